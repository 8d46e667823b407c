"""Admission: what rows need in tokens, pages, bytes and time, before anything runs. Pure.

The gateway refuses with `check_row` and `check_policies`; the CLI's `plan` shows `plan_rows`.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from ..core.config import Config
from ..core.errors import ContextTooLong, EmptyContext, FailedPrecondition, LongreachError
from ..core.page_key import PageKey
from ..kvstore.page import PageGeometry


@dataclass(frozen=True)
class RowSize:
    """One tokenized row. `keys` name its full prompt pages."""

    custom_id: str
    n_prompt_tokens: int
    n_context_tokens: int
    max_tokens: int
    keys: tuple[PageKey, ...] = ()


@dataclass(frozen=True)
class Rates:
    """Tokens per second of one worker, all its rows together."""

    prefill_tokens_per_s: float
    decode_tokens_per_s: float


@dataclass
class Plan:
    """Sums over the rows that can run. Bytes are of KV."""

    n_rows: int = 0
    prompt_tokens: int = 0
    computed_tokens: int = 0
    """Prompt tokens left after pages shared between rows are counted once."""
    max_new_tokens: int = 0
    n_pages: int = 0
    """Distinct pages of all prompts, and pages that the answers may fill."""
    largest_row_pages: int = 0
    device_pages: int = 0
    device_bytes: int = 0
    store_bytes: int = 0
    """All pages times their copies."""
    arena_bytes: int = 0
    """What of them lies in arenas while all rows run: arenas fill first, for pages in use stay there."""
    disk_bytes: int = 0
    """What lies on disk; with store.disk_write `through`, also what is in arenas."""
    store_capacity_bytes: int = 0
    arena_capacity_bytes: int = 0
    disk_capacity_bytes: int = 0
    prefill_s: float = 0.0
    decode_s: float = 0.0
    """If every answer uses all of its max_tokens."""
    refused: list[tuple[str, LongreachError]] = field(default_factory=list)

    @property
    def total_s(self) -> float:
        return self.prefill_s + self.decode_s

    @property
    def reused_tokens(self) -> int:
        return self.prompt_tokens - self.computed_tokens

    @property
    def fits(self) -> bool:
        """Whether all pages are held at once; otherwise old ones are evicted and made again."""
        return self.store_bytes <= self.store_capacity_bytes


def n_pages_of(n_tokens: int, page_tokens: int) -> int:
    return -(-n_tokens // page_tokens)


def n_copies(config: Config) -> int:
    """Copies of a page that exist when every store lives."""
    return min(config.store.replicas, config.store.count)


def store_slots(config: Config, geometry: PageGeometry) -> tuple[int, int, int]:
    """Page slots of all stores together: in arenas, on disk, and how many pages they can hold at once.
    With `through` a page of an arena has a slot on disk as well."""
    store = config.store
    arena = store.capacity_bytes // geometry.page_nbytes * store.count
    disk = store.disk_bytes // geometry.page_nbytes * store.count
    return arena, disk, max(arena, disk) if store.disk_write == "through" else arena + disk


def check_policies(config: Config, *, stores_local: bool) -> None:
    """Raises FailedPrecondition for a `search` first stage over keys on other nodes: it touches
    nearly every page of the context at each refresh."""
    for i, policy in enumerate(config.attention.policies):
        if policy.stages and policy.stages[0].scorer == "search" and not stores_local:
            raise FailedPrecondition(
                f"attention.policies.{i}.stages.0: scorer 'search' reads almost every page, but "
                "the stores are not on the worker's node; use 'bounds' or 'mean' first, or place "
                "a store beside the worker",
                path=f"attention.policies.{i}.stages.0.scorer",
            )


def check_row(row: RowSize, config: Config, geometry: PageGeometry) -> None:
    """Raises EmptyContext, or ContextTooLong for a row that can never fit."""
    if row.n_context_tokens <= 0 or row.n_prompt_tokens <= 0:
        raise EmptyContext("the context has no tokens", tokens=row.n_context_tokens)
    limit = config.model.max_context_tokens
    if row.n_context_tokens > limit:
        raise ContextTooLong(
            f"context of {row.n_context_tokens} tokens; model.max_context_tokens is {limit}",
            tokens=row.n_context_tokens,
            limit=limit,
        )
    need = n_pages_of(row.n_prompt_tokens + row.max_tokens, geometry.page_tokens)
    room = store_slots(config, geometry)[2] // n_copies(config)
    if need > room:
        of_disk, or_disk = "", ""
        if config.store.disk_dir is not None:
            of_disk = f" in memory and {config.store.disk_bytes} on disk"
            or_disk = ", store.disk_bytes"
        raise ContextTooLong(
            f"{row.n_prompt_tokens} prompt tokens and {row.max_tokens} new ones need {need} pages "
            f"of {geometry.page_nbytes} bytes in {n_copies(config)} copies; {config.store.count} "
            f"stores of {config.store.capacity_bytes} bytes{of_disk} hold {room}; raise "
            f"store.capacity_bytes{or_disk} or store.count",
            pages=need,
            limit=room,
        )


def plan_rows(
    rows: Iterable[RowSize],
    config: Config,
    geometry: PageGeometry,
    rates: Rates,
    *,
    stores_local: bool = True,
) -> Plan:
    """Sums, and the rows that will be refused with the reason. Raises as check_policies does."""
    check_policies(config, stores_local=stores_local)
    plan = Plan(device_pages=config.cache.device_pages)
    known: set[PageKey] = set()
    for row in rows:
        try:
            check_row(row, config, geometry)
        except LongreachError as exc:
            plan.refused.append((row.custom_id, exc))
            continue
        fresh = [key for key in row.keys if key not in known]
        known.update(fresh)
        n_shared_tokens = (len(row.keys) - len(fresh)) * geometry.page_tokens
        n_pages = n_pages_of(row.n_prompt_tokens + row.max_tokens, geometry.page_tokens)
        plan.n_rows += 1
        plan.prompt_tokens += row.n_prompt_tokens
        plan.computed_tokens += row.n_prompt_tokens - n_shared_tokens
        plan.max_new_tokens += row.max_tokens
        plan.n_pages += n_pages - (len(row.keys) - len(fresh))
        plan.largest_row_pages = max(plan.largest_row_pages, n_pages)
    n_workers = config.worker.count
    plan.device_bytes = min(plan.device_pages, plan.n_pages) * geometry.page_nbytes
    plan.device_bytes += min(plan.n_rows, config.worker.max_rows) * geometry.open_nbytes
    plan.store_bytes = plan.n_pages * geometry.page_nbytes * n_copies(config)
    arena, disk, held = (n * geometry.page_nbytes for n in store_slots(config, geometry))
    plan.arena_capacity_bytes, plan.disk_capacity_bytes, plan.store_capacity_bytes = (
        arena,
        disk,
        held,
    )
    plan.arena_bytes = min(plan.store_bytes, arena)
    above = 0 if config.store.disk_write == "through" else plan.arena_bytes
    plan.disk_bytes = min(plan.store_bytes - above, disk)
    plan.prefill_s = plan.computed_tokens / (rates.prefill_tokens_per_s * n_workers)
    plan.decode_s = plan.max_new_tokens / (rates.decode_tokens_per_s * n_workers)
    return plan
