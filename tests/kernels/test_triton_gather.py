"""Leaves across the link: every byte arrives, nothing else is touched, links say where."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from .triton_attend_helpers import DEVICE, no_work

triton = pytest.importorskip("triton")

from longreach.kernels.gpu_bank import DeviceBank  # noqa: E402
from longreach.kernels.triton_gather import PROGRAMS, copy_out, promote  # noqa: E402
from longreach.kernels.triton_place import link, place_pages  # noqa: E402
from longreach.workers.memory import huge_zeros  # noqa: E402

from .triton_compile import compile_for_gpu  # noqa: E402

pytestmark = pytest.mark.grid

N_HEADS, N_LAYERS = 2, 2
N_BANKS = N_HEADS * N_LAYERS


def on_device(values: list) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32, device=DEVICE)


def memories(
    leaf_bytes: int, n_slots: int = 7, n_ids: int = 12, most: int = 9
) -> tuple[DeviceBank, torch.Tensor]:
    """A bank and host leaves [n_ids, N_BANKS, leaf_bytes], all of random bytes."""

    def some(*shape: int) -> torch.Tensor:
        return torch.randint(0, 256, shape, dtype=torch.uint8)

    bank = DeviceBank.empty(some(N_BANKS, n_slots, leaf_bytes).to(DEVICE), N_HEADS, n_ids, most)
    host = some(n_ids, N_BANKS, leaf_bytes)
    host = host if DEVICE == "cpu" else host.pin_memory()
    starts = host.data_ptr() + np.arange(n_ids) * N_BANKS * leaf_bytes
    bank.host_address.copy_(torch.from_numpy(starts))
    link(bank, on_device(list(range(n_ids))))
    return bank, host


# bf16, int8 and int4 of 64 tokens of 128 (whole, and no power of two), float32 of 128 tokens (two turns)
LEAVES = [48, 32768, 64 * 2 * 132, 64 * 2 * 68, 128 * 2 * 512]


@pytest.mark.parametrize("leaf_bytes", LEAVES)
def test_what_is_listed_arrives_and_is_linked(
    leaf_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    bank, host = memories(leaf_bytes)
    lists = [{3: 5, 8: 0}, {}, {0: 6, 2: 1, 4: 4, 11: 2, 7: 3, 9: 0, 5: 5}, {10: 2}]
    for h, pairs in enumerate(lists):
        bank.promote_page[h, : len(pairs)] = on_device(list(pairs))
        bank.promote_slot[h, : len(pairs)] = on_device(list(pairs.values()))
        bank.n_promote[h] = len(pairs)
    want, links = bank.memory.clone(), bank.address.clone()
    for h, pairs in enumerate(lists):
        for page, slot in pairs.items():
            want[h, slot] = host[page, h].to(DEVICE)
            links[h, page] = bank.memory[h, slot].data_ptr()
    before = host.clone()
    with no_work(monkeypatch):
        promote(bank)
    assert torch.equal(bank.memory, want)
    assert torch.equal(bank.address, links)
    assert torch.equal(host, before)
    for h, pairs in enumerate(lists):
        assert bank.slot_of[h].tolist() == [pairs.get(page, -1) for page in range(12)]


def test_an_empty_list_moves_nothing() -> None:
    bank, _ = memories(64)
    before, links = bank.memory.clone(), bank.address.clone()
    promote(bank)
    assert torch.equal(bank.memory, before)
    assert torch.equal(bank.address, links)
    assert bool((bank.slot_of == -1).all())


def test_full_lists_of_all_banks_are_dealt_to_all_programs() -> None:
    n = PROGRAMS + 3
    bank, host = memories(16, n_slots=n, n_ids=2 * n, most=n)
    pages = torch.stack([torch.randperm(2 * n)[:n] for _ in range(N_BANKS)])
    slots = torch.stack([torch.randperm(n) for _ in range(N_BANKS)])
    bank.promote_page.copy_(pages)
    bank.promote_slot.copy_(slots)
    bank.n_promote.fill_(n)
    promote(bank)
    for h in range(N_BANKS):
        assert torch.equal(bank.memory[h, slots[h].to(DEVICE)].cpu(), host[pages[h], h])


def test_one_layer_takes_its_leaves_of_a_page() -> None:
    bank, host = memories(64)
    mine = bank.layer(1)
    mine.promote_page[:, 0], mine.promote_slot[:, 0] = 4, 2
    mine.n_promote.fill_(1)
    promote(mine)
    assert torch.equal(bank.memory[2:, 2].cpu(), host[4, 2:])
    assert bank.slot_of[:, 4].tolist() == [-1, -1, 2, 2]


@pytest.mark.parametrize("leaf_bytes", LEAVES)
def test_complete_pages_are_copied_out(leaf_bytes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    bank, host = memories(leaf_bytes)
    bank.slot_of[:, 6] = on_device([3, 0, 6, 1])
    bank.slot_of[:, 1] = on_device([2, -1, 5, 2])  # one leaf was written to the host at once
    want = host.clone()
    for h in range(N_BANKS):
        for page in (6, 1):
            if (slot := int(bank.slot_of[h, page])) >= 0:
                want[page, h] = bank.memory[h, slot].cpu()
    before = bank.memory.clone()
    ended = on_device([-1, 6, 1, -1])
    with no_work(monkeypatch):
        copy_out(bank, ended)
    if DEVICE != "cpu":
        torch.cuda.synchronize()
    assert torch.equal(host, want)
    assert torch.equal(bank.memory, before)


def test_a_bank_of_more_than_4_gib_is_reached_to_its_end() -> None:
    """Byte offsets beyond 2^32; of the memory only what is written exists."""
    n_slots, leaf_bytes = 70_000, 32768
    shape = (2, n_slots, leaf_bytes)
    if DEVICE == "cpu":
        memory = huge_zeros(shape, torch.uint8)
    else:
        memory = torch.zeros(shape, dtype=torch.uint8, device=DEVICE)
    bank = DeviceBank.empty(memory, 2, 4, 2)
    host = torch.randint(0, 256, (4, 2, leaf_bytes), dtype=torch.uint8)
    host = host if DEVICE == "cpu" else host.pin_memory()
    bank.host_address.copy_(host.data_ptr() + torch.arange(4) * 2 * leaf_bytes)
    bank.promote_page[:, 0], bank.promote_slot[:, 0] = 3, n_slots - 1
    bank.n_promote.fill_(1)
    promote(bank)
    assert torch.equal(memory[:, -1].cpu(), host[3])
    assert int(bank.address[1, 3]) == memory.data_ptr() + (2 * n_slots - 1) * leaf_bytes
    bank.pinned[:, :-2] = 1
    bank.owner[:, :-2] = 0
    place_pages(bank, on_device([1]))
    assert int(bank.address[1, 1]) == memory.data_ptr() + (2 * n_slots - 2) * leaf_bytes
    memory[:, -2] = host[2].to(DEVICE)
    copy_out(bank, on_device([1]))
    if DEVICE != "cpu":
        torch.cuda.synchronize()
    assert torch.equal(host[1], host[2])


def test_the_kernels_compile_for_an_h100_with_wide_loads() -> None:
    pointers = {"slot_of": "*i32", "host_address": "*i64"}
    sizes = dict.fromkeys(["n_slots", "n_page_ids", "first_leaf", "n_banks"], "i32")
    for leaf_bytes in LEAVES[1:3]:
        words = leaf_bytes // 4
        moved = {"WORDS": words, "BLOCK": min(8192, triton.next_power_of_2(words))}
        coming = compile_for_gpu(
            "longreach.kernels.triton_gather",
            "_promote",
            pointers
            | dict.fromkeys(["promote_page", "promote_slot", "n_promote"], "*i32")
            | {"address": "*i64", "memory": "i64:16", "most": "i32"}
            | sizes,
            {"PROGRAMS": PROGRAMS, **moved},
            num_warps=8,
        )
        going = compile_for_gpu(
            "longreach.kernels.triton_gather",
            "_copy_out",
            pointers | {"page_ids": "*i32", "n": "i32", "memory": "i64:16"} | sizes,
            {"PROGRAMS": PROGRAMS, **moved},
            num_warps=8,
        )
        for made in (coming, going):
            wide = [line for line in made["ptx_lines"] if "ld.global.cg.v4.b32" in line]
            assert len(wide) >= min(words, 8192) // 1024
            assert any("st.global.v4.b32" in line for line in made["ptx_lines"])
            assert made["shared"] < 16 << 10
            assert made["n_spills"] == 0
