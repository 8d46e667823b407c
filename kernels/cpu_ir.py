"""A thin layer over LLVM IR for the numba kernels: vectors of LANES floats at integer addresses.

LLVM splits the vectors into what the machine has (AVX2, AVX-512, NEON). All offsets are in
elements, all addresses are plain integers.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba.core import cgutils
from numba.extending import intrinsic as _intrinsic

intrinsic: Any = _intrinsic
"""numba's decorator, untyped: callers see only the compiled signature."""

LANES = 16
F32 = ir.FloatType()
VEC = ir.VectorType(F32, LANES)
I64 = ir.IntType(64)
I32 = ir.IntType(32)

_EXP2 = (
    1.0,
    0.6931471805599453,
    0.2402265069591007,
    0.05550410866482158,
    0.009618129107628477,
    0.0013333558146428441,
    0.00015403530393381606,
)
"""ln(2)^n / n!: 2^x on [-1/2, 1/2] within 1.3e-7."""


class Emit:
    """Short names for what the kernels below need of an IR builder."""

    def __init__(self, builder: Any) -> None:
        self.b = builder

    def pointer(self, address: Any, offset: Any, kind: Any = F32, align: int = 4) -> Any:
        """address + offset elements (an integer value) as a pointer to `kind`."""
        size = ir.Constant(I64, align)
        at = self.b.add(address, self.b.mul(offset, size))
        return self.b.inttoptr(at, kind.as_pointer())

    def scalar(self, address: Any, offset: Any) -> Any:
        return self.b.load(self.pointer(address, offset), align=4)

    def vector(self, address: Any, offset: Any) -> Any:
        return self.b.load(self.pointer(address, offset, VEC), align=4)

    def store(self, value: Any, address: Any, offset: Any, kind: Any = VEC) -> None:
        self.b.store(value, self.pointer(address, offset, kind), align=4)

    def splat(self, scalar: Any, kind: Any = VEC) -> Any:
        lanes = kind.count
        one = self.b.insert_element(ir.Constant(kind, ir.Undefined), scalar, ir.Constant(I32, 0))
        mask = ir.Constant(ir.VectorType(I32, lanes), [0] * lanes)
        return self.b.shuffle_vector(one, ir.Constant(kind, ir.Undefined), mask)

    def const(self, value: float, kind: Any = VEC) -> Any:
        return ir.Constant(kind, [value] * kind.count)

    def _call(self, name: str, *args: Any) -> Any:
        kind = args[0].type
        suffix = f"v{kind.count}f32" if isinstance(kind, ir.VectorType) else "f32"
        function = cgutils.get_or_insert_function(
            self.b.module, ir.FunctionType(kind, [a.type for a in args]), f"llvm.{name}.{suffix}"
        )
        return self.b.call(function, args)

    def fma(self, x: Any, y: Any, z: Any) -> Any:
        return self._call("fmuladd", x, y, z)

    def maximum(self, x: Any, y: Any) -> Any:
        return self.b.select(self.b.fcmp_ordered(">", x, y), x, y)

    def prefetch(self, address: Any) -> None:
        """Ask for one cache line, for the second-level cache."""
        pointer = self.b.inttoptr(address, ir.IntType(8).as_pointer())
        kind = ir.FunctionType(ir.VoidType(), [pointer.type, I32, I32, I32])
        function = cgutils.get_or_insert_function(self.b.module, kind, "llvm.prefetch.p0")
        self.b.call(function, [pointer, *(ir.Constant(I32, n) for n in (0, 2, 1))])

    def index(self, value: int) -> Any:
        return ir.Constant(I64, value)

    def reduce(self, name: str, x: Any) -> Any:
        """Sum (pairwise, fixed order) or maximum of a vector's lanes."""
        lanes = x.type.count
        while lanes > 1:
            lanes //= 2
            undef = ir.Constant(x.type, ir.Undefined)
            kind = ir.VectorType(I32, lanes)
            low = self.b.shuffle_vector(x, undef, ir.Constant(kind, list(range(lanes))))
            undef = ir.Constant(x.type, ir.Undefined)
            high = self.b.shuffle_vector(x, undef, ir.Constant(kind, list(range(lanes, 2 * lanes))))
            x = self.b.fadd(low, high) if name == "add" else self.maximum(low, high)
        return self.b.extract_element(x, ir.Constant(I32, 0))

    def exp2(self, x: Any) -> Any:
        """2 ** x of a vector, exactly 0 below -126 (and at -inf)."""
        b, kind = self.b, x.type
        low = b.fcmp_ordered("<", x, self.const(-126.0, kind))
        x = b.select(low, self.const(-126.0, kind), x)
        whole = self._call("floor", b.fadd(x, self.const(0.5, kind)))
        part = b.fsub(x, whole)
        value = self.const(_EXP2[-1], kind)
        for c in reversed(_EXP2[:-1]):
            value = self.fma(value, part, self.const(c, kind))
        ints = ir.VectorType(I32, kind.count)
        exponent = b.add(b.fptosi(whole, ints), ir.Constant(ints, [127] * kind.count))
        power = b.bitcast(b.shl(exponent, ir.Constant(ints, [23] * kind.count)), kind)
        return b.select(low, self.const(0.0, kind), b.fmul(value, power))
