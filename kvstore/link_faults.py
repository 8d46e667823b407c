"""Links that are cut by a fault plan, as a worker sees its stores."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from ..core.errors import Unavailable
from ..core.fault_config import FaultsConfig
from .fault_plan import FaultPlan
from .faults import FaultCounts
from .rpc_frames import STREAM_CREDIT
from .transport import Buffer, Channel, Reply, ReplyStream

Header = dict[str, Any]


class FaultyChannel:
    """A worker's channel to a store over a link that is cut now and then: Unavailable until it is
    whole again, in the middle of streams too. Delays and losses are the service's."""

    def __init__(
        self,
        channel: Channel,
        counts: FaultCounts,
        monotonic_s: Callable[[], float] = time.monotonic,
    ) -> None:
        self.address = channel.address
        self._channel = channel
        self._counts = counts
        self._monotonic_s = monotonic_s
        self._cut_until_s = float("-inf")

    def call(
        self,
        method: str,
        header: Header | None = None,
        buffers: Sequence[Buffer] = (),
        *,
        timeout_s: float,
    ) -> Reply:
        self._strike(method)
        return self._channel.call(method, header, buffers, timeout_s=timeout_s)

    def stream(
        self,
        method: str,
        header: Header | None = None,
        buffers: Sequence[Buffer] = (),
        *,
        idle_timeout_s: float,
        credit: int = STREAM_CREDIT,
        bundle_bytes: int = 0,
    ) -> ReplyStream:
        self._strike(method)
        stream = self._channel.stream(
            method,
            header,
            buffers,
            idle_timeout_s=idle_timeout_s,
            credit=credit,
            bundle_bytes=bundle_bytes,
        )
        return _CutStream(self, stream)

    def close(self) -> None:
        self._channel.close()

    def check(self) -> None:
        """Raises Unavailable while the link is cut."""
        left_s = self._cut_until_s - self._monotonic_s()
        if left_s > 0:
            raise Unavailable(
                f"{self._counts.where} is cut for {left_s:.1f} s more by the fault plan"
            )

    def _strike(self, method: str) -> None:
        self.check()
        cut_s = self._counts.decide(method).cut_s
        if cut_s:
            self._counts.add("cut")
            self._cut_until_s = self._monotonic_s() + cut_s
            self.check()


class _CutStream:
    def __init__(self, channel: FaultyChannel, stream: ReplyStream) -> None:
        self._channel = channel
        self._stream = stream

    def __iter__(self) -> Iterator[Reply]:
        return self

    def __next__(self) -> Reply:
        try:
            self._channel.check()
        except Unavailable:
            self.close()
            raise
        return next(self._stream)

    def __enter__(self) -> _CutStream:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def close(self) -> None:
        self._stream.close()

    def cancel(self) -> None:
        self._stream.cancel()


class LinkFaults:
    """Puts faults on a worker's channels to the stores."""

    def __init__(self, plan: FaultPlan, where: str) -> None:
        self._plan = plan
        self._where = where
        self._counts: dict[str, FaultCounts] = {}

    def __call__(self, peer: str, channel: Channel) -> Channel:
        counts = self._counts.setdefault(peer, FaultCounts(self._plan, f"{self._where}>{peer}"))
        return FaultyChannel(channel, counts)

    def stats(self) -> dict[str, int]:
        counts = list(self._counts.values())
        return {"faults_cut": sum(c.snapshot().get("faults_cut", 0) for c in counts)}


def link_faults(config: FaultsConfig, where: str) -> LinkFaults | None:
    """What puts faults on the channels of a worker to its stores; None if the plan has none."""
    return LinkFaults(FaultPlan(config), where) if config.cut is not None else None
