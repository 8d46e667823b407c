"""Compiles a Triton kernel for a GPU that need not be there, in a process without the interpreter."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

SCRIPT = """
import importlib, json, pathlib, re, subprocess, sys, tempfile
import triton.backends.nvidia
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile
ask = json.load(sys.stdin)
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
ptxas = pathlib.Path(triton.backends.nvidia.__file__).parent / "bin" / "ptxas"
with tempfile.TemporaryDirectory() as folder:
    ptx = pathlib.Path(folder) / "kernel.ptx"
    ptx.write_text(made.asm["ptx"])
    command = [ptxas, "-v", "--gpu-name=sm_90a", ptx, "-o", ptx.with_suffix(".cubin")]
    log = subprocess.run(command, check=True, capture_output=True, text=True).stderr
def number(pattern):
    return max(map(int, re.findall(pattern, log)), default=0)
print(json.dumps({
    "shared": made.metadata.shared,
    "n_regs": number(r"Used (\\d+) registers"),
    "n_spills": number(r"(\\d+) bytes spill stores"),
    "ptx_lines": made.asm["ptx"].splitlines(),
}))
"""


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
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT],
        input=json.dumps(ask),
        env=env,
        capture_output=True,
        text=True,
        timeout=240,
    )
    if done.returncode:
        raise RuntimeError(f"{kernel} does not compile for sm_90:\n{done.stderr[-4000:]}")
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result
