"""Everything about the GPU in one call: kernels checked on the device, then timed, by context to 3M tokens.

    python -m benchmarks.gpu [--toy] [--minutes 9] [--only checks,layers,offload,model,prefill]

Geometry of Llama-3.1-8B unless --toy (sizes for Triton's interpreter on a CPU, whose times mean nothing).
Needs no ray and no network. Sections that no time is left for are named in the result. Aims on an H100:
35 µs per layer at 1M tokens amortised, 20 with warm masks, 40 times faster than dense there, 120 tokens/s
at 1M and 100 at 3M with KV on the host, prefill of 1M tokens in 60 s.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from longreach.core.config import load_config
from longreach.core.stage import LayerPolicy, Stage
from longreach.kvstore.page import PageGeometry

from . import gpu_checks, gpu_layers, gpu_model
from .gpu_layers import Shape
from .gpu_time import copy_rates
from .transport import commit

ROOT = Path(__file__).resolve().parent.parent
MEASURED = ("core", "kernels", "kvstore", "workers", "configs", "benchmarks/*.py")
SECTIONS = ("checks", "copies", "layers", "graph", "offload", "model", "prefill")
K, M = 1 << 10, 1 << 20
SUMMARIES = LayerPolicy(
    stages=(
        Stage(scorer="mean", chunk=256, keep=32768, refresh=16),
        Stage(scorer="bounds", chunk=8, keep=2048, refresh=4),
    )
)

Row = dict[str, Any]


@dataclass(frozen=True)
class Size:
    """How much is measured."""

    shape: Shape
    model: dict[str, Any]
    contexts: tuple[int, ...]
    offload_context: int
    decode: tuple[tuple[int, str], ...]
    """Contexts end to end, and the format of their KV on the host."""
    depths: tuple[int, ...]
    prefill_whole: int
    chunk_tokens: int
    device_bytes: int
    host_bytes: int
    device_pages: int
    n_steps: int
    hit_ratios: tuple[float, ...] = (0.0, 0.5, 0.9, 0.98, 1.0)


FULL = Size(
    shape=Shape(32, 8, 128),
    model=gpu_model.LLAMA_8B,
    contexts=(128 * K, 512 * K, 1 * M, 3 * M),
    offload_context=1 * M,
    decode=((128 * K, "bfloat16"), (1 * M, "float8"), (3 * M, "int4")),
    depths=(0, 256 * K, 1 * M),
    prefill_whole=1 * M,
    chunk_tokens=8 * K,
    device_bytes=28 << 30,
    host_bytes=100 << 30,
    device_pages=1024,
    n_steps=64,
)
TOY = Size(
    shape=Shape(2, 1, 16),
    model=gpu_model.TOY,
    contexts=(300,),
    offload_context=300,
    decode=((300, "int4"),),
    depths=(0, 192),
    prefill_whole=384,
    chunk_tokens=64,
    device_bytes=1 << 26,
    host_bytes=1 << 26,
    device_pages=16,
    n_steps=3,
    hit_ratios=(0.0, 1.0),
)
TOY_POLICY = LayerPolicy(
    sink=64,
    window=64,
    stages=(
        Stage(scorer="mean", chunk=64, keep=192, refresh=4, query_stride=16),
        Stage(scorer="bounds", chunk=8, keep=64, refresh=2, query_stride=16),
    ),
)


def policies_of(toy: bool) -> dict[str, LayerPolicy]:
    """What is measured per layer: our default, the summaries of DESIGN 1.2, and InfiniteHiP's own."""
    if toy:
        return {"summaries": TOY_POLICY}

    def rest(name: str) -> LayerPolicy:
        config = load_config([str(ROOT / "configs" / f"{name}.yaml")], [])
        return next(p for p in config.attention.policies if p.layers in ("rest", "all"))

    return {
        "longreach-3k": rest("longreach-3k"),
        "summaries": SUMMARIES,
        "infinitehip-3k": rest("infinitehip-3k"),
    }


class Run:
    """One call of the benchmark: sections in order, until the time is up."""

    def __init__(self, arguments: argparse.Namespace, say: Callable[[str], None]) -> None:
        self.toy = bool(arguments.toy)
        self.size = TOY if self.toy else FULL
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        # the interpreter has no tensor cores to be exact about
        self.precision = "tf32x3" if self.device.type == "cuda" else "ieee"
        self.policies = policies_of(self.toy)
        self._only = set(arguments.only.split(",")) if arguments.only else set(SECTIONS)
        self._until_s = time.monotonic() + 60.0 * arguments.minutes
        self._say = say
        self.result: Row = {
            "commit": commit(MEASURED),
            "device": self._device(),
            "toy": self.toy,
            "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "left_out": {},
            "seconds": {},
        }

    def run(self) -> Row:
        for name in SECTIONS:
            if name not in self._only:
                continue
            if time.monotonic() > self._until_s:
                self.result["left_out"][name] = "no time was left"
                continue
            self._say(name)
            started = time.monotonic()
            try:
                self.result[name] = getattr(self, f"_{name}")()
            except (torch.OutOfMemoryError, MemoryError) as exc:
                self.result["left_out"][name] = f"out of memory: {exc}"
            self.result["seconds"][name] = round(time.monotonic() - started, 1)
            if self.device.type == "cuda":
                torch.cuda.empty_cache()
        return self.result

    def _device(self) -> Row:
        if self.device.type != "cuda":
            interpreted = os.environ.get("TRITON_INTERPRET") == "1"
            return {"name": "CPU", "interpreter": interpreted, "torch": torch.__version__}
        properties = torch.cuda.get_device_properties(self.device)
        return {
            "name": properties.name,
            "memory_gib": round(properties.total_memory / 2**30, 1),
            "multiprocessors": properties.multi_processor_count,
            "torch": torch.__version__,
            "cuda": torch.version.cuda,
            "host_memory_gib": round(
                os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30, 1
            ),
        }

    def _checks(self) -> list[Row]:
        return gpu_checks.run(self.device, self.precision, small=self.toy)

    def _copies(self) -> Row:
        return copy_rates(self.device, 1 << (20 if self.toy else 30))

    def _layers(self) -> list[Row]:
        s = self.size
        dtype = "bfloat16" if self.device.type == "cuda" else "float16"
        return gpu_layers.measure(
            s.shape,
            self.policies,
            s.contexts,
            dtype,
            self.device,
            s.device_bytes,
            self.precision,
            1 if self.toy else 8,
        )

    def _graph(self) -> Row:
        """The same step launched kernel by kernel, and replayed."""
        s = self.size
        name, policy = next(iter(self.policies.items()))
        n_tokens = s.contexts[0]
        n_pages = -(-n_tokens // s.shape.page_tokens) + 8
        n_layers = 1 if self.toy else 4
        geometry = PageGeometry(
            n_layers, s.shape.n_kv_heads, s.shape.page_tokens, s.shape.head_dim, "float16"
        )
        pool = gpu_layers.random_pool(geometry, n_pages, s.device_bytes, self.device, host=False)
        found: Row = {"policy": name, "n_tokens": n_tokens}
        for kind, graph in (("eager", False), ("replay", True)):
            layers, batch = gpu_layers.rig(
                s.shape,
                policy,
                "float16",
                n_tokens,
                n_layers,
                pool,
                self.device,
                precision=self.precision,
            )
            seconds = gpu_layers.step_seconds(
                s.shape, layers, batch, n_tokens, self.device, graph=graph
            )
            found[f"{kind}_us"] = {part: round(1e6 * x, 2) for part, x in seconds.items()}
        return found

    def _offload(self) -> list[Row]:
        s = self.size
        policy = next(iter(self.policies.values()))
        return gpu_layers.by_hit_ratio(
            s.shape,
            policy,
            s.offload_context,
            "float16",
            self.device,
            s.device_bytes // 4,
            s.hit_ratios,
            self.precision,
        )

    def _executor(self, model: Any, n_tokens: int, kv_dtype: str, device_pages: int) -> Any:
        policy = self.policies.get("summaries")
        assert policy is not None
        policies = [policy] * model.n_layers
        return gpu_model.executor_of(
            model, policies, kv_dtype, n_tokens, device_pages, self.device, self.precision
        )

    def _model(self) -> list[Row]:
        s, rows = self.size, []
        model = gpu_model.random_model(s.model, self.device)
        for n_tokens, kv_dtype in s.decode:
            if time.monotonic() > self._until_s:
                self.result["left_out"][f"model at {n_tokens}"] = "no time was left"
                continue
            executor = self._executor(model, n_tokens, kv_dtype, s.device_pages)
            rows.append(
                gpu_model.decode_rates(executor, n_tokens, s.host_bytes, self.device, s.n_steps)
            )
            del executor
        return rows

    def _prefill(self) -> Row:
        s, chunks = self.size, []
        model = gpu_model.random_model(s.model, self.device)
        kv_dtype = s.decode[-1][1] if self.toy else "float8"
        pages = max(s.device_pages, 4 * s.chunk_tokens // s.shape.page_tokens)
        for depth in s.depths:
            executor = self._executor(model, depth + s.chunk_tokens, kv_dtype, pages)
            chunks.append(
                gpu_model.prefill_chunk(executor, depth, s.chunk_tokens, s.host_bytes, self.device)
            )
            del executor
        whole = gpu_model.whole_prefill_s(chunks, s.prefill_whole)
        return {"kv_dtype": kv_dtype, "chunks": chunks, "whole": [s.prefill_whole, round(whole, 2)]}


def aims(result: Row) -> list[Row]:
    """What was wanted, beside what was found; nothing for a toy, whose times mean nothing."""
    found: list[Row] = []
    if result["toy"]:
        return found

    def aim(what: str, wanted: float, got: float, *, most: bool) -> None:
        met = got <= wanted if most else got >= wanted
        found.append({"what": what, "wanted": wanted, "found": round(got, 2), "met": met})

    for row in result.get("layers", []):
        if row["n_tokens"] != 1 * M:
            continue
        best = row["summaries"]
        aim("µs per layer at 1M, amortised", 35, best["amortised"], most=True)
        aim("µs per layer at 1M, warm masks", 20, best["warm"], most=True)
        aim(
            "times faster than dense at 1M",
            40,
            row["dense"]["warm"] / best["amortised"],
            most=False,
        )
    for row in result.get("model", []):
        wanted = {1 * M: 120, 3 * M: 100}.get(row["n_tokens"])
        if wanted:
            aim(f"tokens/s at {row['n_tokens']}", wanted, row["tokens_per_s"], most=False)
    if "prefill" in result:
        n_tokens, seconds = result["prefill"]["whole"]
        aim(f"s to read {n_tokens} tokens", 60, seconds, most=True)
    return found


def show(result: Row, out: Console) -> None:
    wrong = [check for check in result.get("checks", []) if not check["passed"]]
    out.print(
        f"{result['device']['name']}: {len(result.get('checks', []))} checks, {len(wrong)} failed"
    )
    for check in wrong:
        out.print(f"  [red]{check['name']}: error {check['error']}, at most {check['most']}[/red]")
    if "layers" in result:
        columns = ("warm", "last", "all", "amortised")
        table = Table("tokens", "policy", *columns, title="µs per layer")
        for row in result["layers"]:
            for name, parts in row.items():
                if isinstance(parts, dict):
                    cells = [
                        f"{parts[p]:.1f}" if p in parts else ""
                        for p in ("warm", "last", "all", "amortised")
                    ]
                    table.add_row(str(row["n_tokens"]), name, *cells, "")
        out.print(table)
    for section in ("copies", "graph", "offload", "model", "prefill", "left_out", "seconds"):
        if result.get(section):
            out.print(section, result[section])
    for row in result.get("aims", []):
        mark = "met" if row["met"] else "[red]missed[/red]"
        out.print(f"{row['what']}: {row['found']} (wanted {row['wanted']}): {mark}")


def draw(result: Row, path: Path) -> None:
    from .harness import pyplot

    plt = pyplot()
    if plt is None or not result.get("layers"):
        return
    figure, axes = plt.subplots(figsize=(7, 4.5))
    contexts = [row["n_tokens"] for row in result["layers"]]
    for name in (n for n, parts in result["layers"][0].items() if isinstance(parts, dict)):
        axes.plot(contexts, [row[name]["amortised"] for row in result["layers"]], "o-", label=name)
    axes.set(xscale="log", yscale="log", xlabel="context, tokens", ylabel="µs per layer")
    axes.set_title(f"decode attention, amortised; {result['device']['name']}")
    axes.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--toy", action="store_true", help="sizes for the interpreter on a CPU")
    parser.add_argument("--minutes", type=float, default=9.0, help="no section begins after these")
    parser.add_argument("--only", default="", help=f"sections of {', '.join(SECTIONS)}")
    parser.add_argument("--out", type=Path, help="JSON file of the result")
    arguments = parser.parse_args(argv)
    unknown = set(filter(None, arguments.only.split(","))) - set(SECTIONS)
    if unknown:
        parser.error(
            f"--only: no section {', '.join(sorted(unknown))}; there are {', '.join(SECTIONS)}"
        )
    if not torch.cuda.is_available() and not arguments.toy:
        parser.error("no CUDA device here; --toy runs everything in Triton's interpreter")
    if not torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1":
        parser.error("without a CUDA device set TRITON_INTERPRET=1")
    out = Console()
    run = Run(arguments, lambda text: out.print(f"[dim]{text}[/dim]"))
    result = run.run()
    result["command"] = [
        "python",
        "-m",
        "benchmarks.gpu",
        *(argv if argv is not None else sys.argv[1:]),
    ]
    result["aims"] = aims(result)
    show(result, out)
    if arguments.out:
        from .harness import write_result

        write_result(arguments.out, result)
        draw(result, arguments.out.with_suffix(".png"))
    return 1 if any(not check["passed"] for check in result.get("checks", [])) else 0


if __name__ == "__main__":
    sys.exit(main())
