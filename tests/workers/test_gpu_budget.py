from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from longreach.core.config import load_config
from longreach.core.errors import ConfigError
from longreach.core.stage import LayerPolicy, Stage, resolve_policies
from longreach.kernels.gpu_bank import DeviceBank
from longreach.kernels.gpu_pages import DeviceMask
from longreach.kernels.paged import PagedKV
from longreach.kernels.summaries import empty_table, tables_of
from longreach.workers.gpu_budget import FORMATS, plan_gpu
from longreach.workers.gpu_estimate import (
    GpuMachine,
    GpuModel,
    attended_tokens,
    estimate_decode,
    prefill_order,
    table_bytes,
)
from longreach.workers.gpu_needs import GpuLoad, needs_of, step_pages_of

LLAMA_8B = GpuModel(
    n_layers=32,
    n_heads=32,
    n_kv_heads=8,
    head_dim=128,
    hidden=4096,
    intermediate=14336,
    vocab=128256,
    weight_bytes=16_060_000_000,
)
H100 = GpuMachine(device_bytes=80_000_000_000, host_bytes=1_000_000_000_000)
M3 = 3 << 20
DENSE = (LayerPolicy(sink=0, window=0, attend_rope="none"),) * 32
ROOT = Path(__file__).resolve().parents[2]


def preset(name: str, n_layers: int = 32) -> tuple[LayerPolicy, ...]:
    config = load_config([ROOT / "configs" / f"{name}.yaml"])
    return resolve_policies(config.attention.policies, n_layers)


def load_of(policies: tuple[LayerPolicy, ...], context_tokens: int = M3, **more) -> GpuLoad:
    values = {
        "kv_dtype": "bfloat16",
        "page_tokens": 64,
        "rows": 1,
        "device_pages": 2048,
        "chunk_tokens": 2048,
        **more,
    }
    return GpuLoad(LLAMA_8B, policies, context_tokens=context_tokens, **values)


def need(load: GpuLoad, what: str) -> int:
    return next(n.n_bytes for n in needs_of(load) if n.what == what)


def test_page_tables_of_3m_tokens_are_far_below_a_gibibyte() -> None:
    load = load_of(preset("infinitehip-3k"))
    assert load.n_pages == 49152
    assert need(load, "page tables") < 1 << 28
    assert need(replace(load, page_tokens=16), "page tables") < 1 << 30


def test_bytes_of_kv_are_those_of_the_reference_model() -> None:
    """performance.md: 131072 bytes a token, 412 GB for 3M; float8 halves, 4 bits quarter (and scales)."""
    load = load_of(preset("infinitehip-3k"))
    assert need(load, "pages") == 131072 * M3
    assert need(replace(load, kv_dtype="float8"), "pages") == 65536 * M3
    assert need(replace(load, kv_dtype="int4"), "pages") == 32768 * M3 * 68 // 64
    assert need(load, "bank") == pytest.approx(2048 * 64 * 131072, rel=1e-2)


def nbytes(*tensors: torch.Tensor) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


def test_tables_masks_and_state_are_what_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    """Held to the classes that make them, of a small model."""
    policy = LayerPolicy(
        stages=(
            Stage(scorer="mean", chunk=128, keep=1024),
            Stage(scorer="bounds", chunk=32, keep=512, spread=0.5),
            Stage(chunk=8, keep=64),
        ),
        sink=128,
        window=256,
        head_reduce="kv-group",
    )
    model = replace(LLAMA_8B, n_layers=3, n_kv_heads=2, n_heads=4, head_dim=16)
    load = GpuLoad(model, (policy,) * 3, "float16", 64, 64 * 10, 2, 5, 128)
    g = load.geometry
    leaf = torch.zeros(1, 2, 64, 16, dtype=torch.float16)
    rows = torch.zeros(2, 1, dtype=torch.int64)
    view = PagedKV((leaf,), rows, rows, 64, 64)
    made = sum(nbytes(empty_table(name, view, 20)) for name in tables_of(policy))
    assert sum(table_bytes(policy, g, 20).values()) == made
    mask = DeviceMask.empty(policy, 2, 2, "cpu")
    size = nbytes(*mask.inputs, *mask.n_inputs, mask.blocks, mask.n_blocks)
    assert need(load, "masks") == 3 * size
    memory = torch.zeros(6, 5, g.leaf_nbytes, dtype=torch.uint8)
    bank = DeviceBank.empty(memory, 2, load.n_pages, 4)
    state = nbytes(bank.memory, bank.owner, bank.referenced, bank.pinned)
    assert need(load, "bank") == state
    by_page = nbytes(bank.slot_of, bank.address, bank.host_address, bank.wanted)
    assert need(load, "page tables") == by_page + 4 * load.n_pages


def test_3m_tokens_of_an_8b_model_on_one_h100() -> None:
    budget = plan_gpu(load_of(preset("infinitehip-3k")), H100)
    assert budget.fits
    budget.check()
    assert budget.bytes_of("device") < 40e9
    assert budget.bytes_of("host") == 131072 * M3
    assert budget.best_format == "float32"
    half = plan_gpu(budget.load, replace(H100, host_bytes=512_000_000_000))
    assert half.best_format == "float16"


def test_fine_summaries_of_3m_tokens_do_not_fit_and_the_error_says_what_to_change() -> None:
    """Bounds of 8 tokens are an eighth of the KV: 51 GB at 3M."""
    load = load_of(preset("longreach-3k"))
    budget = plan_gpu(load, H100)
    assert not budget.fits
    with pytest.raises(ConfigError) as caught:
        budget.check()
    said = caught.value.message
    for part in ("summaries: bounds of 8 tokens, 51.54 GB", "scorer: search", "80.00 GB"):
        assert part in said
    for key in ("cache.device_pages", "model.max_context_tokens", "cache.kv_dtype"):
        assert key in said
    tokens = int(said.split("model.max_context_tokens: ")[1].split()[0])
    assert plan_gpu(replace(load, context_tokens=tokens), H100).fits
    assert not plan_gpu(replace(load, context_tokens=tokens + 64), H100).fits


def test_a_small_host_is_told_which_format_fits() -> None:
    load = load_of(preset("infinitehip-3k"))
    budget = plan_gpu(load, replace(H100, host_bytes=256_000_000_000))
    assert not budget.fits
    assert budget.best_format == "int8"
    assert "the host needs 412.32 GB and has 256.00 GB" in budget.problems[0]
    assert "cache.kv_dtype: int8 is the most exact" in budget.problems[-1]
    assert plan_gpu(replace(load, kv_dtype="int8"), budget.machine).fits
    none = plan_gpu(load, replace(H100, host_bytes=10_000_000_000))
    assert none.best_format is None
    assert "no cache.kv_dtype" in none.problems[-1]


def test_too_large_a_bank_names_the_one_that_fits() -> None:
    load = load_of(preset("infinitehip-3k"), device_pages=20000)
    budget = plan_gpu(load, H100)
    pages = int(budget.problems[0].split("cache.device_pages: ")[1].split()[0])
    assert plan_gpu(replace(load, device_pages=pages), H100).fits
    assert not plan_gpu(replace(load, device_pages=pages + 1), H100).fits


def test_nothing_helps_a_device_without_room_for_weights() -> None:
    budget = plan_gpu(
        load_of(DENSE, 4096, device_pages=64), replace(H100, device_bytes=8_000_000_000)
    )
    assert "no single value" in budget.problems[0]
    assert "weights" in budget.problems[0]


def test_the_configuration_gives_the_load_and_answers_count() -> None:
    sets = ["worker.max_rows=3", "gateway.max_new_tokens=128", "cache.kv_dtype=int8"]
    config = load_config([ROOT / "configs" / "infinitehip-3k.yaml"], sets)
    load = GpuLoad.of(config, LLAMA_8B)
    assert load.policies == preset("infinitehip-3k")
    assert (load.kv_dtype, load.rows, load.n_pages) == ("int8", 3, 3 * (3_000_000 // 64 + 2))
    none = load_config([], ["attention.policies=[{layers: '0-2'}]"])
    with pytest.raises(ConfigError, match="have no policy"):
        GpuLoad.of(none, LLAMA_8B)


def test_formats_are_listed_from_exact_to_small() -> None:
    formats = plan_gpu(load_of(preset("infinitehip-3k")), H100).formats
    assert {f.kv_dtype for f in formats} == set(FORMATS)
    assert (formats[0].kv_dtype, formats[-1].kv_dtype) == ("float32", "int4")
    host = [f.host_bytes for f in formats]
    assert host == sorted(host, reverse=True)


def test_pages_of_a_step() -> None:
    load = load_of(preset("infinitehip-3k"))
    # the first layers keep 4096 tokens in blocks of 8; sinks of 4 pages, a window of 16 and its ends
    assert step_pages_of(load) == 512 + 4 + 18
    assert step_pages_of(replace(load, rows=3)) == 3 * 534
    assert step_pages_of(replace(load, context_tokens=6400)) == 100
    assert step_pages_of(load_of(DENSE, 6400)) == 100
    little = plan_gpu(replace(load, device_pages=100), H100)
    assert any("read in place" in note for _, _, note in little.describe())


def decode(policies: tuple[LayerPolicy, ...], tokens: int, **more):
    load = load_of(policies, tokens)
    values = {"rows": 1, "device_pages": 1 << 30, "hit_ratio": 0.0, "layer_overhead_us": 0, **more}
    return estimate_decode(LLAMA_8B, policies, load.geometry, H100, context_tokens=tokens, **values)


def test_decode_bytes_are_those_of_the_reference() -> None:
    """performance.md 2.1 and 2.2: dense 4295 MB a layer at 1M, the 3K preset 17.9 to 43 MB with refresh."""
    dense = decode(DENSE, 1 << 20)
    assert dense.attention_bytes == 32 * (1 << 20) * 4096
    assert dense.floor_s == pytest.approx(5.35e-3 + 45.8e-3, rel=1e-2)
    sparse = decode(preset("infinitehip-3k"), 1 << 20)
    per_layer = (sparse.selection_bytes + sparse.attention_bytes) / 32 / 1e6
    assert 17.9 < per_layer < 43
    assert attended_tokens(preset("infinitehip-3k")[5], 1 << 20) == 3328


def test_misses_cross_the_link() -> None:
    """performance.md 2.3: 436 MB a token at no hits, 7.9 ms over PCIe 5."""
    policy = LayerPolicy(stages=(Stage(scorer="mean", chunk=64, keep=2048),), sink=256, window=1024)
    missed = decode((policy,) * 32, M3, device_pages=1)
    assert missed.link_bytes == pytest.approx(436e6, rel=1e-3)
    assert missed.link_bytes / 55e9 == pytest.approx(7.9e-3, rel=1e-2)
    assert decode((policy,) * 32, M3, device_pages=1, hit_ratio=0.75).link_bytes == pytest.approx(
        missed.link_bytes / 4, rel=1e-3
    )
    assert decode((policy,) * 32, M3).link_bytes == 0
    both = decode((policy,) * 32, M3, rows=2, device_pages=1)
    assert both.link_bytes == pytest.approx(2 * missed.link_bytes, rel=1e-4)
    assert both.weight_bytes == missed.weight_bytes
    slow = decode((policy,) * 32, M3, layer_overhead_us=30.0)
    assert slow.seconds == pytest.approx(slow.floor_s + 32 * 30e-6)


def order(policies: tuple[LayerPolicy, ...], tokens: int = M3, **more):
    values = {"chunk_tokens": 32768, "device_pages": 1, "room_bytes": 60_000_000_000, **more}
    load = load_of(policies, tokens)
    return prefill_order(LLAMA_8B, policies, load.geometry, context_tokens=tokens, **values)


def test_dense_chunks_read_the_prefix_again_and_again() -> None:
    """performance.md 5: 2.2 TB at 1M and 19.8 TB at 3M in chunks of 32K; layer-major reads none of it."""
    at_1m = order(DENSE, 1 << 20)
    assert at_1m.selected_bytes == pytest.approx(2.2e12, rel=0.05)
    at_3m = order(DENSE)
    assert at_3m.selected_bytes == pytest.approx(19.8e12, rel=0.02)
    assert at_3m.written_bytes == 131072 * M3
    assert (at_3m.layer_major_bytes, at_3m.layer_major) == (0, True)
    assert at_3m.link_bytes == at_3m.written_bytes


def test_activations_that_do_not_fit_are_parked_in_the_host() -> None:
    """25.8 GB of activations and 12.9 GB of one layer's KV at 3M."""
    parked = order(DENSE, room_bytes=20_000_000_000)
    assert parked.layer_major_bytes == 2 * 32 * M3 * 4096 * 2
    assert parked.layer_major
    assert order(DENSE, room_bytes=38_600_000_000).layer_major_bytes != 0
    assert order(DENSE, room_bytes=38_700_000_000).layer_major_bytes == 0
    without = order(DENSE, room_bytes=10_000_000_000)
    assert (without.layer_major_bytes, without.layer_major) == (None, False)
    assert without.link_bytes == without.written_bytes + without.selected_bytes


def test_selected_pages_are_fewer_than_the_prefix_and_no_more_if_blocks_agree() -> None:
    policy = LayerPolicy(
        stages=(Stage(scorer="bounds", chunk=64, keep=2048),), sink=256, window=1024
    )
    dense, sparse = order(DENSE), order((policy,) * 32)
    assert sparse.selected_bytes < dense.selected_bytes
    agreeing = order((policy,) * 32, new_share=0.0)
    # 32 pages a chunk and layer but for the first chunk, which has nothing before it
    assert agreeing.selected_bytes == 95 * 32 * 32 * 64 * 4096
    worst = order((policy,) * 32, new_share=1.0)
    assert agreeing.selected_bytes < sparse.selected_bytes < worst.selected_bytes
    assert worst.selected_bytes <= dense.selected_bytes
    assert order((policy,) * 32, device_pages=49152).selected_bytes == 0
    fine = LayerPolicy(stages=(Stage(scorer="bounds", chunk=8, keep=2048),), sink=256, window=1024)
    assert order((fine,) * 32, new_share=1.0).selected_bytes == worst.selected_bytes
    searching = LayerPolicy(stages=(Stage(chunk=64, keep=2048),), sink=256, window=1024)
    assert order((searching,) * 32).selected_bytes > sparse.selected_bytes


def test_the_table_names_parts_sums_and_estimates() -> None:
    budget = plan_gpu(load_of(preset("infinitehip-3k")), H100)
    rows = budget.describe()
    whats = [what for what, _, _ in rows]
    for what in ("weights", "page tables", "masks", "bank", "pages", "device in all"):
        assert what in whats
    assert dict((what, n) for what, n, _ in rows)["host in all"] == budget.bytes_of("host")
    estimates = [what for what, n, _ in rows if n is None]
    assert estimates
    assert all("estimate" in what for what in estimates)
    # 3M sparse: minutes, not the hour of dense attention
    assert 60 < budget.prefill.compute_s < 600
    dense = plan_gpu(load_of(DENSE), H100)
    assert dense.prefill.compute_s == pytest.approx(4391, rel=0.05)


def test_three_million_tokens_on_one_card_as_configured() -> None:
    """What configs/single-gpu-3m.yaml says of itself."""
    config = load_config([ROOT / "configs" / "single-gpu-3m.yaml"])
    assert config.model.device == "cuda"
    load = GpuLoad.of(config, LLAMA_8B)
    assert load.context_tokens == M3
    plan_gpu(load, replace(H100, host_bytes=256 << 30)).check()
    small = plan_gpu(load, replace(H100, host_bytes=128 << 30))
    assert small.best_format == "int4"
    with pytest.raises(ConfigError, match=r"cache\.kv_dtype"):
        small.check()
    assert config.store.capacity_bytes >= load.n_pages * load.geometry.page_nbytes
