"""One question to many stores at once: who does not answer in time is named, the others are heard."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from ..core.config import Config
from ..core.errors import LongreachError, as_longreach_error
from ..kvstore.transport import Channel
from .runtime import Runtime, part_ids

T = TypeVar("T")
STAT_TIMEOUT_S = 2.0
LIST_PAGES = 10_000
"""Page keys in one request."""


def each(
    channels: Mapping[str, Channel], ask: Callable[[Channel], T]
) -> dict[str, T | LongreachError]:
    """ask of every channel, side by side; an answer or an error by store id. `ask` has deadlines."""
    if not channels:
        return {}

    def guarded(channel: Channel) -> T | LongreachError:
        try:
            return ask(channel)
        except Exception as exc:
            return as_longreach_error(exc)

    with ThreadPoolExecutor(len(channels), "ask-stores") as threads:
        asked = {
            store_id: threads.submit(guarded, channel) for store_id, channel in channels.items()
        }
        return {store_id: future.result() for store_id, future in sorted(asked.items())}


def ask_all(
    channels: Mapping[str, Channel], method: str, header: dict[str, Any], timeout_s: float
) -> dict[str, dict[str, Any] | LongreachError]:
    """One call to each store."""
    return each(channels, lambda channel: channel.call(method, header, timeout_s=timeout_s).header)


def store_states(runtime: Runtime, config: Config) -> dict[str, str]:
    """Every store that is known: live, draining or lost."""
    states = dict.fromkeys(part_ids(config)["store"], "lost")
    states |= dict.fromkeys(runtime.stores(), "live")
    for member in runtime.membership():
        if member.draining and states.get(member.store_id) == "live":
            states[member.store_id] = "draining"
    return states


def told(error: LongreachError) -> str:
    """An error as a field of a reply."""
    return f"{error.reason}: {error.message}"


def drop_keys(channel: Channel, keys: list[bytes], timeout_s: float) -> int:
    """How many of these pages the store has forgotten."""
    n_dropped = 0
    for first in range(0, len(keys), LIST_PAGES):
        part = {"keys": keys[first : first + LIST_PAGES]}
        n_dropped += int(channel.call("drop", part, timeout_s=timeout_s).header["n_dropped"])
    return n_dropped


def drop_everything(channel: Channel, timeout_s: float) -> int:
    """The store forgets every page that it lists."""
    n_dropped, after = 0, None
    while True:
        asked = {"after": after, "limit": LIST_PAGES}
        listed = channel.call("list", asked, timeout_s=timeout_s).header
        n_dropped += drop_keys(channel, [page["key"] for page in listed["pages"]], timeout_s)
        after = listed["next"]
        if after is None:
            return n_dropped
