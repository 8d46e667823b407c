"""Which stores hold a page: rendezvous hashing, so a store that joins or leaves moves only its share."""

from __future__ import annotations

from collections.abc import Iterable

import xxhash

from ..core.page_key import PageKey


def rendezvous(key: PageKey, store_ids: Iterable[str], replicas: int) -> list[str]:
    """The first `replicas` of store_ids in this key's own order of preference (fewer if there are
    fewer). The order of the others does not change when one store joins or leaves."""
    ranked = sorted(
        store_ids,
        key=lambda store_id: (-xxhash.xxh3_64_intdigest(key + store_id.encode()), store_id),
    )
    return ranked[:replicas]
