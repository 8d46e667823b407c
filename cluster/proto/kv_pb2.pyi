from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class KvStatRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class StoreStat(_message.Message):
    __slots__ = ("store_id", "state", "error", "numbers")
    class NumbersEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: float
        def __init__(self, key: _Optional[str] = ..., value: _Optional[float] = ...) -> None: ...
    STORE_ID_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    ERROR_FIELD_NUMBER: _ClassVar[int]
    NUMBERS_FIELD_NUMBER: _ClassVar[int]
    store_id: str
    state: str
    error: str
    numbers: _containers.ScalarMap[str, float]
    def __init__(self, store_id: _Optional[str] = ..., state: _Optional[str] = ..., error: _Optional[str] = ..., numbers: _Optional[_Mapping[str, float]] = ...) -> None: ...

class KvStatResponse(_message.Message):
    __slots__ = ("stores", "totals", "page_bytes")
    class TotalsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: float
        def __init__(self, key: _Optional[str] = ..., value: _Optional[float] = ...) -> None: ...
    STORES_FIELD_NUMBER: _ClassVar[int]
    TOTALS_FIELD_NUMBER: _ClassVar[int]
    PAGE_BYTES_FIELD_NUMBER: _ClassVar[int]
    stores: _containers.RepeatedCompositeFieldContainer[StoreStat]
    totals: _containers.ScalarMap[str, float]
    page_bytes: int
    def __init__(self, stores: _Optional[_Iterable[_Union[StoreStat, _Mapping]]] = ..., totals: _Optional[_Mapping[str, float]] = ..., page_bytes: _Optional[int] = ...) -> None: ...

class VerifyRequest(_message.Message):
    __slots__ = ("store_id",)
    STORE_ID_FIELD_NUMBER: _ClassVar[int]
    store_id: str
    def __init__(self, store_id: _Optional[str] = ...) -> None: ...

class BadPage(_message.Message):
    __slots__ = ("store_id", "key", "tier", "reason")
    STORE_ID_FIELD_NUMBER: _ClassVar[int]
    KEY_FIELD_NUMBER: _ClassVar[int]
    TIER_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    store_id: str
    key: str
    tier: str
    reason: str
    def __init__(self, store_id: _Optional[str] = ..., key: _Optional[str] = ..., tier: _Optional[str] = ..., reason: _Optional[str] = ...) -> None: ...

class StoreVerify(_message.Message):
    __slots__ = ("store_id", "checked", "bad", "done", "error")
    STORE_ID_FIELD_NUMBER: _ClassVar[int]
    CHECKED_FIELD_NUMBER: _ClassVar[int]
    BAD_FIELD_NUMBER: _ClassVar[int]
    DONE_FIELD_NUMBER: _ClassVar[int]
    ERROR_FIELD_NUMBER: _ClassVar[int]
    store_id: str
    checked: int
    bad: int
    done: bool
    error: str
    def __init__(self, store_id: _Optional[str] = ..., checked: _Optional[int] = ..., bad: _Optional[int] = ..., done: _Optional[bool] = ..., error: _Optional[str] = ...) -> None: ...

class VerifyUpdate(_message.Message):
    __slots__ = ("stores", "bad")
    STORES_FIELD_NUMBER: _ClassVar[int]
    BAD_FIELD_NUMBER: _ClassVar[int]
    stores: _containers.RepeatedCompositeFieldContainer[StoreVerify]
    bad: _containers.RepeatedCompositeFieldContainer[BadPage]
    def __init__(self, stores: _Optional[_Iterable[_Union[StoreVerify, _Mapping]]] = ..., bad: _Optional[_Iterable[_Union[BadPage, _Mapping]]] = ...) -> None: ...

class ScrubRequest(_message.Message):
    __slots__ = ("start",)
    START_FIELD_NUMBER: _ClassVar[int]
    start: bool
    def __init__(self, start: _Optional[bool] = ...) -> None: ...

class StoreScrub(_message.Message):
    __slots__ = ("store_id", "running", "pages_checked", "bad", "last_round_s", "error")
    STORE_ID_FIELD_NUMBER: _ClassVar[int]
    RUNNING_FIELD_NUMBER: _ClassVar[int]
    PAGES_CHECKED_FIELD_NUMBER: _ClassVar[int]
    BAD_FIELD_NUMBER: _ClassVar[int]
    LAST_ROUND_S_FIELD_NUMBER: _ClassVar[int]
    ERROR_FIELD_NUMBER: _ClassVar[int]
    store_id: str
    running: bool
    pages_checked: int
    bad: int
    last_round_s: float
    error: str
    def __init__(self, store_id: _Optional[str] = ..., running: _Optional[bool] = ..., pages_checked: _Optional[int] = ..., bad: _Optional[int] = ..., last_round_s: _Optional[float] = ..., error: _Optional[str] = ...) -> None: ...

class ScrubResponse(_message.Message):
    __slots__ = ("stores",)
    STORES_FIELD_NUMBER: _ClassVar[int]
    stores: _containers.RepeatedCompositeFieldContainer[StoreScrub]
    def __init__(self, stores: _Optional[_Iterable[_Union[StoreScrub, _Mapping]]] = ...) -> None: ...

class SnapshotRequest(_message.Message):
    __slots__ = ("context_id", "uri", "no_text")
    CONTEXT_ID_FIELD_NUMBER: _ClassVar[int]
    URI_FIELD_NUMBER: _ClassVar[int]
    NO_TEXT_FIELD_NUMBER: _ClassVar[int]
    context_id: str
    uri: str
    no_text: bool
    def __init__(self, context_id: _Optional[str] = ..., uri: _Optional[str] = ..., no_text: _Optional[bool] = ...) -> None: ...

class RestoreRequest(_message.Message):
    __slots__ = ("uri",)
    URI_FIELD_NUMBER: _ClassVar[int]
    uri: str
    def __init__(self, uri: _Optional[str] = ...) -> None: ...

class SnapshotUpdate(_message.Message):
    __slots__ = ("phase", "pages", "total_pages", "bytes", "done")
    PHASE_FIELD_NUMBER: _ClassVar[int]
    PAGES_FIELD_NUMBER: _ClassVar[int]
    TOTAL_PAGES_FIELD_NUMBER: _ClassVar[int]
    BYTES_FIELD_NUMBER: _ClassVar[int]
    DONE_FIELD_NUMBER: _ClassVar[int]
    phase: str
    pages: int
    total_pages: int
    bytes: int
    done: SnapshotDone
    def __init__(self, phase: _Optional[str] = ..., pages: _Optional[int] = ..., total_pages: _Optional[int] = ..., bytes: _Optional[int] = ..., done: _Optional[_Union[SnapshotDone, _Mapping]] = ...) -> None: ...

class SnapshotDone(_message.Message):
    __slots__ = ("uri", "context_id", "n_tokens", "n_pages", "n_bytes", "seconds")
    URI_FIELD_NUMBER: _ClassVar[int]
    CONTEXT_ID_FIELD_NUMBER: _ClassVar[int]
    N_TOKENS_FIELD_NUMBER: _ClassVar[int]
    N_PAGES_FIELD_NUMBER: _ClassVar[int]
    N_BYTES_FIELD_NUMBER: _ClassVar[int]
    SECONDS_FIELD_NUMBER: _ClassVar[int]
    uri: str
    context_id: str
    n_tokens: int
    n_pages: int
    n_bytes: int
    seconds: float
    def __init__(self, uri: _Optional[str] = ..., context_id: _Optional[str] = ..., n_tokens: _Optional[int] = ..., n_pages: _Optional[int] = ..., n_bytes: _Optional[int] = ..., seconds: _Optional[float] = ...) -> None: ...

class DropRequest(_message.Message):
    __slots__ = ("context_id", "all")
    CONTEXT_ID_FIELD_NUMBER: _ClassVar[int]
    ALL_FIELD_NUMBER: _ClassVar[int]
    context_id: str
    all: bool
    def __init__(self, context_id: _Optional[str] = ..., all: _Optional[bool] = ...) -> None: ...

class StoreDrop(_message.Message):
    __slots__ = ("store_id", "n_dropped", "error")
    STORE_ID_FIELD_NUMBER: _ClassVar[int]
    N_DROPPED_FIELD_NUMBER: _ClassVar[int]
    ERROR_FIELD_NUMBER: _ClassVar[int]
    store_id: str
    n_dropped: int
    error: str
    def __init__(self, store_id: _Optional[str] = ..., n_dropped: _Optional[int] = ..., error: _Optional[str] = ...) -> None: ...

class DropResponse(_message.Message):
    __slots__ = ("stores", "n_pages")
    STORES_FIELD_NUMBER: _ClassVar[int]
    N_PAGES_FIELD_NUMBER: _ClassVar[int]
    stores: _containers.RepeatedCompositeFieldContainer[StoreDrop]
    n_pages: int
    def __init__(self, stores: _Optional[_Iterable[_Union[StoreDrop, _Mapping]]] = ..., n_pages: _Optional[int] = ...) -> None: ...

class DrainStoreRequest(_message.Message):
    __slots__ = ("store_id", "wait")
    STORE_ID_FIELD_NUMBER: _ClassVar[int]
    WAIT_FIELD_NUMBER: _ClassVar[int]
    store_id: str
    wait: bool
    def __init__(self, store_id: _Optional[str] = ..., wait: _Optional[bool] = ...) -> None: ...

class DrainUpdate(_message.Message):
    __slots__ = ("store_id", "drained", "to_move", "pages_pushed", "bytes_pushed", "error")
    STORE_ID_FIELD_NUMBER: _ClassVar[int]
    DRAINED_FIELD_NUMBER: _ClassVar[int]
    TO_MOVE_FIELD_NUMBER: _ClassVar[int]
    PAGES_PUSHED_FIELD_NUMBER: _ClassVar[int]
    BYTES_PUSHED_FIELD_NUMBER: _ClassVar[int]
    ERROR_FIELD_NUMBER: _ClassVar[int]
    store_id: str
    drained: bool
    to_move: int
    pages_pushed: int
    bytes_pushed: int
    error: str
    def __init__(self, store_id: _Optional[str] = ..., drained: _Optional[bool] = ..., to_move: _Optional[int] = ..., pages_pushed: _Optional[int] = ..., bytes_pushed: _Optional[int] = ..., error: _Optional[str] = ...) -> None: ...
