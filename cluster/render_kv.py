"""The stores on a terminal and as JSON: tiers with their limits, hit rates, checks."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from rich import box
from rich.table import Column, Table

from .proto import kv_pb2 as pb
from .render import human_bytes, human_count, human_seconds
from .tier_metrics import tiered


def stat_table(response: pb.KvStatResponse) -> Table:
    """A line per store, and one for all."""
    right = {"justify": "right"}
    table = Table(Column("store", no_wrap=True), "state", box=box.SIMPLE)
    for name in ("arena", "disk", "pages", "pinned", "leases", "hits", "evicted", "few copies"):
        table.add_column(name, **right)  # type: ignore[arg-type]
    table.add_column("corrupt", **right)  # type: ignore[arg-type]
    for store in response.stores:
        if store.error:
            table.add_row(store.store_id, store.state, "no answer")
        else:
            cells = _cells(store.numbers, response.page_bytes)
            table.add_row(store.store_id, store.state, *cells)
    n_answered = sum(not store.error for store in response.stores)
    table.add_section()
    table.add_row("all", f"{n_answered} answer", *_cells(response.totals, response.page_bytes))
    return table


def stat_dict(response: pb.KvStatResponse) -> dict[str, Any]:
    return {
        "stores": [
            {
                "store_id": store.store_id,
                "state": store.state,
                "error": store.error,
                "hit_rate": hit_rate(store.numbers),
                "numbers": dict(store.numbers),
            }
            for store in response.stores
        ],
        "totals": {**response.totals, "hit_rate": hit_rate(response.totals)},
        "page_bytes": response.page_bytes,
    }


def hit_rate(numbers: Mapping[str, float]) -> float | None:
    """Share of pages asked for that were held; None before any was."""
    hits = numbers.get("hits_arena", 0.0) + numbers.get("hits_disk", 0.0)
    asked = hits + numbers.get("misses", 0.0)
    return hits / asked if asked else None


def share(rate: float | None) -> str:
    return "-" if rate is None else f"{rate:.1%}"


def _cells(given: Mapping[str, float], page_bytes: int) -> list[str]:
    numbers = tiered(given)

    def count(name: str) -> str:
        return human_count(numbers.get(name, 0))

    def tier(name: str) -> str:
        held, limit = (page_bytes * numbers.get(f"{name}_{x}", 0) for x in ("pages", "slots"))
        return f"{human_bytes(held)} of {human_bytes(limit)}" if limit else "-"

    return [
        tier("arena"),
        tier("disk"),
        count("pages_held"),
        count("pages_pinned"),
        count("leases"),
        share(hit_rate(numbers)),
        count("evictions"),
        count("repair_under_replicated"),
        f"{count('corrupt_arena')} + {count('corrupt_disk')}",
    ]


def verify_table(update: pb.VerifyUpdate) -> Table:
    table = Table("store", "checked", "bad", "", box=box.SIMPLE)
    for store in update.stores:
        note = "no answer" if store.error else ""
        table.add_row(store.store_id, human_count(store.checked), human_count(store.bad), note)
    return table


def verify_dict(update: pb.VerifyUpdate, bad: Iterable[pb.BadPage]) -> dict[str, Any]:
    return {
        "stores": [
            {"store_id": s.store_id, "checked": s.checked, "bad": s.bad, "error": s.error}
            for s in update.stores
        ],
        "bad": [
            {"store_id": p.store_id, "key": p.key, "tier": p.tier, "reason": p.reason} for p in bad
        ],
    }


def scrub_table(response: pb.ScrubResponse) -> Table:
    table = Table("store", "now", "checked", "bad", "last round", box=box.SIMPLE)
    for store in response.stores:
        if store.error:
            table.add_row(store.store_id, "no answer")
            continue
        table.add_row(
            store.store_id,
            "checking" if store.running else "waiting",
            human_count(store.pages_checked),
            human_count(store.bad),
            human_seconds(store.last_round_s) if store.last_round_s else "-",
        )
    return table


def scrub_dict(response: pb.ScrubResponse) -> dict[str, Any]:
    names = ("store_id", "running", "pages_checked", "bad", "last_round_s", "error")
    return {"stores": [{name: getattr(s, name) for name in names} for s in response.stores]}
