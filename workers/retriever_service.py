"""The retriever behind the transport: contexts in, coarse selections out."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..core.config import Config
from ..core.errors import InvalidInput
from ..core.page_key import PageKey
from ..kernels.ops import Rope
from ..kvstore.transport import Reply
from .model_source import load_model_config, model_dir, policies_of
from .retriever import Retriever


class RetrieverService:
    """One retriever shard. It needs the model's RoPE, not its weights."""

    def __init__(self, config: Config, retriever_id: str) -> None:
        self.retriever_id = retriever_id
        hf = load_model_config(model_dir(config.model))
        policies = policies_of(config, hf.num_hidden_layers)
        self._retriever = Retriever(policies, config.cache.page_tokens, rope_of(hf))
        self._lock = threading.Lock()

    def handle(self, method: str, header: dict[str, Any], buffers: Sequence[memoryview]) -> Reply:
        act = getattr(self, f"_do_{method}", None)
        if act is None:
            raise InvalidInput(f"a retriever has no method {method!r}")
        with self._lock:
            return act(header, buffers)  # type: ignore[no-any-return]

    def close(self) -> None:
        return

    def _do_open(self, header: dict[str, Any], buffers: Sequence[memoryview]) -> Reply:
        keys = [PageKey(key) for key in header["keys"]]
        return Reply({"known": self._retriever.open(header["context_id"], keys)})

    def _do_add(self, header: dict[str, Any], buffers: Sequence[memoryview]) -> Reply:
        rows = _tensor(buffers[0], header["shape"])
        first, last = header["first_page"], header["last_page"]
        self._retriever.add(header["context_id"], header["layer"], first, last, rows)
        return Reply({})

    def _do_select(self, header: dict[str, Any], buffers: Sequence[memoryview]) -> Reply:
        q = _tensor(buffers[0], header["q_shape"])
        cut = _tensor(buffers[1], header["cut_shape"]) if header["cut_shape"] else None
        names = ("q_start", "scale", "query_block")
        numbers = {name: header[name] for name in names}
        blocks = self._retriever.select(
            header["context_id"], header["layer"], q, cut_keys=cut, **numbers
        )
        return _starts(blocks)

    def _do_choose(self, header: dict[str, Any], buffers: Sequence[memoryview]) -> Reply:
        query = _tensor(buffers[0], header["q_shape"])
        log_scale, nearness = header["weights"]
        return _starts(
            self._retriever.choose(
                header["context_id"],
                header["layer"],
                query,
                header["q_start"],
                (log_scale, nearness),
            )
        )

    def _do_ask(self, header: dict[str, Any], buffers: Sequence[memoryview]) -> Reply:
        """`add` and then `choose` of many contexts and layers at once."""
        n_adds = len(header["adds"])
        for add, data in zip(header["adds"], buffers[:n_adds], strict=True):
            self._do_add(add, [data])
        asks = zip(header["asks"], buffers[n_adds:], strict=True)
        answers = [self._do_choose(ask, [data]) for ask, data in asks]
        shapes = [answer.header["shape"] for answer in answers]
        return Reply({"shapes": shapes}, [answer.buffers[0] for answer in answers])

    def _do_close(self, header: dict[str, Any], buffers: Sequence[memoryview]) -> Reply:
        self._retriever.close(header["context_id"])
        return Reply({})

    def _do_stats(self, header: dict[str, Any], buffers: Sequence[memoryview]) -> Reply:
        return Reply(self._retriever.stats())

    def _do_health(self, header: dict[str, Any], buffers: Sequence[memoryview]) -> Reply:
        return Reply({"status": "serving", "retriever_id": self.retriever_id})

    def _do_drain(self, header: dict[str, Any], buffers: Sequence[memoryview]) -> Reply:
        return Reply({})


def _starts(chunks: Tensor) -> Reply:
    """Chunk starts int64 [Hsel, n]."""
    data = np.ascontiguousarray(chunks.numpy(), dtype="<i8")
    return Reply({"shape": list(chunks.shape)}, [data.tobytes()])


def _tensor(data: memoryview, shape: list[int]) -> Tensor:
    """A float32 tensor from received bytes; copied, because received buffers are read-only."""
    return torch.from_numpy(np.frombuffer(data, dtype="<f4").reshape(shape).copy())


def rope_of(hf_config: Any) -> Rope:
    """RoPE of a model from its configuration alone."""
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    rotary = LlamaRotaryEmbedding(config=hf_config)
    return Rope(rotary.inv_freq.float().clone(), float(rotary.attention_scaling))
