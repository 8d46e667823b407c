"""Rotary positions given when a key is used (DESIGN 1.2): keys and queries arrive unrotated."""

from __future__ import annotations

import torch
from torch import Tensor

TABLE_LIMIT = 1 << 17
"""Positions kept in the cos/sin table; later ones are computed for each call."""
FINE = 1 << 12
"""Distances of the fine table of `Rope.distance_tables`; the coarse one has their multiples."""


class Rope:
    """Rotation in the Hugging Face convention: the second half of a head is paired with the first.

    inv_freq: [D / 2] float32, frequencies of the pairs. attention_scaling multiplies cos and sin
    (yarn), as in transformers. Angles are float32 products, as in transformers, so that dense
    attention has the model's own bits.
    """

    def __init__(self, inv_freq: Tensor, attention_scaling: float = 1.0) -> None:
        if inv_freq.dim() != 1:
            raise ValueError(f"inv_freq must be [D / 2], got {list(inv_freq.shape)}")
        self.inv_freq = inv_freq.detach().to(torch.float32).contiguous()
        self.attention_scaling = float(attention_scaling)
        self._cos, self._sin = self._angles(torch.arange(0))
        none = torch.zeros(0, self.inv_freq.numel())
        self._distances = (none, none, none, none)

    @property
    def head_dim(self) -> int:
        return 2 * self.inv_freq.numel()

    def _angles(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        angles = positions.to(torch.float32)[..., None] * self.inv_freq
        return angles.cos() * self.attention_scaling, angles.sin() * self.attention_scaling

    def table(self, n_positions: int) -> tuple[Tensor, Tensor]:
        """cos and sin of positions 0 .. at least n_positions - 1: [n, D / 2] each, float32.

        Grows by doubling and is kept; raises ValueError beyond TABLE_LIMIT positions.
        """
        if n_positions > TABLE_LIMIT:
            raise ValueError(f"{n_positions} positions exceed the table limit {TABLE_LIMIT}")
        if n_positions > self._cos.shape[0]:
            size = max(1024, 1 << (n_positions - 1).bit_length())
            # bound before assignment: another thread may be reading the old, still valid table
            self._cos, self._sin = self._angles(torch.arange(size, device=self.inv_freq.device))
        return self._cos, self._sin

    def distance_tables(self, n_distances: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Fine cos, sin [FINE, D / 2] of distances 0, 1 ..., and coarse ones [n, D / 2] of 0, FINE,
        2 FINE ... up to n_distances at least. A distance's angle is the sum of one of each.

        Angles are float64 products, so far distances keep their precision; attention_scaling is not
        in them. Kept, and grown by doubling.
        """
        n_coarse = -(-max(1, n_distances) // FINE) + 1
        if n_coarse > self._distances[2].shape[0]:
            size = max(4, 1 << (n_coarse - 1).bit_length())
            inv_freq = self.inv_freq.double()
            fine = torch.arange(FINE).double()[:, None] * inv_freq
            coarse = torch.arange(size).double()[:, None] * (FINE * inv_freq)
            self._distances = (
                fine.cos().float(), fine.sin().float(), coarse.cos().float(), coarse.sin().float()
            )  # fmt: skip
        return self._distances

    def cos_sin(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """positions: int64 [...], may be negative. Returns cos, sin: [..., D / 2] float32."""
        return self._angles(positions)

    def rotate(self, x: Tensor, positions: Tensor | int) -> Tensor:
        """x: [..., D] float32; positions: int64, broadcast against x without its last axis."""
        if isinstance(positions, int):
            positions = torch.tensor(positions, device=x.device)
        cos, sin = self._angles(positions)
        first, second = x.chunk(2, dim=-1)
        return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
