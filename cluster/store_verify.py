"""Every held page of many stores, checked side by side; what each found comes as it is found."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Generator, Iterator, Mapping
from queue import Empty, Queue
from typing import Any

from ..core.errors import LongreachError, as_longreach_error
from ..kvstore.transport import Channel
from .proto import kv_pb2 as pb
from .store_calls import told

MAX_LISTED = 1000
"""Bad pages of one store that are named; all are counted."""
UPDATE_S = 0.25

_Item = tuple[str, tuple[int, list[pb.BadPage]] | LongreachError | None]
"""Of a store: pages checked and those that were bad; its failure; its end."""


def verify_stores(
    channels: Mapping[str, Channel],
    lost: Mapping[str, LongreachError],
    is_active: Callable[[], bool],
    timeout_s: float,
) -> Generator[pb.VerifyUpdate, None, None]:
    """Updates until every store has ended or is_active() is False. timeout_s: longest silence of a
    store. The streams are closed with this generator."""
    items: Queue[_Item] = Queue()
    gone = threading.Event()
    states = {s: pb.StoreVerify(store_id=s) for s in sorted({*channels, *lost})}
    for store_id, error in lost.items():
        states[store_id].error = told(error)
        states[store_id].done = True
    for store_id, channel in channels.items():
        arguments = (store_id, channel, items, gone, timeout_s)
        threading.Thread(target=_read, args=arguments, name=f"verify {store_id}").start()
    n_listed: Counter[str] = Counter()
    try:
        while is_active():
            update = pb.VerifyUpdate()
            for store_id, item in _waiting(items):
                state = states[store_id]
                if item is None:
                    state.done = True
                elif isinstance(item, LongreachError):
                    state.error, state.done = told(item), True
                else:
                    n_checked, bad = item
                    state.checked += n_checked
                    state.bad += len(bad)
                    listed = bad[: MAX_LISTED - n_listed[store_id]]
                    n_listed[store_id] += len(listed)
                    update.bad.extend(listed)
            update.stores.extend(states.values())
            yield update
            if all(state.done for state in states.values()):
                return
    finally:
        gone.set()


def _waiting(items: Queue[_Item]) -> Iterator[_Item]:
    """What is there, after a moment in which more may come."""
    try:
        yield items.get(timeout=UPDATE_S)
        while True:
            yield items.get_nowait()
    except Empty:
        return


def _read(
    store_id: str, channel: Channel, items: Queue[_Item], gone: threading.Event, timeout_s: float
) -> None:
    try:
        with channel.stream("verify", {"keys": None}, idle_timeout_s=timeout_s) as replies:
            for reply in replies:
                if gone.is_set():
                    return
                bad = [_bad_page(store_id, page) for page in reply.header["bad"]]
                items.put((store_id, (int(reply.header["checked"]), bad)))
        items.put((store_id, None))
    except Exception as exc:
        items.put((store_id, as_longreach_error(exc)))


def _bad_page(store_id: str, page: Mapping[str, Any]) -> pb.BadPage:
    return pb.BadPage(
        store_id=store_id, key=page["key"].hex(), tier=page["tier"], reason=page["reason"]
    )
