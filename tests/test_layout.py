"""The rules of the code base that a reader may rely on, held by machine.

Folders import only downwards and relatively, foreign packages stay where they belong, files stay
small, the wheel is complete, and the checkout never shadows a package of somebody else.
"""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from importlib import import_module, metadata
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
MAX_LINES = 500

# folder -> folders of ours that it may import
LAYERS = {
    "core": {"core"},
    "kernels": {"kernels", "core"},
    "kvstore": {"kvstore", "core"},
    "workers": {"workers", "kernels", "kvstore", "core"},
    "cluster": {"cluster", "workers", "kernels", "kvstore", "core"},
}

# folder -> foreign packages that any of its files may import
FOREIGN = {
    "core": {"numpy", "msgpack", "yaml", "pydantic"},
    "kernels": {"torch", "numpy", "numba", "llvmlite", "triton"},
    "kvstore": {"numpy", "torch", "xxhash", "tenacity", "pydantic", "fsspec"},
    "workers": {
        "torch",
        "numpy",
        "transformers",
        "tokenizers",
        "huggingface_hub",
        "safetensors",
        "gguf",
        "xxhash",
        "pydantic",
    },
    "cluster": {
        "grpc",
        "grpc_health",
        "grpc_reflection",
        "grpc_status",
        "google",
        "numpy",
        "torch",  # `plan` measures the machine; nothing that serves requests may load it
        "pydantic",
        "pydantic_core",
        "prometheus_client",
        "fsspec",
        "tenacity",
        "typer",
        "rich",
        "yaml",
        "xxhash",
    },
}

# foreign package -> the only files that may import it, as patterns of paths
CONFINED = {
    "ray": r"[a-z]+/\w+_actor\.py|cluster/ray_runtime\.py",
    "zmq": r"kvstore/zmq_transport\.py",
    "triton": r"kernels/triton_\w+\.py",
}

# the environment is not configuration: command line and actor starts only, and Ray's wiring, since
# Ray takes its token from nowhere else
ENVIRONMENT = r"cluster/cli\w*\.py|cluster/ray_runtime\.py|[a-z]+/\w+_actor\.py"


def _generated(path: Path) -> bool:
    return "_pb2" in path.name


def _ours() -> list[Path]:
    """Every file of the package that a person wrote."""
    files = [ROOT / "__init__.py", ROOT / "__main__.py"]
    for folder in LAYERS:
        files += sorted((ROOT / folder).rglob("*.py"))
    return [path for path in files if not _generated(path)]


def _name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


OURS = {_name(path): path for path in _ours()}
IN_FOLDERS = sorted(name for name in OURS if "/" in name)


def _imports(path: Path) -> Iterator[tuple[int, str]]:
    """(line, absolute module) of every import; ours start with `longreach`.

    Relative imports are resolved as Python does; one that leaves the package is an error.
    """
    package = ["longreach", *path.relative_to(ROOT).parts[:-1]]
    for node in ast.walk(ast.parse(path.read_text(), str(path))):
        if isinstance(node, ast.Import):
            for alias in node.names:
                assert alias.name.split(".")[0] != "longreach", (
                    f"{_name(path)}:{node.lineno}: import {alias.name}: ours are imported relatively"
                )
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            assert node.module is not None
            assert node.module.split(".")[0] != "longreach", (
                f"{_name(path)}:{node.lineno}: from {node.module}: ours are imported relatively"
            )
            yield node.lineno, node.module
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1]
            assert base, f"{_name(path)}:{node.lineno}: the import leaves the package"
            target = [*base, *(node.module or "").split(".")] if node.module else base
            if len(target) > 1:
                yield node.lineno, ".".join(target)
            else:
                for alias in node.names:
                    yield node.lineno, f"longreach.{alias.name}"


def test_the_rules_look_at_real_files() -> None:
    """A rule over an empty list would pass in silence."""
    assert len(OURS) > 40
    for folder in LAYERS:
        assert any(name.startswith(f"{folder}/") for name in IN_FOLDERS), folder


def test_imports_of_ours_are_relative_and_go_downwards() -> None:
    wrong = []
    for name in IN_FOLDERS:
        folder = name.split("/")[0]
        for line, module in _imports(OURS[name]):
            top, _, rest = module.partition(".")
            if top == "longreach" and rest.split(".")[0] not in LAYERS[folder] | {"__version__"}:
                wrong.append(f"{name}:{line}: {folder} must not import {module}")
            if top in LAYERS:
                wrong.append(f"{name}:{line}: write a relative import of {module}")
    assert not wrong


def test_foreign_packages_stay_where_they_belong() -> None:
    wrong = []
    for name in IN_FOLDERS:
        folder = name.split("/")[0]
        for line, module in _imports(OURS[name]):
            top = module.split(".")[0]
            if top == "longreach" or top in sys.stdlib_module_names:
                continue
            where = CONFINED.get(top)
            if where is not None and not re.fullmatch(where, name):
                wrong.append(f"{name}:{line}: {top} is confined to {where}")
            if where is None and top not in FOREIGN[folder]:
                wrong.append(f"{name}:{line}: {top} has no place in {folder}")
    assert not wrong


def _distribution_names(requirements: list[str]) -> set[str]:
    found = (re.match(r"[A-Za-z0-9_.-]+", requirement) for requirement in requirements)
    return {re.sub(r"[-_.]+", "-", match[0]).lower() for match in found if match}


def test_every_foreign_package_is_a_declared_dependency() -> None:
    """Directly, or as a dependency of a declared one that cannot do without it."""
    comes_with = {
        "llvmlite": "numba",
        "pydantic-core": "pydantic",
        "huggingface-hub": "transformers",
        "tokenizers": "transformers",
        "googleapis-common-protos": "grpcio-status",
    }
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    declared = _distribution_names(project["dependencies"])
    declared |= _distribution_names(project["optional-dependencies"]["gpu"])
    owners = metadata.packages_distributions()
    tops = {module.split(".")[0] for name in IN_FOLDERS for _, module in _imports(OURS[name])}
    for top in tops - {"longreach"} - set(sys.stdlib_module_names):
        dists = {re.sub(r"[-_.]+", "-", dist).lower() for dist in owners.get(top, [])}
        dists |= {comes_with[dist] for dist in dists if dist in comes_with}
        assert dists & declared, f"{top} (of {sorted(dists)}) is not in pyproject's dependencies"


def test_files_are_small_and_say_what_they_are() -> None:
    wrong = []
    for name, path in OURS.items():
        text = path.read_text()
        if len(text.splitlines()) > MAX_LINES:
            wrong.append(
                f"{name} has {len(text.splitlines())} lines, {MAX_LINES} at most: split it"
            )
        if name != "__main__.py" and not ast.get_docstring(ast.parse(text)):
            wrong.append(f"{name} has no docstring")
    assert not wrong


def test_the_environment_is_read_only_where_processes_start() -> None:
    wrong = []
    reads = {"environ", "environb", "getenv", "putenv"}
    for name, path in OURS.items():
        if re.fullmatch(ENVIRONMENT, name):
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            attribute = isinstance(node, ast.Attribute) and node.attr in reads
            imported = (
                isinstance(node, ast.ImportFrom)
                and node.module == "os"
                and reads & {alias.name for alias in node.names}
            )
            if attribute or imported:
                wrong.append(f"{name}:{node.lineno}: take it from the configuration")
    assert not wrong


def test_nothing_is_pickled_by_hand() -> None:
    """Headers are msgpack, page bytes are raw: unpickling foreign bytes runs foreign code."""
    unsafe = {"pickle", "cloudpickle", "marshal", "shelve"}
    wrong = [
        f"{name}:{line}: {module}"
        for name in IN_FOLDERS
        for line, module in _imports(OURS[name])
        if module.split(".")[0] in unsafe
    ]
    assert not wrong


def test_the_root_holds_no_module_of_its_own() -> None:
    """Each root file goes into the wheel, and one named like a standard module breaks Python."""
    assert {path.name for path in ROOT.glob("*.py")} == {"__init__.py", "__main__.py"}
    folders = {path.name for path in ROOT.iterdir() if path.is_dir()}
    assert not folders & set(sys.stdlib_module_names)


def test_folders_carry_no_init_file() -> None:
    """As a regular package our `kernels` would shadow the one that transformers probes for."""
    for folder in (*LAYERS, "tests", "benchmarks", "examples"):
        assert not list((ROOT / folder).rglob("__init__.py")), folder
    # a conftest in the root would load the package a second time, under the checkout's name
    assert not (ROOT / "conftest.py").exists()


def test_the_package_list_is_complete() -> None:
    """A folder that is not listed is silently absent from the wheel."""
    setuptools = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    with_python = {
        ".".join(("longreach", *path.parent.relative_to(ROOT).parts))
        for folder in LAYERS
        for path in (ROOT / folder).rglob("*.py")
    }
    assert set(setuptools["packages"]) == with_python | {"longreach"}
    assert setuptools["package-dir"] == {"longreach": "."}
    top_level = {p.parent.name for p in ROOT.glob("[a-z]*/*.py")} - {"build", "dist"}
    assert top_level <= set(LAYERS) | {"benchmarks", "tests", "examples"}, "a folder without a rule"


def test_public_names_resolve() -> None:
    package = import_module("longreach")
    for name in package.__all__:
        assert getattr(package, name) is not None, name
    with pytest.raises(AttributeError, match="no_such_name"):
        package.no_such_name  # noqa: B018


def _python(*arguments: str) -> str:
    """Run python in the checkout's root, where `kernels` and the rest lie on the path."""
    done = subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_python_m_longreach_works_from_the_root() -> None:
    shown = _python("-m", "longreach", "--help")
    for verb in ("serve", "submit", "watch", "results", "cancel", "generate", "plan", "demo"):
        assert verb in shown


def test_transformers_is_not_confused_by_our_folders() -> None:
    """It probes for a module named `kernels` and executes what it finds: it must find none."""
    _python(
        "-c",
        "import sys; assert sys.path[0] == ''\n"
        "from transformers.utils import is_kernels_available\n"
        "from transformers import LlamaConfig, LlamaForCausalLM\n"
        "is_kernels_available()\n"
        "LlamaForCausalLM(LlamaConfig(vocab_size=8, hidden_size=8, intermediate_size=8,"
        " num_hidden_layers=1, num_attention_heads=1))\n"
        "assert getattr(sys.modules.get('kernels'), '__file__', None) is None\n",
    )


@pytest.mark.parametrize(
    ("module", "absent"),
    [
        ("longreach", ("torch", "ray", "grpc", "pydantic")),
        ("longreach.core.config", ("torch", "ray", "grpc", "transformers")),
        ("longreach.kvstore.transport", ("torch", "ray", "grpc", "transformers")),
        ("longreach.cluster.client", ("torch", "ray", "transformers")),
        ("longreach.cluster.gateway", ("torch", "ray")),
        ("longreach.cluster.local_runtime", ("ray",)),
        ("longreach.workers.decode_service", ("ray", "grpc")),
    ],
)
def test_parts_start_without_what_they_do_not_need(module: str, absent: tuple[str, ...]) -> None:
    _python(
        "-c",
        f"import sys, {module}\nfound = [name for name in {absent!r} if name in sys.modules]\n"
        f"assert not found, f'importing {module} brings {{found}}'",
    )
