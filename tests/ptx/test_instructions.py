"""Every instruction of the machine against exact results: integers by Python's, floating point by fractions."""

from __future__ import annotations

import math
import random
import struct
from fractions import Fraction
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING

import exact
import pytest
import torch
from decode import FORMS, UnknownInstructionError
from emulator import Kernel, Memory
from exact import BF16, F16, F32, F64, MODES, Format

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

pytestmark = pytest.mark.usefixtures("machine")

WIDTHS = {"f32": 32, "f64": 64, "pred": 1}
FORMATS = {"f16": F16, "bf16": BF16, "f32": F32, "f64": F64}
BLOCK = 256
SOURCES = "abce"
"""$d is the target."""


def width(type_: str) -> int:
    return WIDTHS.get(type_) or int(type_.lstrip("usbf"))


def kernel(instruction: str, target: str, sources: Sequence[str]) -> str:
    """PTX that reads $a, $b, $c, $e from arrays of 64 bits an element, and stores the instruction's $d into another."""
    names = SOURCES[: len(sources)]
    parameters = ", ".join(f".param .u64 p_{name}" for name in ("d", *names))
    lines = [".reg .b32 %i<4>, %flag;", ".reg .b64 %at<7>, %raw;", f".reg .{_register(target)} %d;"]
    lines += ["mov.u32 %i0, %ctaid.x;", "mov.u32 %i1, %tid.x;", f"mad.lo.s32 %i2, %i0, {BLOCK}, %i1;"]
    for n, name in enumerate(("d", *names)):
        lines += [f"ld.param.u64 %at{n}, [p_{name}];", f"mad.wide.u32 %at{n}, %i2, 8, %at{n};"]
    for n, (name, type_) in enumerate(zip(names, sources, strict=True), 1):
        lines.append(f".reg .{_register(type_)} %{name};")
        if type_ == "pred":
            lines += [f"ld.global.b32 %flag, [%at{n}];", f"setp.ne.u32 %{name}, %flag, 0;"]
        else:
            lines.append(f"ld.global.b{width(type_)} %{name}, [%at{n}];")
    lines += ["mov.b64 %raw, 0;", "st.global.b64 [%at0], %raw;"]
    lines.append(instruction.replace("$", "%") + ";")
    if target == "pred":
        lines += ["selp.b32 %flag, 1, 0, %d;", "st.global.b32 [%at0], %flag;"]
    else:
        lines.append(f"st.global.b{width(target)} [%at0], %d;")
    body = "\n".join(lines)
    return f".version 8.0\n.target sm_90\n.address_size 64\n.visible .entry test({parameters})\n{{\n{body}\nret;\n}}\n"


def _register(type_: str) -> str:
    return type_ if type_ in WIDTHS else f"b{width(type_)}"


def signed(bits: int, width: int) -> int:
    return bits - (1 << width) if bits >> (width - 1) & 1 else bits


def run(
    instruction: str, target: str, sources: Sequence[str], cases: Sequence[tuple[int, ...]], *, jitter: int = 0
) -> list[int]:
    """The bits of $d for each case of bits of $a, $b, ..."""
    program = Kernel(kernel(instruction, target, sources))
    padded = [*cases, *[cases[0]] * (-len(cases) % BLOCK)]
    columns = [torch.tensor([signed(x, 64) for x in column], dtype=torch.int64) for column in zip(*padded, strict=True)]
    out = torch.empty(len(padded), dtype=torch.int64)
    memory = Memory().add("d", out)
    for n, column in enumerate(columns):
        memory.add(SOURCES[n], column, writable=False)
    addresses = [tensor.data_ptr() for tensor in (out, *columns)]
    outcome = program.launch((len(padded) // BLOCK,), addresses, memory, block=(BLOCK,), jitter=jitter)
    assert not outcome.findings, outcome
    return [x & (1 << 64) - 1 for x in out.tolist()[: len(cases)]]


def check(
    instruction: str,
    target: str,
    sources: Sequence[str],
    cases: Iterable[tuple[int, ...]],
    expected: Callable[..., int],
    same: Callable[[int, int], bool] = int.__eq__,
) -> None:
    """Compares $d with ``expected`` of the bits of the sources, all unsigned."""
    cases = list(cases)
    mask = (1 << width(target)) - 1
    found = run(instruction, target, sources, cases)
    wanted = [int(expected(*case)) & mask for case in cases]
    wrong = [
        f"{' '.join(map(hex, case))}: {hex(got)}, not {hex(want)}"
        for case, got, want in zip(cases, found, wanted, strict=True)
        if not same(got, want)
    ]
    assert not wrong, f"{instruction}: {len(wrong)} of {len(cases)} wrong\n" + "\n".join(wrong[:5])


def integers(bits: int, count: int) -> list[tuple[int, ...]]:
    """Cases of ``count`` integers: all pairs of ends and small numbers, and random ones of all lengths."""
    chance = random.Random(bits)
    ends = [0, 1, 2, 5, (1 << (bits - 1)) - 1, 1 << (bits - 1), (1 << bits) - 2, (1 << bits) - 1]
    cases = list(product(ends, repeat=min(count, 3)))
    cases = [case + (chance.choice(ends),) * (count - len(case)) for case in cases]
    cases += [tuple(chance.getrandbits(bits) >> chance.randrange(bits) for _ in range(count)) for _ in range(200)]
    return cases


# Integers.


def truncated(p: int, q: int) -> int:
    """The quotient, rounded towards zero."""
    return abs(p) // abs(q) * (-1 if (p < 0) != (q < 0) else 1)


@pytest.mark.parametrize("type_", ["u16", "s16", "u32", "s32", "u64", "s64"])
def test_integer_arithmetic(type_: str) -> None:
    bits = width(type_)
    number = (lambda x: signed(x, bits)) if type_[0] == "s" else (lambda x: x)
    two, three = integers(bits, 2), integers(bits, 3)
    nonzero = [case for case in two if case[1]]

    def binary(name: str, f: Callable[[int, int], int], cases: Sequence[tuple[int, ...]] = two) -> None:
        wanted = lambda a, b: f(number(a), number(b))  # noqa: E731
        check(f"{name}.{type_} $d, $a, $b", type_, (type_, type_), cases, wanted)

    binary("add", lambda a, b: a + b)
    binary("sub", lambda a, b: a - b)
    binary("mul.lo", lambda a, b: a * b)
    binary("mul.hi", lambda a, b: a * b >> bits)
    binary("div", truncated, nonzero)
    binary("rem", lambda a, b: a - b * truncated(a, b), nonzero)
    binary("min", min)
    binary("max", max)
    ternary = type_, type_, type_
    check(f"mad.lo.{type_} $d, $a, $b, $c", type_, ternary, three, lambda a, b, c: number(a) * number(b) + number(c))
    check(f"mad.hi.{type_} $d, $a, $b, $c", type_, ternary, three, lambda a, b, c: (number(a) * number(b) >> bits) + c)
    check(f"shr.{type_} $d, $a, $b", type_, (type_, "u32"), shifts(bits), lambda a, n: number(a) >> min(n, bits))
    if bits < 64:
        wide = f"{type_[0]}{2 * bits}"
        check(f"mul.wide.{type_} $d, $a, $b", wide, (type_, type_), two, lambda a, b: number(a) * number(b))
        cases = [(a, b, c * 0x10001) for a, b, c in three]
        wanted = lambda a, b, c: number(a) * number(b) + c  # noqa: E731
        check(f"mad.wide.{type_} $d, $a, $b, $c", wide, (type_, type_, wide), cases, wanted)
    if type_[0] == "s":
        check(f"abs.{type_} $d, $a", type_, (type_,), integers(bits, 1), lambda a: abs(number(a)))
        check(f"neg.{type_} $d, $a", type_, (type_,), integers(bits, 1), lambda a: -a)


def shifts(bits: int) -> list[tuple[int, ...]]:
    """Numbers, and distances up to beyond all bits."""
    distances = [0, 1, 7, bits - 1, bits, bits + 1, 64, 255, (1 << 32) - 1]
    return [(a, n) for (a,) in integers(bits, 1)[:60] for n in distances]


@pytest.mark.parametrize("name", ["add", "sub"])
def test_saturated_addition(name: str) -> None:
    def wanted(a: int, b: int) -> int:
        total = signed(a, 32) + signed(b, 32) * (1 if name == "add" else -1)
        return min(max(total, -(1 << 31)), (1 << 31) - 1)

    check(f"{name}.sat.s32 $d, $a, $b", "s32", ("s32", "s32"), integers(32, 2), wanted)


@pytest.mark.parametrize("bits", [16, 32, 64])
def test_logic_and_shifts(bits: int) -> None:
    b = f"b{bits}"
    two = integers(bits, 2)
    check(f"and.{b} $d, $a, $b", b, (b, b), two, lambda x, y: x & y)
    check(f"or.{b} $d, $a, $b", b, (b, b), two, lambda x, y: x | y)
    check(f"xor.{b} $d, $a, $b", b, (b, b), two, lambda x, y: x ^ y)
    check(f"not.{b} $d, $a", b, (b,), integers(bits, 1), lambda x: ~x)
    check(f"cnot.{b} $d, $a", b, (b,), integers(bits, 1), lambda x: x == 0)
    check(f"shl.{b} $d, $a, $b", b, (b, "u32"), shifts(bits), lambda x, n: x << n if n < bits else 0)
    check(f"shr.{b} $d, $a, $b", b, (b, "u32"), shifts(bits), lambda x, n: x >> n)
    check(f"mov.{b} $d, $a", b, (b,), integers(bits, 1), lambda x: x)
    check(f"mov.{b} $d, -2", b, (b,), integers(bits, 1), lambda x: -2)
    cases = [(x, y, n & 1) for n, (x, y) in enumerate(two)]
    check(f"selp.{b} $d, $a, $b, $c", b, (b, b, "pred"), cases, lambda x, y, p: x if p else y)


@pytest.mark.parametrize("bits", [32, 64])
def test_bit_fields(bits: int) -> None:
    b, u, s = f"b{bits}", f"u{bits}", f"s{bits}"
    one = integers(bits, 1)
    check(f"popc.{b} $d, $a", "u32", (b,), one, lambda x: bin(x).count("1"))
    check(f"clz.{b} $d, $a", "u32", (b,), one, lambda x: bits - x.bit_length())
    check(f"brev.{b} $d, $a", b, (b,), one, lambda x: int(f"{x:0{bits}b}"[::-1], 2))
    check(f"bfind.{u} $d, $a", "u32", (u,), one, lambda x: x.bit_length() - 1)
    significant = lambda x: (~x & (1 << bits) - 1 if x >> (bits - 1) else x).bit_length() - 1  # noqa: E731
    check(f"bfind.{s} $d, $a", "u32", (s,), one, significant)
    shift = lambda x: bits - x.bit_length() if x else -1  # noqa: E731
    check(f"bfind.shiftamt.{u} $d, $a", "u32", (u,), one, shift)
    places, lengths = (0, 1, 9, bits - 1, bits, 255), (0, 1, 8, bits - 1, bits, 200)
    fields = [(x, first, length) for (x,) in one[:30] for first in places for length in lengths]

    def extracted(x: int, first: int, length: int) -> int:
        return x >> first & (1 << length) - 1

    def sign_extracted(x: int, first: int, length: int) -> int:  # the sign goes on above the number
        if not length:
            return 0
        return signed(signed(x, bits) >> first & (1 << length) - 1, length)

    check(f"bfe.{u} $d, $a, $b, $c", u, (u, "u32", "u32"), fields, extracted)
    check(f"bfe.{s} $d, $a, $b, $c", s, (s, "u32", "u32"), fields, sign_extracted)

    def inserted(x: int, y: int, first: int, length: int) -> int:
        field = (1 << length) - 1 << first
        return (y & ~field) | (x << first & field)

    words = b, b, "u32", "u32"
    cases = [(x, ~x & (1 << bits) - 1, first, length) for x, first, length in fields]
    check(f"bfi.{b} $d, $a, $b, $c, $e", b, words, cases, inserted)


def test_three_way_instructions() -> None:
    three, words = integers(32, 3), ("b32", "b32", "b32")
    for table in (0x00, 0x96, 0xE8, 0xCA, 0x1B, 0xFF):

        def looked_up(a: int, b: int, c: int, table: int = table) -> int:
            return sum((table >> ((a >> n & 1) << 2 | (b >> n & 1) << 1 | c >> n & 1) & 1) << n for n in range(32))

        check(f"lop3.b32 $d, $a, $b, $c, {table}", "b32", words, three, looked_up)

    def permuted(a: int, b: int, selectors: int) -> int:
        octets = (b << 32 | a).to_bytes(8, "little")
        out = 0
        for n in range(4):
            selector = selectors >> 4 * n & 15
            octet = octets[selector & 7]
            out |= ((255 if octet & 128 else 0) if selector & 8 else octet) << 8 * n
        return out

    check("prmt.b32 $d, $a, $b, $c", "b32", words, three, permuted)
    near = [(a, b, c % 70) for a, b, c in three]

    def left(a: int, b: int, n: int) -> int:
        return (b << 32 | a) << n >> 32

    def right(a: int, b: int, n: int) -> int:
        return (b << 32 | a) >> n

    check("shf.l.clamp.b32 $d, $a, $b, $c", "b32", words, near, lambda a, b, n: left(a, b, min(n, 32)))
    check("shf.r.clamp.b32 $d, $a, $b, $c", "b32", words, near, lambda a, b, n: right(a, b, min(n, 32)))
    check("shf.l.wrap.b32 $d, $a, $b, $c", "b32", words, near, lambda a, b, n: left(a, b, n & 31))
    check("shf.r.wrap.b32 $d, $a, $b, $c", "b32", words, near, lambda a, b, n: right(a, b, n & 31))


# Comparisons and predicates.

ORDERED: dict[str, Callable[[float, float], bool]] = {
    "eq": lambda a, b: a == b,
    "ne": lambda a, b: a != b,
    "lt": lambda a, b: a < b,
    "le": lambda a, b: a <= b,
    "gt": lambda a, b: a > b,
    "ge": lambda a, b: a >= b,
}


@pytest.mark.parametrize("type_", ["u16", "s16", "b16", "u32", "s32", "b32", "u64", "s64", "b64"])
def test_integer_comparisons(type_: str) -> None:
    bits = width(type_)
    number = (lambda x: signed(x, bits)) if type_[0] == "s" else (lambda x: x)
    for name, holds in ORDERED.items():
        if type_[0] == "b" and name not in ("eq", "ne"):
            continue
        wanted = lambda a, b, holds=holds: holds(number(a), number(b))  # noqa: E731
        check(f"setp.{name}.{type_} $d, $a, $b", "pred", (type_, type_), integers(bits, 2), wanted)
    if type_[0] == "u":
        for name, of in {"lo": "lt", "ls": "le", "hi": "gt", "hs": "ge"}.items():
            check(f"setp.{name}.{type_} $d, $a, $b", "pred", (type_, type_), integers(bits, 2), ORDERED[of])


@pytest.mark.parametrize("f", [F32, F64], ids=["f32", "f64"])
def test_real_comparisons(f: Format) -> None:
    t = f.name
    cases = list(product(exact.samples(f), repeat=2))

    def number(bits: int) -> float:
        return math.nan if f.is_nan(bits) else as_float(f, bits)

    def ordered(a: int, b: int) -> bool:
        return not (f.is_nan(a) or f.is_nan(b))

    for name, holds in ORDERED.items():
        wanted = lambda a, b, holds=holds: ordered(a, b) and holds(number(a), number(b))  # noqa: E731
        check(f"setp.{name}.{t} $d, $a, $b", "pred", (t, t), cases, wanted)
        check(f"set.{name}.u32.{t} $d, $a, $b", "u32", (t, t), cases, lambda a, b, w=wanted: -int(w(a, b)))
        or_unordered = lambda a, b, w=wanted: w(a, b) or not ordered(a, b)  # noqa: E731
        check(f"setp.{name}u.{t} $d, $a, $b", "pred", (t, t), cases, or_unordered)
    check(f"setp.num.{t} $d, $a, $b", "pred", (t, t), cases, ordered)
    check(f"setp.nan.{t} $d, $a, $b", "pred", (t, t), cases, lambda a, b: not ordered(a, b))
    check(f"set.lt.f32.{t} $d, $a, $b", "f32", (t, t), cases, lambda a, b: 0x3F800000 * (number(a) < number(b)))
    if f is F32:
        flushed = lambda a, b: number(f.flushed(a)) < number(f.flushed(b))  # noqa: E731
        check("setp.lt.ftz.f32 $d, $a, $b", "pred", ("f32", "f32"), cases, flushed)


def test_predicates() -> None:
    cases = list(product((0, 1), repeat=2))
    for name, of in {"and": int.__and__, "or": int.__or__, "xor": int.__xor__}.items():
        check(f"{name}.pred $d, $a, $b", "pred", ("pred", "pred"), cases, of)
        triples = [(a, b, p) for a in (1, 2) for b in (1, 2) for p in (0, 1)]
        words = "u32", "u32", "pred"
        check(f"setp.lt.{name}.u32 $d, $a, $b, $c", "pred", words, triples, lambda a, b, p, of=of: of(a < b, p))
        check(f"setp.lt.{name}.u32 $d, $a, $b, !$c", "pred", words, triples, lambda a, b, p, of=of: of(a < b, 1 - p))
        second = f".reg .pred %q; setp.lt.{name}.u32 %q|$d, $a, $b, $c"
        check(second, "pred", words, triples, lambda a, b, p, of=of: of(a >= b, p))
    check("not.pred $d, $a", "pred", ("pred",), [(0,), (1,)], lambda a: 1 - a)
    check("mov.b32 $d, 7; @$a mov.b32 $d, 9", "b32", ("pred",), [(0,), (1,)], lambda a: 9 if a else 7)
    check("mov.b32 $d, 7; @!$a mov.b32 $d, 9", "b32", ("pred",), [(0,), (1,)], lambda a: 7 if a else 9)


def test_vectors_of_registers() -> None:
    words = integers(32, 2)
    check("mov.b64 $d, {$a, $b}", "b64", ("b32", "b32"), words, lambda a, b: b << 32 | a)
    check("mov.b32 $d, {$a, $b}", "b32", ("b16", "b16"), integers(16, 2), lambda a, b: b << 16 | a)
    halves = ".reg .b32 %low; mov.b64 {{{}}}, $a"
    check(halves.format("%low, $d"), "b32", ("b64",), integers(64, 1), lambda a: a >> 32)
    check(halves.format("$d, _"), "b32", ("b64",), integers(64, 1), lambda a: a)
    quarters = ".reg .b16 %x<3>; mov.b64 {%x0, %x1, $d, %x2}, $a"
    check(quarters, "b16", ("b64",), integers(64, 1), lambda a: a >> 32)


# Floating point.


def as_float(f: Format, bits: int) -> float:
    """The same number as a Python float."""
    if f.is_nan(bits):
        return math.nan
    if f.is_infinite(bits):
        return -math.inf if bits & f.sign else math.inf
    if not bits & ~f.sign:
        return -0.0 if bits & f.sign else 0.0
    return float(f.value(bits))


def reals(f: Format, count: int) -> Sequence[tuple[int, ...]]:
    """Cases of ``count`` numbers: of the samples and random bits, and for three also sums that nearly cancel."""
    chance = random.Random(f.width + count)
    drawn = [chance.getrandbits(f.width) for _ in range(8)]
    samples = exact.samples(f, drawn)
    if count == 1:
        return [(x,) for x in samples] + [(chance.getrandbits(f.width),) for _ in range(300)]
    if count == 2:
        core = [0, 1, f.normal, f.round(Fraction(1), "rn"), f.infinity, f.nan]
        core += [x | f.sign for x in core]
        return [*product(core, repeat=2), *chance.sample(list(product(samples, repeat=2)), 1200)]
    cases = [tuple(chance.choice(samples) for _ in range(3)) for _ in range(1000)]
    for _ in range(500):
        a, b = (f.round(Fraction(chance.uniform(-2, 2)), "rn") for _ in range(2))
        minus_product = exact.multiply(f, "rn", a, b) ^ f.sign
        cases.append((a, b, minus_product + chance.choice((-1, 0, 0, 1))))
    return cases


OPERATIONS: dict[str, tuple[Callable[..., int], int]] = {
    "add": (exact.add, 2),
    "sub": (exact.subtract, 2),
    "mul": (exact.multiply, 2),
    "fma": (exact.fma, 3),
    "mad": (exact.fma, 3),
    "div": (exact.divide, 2),
    "rcp": (exact.reciprocal, 1),
    "sqrt": (exact.square_root, 1),
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("f", [F32, F64], ids=["f32", "f64"])
@pytest.mark.parametrize("name", OPERATIONS)
def test_rounded_arithmetic(name: str, f: Format, mode: str) -> None:
    operation, count = OPERATIONS[name]
    sources = ", ".join("$" + source for source in "abc"[:count])
    types, cases = (f.name,) * count, reals(f, count)
    of = lambda *operands: operation(f, mode, *operands)  # noqa: E731
    check(f"{name}.{mode}.{f.name} $d, {sources}", f.name, types, cases, of, f.same)
    if f is F32:
        check(f"{name}.{mode}.ftz.f32 $d, {sources}", "f32", types, cases, exact.flushing(f, of))
        if name not in ("div", "rcp", "sqrt"):
            check(f"{name}.{mode}.sat.f32 $d, {sources}", "f32", types, cases, exact.saturating(f, of))


@pytest.mark.parametrize("f", [F32, F64], ids=["f32", "f64"])
def test_signs_and_extremes(f: Format) -> None:
    t, two = f.name, reals(f, 2)
    one = [case for case in reals(f, 1) if not f.is_nan(*case)]
    check(f"abs.{t} $d, $a", t, (t,), one, lambda a: a & ~f.sign)
    check(f"neg.{t} $d, $a", t, (t,), one, lambda a: a ^ f.sign)
    check(f"copysign.{t} $d, $a, $b", t, (t, t), two, lambda a, b: (b & ~f.sign) | (a & f.sign))
    check(f"min.{t} $d, $a, $b", t, (t, t), two, lambda a, b: exact.minimum(f, a, b), f.same)
    check(f"max.{t} $d, $a, $b", t, (t, t), two, lambda a, b: exact.maximum(f, a, b), f.same)
    cases = [(a, b, n & 1) for n, (a, b) in enumerate(two)]
    check(f"selp.{t} $d, $a, $b, $c", t, (t, t, "pred"), cases, lambda a, b, p: a if p else b)
    check(f"mov.{t} $d, $a", t, (t,), reals(f, 1), lambda a: a)
    constant = "0f3FC00000" if f is F32 else "0d3FF8000000000000"
    check(f"add.{t} $d, $a, {constant}", t, (t,), one, lambda a: exact.add(f, "rn", a, int(constant[2:], 16)), f.same)
    if f is F32:
        check("min.NaN.f32 $d, $a, $b", t, (t, t), two, lambda a, b: exact.minimum(f, a, b, nan_wins=True))
        check("max.NaN.f32 $d, $a, $b", t, (t, t), two, lambda a, b: exact.maximum(f, a, b, nan_wins=True))
        flushed = exact.flushing(f, lambda a, b: exact.minimum(f, a, b))
        check("min.ftz.f32 $d, $a, $b", t, (t, t), two, flushed)


APPROXIMATE: dict[str, tuple[Callable[[float], float], int]] = {
    "rcp.approx.ftz": (lambda x: 1 / x, 1),
    "sqrt.approx.ftz": (math.sqrt, 1),
    "rsqrt.approx.ftz": (lambda x: 1 / math.sqrt(x), 2),
    "ex2.approx.ftz": (lambda x: 2.0**x, 2),
    "lg2.approx.ftz": (math.log2, 2),
    "sin.approx.ftz": (math.sin, 2),
    "cos.approx.ftz": (math.cos, 2),
    "tanh.approx": (math.tanh, 2),
}


@pytest.mark.parametrize("name", APPROXIMATE)
def test_approximations(name: str) -> None:
    """Without jitter the nearest number, with it not always, but one within the bound and of the operands alone."""
    function, units = APPROXIMATE[name]
    chance = random.Random(0)
    cases = [(F32.round(Fraction(chance.uniform(0.01, 90)), "rn"),) for _ in range(500)]
    nearest = run(f"{name}.f32 $d, $a", "f32", ("f32",), cases)
    wanted = [F32.round(Fraction(function(as_float(F32, x))), "rn") for (x,) in cases]
    assert all(abs(a - b) <= 1 for a, b in zip(nearest, wanted, strict=True)), "libm's own error is below one unit"
    erring, again = (run(f"{name}.f32 $d, $a", "f32", ("f32",), cases, jitter=7) for _ in range(2))
    errors = [abs(a - b) for a, b in zip(erring, nearest, strict=True)]
    assert 0 < max(errors) <= units
    assert erring == again


def test_approximations_of_special_numbers() -> None:
    def float32(x: float) -> int:
        return struct.unpack("<I", struct.pack("<f", x))[0] if x == x else F32.nan

    cases = {
        "rcp.approx.ftz": [(0.0, math.inf), (-0.0, -math.inf), (math.inf, 0.0), (math.nan, math.nan)],
        "rsqrt.approx.ftz": [(0.0, math.inf), (math.inf, 0.0), (-1.0, math.nan)],
        "sqrt.approx.ftz": [(-0.0, -0.0), (-1.0, math.nan), (math.inf, math.inf)],
        "ex2.approx.ftz": [(-math.inf, 0.0), (0.0, 1.0), (math.inf, math.inf), (-140.0, 0.0), (200.0, math.inf)],
        "lg2.approx.ftz": [(0.0, -math.inf), (1.0, 0.0), (math.inf, math.inf), (-1.0, math.nan)],
    }
    for name, pairs in cases.items():
        wanted = {float32(x): float32(y) for x, y in pairs}
        check(f"{name}.f32 $d, $a", "f32", ("f32",), [(x,) for x in wanted], wanted.__getitem__)
    check("div.full.f32 $d, $a, $b", "f32", ("f32", "f32"), [(float32(6.0), float32(3.0))], lambda a, b: float32(2.0))


# Conversions.


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("to", FORMATS.values(), ids=list(FORMATS))
@pytest.mark.parametrize("of", FORMATS.values(), ids=list(FORMATS))
def test_conversions_between_reals(of: Format, to: Format, mode: str) -> None:
    """Narrower: rounded once. Wider, or to the same: exact, without a mode."""
    chance = random.Random(0)
    cases = [*reals(of, 1), *((halfway(of, to, chance),) for _ in range(200))]
    narrower = to.precision < of.precision or (to.lowest > of.lowest)

    def converted(x: int) -> int:
        if of.is_nan(x):
            return to.nan
        if of.is_infinite(x):
            return (to.sign if x & of.sign else 0) | to.infinity
        return to.round(of.value(x), mode, to.sign if x & of.sign else 0)

    def same(a: int, b: int) -> bool:
        return to.same(a, b) or (of is BF16 and to.is_nan(a) and to.is_nan(b))  # bfloat16's payload goes with it

    types = storage(to), (storage(of),)
    name = f"cvt{f'.{mode}' if narrower else ''}.{to.name}.{of.name} $d, $a"
    check(name, *types, cases, converted, same)
    if narrower and of is F32:
        relu = lambda x: 0 if x & F32.sign and not F32.is_nan(x) else converted(x)  # noqa: E731
        check(f"cvt.{mode}.relu.{to.name}.f32 $d, $a", *types, cases, relu)
    if narrower and to.width == 16 and of is F32:
        pair = [(x, y) for (x,), (y,) in zip(cases, reversed(cases), strict=True)]
        wanted = lambda x, y: converted(x) << 16 | converted(y)  # noqa: E731
        check(f"cvt.{mode}.{to.name}x2.f32 $d, $a, $b", "b32", ("f32", "f32"), pair, wanted)


def storage(f: Format) -> str:
    return f.name if f.width >= 32 else "b16"


def halfway(of: Format, to: Format, chance: random.Random) -> int:
    """A number of the one format in the middle of two of the other, or next to that."""
    bits = chance.getrandbits(to.width) % to.infinity
    middle = (to.value(bits) + to.value(max(bits - 1, 0))) / 2
    return min(max(of.round(middle, "rn") + chance.choice((-1, 0, 0, 1)), 0), of.infinity)


def test_conversions_are_those_of_torch() -> None:
    """A second opinion on how bfloat16 and float16 are rounded."""
    cases = [case for case in reals(F32, 1) if not F32.is_nan(*case)]
    numbers = torch.tensor([signed(x, 32) for (x,) in cases], dtype=torch.int32).view(torch.float32)
    for name, dtype in (("bf16", torch.bfloat16), ("f16", torch.float16)):
        wanted = [x & 0xFFFF for x in numbers.to(dtype).view(torch.int16).tolist()]
        assert run(f"cvt.rn.{name}.f32 $d, $a", "b16", ("f32",), cases) == wanted


@pytest.mark.parametrize("f", FORMATS.values(), ids=list(FORMATS))
def test_conversions_to_integers(f: Format) -> None:
    cases = reals(f, 1)
    for mode, to in product(MODES, ("u8", "s8", "u16", "s16", "u32", "s32", "u64", "s64")):
        bits = width(to)
        wanted = lambda x, m=mode, n=bits, s=to[0] == "s": exact.to_integer(f, m, x, n, signed=s)  # noqa: E731
        register = to if bits > 8 else "u16"
        mask = (1 << bits) - 1
        same = lambda a, b, mask=mask: a & mask == b  # noqa: E731
        check(f"cvt.{mode}i.{to}.{f.name} $d, $a", register, (storage(f),), cases, wanted, same)


@pytest.mark.parametrize("of", ["u8", "s8", "u16", "s16", "u32", "s32", "u64", "s64"])
def test_conversions_of_integers(of: str) -> None:
    bits = width(of)
    number = (lambda x: signed(x, bits)) if of[0] == "s" else (lambda x: x)
    source = of if bits > 8 else f"{of[0]}16"
    cases = integers(bits, 1)
    for mode, f in product(MODES, FORMATS.values()):
        wanted = lambda x, f=f, mode=mode: f.round(Fraction(number(x)), mode)  # noqa: E731
        check(f"cvt.{mode}.{f.name}.{of} $d, $a", storage(f), (source,), cases, wanted)
    for to in ("u16", "s16", "u32", "s32", "u64", "s64"):
        check(f"cvt.{to}.{of} $d, $a", to, (source,), cases, number)
        n = width(to)
        low, high = (-(1 << (n - 1)), (1 << (n - 1)) - 1) if to[0] == "s" else (0, (1 << n) - 1)
        saturated = lambda x, low=low, high=high: min(max(number(x), low), high)  # noqa: E731
        check(f"cvt.sat.{to}.{of} $d, $a", to, (source,), cases, saturated)
    check(f"cvt.s8.{of} $d, $a", "s32", (source,), cases, lambda x: signed(x & 255, 8))
    check(f"cvt.u8.{of} $d, $a", "u32", (source,), cases, lambda x: x & 255)


@pytest.mark.parametrize("f", [F32, F64], ids=["f32", "f64"])
@pytest.mark.parametrize("mode", MODES)
def test_rounding_to_integral_numbers(mode: str, f: Format) -> None:
    def wanted(x: int) -> int:
        if f.is_nan(x):
            return f.nan
        if f.is_infinite(x):
            return x
        return f.round(Fraction(exact.integral(f.value(x), mode)), "rn", x & f.sign) | x & f.sign

    check(f"cvt.{mode}i.{f.name}.{f.name} $d, $a", f.name, (f.name,), reals(f, 1), wanted, f.same)


def test_flushing_and_saturating_conversions() -> None:
    cases = reals(F32, 1)
    flushed = lambda x: F32.nan if F32.is_nan(x) else F32.flushed(x)  # noqa: E731
    check("cvt.ftz.f32.f32 $d, $a", "f32", ("f32",), cases, flushed)
    check("cvt.sat.f32.f32 $d, $a", "f32", ("f32",), cases, exact.saturating(F32, lambda x: x))
    to_integer = lambda x: exact.to_integer(F32, "rp", F32.flushed(x), 32, signed=True)  # noqa: E731
    check("cvt.rpi.ftz.s32.f32 $d, $a", "s32", ("f32",), cases, to_integer)
    doubles = [(F64.round(F32.value(x) * Fraction(5, 4), "rn"),) for (x,) in cases if x & ~F32.sign < F32.infinity]
    narrowed = lambda x: F32.flushed(F32.round(F64.value(x), "rn", (x >> 63) << 31))  # noqa: E731
    check("cvt.rn.ftz.f32.f64 $d, $a", "f32", ("f64",), doubles, narrowed)


# Address spaces.


def test_spaces_of_generic_addresses() -> None:
    for space in ("global", "shared", "local"):
        declare = ".shared .align 8 .b8 inside[8]; .local .align 8 .b8 frame[8]; .reg .b64 %x"
        address = {"global": "%at0", "shared": "inside", "local": "frame"}[space]
        generic = f"{declare}; mov.b64 %x, {address}; cvta.{space}.u64 %x, %x"
        for asked in ("global", "shared", "local", "shared::cta"):
            wanted = space == asked.partition("::")[0]
            check(f"{generic}; isspacep.{asked} $d, %x", "pred", ("b32",), [(0,)], lambda x, w=wanted: w)
        back = f"{generic}; cvta.to.{space}.u64 %x, %x; .reg .b64 %y; mov.b64 %y, {address}; setp.eq.u64 $d, %x, %y"
        check(back, "pred", ("b32",), [(0,)], lambda x: True)


# Unknown instructions.


@pytest.mark.parametrize(
    "instruction",
    [
        "add.cc.u32 %r1, %r1, %r1",
        "addc.u32 %r1, %r1, %r1",
        "add.f16 %h1, %h1, %h1",
        "add.rn.bf16x2 %r1, %r1, %r1",
        "add.rna.f32 %f1, %f1, %f1",
        "add.sat.u32 %r1, %r1, %r1",
        "add.u32 %r1, %r1, %d1",
        "add.u32 %r1, %r1",
        "add.u32 %r1, %r1, %tid.x",
        "min.xorsign.abs.f32 %f1, %f1, %f1",
        "max.f32 %f1, %f1, %f1, %f1",
        "ex2.approx.f16 %h1, %h1",
        "sqrt.approx.f64 %d1, %d1",
        "div.full.f64 %d1, %d1, %d1",
        "prmt.b32.f4e %r1, %r1, %r1, %r1",
        "cvt.rna.tf32.f32 %r1, %f1",
        "cvt.rs.f16x2.f32 %r1, %f1, %f1, %r1",
        "cvt.rn.satfinite.e4m3x2.f32 %h1, %f1, %f1",
        "cvt.pack.sat.u8.s32.b32 %r1, %r1, %r1, %r1",
        "setp.lt.f16 %p1, %h1, %h1",
        "testp.infinite.f32 %p1, %f1",
        "slct.s32.s32 %r1, %r1, %r1, %r1",
        "dp4a.u32.u32 %r1, %r1, %r1, %r1",
        "vote.all.pred %p1, %p1",
        "match.all.sync.b32 %r1|%p1, %r1, %r1",
        "match.any.sync.b64 %r1, %d1, %r1",
        "redux.sync.min.f32 %f1, %f1, %r1",
        "bar.red.popc.u32 %r1, 0, %p1",
        "bar.arrive 0, 64",
        "bar.sync %r1",
        "barrier.cluster.arrive",
        "fence.proxy.async",
        "fence.acq_rel.cluster",
        "atom.global.add.noftz.f16 %h1, [%d1], %h1",
        "atom.global.v2.f32.add %f1, [%d1], %f1",
        "atom.global.add.s64 %d1, [%d1], %d1",
        "atom.global.cas.b128 %d1, [%d1], %d1, %d1",
        "ld.global.b128 %d1, [%d1]",
        "ld.global.v2.b32 %r1, [%d1]",
        "ld.shared::cluster.b32 %r1, [%d1]",
        "cp.async.ca.shared.global [%r1], [%d1], 16",
        "cp.async.bulk.commit_group",
        "mbarrier.init.shared.b64 [%d1], 1",
        "ldmatrix.sync.aligned.m8n16.x1.shared.b8 {%r1}, [%r1]",
        "createpolicy.fractional.L2::evict_last.b64 %d1, 1.0",
        "isspacep.param %p1, %d1",
        "isspacep.const %p1, %d1",
        "call.uni helper",
        "brx.idx %r1, targets",
        "mov.u32 %r1, %smid",
        "mov.u32 %r1, no_such_name",
        "discard.global.L2 [%d1], 128",
        "wgmma.fence.sync.aligned",
        ".maxnreg 8",
    ],
)
def test_unknown_instructions_are_named(instruction: str) -> None:
    registers = ".reg .b16 %h<2>; .reg .b32 %r<2>; .reg .b64 %d<2>; .reg .f32 %f<2>; .reg .pred %p<2>;"
    with pytest.raises(UnknownInstructionError) as error:
        Kernel(f".visible .entry k()\n{{ {registers}\n{instruction};\nret;\n}}")
    assert instruction in str(error.value)


def test_every_arithmetic_form_is_tried() -> None:
    """The lists above name every instruction that the decoder passes to the machine's arithmetic."""
    text = Path(__file__).read_text()
    named = {name for name in FORMS if f"{name}." in text or f'"{name}"' in text}
    assert set(FORMS) - named <= {"div.approx"}, "the same as div.full"
