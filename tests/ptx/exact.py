"""IEEE arithmetic on exact fractions, to compare instructions with. A number is its bits in a format."""

from __future__ import annotations

import math
from fractions import Fraction
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

MODES = ("rn", "rz", "rm", "rp")


class Format(NamedTuple):
    """A floating-point format."""

    name: str
    width: int
    """Bits in all."""
    precision: int
    """Significant bits."""
    lowest: int
    """The exponent of the last bit of a denormal."""

    @property
    def infinity(self) -> int:
        return ((1 << (self.width - self.precision)) - 1) << (self.precision - 1)

    @property
    def sign(self) -> int:
        return 1 << (self.width - 1)

    @property
    def nan(self) -> int:
        """The bits of the NaN that instructions return. In float64 any NaN counts as equal: :meth:`same`."""
        return (1 << (self.width - 1)) - 1

    @property
    def normal(self) -> int:
        """The smallest normal number."""
        return 1 << (self.precision - 1)

    def is_nan(self, bits: int) -> bool:
        return bits & ~self.sign > self.infinity

    def is_infinite(self, bits: int) -> bool:
        return bits & ~self.sign == self.infinity

    def same(self, a: int, b: int) -> bool:
        return a == b or (self.width == 64 and self.is_nan(a) and self.is_nan(b))

    def value(self, bits: int) -> Fraction:
        """The exact value of a finite number, given as bits."""
        field, fraction = divmod(bits & ~self.sign, self.normal)
        digits = fraction + self.normal if field else fraction
        return (-1 if bits & self.sign else 1) * digits * Fraction(2) ** (self.lowest + max(field, 1) - 1)

    def flushed(self, bits: int) -> int:
        """Zero for a denormal."""
        return bits & self.sign if bits & ~self.sign < self.normal else bits

    def round(self, x: Fraction, mode: str, zero: int = 0) -> int:
        """The number next to ``x``; ``zero`` if ``x`` is zero."""
        if x == 0:
            return zero
        sign = self.sign if x < 0 else 0
        toward_infinity = mode == ("rm" if x < 0 else "rp")
        x = abs(x)
        exponent = x.numerator.bit_length() - x.denominator.bit_length()
        exponent -= x < Fraction(2) ** exponent
        last = max(exponent - self.precision + 1, self.lowest)
        scaled = x / Fraction(2) ** last
        digits = math.floor(scaled)
        rest = scaled - digits
        half = Fraction(1, 2)
        digits += (rest > half or (rest == half and digits % 2 == 1)) if mode == "rn" else toward_infinity and rest > 0
        if digits == 2 * self.normal:
            digits, last = self.normal, last + 1
        bits = digits if digits < self.normal else (last - self.lowest) * self.normal + digits
        if bits >= self.infinity:
            bits = self.infinity if mode == "rn" or toward_infinity else self.infinity - 1
        return sign | bits


F16, BF16 = Format("f16", 16, 11, -24), Format("bf16", 16, 8, -133)
F32, F64 = Format("f32", 32, 24, -149), Format("f64", 64, 53, -1074)


def add(f: Format, mode: str, a: int, b: int) -> int:
    return fma(f, mode, a, f.round(Fraction(1), "rn"), b)


def subtract(f: Format, mode: str, a: int, b: int) -> int:
    return add(f, mode, a, b if f.is_nan(b) else b ^ f.sign)


def multiply(f: Format, mode: str, a: int, b: int) -> int:
    sign = (a ^ b) & f.sign
    if f.is_nan(a) or f.is_nan(b):
        return f.nan
    if f.is_infinite(a) or f.is_infinite(b):
        return f.nan if 0 in (a & ~f.sign, b & ~f.sign) else sign | f.infinity
    return f.round(f.value(a) * f.value(b), mode, sign)


def fma(f: Format, mode: str, a: int, b: int, c: int) -> int:
    sign = (a ^ b) & f.sign
    if f.is_nan(a) or f.is_nan(b) or f.is_nan(c):
        return f.nan
    if f.is_infinite(a) or f.is_infinite(b):
        if 0 in (a & ~f.sign, b & ~f.sign) or (f.is_infinite(c) and c & f.sign != sign):
            return f.nan
        return sign | f.infinity
    if f.is_infinite(c):
        return c
    zero = sign if sign == c & f.sign else f.sign if mode == "rm" else 0
    return f.round(f.value(a) * f.value(b) + f.value(c), mode, zero)


def divide(f: Format, mode: str, a: int, b: int) -> int:
    sign = (a ^ b) & f.sign
    if f.is_nan(a) or f.is_nan(b):
        return f.nan
    if f.is_infinite(a):
        return f.nan if f.is_infinite(b) else sign | f.infinity
    if f.is_infinite(b):
        return sign
    if f.value(b) == 0:
        return f.nan if f.value(a) == 0 else sign | f.infinity
    return f.round(f.value(a) / f.value(b), mode, sign)


def reciprocal(f: Format, mode: str, a: int) -> int:
    return divide(f, mode, f.round(Fraction(1), "rn"), a)


def square_root(f: Format, mode: str, a: int) -> int:
    if f.is_nan(a):
        return f.nan
    if a & ~f.sign == 0:
        return a
    if a & f.sign:
        return f.nan
    if f.is_infinite(a):
        return a
    shift = 1200  # even, and more bits than any format has: so what is cut off decides no rounding but by being there
    square = f.value(a) * 2**shift
    root = math.isqrt(math.floor(square))
    inexact = root * root != square
    return f.round((root + Fraction(int(inexact), 2)) / 2 ** (shift // 2), mode)


def minimum(f: Format, a: int, b: int, *, nan_wins: bool = False) -> int:
    """Minus zero is less than zero."""
    if f.is_nan(a) or f.is_nan(b):
        return f.nan if nan_wins or (f.is_nan(a) and f.is_nan(b)) else b if f.is_nan(a) else a
    return min(a, b, key=lambda x: -(x & ~f.sign) - 1 if x & f.sign else x)


def maximum(f: Format, a: int, b: int, *, nan_wins: bool = False) -> int:
    found = minimum(f, a ^ f.sign, b ^ f.sign, nan_wins=nan_wins)
    return f.nan if f.is_nan(found) else found ^ f.sign


def flushing(f: Format, of: Callable[..., int]) -> Callable[..., int]:
    """An operation with ``.ftz``."""
    return lambda *operands: f.flushed(of(*map(f.flushed, operands)))


def saturating(f: Format, of: Callable[..., int]) -> Callable[..., int]:
    """An operation with ``.sat``: into [0, 1], and NaN to zero."""
    one = f.round(Fraction(1), "rn")

    def saturated(*operands: int) -> int:
        bits = of(*operands)
        return 0 if f.is_nan(bits) or bits & f.sign else min(bits, one)

    return saturated


def to_integer(f: Format, mode: str, bits: int, width: int, *, signed: bool) -> int:
    """A number as an integer's bits: saturated, NaN as PTX defines it."""
    low, high = (-(1 << (width - 1)), (1 << (width - 1)) - 1) if signed else (0, (1 << width) - 1)
    if f.is_nan(bits):
        return 1 << (width - 1) if f.width == 64 or width == 64 else 0
    if f.is_infinite(bits):
        return (low if bits & f.sign else high) & ((1 << width) - 1)
    return min(max(integral(f.value(bits), mode), low), high) & ((1 << width) - 1)


def integral(x: Fraction, mode: str) -> int:
    """The next integer."""
    return (
        round(x) if mode == "rn" else math.trunc(x) if mode == "rz" else math.floor(x) if mode == "rm" else math.ceil(x)
    )


def samples(f: Format, random: Sequence[int] = ()) -> list[int]:
    """Bits of zeros, denormals, numbers around one and around integers' ends, halves, infinities, NaN, both signs."""
    one = f.round(Fraction(1), "rn")
    positive = [0, 1, 2, f.normal - 1, f.normal, f.normal + 1, one - 1, one, one + 1, f.infinity - 1, f.infinity]
    halves = [Fraction(1, 2), Fraction(3, 2), Fraction(5, 2), Fraction(255, 2), Fraction(1, 3)]
    ends = [Fraction(2) ** bits for bits in (15, 16, 31, 32, 63, 64)]
    positive += [f.round(x, "rn") for x in halves + ends]
    positive += [f.round(Fraction(2**31), "rn") - 1, f.round(Fraction(2**63), "rn") - 1, f.nan]
    positive = [bits for bits in positive if bits <= f.nan] + [bits & (f.sign - 1) for bits in random]
    return positive + [bits | f.sign for bits in positive]
