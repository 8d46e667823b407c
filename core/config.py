"""The configuration tree: frozen, one default per field; an unknown key names its path."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, Field, ValidationError, model_validator

from .errors import ConfigError
from .fault_config import FaultsConfig
from .kv_format import KvDtype, format_problem
from .section import Section
from .stage import DENSE, QUERY_BLOCK, LayerPolicy, question_start
from .store_config import StoreConfig


class ModelConfig(Section):
    """Which model answers."""

    name: str = "embedded"
    """`embedded`, a Hugging Face id, a directory, or the path of a .gguf or .safetensors file."""
    revision: str | None = None
    """Revision of a Hugging Face id."""
    max_context_tokens: int = Field(default=3_000_000, gt=0)
    """Longest context accepted, in tokens; longer ones are refused with CONTEXT_TOO_LONG."""
    device: Literal["cpu", "cuda"] = "cpu"
    """Device of the decode worker. On `cuda` weights are bfloat16, or float16 where the device has no
    bfloat16; on `cpu` float32."""
    n_threads: int = Field(default=0, ge=0)
    """CPU threads of a decode worker, shared by torch and our kernels; 0 takes all cores."""
    served_names: tuple[str, ...] = ()
    """Names a batch line's `model` may use besides `name`; empty accepts only `name`."""


class AttentionConfig(Section):
    """Selection and attention per layer."""

    policies: tuple[LayerPolicy, ...] = Field(default=(DENSE,), min_length=1)
    """Layer policies; the default keeps every key (dense)."""
    question_block: Literal[8, 16, 32, 64] = 64
    """Queries that share one selection in the question (what follows the context, at most 256
    tokens). 64 is the context's and the paper's: one mask then serves a whole question at once."""

    def question_start(self, n_prompt: int, n_context: int) -> int:
        """First token whose selection is made in blocks of `question_block`; n_prompt if none is."""
        if not self.sparse or self.question_block == QUERY_BLOCK:
            return n_prompt
        return question_start(n_prompt, n_context)

    @property
    def sparse(self) -> bool:
        return any(not (policy.dense and policy.in_prefill.dense) for policy in self.policies)

    @property
    def by_bookmark(self) -> bool:
        """Whether a stage of any layer is scored by bookmarks."""
        return any(p.by_bookmark or p.in_prefill.by_bookmark for p in self.policies)


class CacheConfig(Section):
    """Pages and the decode worker's device bank."""

    page_tokens: int = Field(default=64, ge=8)
    """Tokens per page; a multiple of 64 where any layer prunes."""
    kv_dtype: KvDtype = "float32"
    """Storage format of K and V; rounded once, when appended. `int8` and `int4` have a scale per token and
    head, `float8` (e4m3) has none. `int4c` is 4 bits too: keys with a scale and an offset per channel of 64
    tokens, values with a scale per 32 elements; a block of 64 tokens is rounded when it is full, and until
    then, and for its own queries, as it was appended (float32). CPU only."""
    device_pages: int = Field(default=256, gt=0)
    """Pages (of all layers) that the device bank of attention holds; smaller means more passes."""


class WorkerConfig(Section):
    """The decode worker's batching."""

    max_rows: int = Field(default=8, gt=0)
    """Rows decoded together."""
    prefill_chunk_tokens: int = Field(default=512, gt=0)
    """Tokens prefilled between two decode steps; chunk ends are rounded to 64-token blocks."""
    count: int = Field(default=1, gt=0)
    """Decode workers."""
    audit_interval: int = Field(default=16, ge=0)
    """Every n-th decode step samples the attention mass kept (one layer, one head); 0 never."""


class RetrieverConfig(Section):
    """The page retriever (summaries of active contexts)."""

    count: int = Field(default=1, gt=0)
    """Retriever shards; contexts are spread over them."""
    remote: bool = False
    """Score first stages of `bounds`, `mean` and `bookmark` in the retriever instead of inside the worker."""
    weights: str | None = None
    """Trained bookmarks, for stages of scorer `bookmark`: a safetensors file of `longreach
    train-retriever`, or `embedded` for those that come with the embedded model."""
    asynchronous: bool = False
    """In decode, pages chosen by the bookmark at position p take effect at p + refresh, so that no step waits
    for the retriever. Needs `remote` and stages of scorer `bookmark`; others are scored in the worker."""
    timeout_s: float = Field(default=20.0, gt=0)
    """Deadline of one call to a retriever."""


class GatewayConfig(Section):
    """The gRPC gateway and its journal."""

    host: str = "127.0.0.1"
    """Interface the gateway listens on."""
    port: int = Field(default=50051, ge=0, le=65535)
    """TCP port; 0 picks a free one (printed, and written to the state directory)."""
    state_dir: str = ".longreach"
    """Directory of the journal, uploaded contexts, results and logs."""
    max_message_bytes: int = Field(default=8 << 20, gt=0)
    """Largest gRPC message accepted."""
    max_line_bytes: int = Field(default=32 << 20, gt=0)
    """Largest batch line accepted."""
    max_queued_rows: int = Field(default=100_000, gt=0)
    """Rows waiting or running; more are refused with QUEUE_FULL."""
    max_new_tokens: int = Field(default=8192, gt=0)
    """Upper bound of `max_tokens` of one row."""
    max_attempts: int = Field(default=5, gt=0)
    """Times a row is routed again after losing its worker before it fails."""
    drain_timeout_s: float = Field(default=60.0, gt=0)
    """On SIGTERM, how long running rows may finish before they are left to the journal."""
    heartbeat_timeout_s: float = Field(default=15.0, gt=0)
    """Silence after which a worker counts as lost."""
    uri_timeout_s: float = Field(default=60.0, gt=0)
    """Longest silence while a context or a batch is read from a URI."""
    uri_protocols: tuple[str, ...] = ("file", "http", "https", "s3", "gs")
    """fsspec protocols that a URI may use; a plain path counts as `file`."""
    metrics_port: int | None = Field(default=None, ge=0, le=65535)
    """TCP port of the Prometheus metrics; none serves no metrics, 0 picks a free one."""


class ClusterConfig(Section):
    """How the parts are started."""

    wiring: Literal["ray", "inprocess"] = "ray"
    """`ray`: parts are actors; `inprocess`: the same parts in the gateway's process."""
    ray_address: str | None = None
    """Address of a running Ray cluster; none starts a single-node one."""
    num_cpus: int = Field(default=4, gt=0)
    """Logical CPUs given to a single-node Ray."""
    object_store_bytes: int = Field(default=80 << 20, ge=78_643_200)
    """Ray's own object store; KV never goes through it."""
    start_timeout_s: float = Field(default=120.0, gt=0)
    """Deadline for the parts to come up."""


class Config(Section):
    """The whole tree. Loaded from YAML files (later ones win), then `--set a.b=c`."""

    model: ModelConfig = ModelConfig()
    attention: AttentionConfig = AttentionConfig()
    cache: CacheConfig = CacheConfig()
    worker: WorkerConfig = WorkerConfig()
    store: StoreConfig = StoreConfig()
    retriever: RetrieverConfig = RetrieverConfig()
    gateway: GatewayConfig = GatewayConfig()
    cluster: ClusterConfig = ClusterConfig()
    faults: FaultsConfig = FaultsConfig()

    @model_validator(mode="after")
    def _check(self) -> Config:
        if self.model.device == "cuda" and self.store.disk_dir is not None:
            raise ValueError(
                f"store.disk_dir ({self.store.disk_dir}) with model.device cuda: a GPU reads pages in "
                "memory that is pinned, which a file's is not; leave out the disk tier and raise "
                "store.capacity_bytes"
            )
        cache, policies = self.cache, self.attention.policies
        if p := format_problem(cache.kv_dtype, self.model.device, cache.page_tokens, policies):
            raise ValueError(p)
        if self.attention.sparse and self.cache.page_tokens % QUERY_BLOCK:
            raise ValueError(
                f"cache.page_tokens ({self.cache.page_tokens}) must be a multiple of "
                f"{QUERY_BLOCK} where a layer prunes"
            )
        for i, policy in enumerate(self.attention.policies):
            self._check_policy(f"attention.policies.{i}", policy)
        asked_ahead = self.retriever.remote and any(p.by_bookmark for p in policies)
        if self.retriever.asynchronous and not asked_ahead:
            raise ValueError(
                "retriever.asynchronous needs retriever.remote: true and a layer whose first stage is of "
                "scorer bookmark: only its queries are known before the step that uses their pages"
            )
        self._check_faults()
        return self

    def _check_policy(self, path: str, policy: LayerPolicy) -> None:
        page_tokens = self.cache.page_tokens
        if policy.prefill_stages is not None and self.model.device == "cuda":
            raise ValueError(
                f"{path}.prefill_stages are not done on a GPU yet; leave them out, or use model.device: cpu"
            )
        if policy.tail and page_tokens % policy.tail:
            raise ValueError(
                f"{path}.tail ({policy.tail}) must divide cache.page_tokens ({page_tokens})"
            )
        for used in (policy, policy.in_prefill):
            if not used.dense and page_tokens % used.block_tokens:
                raise ValueError(
                    f"{path}: the last chunk ({used.block_tokens}) must divide "
                    f"cache.page_tokens ({page_tokens})"
                )
            if used.by_bookmark:
                self._check_bookmark(path, used)

    def _check_bookmark(self, path: str, policy: LayerPolicy) -> None:
        page_tokens, chunk = self.cache.page_tokens, policy.stages[0].chunk
        if self.model.device == "cuda":
            raise ValueError(
                f"{path}: scorer bookmark is not done on a GPU yet; use bounds, mean or search, or "
                "model.device: cpu"
            )
        if self.retriever.weights is None:
            raise ValueError(
                f"{path}: scorer bookmark needs retriever.weights: a file of trained bookmarks, or "
                "'embedded'"
            )
        if chunk != page_tokens or policy.sink % page_tokens:
            raise ValueError(
                f"{path}: scorer bookmark ranks whole pages, so its chunk ({chunk}) must be "
                f"cache.page_tokens ({page_tokens}) and sink ({policy.sink}) a multiple of it"
            )

    def _check_faults(self) -> None:
        counts = {
            "store": self.store.count,
            "worker": self.worker.count,
            "retriever": self.retriever.count,
        }
        self.faults.check_parts(f"{kind}-{i}" for kind, n in counts.items() for i in range(n))
        if self.faults.of_disks and self.store.disk_dir is None:
            raise ValueError(
                "faults of disks (disk_full, disk_error, slow_disk) need store.disk_dir"
            )
        if self.faults.pause and self.cluster.wiring == "ray" and self.cluster.ray_address:
            raise ValueError(
                "faults.pause needs the parts' processes on this machine; with "
                "cluster.ray_address they may be anywhere: use faults.kill"
            )


def _nearest(path: tuple[str | int, ...]) -> str:
    """The closest known key to an unknown one, as a hint."""
    node: Any = Config
    for part in path[:-1]:
        if isinstance(part, int):
            continue
        field = node.model_fields.get(part)
        if field is None:
            return ""
        node = field.annotation
        while not (isinstance(node, type) and issubclass(node, BaseModel)):
            args = [a for a in getattr(node, "__args__", ()) if a is not Ellipsis]
            if not args:
                return ""
            node = args[0]
    known = list(node.model_fields)
    close = difflib.get_close_matches(str(path[-1]), known, n=1, cutoff=0.4)
    return f"; did you mean '{close[0]}'?" if close else f"; known keys: {', '.join(known)}"


def _config_error(exc: ValidationError, source: str) -> ConfigError:
    lines = []
    for error in exc.errors():
        path = ".".join(str(part) for part in error["loc"]) or "(top level)"
        if error["type"] == "extra_forbidden":
            lines.append(f"{path}: unknown key{_nearest(error['loc'])}")
        else:
            given = "" if isinstance(error["input"], Mapping) else f" (given: {error['input']!r})"
            lines.append(f"{path}: {error['msg']}{given}")
    return ConfigError(f"{source}: " + "; ".join(lines), path=lines[0].split(":")[0])


def _merge(base: dict[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in over.items():
        if isinstance(value, Mapping) and isinstance(merged.get(key), dict):
            merged[key] = _merge(merged[key], value)
        else:
            merged[key] = value
    return merged


def _apply_set(tree: dict[str, Any], assignment: str) -> None:
    """Apply one `a.b.0.c=value`; the value is read as YAML."""
    path, equals, text = assignment.partition("=")
    if not equals or not path:
        raise ConfigError(f"--set {assignment!r}: expected a.b.c=value")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as exc:
        raise ConfigError(f"--set {assignment!r}: the value is not YAML: {exc}") from exc
    node: Any = tree
    parts = path.split(".")
    for depth, part in enumerate(parts):
        here = ".".join(parts[: depth + 1])
        last = depth == len(parts) - 1
        if isinstance(node, list):
            if not part.isdigit() or int(part) >= len(node):
                raise ConfigError(f"--set {here}: no such list entry (it has {len(node)})")
            if last:
                node[int(part)] = value
            else:
                node = node[int(part)]
        elif isinstance(node, dict):
            if last:
                node[part] = value
            else:
                node = node.setdefault(part, {})
        else:
            raise ConfigError(f"--set {here}: '{parts[depth - 1]}' has no parts")


def load_config(paths: Sequence[str | Path] = (), sets: Sequence[str] = ()) -> Config:
    """Read YAML files (later win, lists are replaced), then `--set` assignments.

    Raises ConfigError naming the dotted path, or the file that is missing or not YAML.
    """
    tree: dict[str, Any] = {}
    for path in paths:
        try:
            loaded = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
        except OSError as exc:
            raise ConfigError(f"{path}: cannot be read: {exc.strerror}") from exc
        except UnicodeDecodeError as exc:
            raise ConfigError(f"{path}: not a text file: {exc}") from exc
        except yaml.YAMLError as exc:
            raise ConfigError(f"{path}: not valid YAML: {exc}") from exc
        if loaded is None:
            continue
        if not isinstance(loaded, dict):
            raise ConfigError(f"{path}: expected a mapping at the top level")
        tree = _merge(tree, loaded)
    if sets:
        # defaults must be present for a.b.0.c paths to reach list entries
        tree = _merge(config_dict(_validate(tree, _source(paths))), tree)
        for assignment in sets:
            _apply_set(tree, assignment)
    return _validate(tree, _source(paths) if not sets else "--set")


def config_text(tree: dict[str, Any]) -> str:
    """The YAML of a configuration, or of a part of one, which `load_config` reads."""
    text: str = yaml.safe_dump(tree, sort_keys=False)
    return text


def _source(paths: Sequence[str | Path]) -> str:
    return ", ".join(str(p) for p in paths) or "configuration"


def _validate(tree: dict[str, Any], source: str) -> Config:
    try:
        return Config.model_validate(tree)
    except ValidationError as exc:
        raise _config_error(exc, source) from exc


def config_dict(config: Config) -> dict[str, Any]:
    """Plain values (lists, not tuples) for YAML or msgpack."""
    return config.model_dump(mode="json")
