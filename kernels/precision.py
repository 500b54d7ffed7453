"""bfloat16 storage without loss: fused_adamp/precision.py, bit for bit."""

import triton
import triton.language as tl

# fused_adamp/precision.py, ROUNDINGS.
NEAREST = tl.constexpr(0)
STOCHASTIC = tl.constexpr(1)
REMAINDER = tl.constexpr(2)


@triton.jit
def bits_of(x):
    """A float32 block's bits as int32; 0x7fc00000 for every NaN."""
    return tl.where(x == x, x.to(tl.int32, bitcast=True), 0x7FC00000)


@triton.jit
def join(high, low):
    """float32 from bfloat16 and the int16 remainder: ``bits = 65536 high + low``. No zero has a negative remainder."""
    rest = low.to(tl.int32)
    bits = high.to(tl.int16, bitcast=True).to(tl.int32) << 16
    stale = ((bits & 0x7FFFFFFF) == 0) & (rest < 0)
    return (bits + tl.where(stale, 0, rest)).to(tl.float32, bitcast=True)


@triton.jit
def split(x):
    """Float32 to the nearest bfloat16 and an int16 remainder in [-32768, 32767]: ``bits = 65536 high + low``."""
    bits = bits_of(x)
    return ((bits + 0x8000) >> 16).to(tl.int16).to(tl.bfloat16, bitcast=True), bits.to(tl.int16)


@triton.jit
def round_stochastically(x, random):
    """float32 to either neighbour in bfloat16, with a mean over all ``random`` (16 bits) of x. Infinity stays."""
    bits = bits_of(x)
    bits = tl.where(tl.abs(x) < float("inf"), bits + random.to(tl.int32), bits)
    return (bits >> 16).to(tl.int16).to(tl.bfloat16, bitcast=True)


@triton.jit
def step_key(seed):
    """The keys of a step, as the halves of 64 bits, from an int64 seed: SplitMix64's finalizer."""
    z = (seed.to(tl.uint64) + 1) * 0x9E3779B97F4A7C15
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB
    return (z ^ (z >> 31)).to(tl.int64)


@triton.jit
def halves(key):
    """The low and the high key, uint32."""
    key = key.to(tl.uint64)
    return (key & 0xFFFFFFFF).to(tl.uint32), (key >> 32).to(tl.uint32)


@triton.jit
def noise(number, low, high):
    """32 random bits for every element's number (uint32), under two keys: a multiply-xorshift hash."""
    x = number + low
    x = (x ^ (x >> 16)) * 0x21F0AAAD
    x = x ^ high
    x = (x ^ (x >> 15)) * 0x735A2D97
    x = (x ^ (x >> 15)) * 0x846CA68B
    return x ^ (x >> 16)
