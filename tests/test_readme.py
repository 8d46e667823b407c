"""What the README tells a reader to type exists, and what it says stands where it says."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import click
import pytest
import typer

from longreach.core.config import load_config

ROOT = Path(__file__).resolve().parent.parent
TEXT = (ROOT / "README.md").read_text()
MAKEFILE = (ROOT / "Makefile").read_text()


def _blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", TEXT, re.MULTILINE | re.DOTALL)


def _console() -> list[list[str]]:
    """The typed lines of the console blocks, split as a shell would."""
    return [
        shlex.split(line[2:], comments=True)
        for block in _blocks("console")
        for line in block.splitlines()
        if line.startswith("$ ")
    ]


def _targets() -> set[str]:
    return set(re.findall(r"^([a-z]+):", MAKEFILE, re.MULTILINE))


def _command(words: list[str]) -> tuple[click.Command, list[str]]:
    """The command that the words name, and what is left of them."""
    from longreach.cluster.cli import app

    command: click.Command = typer.main.get_command(app)
    while isinstance(command, click.Group) and words:
        found = command.commands.get(words[0])
        assert found is not None, f"no command {words[0]!r}"
        command, words = found, words[1:]
    return command, words


def test_make_lines_name_real_targets() -> None:
    used = {words[1] for words in _console() if words[0] == "make"}
    assert {"demo", "test"} <= used
    assert used <= _targets()
    assert set(re.findall(r"`make ([a-z]+)`", TEXT)) <= _targets()


def test_the_makefile_has_every_chore() -> None:
    chores = {"demo", "test", "lint", "bench", "proto", "clean", "setup"}
    assert chores <= _targets()
    phony = re.search(r"^\.PHONY:(.*)$", MAKEFILE, re.MULTILINE)
    assert phony is not None
    assert chores <= set(phony[1].split())


def test_ci_runs_what_a_person_runs() -> None:
    run = ROOT / ".ci" / "run"
    assert run.stat().st_mode & 0o111, ".ci/run must be executable"
    assert "make test" in run.read_text()


def test_longreach_lines_parse() -> None:
    """Every line is given to the real parser: verbs, options, required values, existing files."""
    lines = [w[1:] for w in _console() if w[0].endswith("longreach")]
    verbs = {words[0] for words in lines}
    assert {"serve", "submit", "jobs", "watch", "results", "cancel", "generate", "plan"} <= verbs
    for words in lines:
        command, rest = _command(words)
        command.make_context(words[0], rest).close()
        for word in rest:
            if "/" in word:
                assert (ROOT / word).exists(), word


def test_the_table_of_commands_names_real_ones() -> None:
    for verb in re.findall(r"^\| (`[a-z`, ]+`) \|", TEXT, re.MULTILINE):
        for name in re.findall(r"`([a-z]+)`", verb):
            _command([name])


def test_the_tree_lists_every_folder_and_no_other() -> None:
    tree = next(block for block in _blocks("text") if block.startswith("core/"))
    listed = re.findall(r"^([a-z0-9]+)/ ", tree, re.MULTILINE)
    real = {
        path.name
        for path in ROOT.iterdir()
        if path.is_dir()
        and not path.name.startswith((".", "__"))
        and not path.name.endswith(".egg-info")
        and path.name not in {"build", "dist", "out"}
    }
    assert len(listed) == len(set(listed))
    assert set(listed) == real
    for line in tree.splitlines():
        assert re.search(r"/ +\S.{10,}", line), f"no purpose: {line!r}"


@pytest.mark.parametrize("link", sorted(set(re.findall(r"\]\(([^)#:]+)\)", TEXT))))
def test_links_lead_somewhere(link: str) -> None:
    assert (ROOT / link).exists()


def test_named_configs_exist_and_stack_as_told() -> None:
    named = set(re.findall(r"`(configs/[\w.-]+\.yaml)`", TEXT))
    assert {path.relative_to(ROOT).as_posix() for path in (ROOT / "configs").glob("*")} == named
    stacked = load_config([ROOT / "configs/dev.yaml", ROOT / "configs/infinitehip-5k.yaml"])
    assert stacked.attention.policies[1].stages[0].chunk == 64
    assert stacked.store.replicas == 2


def test_the_batch_line_is_a_batch_line() -> None:
    lines = [line for block in _blocks("json") for line in block.splitlines()]
    demo = [json.loads(line) for line in (ROOT / "examples/demo/batch.jsonl").open()]
    for line in lines:
        row = json.loads(line)
        assert set(row) <= set(demo[0])
        assert (ROOT / row["context_uri"]).exists()
