"""The command line: `longreach serve`, and the client commands against a running gateway."""

from __future__ import annotations

import os

import typer

from .. import __version__
from ..core.config import config_dict, config_text, load_config
from .cli_ask import generate
from .cli_base import Commands, ConfigFiles, Sets, out
from .cli_demo import ask_dense, demo
from .cli_jobs import cancel, jobs, results, submit, watch
from .cli_kv import kv_app
from .cli_plan import plan
from .cli_post_train import post_train
from .cli_serve import serve
from .cli_top import top
from .cli_train import train_retriever

# transformers and Ray print advice for other people at import; set before either is loaded
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # spinning threads starve a busy machine
os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")

app = typer.Typer(
    name="longreach",
    cls=Commands,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Answers questions over contexts far larger than an accelerator's memory.",
)
config_app = typer.Typer(no_args_is_help=True, help="Look at the configuration.")
app.add_typer(config_app, name="config")
app.add_typer(kv_app, name="kv")

for command in (serve, submit, jobs, watch, results, cancel, generate, plan, top, demo):
    app.command()(command)
app.command("dense")(ask_dense)
app.command("train-retriever")(train_retriever)
app.command("post-train")(post_train)


@config_app.command("show")
def config_show(config: ConfigFiles = [], set_: Sets = []) -> None:  # noqa: B006
    """Print the resolved configuration as YAML: files, then --set, then defaults."""
    tree = config_dict(load_config(config, set_))
    out.print(config_text(tree), end="", markup=False, soft_wrap=True)


@app.command()
def version() -> None:
    """Print the version."""
    out.print(__version__)


def main() -> None:
    """Entry point of the `longreach` command."""
    app()
