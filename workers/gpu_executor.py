"""Rows computed on a GPU by Triton kernels; on a CPU in Triton's interpreter, for tests."""

from __future__ import annotations

import time
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from ..core.config import Config
from ..core.errors import ConfigError
from ..core.page_key import RecipeFingerprint
from ..core.stage import LayerPolicy
from ..kernels import gpu_ops
from ..kvstore.page import PageGeometry
from ..kvstore.page_client import PageClient
from .gpu_batch import DeviceBatch
from .gpu_graph import StepGraphs
from .gpu_memory import GpuMemory, Reachable
from .gpu_steps import GpuDecodeStep, GpuLayers, GpuPrefillStep
from .model import ModelAdapter
from .page_errors import not_finite
from .page_flow import PageFlow
from .row import Row
from .scheduler import query_blocks

WRITTEN_SHARE = 2
"""One page of so many on the device is room for new ones, the others hold copies."""
N_PROMOTED = 64
"""Pages that a step copies into the bank at most, per layer and KV head: 2 MB of 8B geometry, which the link
brings while the model's products run."""


class GpuExecutor:
    """An `Executor`. The model and all tables are on `device`; the host loads a step's numbers, launches
    it, and reads the logits.

    Raises ConfigError for what the GPU path does not do, or if the device cannot hold what is asked.
    """

    def __init__(
        self,
        config: Config,
        model: ModelAdapter,
        geometry: PageGeometry,
        policies: tuple[LayerPolicy, ...],
        recipe: RecipeFingerprint,
        client: PageClient | None,
        device: torch.device,
        reachable: Reachable,
        *,
        graphs: bool = True,
        precision: str = "tf32x3",
    ) -> None:
        _check(policies, geometry)
        self._config = config
        self.model = model
        self._device = device
        page_tokens = geometry.page_tokens
        most_tokens = config.model.max_context_tokens + config.gateway.max_new_tokens
        most_pages = -(-most_tokens // page_tokens)
        most_rows = config.worker.max_rows
        device_pages = config.cache.device_pages
        self.memory = GpuMemory(
            geometry,
            n_written=max(1, device_pages // WRITTEN_SHARE),
            n_copies=max(1, device_pages - device_pages // WRITTEN_SHARE),
            n_page_ids=most_rows * most_pages,
            n_promoted=N_PROMOTED,
            client=client,
            device=device,
            reachable=reachable,
        )
        self.flow = PageFlow(geometry, self.memory, recipe, client, config.store.timeout_s * 3)
        self.n_ahead = 1
        self.batch = DeviceBatch(most_rows, most_pages, policies, geometry.n_kv_heads, device)
        self.layers = GpuLayers.of(self.memory, policies, model.rope, most_tokens, precision)
        self._logits = torch.zeros(most_rows, model.vocab_size, device=device)
        self._graphs = StepGraphs(self._body, most_rows, device, graphs)
        self._summarised = np.zeros(self.memory.n_page_ids, dtype=np.int64)
        """Version of each page number whose summaries are on the device; 0 = none."""

    # --- Executor -------------------------------------------------------------------------------

    def opened(self, row: Row) -> None:
        """Summaries of pages that exist are made from their keys, once per page."""
        n_pages = row.n_existing_pages
        ids, versions = row.page_ids.array[:n_pages], self.flow.versions_of(row)[:n_pages]
        missing = np.flatnonzero(self._summarised[ids] != versions)
        if not len(missing):
            return
        pages = self._pages(row)
        for layer, tables in enumerate(self.layers.tables):
            if tables:
                view = self.memory.view(layer, pages)
                gpu_ops.summarise_range(view, tables, 0, int(missing[0]), n_pages)
        self._summarised[ids] = versions

    def prepare(self, row: Row) -> bool:
        return True

    def prefill(self, row: Row, end: int) -> Tensor | None:
        start, question_block = row.n_done, self._config.attention.question_block
        blocks = query_blocks(start, end, row.question_start, question_block)
        n_existing = row.n_existing_pages * self._config.cache.page_tokens
        step = GpuPrefillStep(
            self.layers,
            self._pages(row),
            start,
            n_existing,
            blocks,
            row.question_start,
            question_block,
        )
        tokens = torch.from_numpy(row.request.prompt[start:end].astype("int64")).to(self._device)
        started = time.monotonic()
        hidden = self.model.hidden(tokens, step, decode=False)
        last = self.model.logits(hidden[-1:])[0] if end == row.n_prompt else None
        self._refuse_bad(row, step.bad, start)
        self._note_summaries(row, start, end)
        row.stats.seconds_linear += time.monotonic() - started
        return None if last is None else last.float().cpu()

    def decode(self, rows: Sequence[Row]) -> Tensor:
        started = time.monotonic()
        batch = self.batch
        places = batch.load(rows, self._config.cache.page_tokens)
        self._graphs.run(batch.n_places(places))
        logits = self._logits[: batch.n_places(places)].cpu()
        bad = batch.bad.cpu()
        seconds = (time.monotonic() - started) / len(rows)
        for row, at in zip(rows, places, strict=True):
            row.stats.seconds_linear += seconds
            self._note_summaries(row, row.n_done, row.n_done + 1)
            if bool(bad[:, at].any()):
                batch.bad[:, at] = 0
                layer = int(bad[:, at].argmax())
                raise not_finite(row, layer, row.n_done, self.memory.geometry)
        return logits[places]

    def closed(self, row: Row) -> None:
        self.batch.leave(row)

    def update_retrievers(self, addresses: dict[str, str]) -> None:
        pass  # summaries are on the device

    # --- one step -------------------------------------------------------------------------------

    def _body(self, n_places: int) -> None:
        """What a graph holds: reads and writes the batch, the pages, the tables and the logits."""
        step = GpuDecodeStep(self.layers, self.batch, n_places)
        step.begin()
        hidden = self.model.hidden(self.batch.token[:n_places], step, decode=True)
        self._logits[:n_places].copy_(self.model.logits(hidden))

    def _refuse_bad(self, row: Row, bad: Tensor, start: int) -> None:
        wrong = bad.cpu()
        if bool(wrong.any()):
            raise not_finite(row, int(wrong.argmax()), start, self.memory.geometry)

    def _note_summaries(self, row: Row, start: int, end: int) -> None:
        """Pages that tokens start … end completed have their summaries."""
        page_tokens = self._config.cache.page_tokens
        done = slice(start // page_tokens, end // page_tokens)
        if done.start == done.stop:
            return  # most decode steps: a row has thousands of pages to look at
        self._summarised[row.page_ids.array[done]] = self.flow.versions_of(row)[done]

    def _pages(self, row: Row) -> Tensor:
        ids = torch.from_numpy(row.page_ids.array.astype("int32"))
        return ids[None].to(self._device)


def _check(policies: Sequence[LayerPolicy], geometry: PageGeometry) -> None:
    for policy in policies:
        for name in ("tail", "delta"):
            if getattr(policy, name):
                raise ConfigError(
                    f"attention.policies: {name} ({getattr(policy, name)}) is not done on a GPU yet; "
                    f"leave it out, or use model.device: cpu"
                )
    if geometry.head_dim % 16 or geometry.head_dim > 256:
        raise ConfigError(
            f"a head size of {geometry.head_dim} is not supported on a GPU: multiples of 16 up to 256"
        )
