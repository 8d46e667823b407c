"""The configuration tree: presets hold the paper's numbers, mistakes name their path."""

import ast
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import BaseModel

from longreach.core import config as config_module
from longreach.core.config import Config, config_dict, load_config
from longreach.core.errors import ConfigError, InvalidInput

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))
K = 1024

# chunks, tokens kept in layers 0-2 and in the others, refresh (arXiv 2502.08910, Appendix F)
PRESETS = {
    "infinitehip-3k": ((256, 32, 8), (32 * K, 8 * K, 4 * K), (32 * K, 8 * K, 2 * K), (16, 8, 4)),
    "infinitehip-3k-fast": (
        (256, 32, 8),
        (32 * K, 8 * K, 4 * K),
        (32 * K, 8 * K, 2 * K),
        (32, 16, 8),
    ),
    "infinitehip-3k-flash": (
        (256, 32, 8),
        (32 * K, 8 * K, 4 * K),
        (32 * K, 8 * K, 2 * K),
        (96, 24, 8),
    ),
    "infinitehip-5k": ((64, 32, 16), (32 * K, 16 * K, 4 * K), (32 * K, 16 * K, 4 * K), (16, 8, 4)),
}


def _write(folder: Path, name: str, text: str) -> Path:
    path = folder / name
    path.write_text(text)
    return path


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_file_in_configs_loads(path: Path) -> None:
    config = load_config([path])
    # the printed form is again a configuration, and the same one
    assert Config.model_validate(yaml.safe_load(yaml.safe_dump(config_dict(config)))) == config


def test_the_files_are_the_ones_tested_here() -> None:
    assert {path.stem for path in CONFIGS} == {
        "dev",
        "infinitehip-16k-shallow",
        "longreach",
        "longreach-3k",
        "one-machine-1m",
        "retrolm",
        "single-gpu-3m",
        *PRESETS,
    }


@pytest.mark.parametrize("name", PRESETS)
def test_presets_hold_the_papers_numbers(name: str) -> None:
    chunks, keep_first, keep_rest, refresh = PRESETS[name]
    path = ROOT / "configs" / f"{name}.yaml"
    assert set(yaml.safe_load(path.read_text())) == {"attention"}, "a preset sets selection only"
    first, rest = load_config([path]).attention.policies
    assert (first.layers, rest.layers) == ("0-2", "rest")
    assert (first.select_rope, rest.select_rope) == ("chunk-indexed", "relative")
    for policy, keep in ((first, keep_first), (rest, keep_rest)):
        assert (policy.sink, policy.window) == (256, 1024)
        assert policy.attend_rope == "streaming"
        assert policy.head_reduce == "all"
        assert tuple(stage.scorer for stage in policy.stages) == ("search",) * 3
        assert tuple(stage.variant for stage in policy.stages) == ("authors",) * 3
        assert tuple(stage.chunk for stage in policy.stages) == chunks
        assert tuple(stage.keep for stage in policy.stages) == keep
        assert tuple(stage.refresh for stage in policy.stages) == refresh
        assert tuple(stage.query_stride for stage in policy.stages) == (4, 4, 1)


def test_the_shallow_preset_has_one_stage_and_a_large_window() -> None:
    path = ROOT / "configs" / "infinitehip-16k-shallow.yaml"
    assert set(yaml.safe_load(path.read_text())) == {"attention"}
    first, rest = load_config([path]).attention.policies
    assert (first.layers, first.window, rest.window) == ("0-2", 128 * K, 1024)
    for policy in (first, rest):
        assert [(s.scorer, s.chunk, s.keep) for s in policy.stages] == [("search", 32, 16 * K)]


def test_our_preset_has_the_sizes_of_3k_and_searches_nothing() -> None:
    ours = load_config([ROOT / "configs" / "longreach-3k.yaml"]).attention
    paper = load_config([ROOT / "configs" / "infinitehip-3k.yaml"]).attention
    for mine, theirs in zip(ours.policies, paper.policies, strict=True):
        # by content everywhere: docs/decisions/0008
        assert (mine.layers, mine.select_rope) == (theirs.layers, "relative")
        assert (mine.sink, mine.window) == (theirs.sink, theirs.window)
        for at in (0, -1):
            assert mine.stages[at].keep == theirs.stages[at].keep
            assert mine.stages[at].refresh == theirs.stages[at].refresh
        assert {stage.scorer for stage in mine.stages} == {"bounds"}
    # the paper has one query block for everything
    assert (ours.question_block, paper.question_block) == (16, 64)


def test_both_together_attend_to_as_much_as_our_preset() -> None:
    both = load_config([ROOT / "configs" / "longreach.yaml"])
    ours = load_config([ROOT / "configs" / "longreach-3k.yaml"]).attention
    assert (both.retriever.weights, both.cache.page_tokens) == ("embedded", 128)
    first, rest = both.attention.policies
    assert [policy.by_bookmark for policy in (first, rest)] == [False, True]
    for policy in (first, rest):
        assert policy.window == ours.policies[-1].window
        assert policy.stages[-1].keep == ours.policies[-1].stages[-1].keep
        assert policy.stages[0].chunk == both.cache.page_tokens


def test_dev_runs_our_preset_on_one_node() -> None:
    dev = load_config([ROOT / "configs" / "dev.yaml"])
    assert dev.attention == load_config([ROOT / "configs" / "longreach-3k.yaml"]).attention
    assert (dev.cluster.wiring, dev.cluster.ray_address) == ("ray", None)
    assert (dev.worker.count, dev.retriever.count) == (1, 1)
    assert (dev.store.count, dev.store.replicas) == (2, 2)
    assert dev.gateway.port == 50051
    assert dev.model.name == "embedded"


def test_without_files_everything_has_a_default_and_is_dense() -> None:
    config = load_config()
    assert config == Config()
    assert not config.attention.sparse


@pytest.mark.parametrize(
    ("text", "path", "hint"),
    [
        ("gatewy: {port: 1}", "gatewy", "gateway"),
        ("gateway: {prot: 1}", "gateway.prot", "port"),
        ("store: {replica: 1}", "store.replica", "replicas"),
        ("attention: {policies: [{sinc: 1}]}", "attention.policies.0.sinc", "sink"),
        (
            "attention: {policies: [{stages: [{chunk: 8, keep: 8}, {chnk: 8, keep: 8}]}]}",
            "attention.policies.0.stages.1.chnk",
            "chunk",
        ),
    ],
)
def test_an_unknown_key_names_its_path_and_the_nearest(
    tmp_path: Path, text: str, path: str, hint: str
) -> None:
    file = _write(tmp_path, "c.yaml", text)
    with pytest.raises(ConfigError) as caught:
        load_config([file])
    assert f"{path}: unknown key; did you mean '{hint}'?" in caught.value.message
    assert str(file) in caught.value.message
    assert isinstance(caught.value, InvalidInput)


def test_an_unknown_key_without_a_near_one_lists_the_known(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="zzzzzz: unknown key; known keys: name, revision,"):
        load_config([_write(tmp_path, "c.yaml", "model: {zzzzzz: 1}")])


@pytest.mark.parametrize(
    ("text", "path", "words"),
    [
        ("gateway: {port: 99999}", "gateway.port", "99999"),
        ("gateway: {port: many}", "gateway.port", "many"),
        ("store: {lease_s: -1}", "store.lease_s", "greater than 0"),
        ("store: {timeout_s: .inf}", "store.timeout_s", "finite"),
        ("store: {timeout_s: .nan}", "store.timeout_s", "finite"),
        ("cache: {kv_dtype: int3}", "cache.kv_dtype", "'int8', 'float8', 'int4' or 'int4c'"),
        ("cluster: {wiring: mesh}", "cluster.wiring", "'ray' or 'inprocess'"),
        ("worker: 3", "worker", "valid dictionary"),
        ("worker:", "worker", "valid dictionary"),
        ("attention: {policies: []}", "attention.policies", "at least 1 item"),
        ("attention: {policies: [{layers: 3-1}]}", "attention.policies.0", "ends before it starts"),
        ("attention: {policies: [{layers: first}]}", "attention.policies.0", "like 0-2"),
        (
            "attention: {policies: [{stages: [{keep: 8}]}]}",
            "attention.policies.0.stages.0.chunk",
            "",
        ),
    ],
)
def test_a_bad_value_names_its_path(tmp_path: Path, text: str, path: str, words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config([_write(tmp_path, "c.yaml", text)])
    assert f"{path}: " in caught.value.message
    assert words in caught.value.message
    assert caught.value.details["path"] == path


def _stages(*stages: dict[str, int], **policy: Any) -> str:
    return yaml.safe_dump({"attention": {"policies": [{"stages": list(stages), **policy}]}})


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (
            _stages({"chunk": 64, "keep": 1024}, {"chunk": 8, "keep": 2048}),
            "stages.1.keep (2048) exceeds what enters it (1024)",
        ),
        (_stages({"chunk": 64, "keep": 1000}), "keep (1000) must be a multiple of chunk (64)"),
        (
            _stages({"chunk": 64, "keep": 1024}, window=32),
            "window (32) must be at least the first chunk (64)",
        ),
        (
            _stages({"chunk": 64, "keep": 1024}) + "cache: {page_tokens: 32}",
            "cache.page_tokens (32) must be a multiple of 64",
        ),
        (
            _stages({"chunk": 128, "keep": 1024}),
            "attention.policies.0: the last chunk (128) must divide cache.page_tokens (64)",
        ),
    ],
)
def test_contradictory_budgets_are_refused_with_both_numbers(
    tmp_path: Path, text: str, words: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config([_write(tmp_path, "c.yaml", text)])
    assert words in caught.value.message


@pytest.mark.parametrize(
    ("sets", "words"),
    [
        (["store.disk_bytes=5"], "store.disk_bytes (5) needs store.disk_dir"),
        (["store.disk_write=through"], "store.disk_write (through) needs store.disk_dir"),
        (["store.disk_dir=/d"], "store.disk_dir (/d) needs store.disk_bytes"),
        (
            ["store.low_watermark=0.95"],
            "store.low_watermark (0.95) must be below store.high_watermark (0.95)",
        ),
        (
            ["model.device=cuda", "store.disk_dir=/d", "store.disk_bytes=1000000"],
            "store.disk_dir (/d) with model.device cuda",
        ),
    ],
)
def test_contradictions_of_the_disk_tier(sets: list[str], words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(sets=sets)
    assert words in caught.value.message


_BOOKMARKS = "attention.policies.0.stages=[{scorer: bookmark, chunk: %d, keep: 1024}]"
_WITH_WEIGHTS = ["cache.page_tokens=128", "retriever.weights=w", "attention.policies.0.window=128"]


@pytest.mark.parametrize(
    ("sets", "words"),
    [
        (["retriever.weights=null"], "policies.0: scorer bookmark needs retriever.weights"),
        (["model.device=cuda"], "policies.0: scorer bookmark is not done on a GPU yet"),
        (["cache.page_tokens=256"], "its chunk (128) must be cache.page_tokens (256)"),
        (["attention.policies.0.sink=64"], "and sink (64) a multiple of it"),
    ],
)
def test_bookmarks_rank_whole_pages_with_weights_on_a_cpu(sets: list[str], words: str) -> None:
    good = [*_WITH_WEIGHTS, _BOOKMARKS % 128]
    assert load_config(sets=good).attention.by_bookmark
    with pytest.raises(ConfigError) as caught:
        load_config(sets=[*good, *sets])
    assert words in caught.value.message
    for_prefill = [one.replace("stages", "prefill_stages") for one in good]
    with pytest.raises(ConfigError, match="not done on a GPU" if "cuda" in sets[0] else "bookmark"):
        load_config(sets=[*for_prefill, *sets])


def test_a_dense_configuration_may_have_any_page_size() -> None:
    assert load_config(sets=["cache.page_tokens=16"]).cache.page_tokens == 16


def test_later_files_win_and_lists_are_replaced(tmp_path: Path) -> None:
    a = _write(tmp_path, "a.yaml", "worker: {max_rows: 2, count: 3}\ngateway: {port: 1}")
    b = _write(tmp_path, "b.yaml", "worker: {max_rows: 4}\n" + _stages({"chunk": 64, "keep": 64}))
    empty = _write(tmp_path, "empty.yaml", "# nothing\n")
    config = load_config([ROOT / "configs" / "infinitehip-3k.yaml", a, empty, b])
    assert (config.worker.max_rows, config.worker.count, config.gateway.port) == (4, 3, 1)
    assert [policy.layers for policy in config.attention.policies] == ["all"]


def test_set_reaches_sections_and_list_entries() -> None:
    config = load_config(
        [ROOT / "configs" / "dev.yaml"],
        [
            "attention.policies.1.stages.1.keep=1024",
            "attention.policies.1.stages.1.refresh=2",
            "gateway.port=0",
            "model.name=org/name=x",
            "model.served_names=[a, b]",
            "model.revision=null",
            "store.lease_s=1.5",
        ],
    )
    first, rest = config.attention.policies
    assert (rest.stages[1].keep, rest.stages[1].refresh) == (1024, 2)
    assert first.stages[1].keep == 4096
    assert (config.gateway.port, config.store.lease_s) == (0, 1.5)
    assert (config.model.name, config.model.served_names) == ("org/name=x", ("a", "b"))


def test_set_wins_over_files_and_the_last_set_over_the_first(tmp_path: Path) -> None:
    file = _write(tmp_path, "c.yaml", "worker: {max_rows: 2}")
    sets = ["worker.max_rows=3", "worker.max_rows=5"]
    assert load_config([file], sets).worker.max_rows == 5


@pytest.mark.parametrize(
    ("assignment", "words"),
    [
        ("gateway.port", "expected a.b.c=value"),
        ("=3", "expected a.b.c=value"),
        ("gateway.prot=1", "gateway.prot: unknown key; did you mean 'port'?"),
        ("gateway.port.tcp=1", "'port' has no parts"),
        ("attention.policies.7.sink=1", "attention.policies.7: no such list entry (it has 1)"),
        ("attention.policies.first.sink=1", "no such list entry"),
        ("attention.policies.0.stages.0.keep=8", "no such list entry (it has 0)"),
        ("worker.max_rows=[", "the value is not YAML"),
        ("worker.max_rows=0", "worker.max_rows: Input should be greater than 0 (given: 0)"),
    ],
)
def test_a_bad_set_says_what_is_wrong(assignment: str, words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(sets=[assignment])
    assert words in caught.value.message
    assert "--set" in caught.value.message


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "cannot be read"),
        (b"a: [1", "not valid YAML"),
        (b"- a\n- b\n", "expected a mapping"),
        (b"GGUF\x03\x00\xff\xfe", "not a text file"),
        (b"1: {a: b}", "1"),
        (b"!!python/object/apply:os.getcwd []", "not valid YAML"),
    ],
)
def test_a_file_that_cannot_be_used_is_named(
    tmp_path: Path, content: bytes | None, words: str
) -> None:
    path = tmp_path / "c.yaml"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ConfigError) as caught:
        load_config([path])
    assert str(path) in caught.value.message
    assert words in caught.value.message


def test_all_mistakes_are_reported_at_once(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config([_write(tmp_path, "c.yaml", "worker: {max_rows: 0, cuont: 1}\nstor: {}")])
    for part in ("worker.max_rows", "worker.cuont", "stor: unknown"):
        assert part in caught.value.message


SPARSE = "attention: {policies: [{stages: [{chunk: 64, keep: 512}], window: 127, sink: 64}]}"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("model: {device: cuda}", "no GPU kernel reads it"),
        ("cache: {page_tokens: 96}", r"page_tokens \(96\) must be a multiple of 64"),
        (SPARSE, r"policies.0.window \(127\) must exceed its first chunk \(64\) by 64"),
    ],
)
def test_what_int4c_cannot_go_with_is_said(tmp_path: Path, text: str, words: str) -> None:
    path = _write(tmp_path, "c.yaml", text)
    int4c = "cache.kv_dtype=int4c"
    with pytest.raises(ConfigError, match=words):
        load_config([path], [int4c])
    load_config([path], [int4c.replace("int4c", "int4")])
    if "window" in words:  # prefill's own stages are held to it as well
        prefill = _write(tmp_path, "p.yaml", text.replace("stages", "prefill_stages"))
        with pytest.raises(ConfigError, match=words):
            load_config([prefill], [int4c])
    load_config([_write(tmp_path, "d.yaml", SPARSE.replace("127", "128"))], [int4c])


def test_the_tree_is_frozen() -> None:
    with pytest.raises(ValueError, match="frozen"):
        Config().gateway.port = 1  # type: ignore[misc]


@pytest.mark.parametrize("module", ["config", "stage", "page_key"])
def test_every_field_has_a_sentence(module: str) -> None:
    """A string stands below each field of each model; a section's fields are the sections."""
    path = Path(config_module.__file__).with_name(f"{module}.py")
    missing = []
    for node in ast.parse(path.read_text()).body:
        if not isinstance(node, ast.ClassDef) or node.name == "Config":
            continue
        for field, after in zip(node.body, [*node.body[1:], None], strict=True):
            if not isinstance(field, ast.AnnAssign) or not isinstance(field.target, ast.Name):
                continue
            documented = (
                isinstance(after, ast.Expr)
                and isinstance(after.value, ast.Constant)
                and str(after.value.value).rstrip().endswith(".")
            )
            if not documented:
                missing.append(f"{node.name}.{field.target.id}")
    assert not missing


def test_every_section_says_what_it_is() -> None:
    for name, field in Config.model_fields.items():
        section = field.annotation
        assert isinstance(section, type), name
        assert issubclass(section, BaseModel), name
        assert section.__doc__, name
        assert field.default == section(), "a default is written once, in the section"
