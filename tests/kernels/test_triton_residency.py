"""The clock on the device against `ClockBank`, decision for decision, on random histories."""

from __future__ import annotations

from dataclasses import fields

import numpy as np
import pytest
import torch

from longreach.core.stage import LayerPolicy, Stage
from longreach.kernels.gpu_pages import DeviceMask, DevicePages
from longreach.workers.clock_residency import ClockBank, ClockPlan

from .triton_attend_helpers import DEVICE, no_work

triton = pytest.importorskip("triton")

from longreach.kernels import triton_residency  # noqa: E402
from longreach.kernels.gpu_bank import DeviceBank  # noqa: E402
from longreach.kernels.triton_gather import promote  # noqa: E402
from longreach.kernels.triton_place import forget, link, mark_safe, place_pages  # noqa: E402
from longreach.kernels.triton_residency import update_residency  # noqa: E402

from .triton_compile import compile_for_gpu  # noqa: E402

pytestmark = pytest.mark.grid

PAGE = 16
N_HEADS = 2
LEAF_BYTES = 48
N_IDS = 24


def policy_of(head_reduce: str = "kv-group", sink: int = 20, window: int = 40) -> LayerPolicy:
    return LayerPolicy(
        stages=(Stage(chunk=8, keep=64),), sink=sink, window=window, head_reduce=head_reduce
    )


DENSE = LayerPolicy(sink=0, window=0, attend_rope="none")


def on_device(values: list, dtype: torch.dtype = torch.int32) -> torch.Tensor:
    return torch.tensor(values, dtype=dtype, device=DEVICE)


def bank_of(
    n_slots: int, most: int, n_layers: int = 1, n_ids: int = N_IDS
) -> tuple[DeviceBank, torch.Tensor]:
    """An empty bank, and pinned leaves of random bytes [n_ids, n_layers * N_HEADS, LEAF_BYTES]."""
    n_banks = n_layers * N_HEADS
    memory = torch.zeros(n_banks, n_slots, LEAF_BYTES, dtype=torch.uint8, device=DEVICE)
    bank = DeviceBank.empty(memory, N_HEADS, n_ids, most)
    host = torch.randint(0, 256, (n_ids, n_banks, LEAF_BYTES), dtype=torch.uint8)
    host = host if DEVICE == "cpu" else host.pin_memory()
    starts = host.data_ptr() + np.arange(n_ids) * n_banks * LEAF_BYTES
    bank.host_address.copy_(torch.from_numpy(starts))
    link(bank, on_device(list(range(n_ids))))
    return bank, host


def pages_of(bank: DeviceBank, rows: list[list[int]]) -> DevicePages:
    table = on_device(rows)
    return DevicePages(bank.address, table, PAGE, 8, torch.int8, 12)


def mask_of(blocks: list[list[list[int]]]) -> DeviceMask:
    """Blocks per row and list; garbage beyond the counts."""
    most = 2 + max(len(one) for row in blocks for one in row)
    padded = [[[*one, *[1 << 20] * (most - len(one))] for one in row] for row in blocks]
    counts = [[len(one) for one in row] for row in blocks]
    return DeviceMask((), (), on_device(padded), on_device(counts))


def wanted_pages(
    head: int,
    rows: list[list[int]],
    position: list[int],
    blocks: list[list[list[int]]] | None,
    policy: LayerPolicy,
) -> np.ndarray:
    """Ids of all pages that hold a token which one of the rows reads, ascending."""
    found: set[int] = set()
    for row, p, lists in zip(rows, position, blocks or [[]] * len(rows), strict=True):
        if p < 0:
            continue
        first = max(0, p - policy.window + 1)
        tokens = set(range(0 if policy.dense else first, p + 1))
        if not policy.dense:
            tokens |= set(range(min(policy.sink, p + 1)))
            for start in lists[head if len(lists) > 1 else 0]:
                tokens |= set(range(start, start + policy.block_tokens))
        found |= {row[token // PAGE] for token in tokens}
    return np.array(sorted(found), dtype=np.int64)


def same_state(bank: DeviceBank, clocks: list[ClockBank], promoted: list[ClockPlan] | None) -> None:
    """promoted: what is listed and not linked yet."""
    for h, clock in enumerate(clocks):
        assert bank.owner[h].tolist() == clock.owner.tolist()
        assert bank.referenced[h].tolist() == clock.referenced.astype(int).tolist()
        assert bank.pinned[h].tolist() == clock.pinned.astype(int).tolist()
        assert int(bank.hand[h]) == clock.hand
        slots = clock.slots_of(np.arange(bank.n_page_ids))
        if promoted is not None:
            slots = slots.copy()
            slots[promoted[h].missing] = -1
        assert bank.slot_of[h].tolist() == slots.tolist()
        leaf = bank.first_leaf + h
        host = bank.host_address.cpu().numpy() + leaf * bank.leaf_bytes
        first = bank.memory.data_ptr() + h * bank.n_slots * bank.leaf_bytes
        address = np.where(slots >= 0, first + slots.astype(np.int64) * bank.leaf_bytes, host)
        assert bank.address[h].tolist() == address.tolist()


def step(
    bank: DeviceBank,
    clocks: list[ClockBank],
    rows: list[list[int]],
    position: list[int],
    blocks: list[list[list[int]]] | None,
    policy: LayerPolicy,
) -> list[ClockPlan]:
    """One update and promotion, held to the planner's."""
    most = bank.promote_page.shape[1]
    hits, misses = bank.n_hits.tolist(), bank.n_misses.tolist()
    mask = None if blocks is None else mask_of(blocks)
    place = on_device(position, torch.int64)
    update_residency(bank, pages_of(bank, rows), place, mask, policy, on_device([1]))
    plans = []
    for h, clock in enumerate(clocks):
        plan = clock.plan(wanted_pages(h, rows, position, blocks, policy), most)
        n = int(bank.n_promote[h])
        assert bank.promote_page[h, :n].tolist() == plan.missing.tolist()
        assert bank.promote_slot[h, :n].tolist() == plan.slots.tolist()
        assert int(bank.n_hits[h]) == hits[h] + plan.n_hits
        assert int(bank.n_misses[h]) == misses[h] + plan.n_misses
        plans.append(plan)
    same_state(bank, clocks, plans)
    promote(bank)
    same_state(bank, clocks, None)
    return plans


def random_step(rng: np.random.Generator, n_lists: int, policy: LayerPolicy, n_ids: int) -> tuple:
    """Three rows, one of them mostly empty, that share their first two pages."""
    shared = rng.permutation(n_ids)[:2].tolist()
    rows = [[*shared, *rng.permutation(n_ids)[:6].tolist()] for _ in range(3)]
    position = [int(rng.integers(0, 8 * PAGE)) for _ in range(3)]
    position[int(rng.integers(0, 3))] = -1
    blocks = []
    for p in position:
        n_grid = max(0, p - policy.sink) // 8
        some = [
            sorted(rng.permutation(n_grid)[: int(rng.integers(0, 5))].tolist())
            for _ in range(n_lists)
        ]
        blocks.append([[policy.sink // 8 * 8 + 8 * i for i in one] for one in some])
    return rows, position, blocks


@pytest.mark.parametrize("head_reduce", ["all", "kv-group"])
@pytest.mark.parametrize(("n_slots", "most"), [(1, 4), (5, 2), (13, 16)])
def test_histories_are_those_of_the_planner(n_slots: int, most: int, head_reduce: str) -> None:
    rng = np.random.default_rng(n_slots)
    policy = policy_of(head_reduce)
    bank, _ = bank_of(n_slots, most)
    clocks = [ClockBank(n_slots) for _ in range(N_HEADS)]
    n_evicted = 0
    for _ in range(14):
        event = rng.choice(["step", "step", "place", "safe", "forget"])
        page = int(rng.integers(0, N_IDS))
        if event == "step":
            n_lists = 1 if head_reduce == "all" else N_HEADS
            drawn = random_step(rng, n_lists, policy, N_IDS)
            n_evicted += sum(len(plan.evicted) for plan in step(bank, clocks, *drawn, policy))
        elif event == "place":
            absent = [
                p
                for p in {page, (page + 5) % N_IDS}
                if all(clock.slots_of(np.array([p]))[0] < 0 for clock in clocks)
            ]
            place_pages(bank, on_device([-1, *absent]))
            for clock in clocks:
                for p in absent:
                    clock.place(p)
        elif event == "safe":
            mark_safe(bank, on_device([page, -1]))
            for clock in clocks:
                clock.mark_safe(np.array([page]))
        else:
            forget(bank, on_device([-1, page, (page + 1) % N_IDS]))
            for clock in clocks:
                clock.forget(np.array([page, (page + 1) % N_IDS]))
        same_state(bank, clocks, None)
    assert n_evicted or n_slots == 1


def test_tiles_smaller_than_tables_decide_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_residency, "ID_TILE", 16)
    monkeypatch.setattr(triton_residency, "SLOT_TILE", 8)
    rng = np.random.default_rng(3)
    policy = policy_of()
    bank, _ = bank_of(21, 9, n_ids=50)
    clocks = [ClockBank(21) for _ in range(N_HEADS)]
    for _ in range(6):
        step(bank, clocks, *random_step(rng, N_HEADS, policy, 50), policy)


def test_a_dense_policy_reads_every_page() -> None:
    bank, _ = bank_of(6, 8)
    clocks = [ClockBank(6) for _ in range(N_HEADS)]
    plans = step(bank, clocks, [[4, 2, 9], [7, 7, 7]], [40, 15], None, DENSE)
    assert plans[0].missing.tolist() == [2, 4, 7, 9]


@pytest.mark.parametrize("sink", [0, 16, 17])
@pytest.mark.parametrize("position", [0, 15, 16, 39, 40, 63, 127])
def test_sinks_and_window_end_where_attention_does(sink: int, position: int) -> None:
    policy = policy_of("all", sink=sink)
    bank, _ = bank_of(8, 8)
    clocks = [ClockBank(8) for _ in range(N_HEADS)]
    step(bank, clocks, [[3, 1, 4, 15, 9, 2, 6, 5]], [position], [[[]]], policy)


def test_an_unchanged_step_does_nothing_but_empty_the_list(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    bank, _ = bank_of(4, 8)
    clocks = [ClockBank(4) for _ in range(N_HEADS)]
    policy = policy_of("all")
    pages, position = pages_of(bank, [[0, 1, 2, 3, 4]]), on_device([70], torch.int64)
    mask, changed = mask_of([[[24]]]), on_device([1])
    update_residency(bank, pages, position, mask, policy, changed)
    promote(bank)
    assert bank.n_promote.tolist() == [4, 4]
    before = {f.name: getattr(bank, f.name) for f in fields(bank) if f.name != "first_leaf"}
    before = {name: value.clone() for name, value in before.items()}
    changed.zero_()
    with no_work(monkeypatch):
        update_residency(bank, pages, position, mask, policy, changed)
        promote(bank)
    for name, value in before.items():
        want = torch.zeros_like(value) if name == "n_promote" else value
        assert torch.equal(getattr(bank, name), want), name
    assert clocks[0].hand == 0


def test_layers_share_the_ticks_and_nothing_else() -> None:
    bank, host = bank_of(6, 8, n_layers=3, n_ids=N_IDS + 1)
    policy, rng = policy_of(), np.random.default_rng(1)
    clocks = [[ClockBank(6) for _ in range(N_HEADS)] for _ in range(3)]
    for layer in (0, 1, 2, 1, 0):
        drawn = random_step(rng, N_HEADS, policy, N_IDS)
        mine = bank.layer(layer)
        step(mine, clocks[layer], *drawn, policy)
        for h in range(N_HEADS):
            for slot, page in enumerate(clocks[layer][h].owner.tolist()):
                if page >= 0:
                    assert torch.equal(mine.memory[h, slot].cpu(), host[page, layer * N_HEADS + h])
    # all layers at once
    place_pages(bank, on_device([N_IDS]))
    for layer in range(3):
        for clock in clocks[layer]:
            clock.place(N_IDS)
        same_state(bank.layer(layer), clocks[layer], None)


def test_a_page_without_a_place_in_host_memory_is_not_promoted() -> None:
    bank, _ = bank_of(4, 8)
    bank.host_address[2] = 0
    pages, position = pages_of(bank, [[1, 2, 3]]), on_device([47], torch.int64)
    update_residency(bank, pages, position, None, DENSE, on_device([1]))
    assert bank.n_promote.tolist() == [2, 2]
    assert bank.promote_page[:, :2].tolist() == [[1, 3], [1, 3]]
    assert bank.n_misses.tolist() == [3, 3]


def test_ticks_come_round_without_meeting_the_start() -> None:
    bank, _ = bank_of(4, 8)
    bank.tick.fill_(0x3FFFFFFF)
    clocks = [ClockBank(4) for _ in range(N_HEADS)]
    step(bank, clocks, [[1, 2]], [20], None, DENSE)
    assert bank.tick.tolist() == [1 << 30] * N_HEADS
    step(bank, clocks, [[2, 3]], [20], None, DENSE)
    assert bank.tick.tolist() == [1] * N_HEADS


def test_a_full_bank_of_pinned_pages_is_written_in_host_memory() -> None:
    bank, host = bank_of(2, 8)
    place_pages(bank, on_device([5, 6, 7]))
    assert bank.slot_of[:, 5:8].tolist() == [[0, 1, -1]] * N_HEADS
    assert bank.address[0, 7] == host.data_ptr() + 7 * N_HEADS * LEAF_BYTES
    assert bank.address[1, 7] == host.data_ptr() + (7 * N_HEADS + 1) * LEAF_BYTES


def test_leaves_are_whole_vectors() -> None:
    with pytest.raises(ValueError, match="16 bytes"):
        DeviceBank.empty(torch.zeros(2, 3, 40, dtype=torch.uint8), 2, 4, 4)


MODULE = "longreach.kernels.triton_residency"
PLACE = "longreach.kernels.triton_place"


def ints(names: str, kind: str = "*i32") -> dict[str, str]:
    return dict.fromkeys(names.split(), kind)


def test_the_kernels_compile_for_an_h100() -> None:
    """8B in bf16: 3M tokens in pages of 64, 5 % of them in the bank."""
    state = ints("owner referenced pinned hand slot_of") | ints("address host_address", "*i64")
    sizes = ints("n_slots n_page_ids first_leaf", "i32")
    clock = compile_for_gpu(
        MODULE,
        "_clock",
        state
        | ints("promote_page promote_slot n_promote wanted tick changed")
        | ints("n_hits n_misses", "*i64")
        | sizes
        | ints("most", "i32"),
        {"LEAF_BYTES": 32768, "IDS": 8192, "SLOTS": 2048},
        num_warps=16,
    )
    mark = compile_for_gpu(
        MODULE,
        "_mark",
        ints("pages blocks n_blocks wanted tick changed")
        | {"position": "*i64"}
        | ints("most_pages n_page_ids most_blocks", "i32"),
        {"N_LISTS": 1, "SINK": 256, "WINDOW": 1024, "PAGE": 64, "BLOCK": 256},
    )
    place = compile_for_gpu(
        PLACE,
        "_place",
        state | ints("page_ids") | ints("n", "i32") | {"memory": "i64:16"} | sizes,
        {"LEAF_BYTES": 32768, "SLOTS": 2048},
        num_warps=16,
    )
    del state["hand"]
    settle = compile_for_gpu(
        PLACE,
        "_settle",
        state | ints("page_ids") | ints("n", "i32") | {"memory": "i64:16"} | sizes,
        {"MODE": 1, "LEAF_BYTES": 32768, "BLOCK": 256},
    )
    for made in (clock, mark, place, settle):
        assert made["shared"] < 48 << 10
        assert made["n_spills"] == 0
