"""bfloat16 storage without loss: a 16-bit remainder beside the weight, or unbiased rounding. Plain PyTorch.

Every backend rounds by these rules, bit for bit: csrc/precision.h and kernels/precision.py say them in their languages.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["ROUNDINGS", "join", "noise", "round_stochastically", "split", "step_key"]

ROUNDINGS = ("nearest", "stochastic", "remainder")
"""How bfloat16 storage is written: to the nearest number; up or down by chance, right on average; with a remainder."""


def split(w: Tensor) -> tuple[Tensor, Tensor]:
    """A float32 tensor as bfloat16 and an int16 remainder, from which :func:`join` gets it back bit for bit.

    With ``bits`` the float32's bits, ``bits = 65536 * bfloat16's + remainder``, the remainder in [-32768, 32767]: so
    the bfloat16 is the nearest one, and of two equally near the one further from zero. A NaN becomes the NaN 0x7fc0.
    """
    bits = w.view(torch.int32)
    bits = torch.where(w.isnan(), 0x7FC00000, bits).to(torch.int64)
    high = ((bits + 0x8000) >> 16).to(torch.int16)
    return high.view(torch.bfloat16), bits.to(torch.int16)


def join(p: Tensor, remainder: Tensor) -> Tensor:
    """The float32 tensor that :func:`split` took apart.

    :func:`split` gives no zero a negative remainder. A zero that has one was set to zero later, and stays zero.
    """
    rest = remainder.to(torch.int32)
    bits = p.view(torch.int16).to(torch.int32) << 16
    return (bits + torch.where((p == 0) & (rest < 0), 0, rest)).view(torch.float32)


def round_stochastically(x: Tensor, random: Tensor) -> Tensor:
    """Rounds float32 ``x`` to either neighbour in bfloat16. Its mean over all ``random`` (16 bits, int64) is ``x``."""
    bits = torch.where(x.isnan(), 0x7FC00000, x.contiguous().view(torch.int32)).to(torch.int64)
    keep = x.isnan() | x.isinf()
    bits = torch.where(keep, bits, bits + random)
    return (bits >> 16).to(torch.int16).view(torch.bfloat16)


def step_key(seed: int) -> tuple[int, int]:
    """Two 32-bit keys from a parameter's 64-bit seed, which grows by one in every step (SplitMix64's finalizer)."""
    mask = (1 << 64) - 1
    z = (seed + 1) * 0x9E3779B97F4A7C15 & mask
    z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9 & mask
    z = (z ^ z >> 27) * 0x94D049BB133111EB & mask
    z ^= z >> 31
    return z & 0xFFFFFFFF, z >> 32


def noise(seed: int, numbers: Tensor, stream: int) -> Tensor:
    """16 random bits per element, int64 in the shape of ``numbers``: the elements' numbers, counted row by row, int64.

    They are a multiply-xorshift hash of the element's number under two keys. Stream 0 (the weight) takes the low half
    of the hash, stream 1 (the first moment) the high half, stream 2 (the second) the low half under swapped keys.
    """
    low, high = step_key(seed)
    if stream == 2:
        low, high = high, low
    x = (numbers + low) & 0xFFFFFFFF
    x = ((x ^ x >> 16) * 0x21F0AAAD) & 0xFFFFFFFF
    x ^= high
    x = ((x ^ x >> 15) * 0x735A2D97) & 0xFFFFFFFF
    x = ((x ^ x >> 15) * 0x846CA68B) & 0xFFFFFFFF
    x ^= x >> 16
    return x >> 16 if stream == 1 else x & 0xFFFF
