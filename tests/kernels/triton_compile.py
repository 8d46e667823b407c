"""Compiles a Triton kernel for a GPU that need not be there, in a process without the interpreter."""

from __future__ import annotations

import atexit
import functools
import json
import os
import subprocess
import sys
import threading
from typing import Any

SCRIPT = """
import importlib, json, pathlib, re, subprocess, sys, tempfile, traceback
import triton.backends.nvidia
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile

ptxas = pathlib.Path(triton.backends.nvidia.__file__).parent / "bin" / "ptxas"

def made_of(ask):
    fn = getattr(importlib.import_module(ask["module"]), ask["kernel"])
    signature, attrs = dict.fromkeys(ask["constexprs"], "constexpr"), {}
    for name, kind in ask["signature"].items():
        kind, _, multiple = kind.partition(":")
        signature[name] = kind
        if kind.startswith("*") or multiple:
            attrs[(fn.arg_names.index(name),)] = [["tt.divisibility", int(multiple or 16)]]
    source = ASTSource(fn, {n: signature[n] for n in fn.arg_names}, ask["constexprs"], attrs)
    options = {"num_warps": ask["num_warps"], "num_stages": ask["num_stages"]}
    made = compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    with tempfile.TemporaryDirectory() as folder:
        ptx = pathlib.Path(folder) / "kernel.ptx"
        ptx.write_text(made.asm["ptx"])
        command = [ptxas, "-v", "--gpu-name=sm_90a", ptx, "-o", ptx.with_suffix(".cubin")]
        log = subprocess.run(command, check=True, capture_output=True, text=True).stderr
    def number(pattern):
        return max(map(int, re.findall(pattern, log)), default=0)
    return {
        "shared": made.metadata.shared,
        "n_regs": number(r"Used (\\d+) registers"),
        "n_spills": number(r"(\\d+) bytes spill stores"),
        "ptx_lines": made.asm["ptx"].splitlines(),
    }

for line in sys.stdin:
    try:
        answer = made_of(json.loads(line))
    except Exception:
        answer = {"error": traceback.format_exc()[-4000:]}
    print(json.dumps(answer), flush=True)
"""
TIMEOUT_S = 240


@functools.cache
def _compiler() -> subprocess.Popen[str]:
    """One process for all: to start it takes longer than to compile."""
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    process = subprocess.Popen(
        [sys.executable, "-c", SCRIPT],
        env=env,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    atexit.register(process.kill)
    return process


def _answer(ask: dict[str, Any]) -> dict[str, Any]:
    process = _compiler()
    assert process.stdin is not None
    assert process.stdout is not None
    print(json.dumps(ask), file=process.stdin, flush=True)
    overdue = threading.Timer(TIMEOUT_S, process.kill)
    overdue.start()
    line = process.stdout.readline()
    overdue.cancel()
    if not line:
        _compiler.cache_clear()
        return {"error": f"the compiler died, or took more than {TIMEOUT_S} s"}
    found: dict[str, Any] = json.loads(line)
    return found


def compile_for_gpu(
    module: str,
    kernel: str,
    signature: dict[str, str],
    constexprs: dict[str, Any],
    num_warps: int = 4,
    num_stages: int = 3,
) -> dict[str, Any]:
    """What the kernel needs on an H100 (sm_90).

    module: as it is imported; signature: types of the arguments that are not constexprs, such as "*bf16",
    "i32", "fp32", where "i32:16" is a multiple of 16 (pointers always are); constexprs: values by name.
    Returns shared (bytes a program), n_regs (registers a thread), n_spills (bytes a thread that registers
    did not hold) and ptx_lines. Raises RuntimeError with the compiler's words if it refuses.
    """
    ask = {
        "module": module,
        "kernel": kernel,
        "signature": signature,
        "constexprs": constexprs,
        "num_warps": num_warps,
        "num_stages": num_stages,
    }
    result = _answer(ask)
    if "error" in result:
        raise RuntimeError(f"{kernel} does not compile for sm_90:\n{result['error']}")
    return result
