"""llama.cpp on the same GGUF and the same tokens, in an environment and a process of its own.

    python -m benchmarks.llama_cpp --setup      once: it is built from source, which takes minutes

Without --setup this file is the child: run by that environment's Python it answers requests with
progress and a result, one JSON object a line, and imports nothing of ours. It is started isolated
(-I), because this file would otherwise be found under the name of the package that it imports.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import os
import queue
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import IO, Any

HERE = Path(__file__).resolve()
ENVIRONMENT = HERE.parent.parent / ".venv-llama"
PACKAGES = (
    "llama-cpp-python==0.3.36",
    "diskcache==5.6.3",
    "Jinja2==3.1.6",
    "MarkupSafe==3.0.4",
    "numpy==2.4.6",
    "typing_extensions==4.16.0",
)
CMAKE_ARGS = "-DGGML_NATIVE=ON -DGGML_OPENMP=ON -DGGML_LLAMAFILE=ON -DLLAVA_BUILD=OFF"
"""Every instruction of this machine's CPU; no image models. On a quiet machine prefill and decode with
OpenMP and without differed by less than 2 percent: llama.cpp's own default stays."""
SETUP = "python -m benchmarks.llama_cpp --setup"
SILENCE_S = 600.0
"""Longest wait for a sign of life: a batch of 2,048 tokens at depth 131,072 takes minutes."""
BATCH_TOKENS = 2048
WARM_UP_TOKENS = 64
WAYS = {"llama.cpp with flash attention": True, "llama.cpp without": False}
ERROR_LEVEL = 4
"""llama.cpp's log level of errors; the lines below it are dropped."""

Row = dict[str, Any]
Say = Callable[[str], None]


class LlamaCppError(RuntimeError):
    """llama.cpp is not there or failed; the message says what to do or what it said last."""


# --- the environment ------------------------------------------------------------------------------


def _stamp(environment: Path) -> Path:
    return environment / ".installed"


def _recipe() -> str:
    return "\n".join([*PACKAGES, CMAKE_ARGS, ""])


def environment_python(environment: Path = ENVIRONMENT) -> Path:
    """Python of the environment. Raises LlamaCppError if it was not built, or not as pinned."""
    stamp = _stamp(environment)
    if not stamp.is_file() or stamp.read_text() != _recipe():
        state = "was built otherwise than pinned" if stamp.is_file() else "does not exist"
        raise LlamaCppError(
            f"llama.cpp's environment {environment.name} {state}; "
            f"build it once with: {SETUP} (some minutes), or leave it out with --skip-llama"
        )
    return environment / "bin" / "python"


def ensure_environment(environment: Path = ENVIRONMENT, n_jobs: int = 1) -> Path:
    """Python of the environment, which is built if it is not there as pinned.

    Niced, with n_jobs compilers. Raises LlamaCppError without a C compiler or if the build fails.
    """
    with contextlib.suppress(LlamaCppError):
        return environment_python(environment)
    if not (shutil.which("cc") and shutil.which("c++")):
        raise LlamaCppError("llama.cpp is built from source and needs cc and c++ (Debian: g++)")
    python = environment / "bin" / "python"
    # never out of pip's cache: a wheel of another machine would hold its instructions
    install = ["-m", "pip", "install", "--no-cache-dir", "--disable-pip-version-check", *PACKAGES]
    settings = {"CMAKE_ARGS": CMAKE_ARGS, "CMAKE_BUILD_PARALLEL_LEVEL": str(n_jobs)}
    try:
        subprocess.run([sys.executable, "-m", "venv", "--clear", str(environment)], check=True)
        (environment / ".gitignore").write_text("*\n")
        subprocess.run(
            [str(python), *install],
            check=True,
            env={**os.environ, **settings},
            preexec_fn=lambda: os.nice(19),
        )
    except subprocess.CalledProcessError as error:
        raise LlamaCppError(f"llama.cpp could not be built: {error}") from error
    _stamp(environment).write_text(_recipe())
    return python


# --- the parent's side ----------------------------------------------------------------------------


def evaluate(
    request: Row, say: Say, *, python: Path | None = None, silence_s: float = SILENCE_S
) -> Row:
    """The child's result on a request (see `_measure`); a fresh process, so that its peak is its own.

    Raises LlamaCppError if it fails, or says nothing for silence_s.
    """
    command = [str(python or environment_python()), "-I", str(HERE)]
    with tempfile.TemporaryFile("w+", errors="replace") as log:
        pipe = subprocess.PIPE
        child = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=log, text=True)
        assert child.stdin is not None
        assert child.stdout is not None
        lines: queue.SimpleQueue[str] = queue.SimpleQueue()
        threading.Thread(target=_pump, args=(child.stdout, lines), daemon=True).start()
        try:
            # a child that is already gone is noticed by the end of what it said
            with contextlib.suppress(BrokenPipeError):
                child.stdin.write(json.dumps(request) + "\n")
                child.stdin.close()
            return _result(lines, say, silence_s)
        except LlamaCppError as error:
            log.seek(0)
            last = log.read().strip()[-2000:]
            raise LlamaCppError(f"{error}; it said last: {last or 'nothing'}") from error
        finally:
            child.kill()
            child.wait(timeout=10.0)


def _pump(stream: Iterable[str], lines: queue.SimpleQueue[str]) -> None:
    """Moves lines into a queue, which can be waited for with a deadline; an empty one at the end."""
    for line in stream:
        lines.put(line)
    lines.put("")


def _result(lines: queue.SimpleQueue[str], say: Say, silence_s: float) -> Row:
    while True:
        try:
            line = lines.get(timeout=silence_s)
        except queue.Empty:
            raise LlamaCppError(f"llama.cpp said nothing for {silence_s:.0f} s") from None
        if not line:
            raise LlamaCppError("llama.cpp ended without a result")
        reply: Row = json.loads(line)
        if reply["kind"] == "error":
            raise LlamaCppError(f"llama.cpp failed: {reply['message']}")
        if reply["kind"] == "result":
            return reply
        say(f"{reply['n_done']} of {reply['n_tokens']} tokens read by llama.cpp")


def faster(one: Sequence[Row], other: Sequence[Row]) -> list[Row]:
    """At each length the better prefill and the better decode of both WAYS."""
    by_length = {row["tokens"]: row for row in other}
    made = []
    for row in one:
        pair = (row, by_length.get(row["tokens"], row))
        prefill = min(pair, key=lambda r: r["prefill_s"])
        decode = min(pair, key=lambda r: r["decode_ms"]["median"])
        is_guess = prefill["extrapolated"] or decode["extrapolated"]
        made.append({**prefill, "decode_ms": decode["decode_ms"], "extrapolated": is_guess})
    return made


# --- the child ------------------------------------------------------------------------------------


def _peak_bytes() -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM"):
            return int(line.split()[1]) << 10
    return 0


class _Context:
    """A model and a context of llama.cpp, greedy, one sequence."""

    def __init__(self, gguf: str, n_ctx: int, flash: bool, n_threads: int) -> None:
        import llama_cpp

        self._llama = llama = llama_cpp
        model_params = llama.llama_model_default_params()
        model_params.n_gpu_layers = 0
        model = llama.llama_model_load_from_file(gguf.encode(), model_params)
        if not model:
            raise ValueError(f"{Path(gguf).name} cannot be loaded")
        params = llama.llama_context_default_params()
        params.n_ctx, params.n_batch = n_ctx, BATCH_TOKENS
        params.n_threads = params.n_threads_batch = n_threads
        params.flash_attn_type = int(flash)
        params.type_k = params.type_v = llama.GGML_TYPE_F16
        self._context = llama.llama_init_from_model(model, params)
        if not self._context:
            raise ValueError(f"no context of {n_ctx} tokens")
        self._n_vocab = llama.llama_vocab_n_tokens(llama.llama_model_get_vocab(model))
        self.build = f"{llama.__version__}; {llama.llama_print_system_info().decode().strip()}"

    def feed(self, tokens: Sequence[int]) -> None:
        """Tokens after those already fed. Raises ValueError if llama.cpp refuses them."""
        values = (self._llama.llama_token * len(tokens))(*tokens)
        batch = self._llama.llama_batch_get_one(values, len(tokens))
        code = self._llama.llama_decode(self._context, batch)
        if code:
            raise ValueError(f"llama_decode returned {code}")
        self._llama.llama_synchronize(self._context)

    def best(self) -> int:
        """The most likely token after the last one fed."""
        import numpy as np

        logits = self._llama.llama_get_logits_ith(self._context, -1)
        return int(np.ctypeslib.as_array(logits, (self._n_vocab,)).argmax())

    def forget(self) -> None:
        self._llama.llama_memory_clear(self._llama.llama_get_memory(self._context), True)


def _measure(request: Row, reply: Callable[[Row], None]) -> Row:
    """Reads `tokens`, then decodes n_steps greedily.

    request: gguf, tokens, n_steps, flash, n_threads. Returns prefill_s, step_s (seconds of each
    forward of one token), token_ids (n_steps + 1: the first comes from prefill), peak_bytes, build.
    """
    tokens, n_steps = request["tokens"], request["n_steps"]
    context = _Context(
        request["gguf"], len(tokens) + n_steps, request["flash"], request["n_threads"]
    )
    context.feed(tokens[:WARM_UP_TOKENS])
    context.feed([context.best()])
    context.forget()
    started_s = time.monotonic()
    for start in range(0, len(tokens), BATCH_TOKENS):
        context.feed(tokens[start : start + BATCH_TOKENS])
        n_done = min(start + BATCH_TOKENS, len(tokens))
        reply({"kind": "progress", "n_done": n_done, "n_tokens": len(tokens)})
    chosen = [context.best()]
    moments_s = [time.monotonic()]
    for _ in range(n_steps):
        context.feed(chosen[-1:])
        chosen.append(context.best())
        moments_s.append(time.monotonic())
    return {
        "prefill_s": moments_s[0] - started_s,
        "step_s": [b - a for a, b in itertools.pairwise(moments_s)],
        "token_ids": chosen,
        "peak_bytes": _peak_bytes(),
        "build": context.build,
    }


def _serve(requests: Iterable[str], replies: IO[str]) -> None:
    """A result or an error for every line."""

    def reply(message: Row) -> None:
        replies.write(json.dumps(message) + "\n")
        replies.flush()

    for line in requests:
        try:
            reply({"kind": "result", **_measure(json.loads(line), reply)})
        except Exception as error:
            reply({"kind": "error", "message": f"{type(error).__name__}: {error}"})


def _child() -> None:
    # whatever native code prints must not get between the replies
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    try:
        import llama_cpp
    except ImportError as error:
        replies.write(json.dumps({"kind": "error", "message": f"ImportError: {error}"}) + "\n")
        replies.flush()
        return

    @llama_cpp.llama_log_callback
    def log(level: int, text: bytes, _: Any) -> None:
        if level == ERROR_LEVEL:
            sys.stderr.write(text.decode(errors="replace"))

    llama_cpp.llama_log_set(log, None)
    llama_cpp.llama_backend_init()
    _serve(sys.stdin, replies)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--setup", action="store_true", help="build the environment if needed")
    parser.add_argument("--jobs", type=int, default=1, help="compilers at a time")
    arguments = parser.parse_args()
    if not arguments.setup:
        _child()
        return
    try:
        print(f"llama.cpp is ready in {ensure_environment(n_jobs=arguments.jobs).parents[1].name}")
    except LlamaCppError as error:
        raise SystemExit(str(error)) from error


if __name__ == "__main__":
    main()
