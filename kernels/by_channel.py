"""The format int4c: keys in 4 bits with a scale and an offset per channel, values with a scale per group.

Keys of a block of 64 tokens are rounded together when the block seals: channels of a key differ in size and
stay so from token to token, so a scale of their own costs them far less than one for the whole row does
(KIVI, arXiv 2402.02750, found the same). A leaf [2, page_tokens, row_nbytes] holds, of the keys, block after
block: 64 rows of codes, halves of a head in low and high bits, then D scales and D offsets (float16); of the
values, row after row: codes as in int4, then D / 32 scales (float16). Both come to the same bytes per token.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..core.stage import KV_BLOCK

BLOCK_TOKENS = KV_BLOCK
"""Tokens whose keys share their channels' scales; page_tokens is a multiple."""
GROUP = 32
"""Elements of a value that share a scale; head_dim is a multiple."""
DTYPE = torch.uint16
"""Marks memory of this format, as torch.uint8 marks int4: nothing in it is a number of this dtype."""
LEAST_SCALE = 1e-7
"""Rounds to the second smallest float16: a scale is never zero."""


def row_nbytes(head_dim: int) -> int:
    """Bytes of one stored value, and of a 64th of a stored block of keys."""
    return head_dim // 2 + head_dim // 16


def head_dim_of(n_bytes: int) -> int:
    """The inverse of `row_nbytes`."""
    return n_bytes * 16 // 9


def pack_keys(k: Tensor) -> Tensor:
    """float32 [..., 64, D] -> uint8 [..., 64 * row_nbytes], rounded to nearest even."""
    offset = k.amin(dim=-2, keepdim=True).half()
    low = offset.float()
    scale = ((k.amax(dim=-2, keepdim=True) - low) / 15).clamp(min=LEAST_SCALE).half()
    whole = ((k - low) / scale.float()).round().clamp(0, 15).nan_to_num(0.0)
    channels = torch.cat((scale, offset), dim=-1).view(torch.uint8)
    return torch.cat((_join(whole).flatten(-2), channels.flatten(-2)), dim=-1)


def pack_values(v: Tensor) -> Tensor:
    """float32 [..., D] -> uint8 [..., row_nbytes], rounded to nearest even."""
    groups = v.unflatten(-1, (-1, GROUP))
    scale = (groups.abs().amax(dim=-1, keepdim=True) / 7).clamp(min=LEAST_SCALE).half()
    whole = (groups / scale.float()).round().clamp(-7, 7).nan_to_num(0.0) + 8
    scales = scale.squeeze(-1).contiguous().view(torch.uint8)
    return torch.cat((_join(whole.flatten(-2)), scales), dim=-1)


def unpack_keys(codes: Tensor, channels: Tensor) -> Tensor:
    """codes: uint8 [..., D / 2], of a row; channels: uint8 [..., 4 * D], what ends its block. Returns
    float32 [..., D]."""
    scale, offset = channels.contiguous().view(torch.float16).float().chunk(2, dim=-1)
    # a code times a scale is exact, so this rounds once
    found: Tensor = _split(codes) * scale + offset
    return found


def unpack_values(rows: Tensor) -> Tensor:
    """uint8 [..., row_nbytes] -> float32 [..., D]."""
    n_codes = head_dim_of(rows.shape[-1]) // 2
    scales = rows[..., n_codes:].contiguous().view(torch.float16).float()
    groups = (_split(rows[..., :n_codes]) - 8.0).unflatten(-1, (-1, GROUP))
    found: Tensor = (groups * scales[..., None]).flatten(-2)
    return found


def gather_keys(leaves: Tensor, row: Tensor, slot: Tensor) -> Tensor:
    """Keys of single tokens. leaves: DTYPE [n, 2, page_tokens, items]; row, slot: int64 [m], leaf and place
    in its page. -> float32 [m, D]."""
    raw = leaves.view(torch.uint8)[:, 0]
    n_codes = head_dim_of(raw.shape[-1]) // 2
    blocks = raw.reshape(len(raw), -1, BLOCK_TOKENS * raw.shape[-1])
    codes = blocks[..., : BLOCK_TOKENS * n_codes].unflatten(-1, (BLOCK_TOKENS, n_codes))
    block = slot // BLOCK_TOKENS
    channels = blocks[row, block, BLOCK_TOKENS * n_codes :]
    return unpack_keys(codes[row, block, slot % BLOCK_TOKENS], channels)


def gather_values(leaves: Tensor, row: Tensor, slot: Tensor) -> Tensor:
    """As `gather_keys`, of values."""
    return unpack_values(leaves.view(torch.uint8)[row, 1, slot])


def rounded(x: Tensor, keys: bool) -> Tensor:
    """Keys or values [..., T, D] as readers find them later; what does not fill a block stays as it is."""
    n_whole = x.shape[-2] // BLOCK_TOKENS * BLOCK_TOKENS
    blocks, rest = x[..., :n_whole, :], x[..., n_whole:, :]
    if not keys:
        return torch.cat((unpack_values(pack_values(blocks)), rest), dim=-2)
    n_codes = BLOCK_TOKENS * x.shape[-1] // 2
    packed = pack_keys(blocks.unflatten(-2, (-1, BLOCK_TOKENS)))
    codes = packed[..., :n_codes].unflatten(-1, (BLOCK_TOKENS, -1))
    found = unpack_keys(codes, packed[..., None, n_codes:]).flatten(-3, -2)
    return torch.cat((found, rest), dim=-2)


def _join(whole: Tensor) -> Tensor:
    """Numbers 0 to 15 two to a byte, as RoPE pairs them: both partners of a pair are in one byte."""
    low, high = whole.to(torch.uint8).chunk(2, dim=-1)
    return low | (high << 4)


def _split(codes: Tensor) -> Tensor:
    return torch.cat((codes & 15, codes >> 4), dim=-1).float()
