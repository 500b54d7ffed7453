"""The one table of tolerances, and the comparison that uses it."""

from __future__ import annotations

import torch
from torch import Tensor

TOLERANCE = {dtype: 64 * torch.finfo(dtype).eps for dtype in (torch.float64, torch.float32)} | {
    dtype: 2 * torch.finfo(dtype).eps for dtype in (torch.bfloat16, torch.float16)
}
"""Allowed difference of values of unit size after up to some thirty steps, by the dtype that stores them.

A step rounds each stored value once (eps / 2). Its update comes from row sums of a few hundred products, rounded in
another order (some eps of the row's norm), times a learning rate of at most 0.1: over thirty steps less than 64 eps in
all. 16-bit storage is rounded once per step from float32 math that agrees far more closely: a value near a tie may
round the other way, one eps off, and a second time in a later step.
"""


def assert_close(actual: Tensor, expected: Tensor, what: str = "values", *, dtype: torch.dtype | None = None) -> None:
    """Within ``TOLERANCE`` of ``dtype`` (default: that of ``actual``), relative to the largest value and at least 1.

    Finite on both sides: a NaN or infinity fails, even where both have one.
    """
    assert actual.shape == expected.shape, f"{what}: shape {tuple(actual.shape)}, expected {tuple(expected.shape)}"
    actual, expected, dtype = actual.detach(), expected.detach().double(), dtype or actual.dtype
    assert actual.isfinite().all(), f"{what}: {actual} is not finite"
    assert expected.isfinite().all(), f"{what}: the expected {expected} is not finite"
    size = max(1.0, expected.abs().max().item()) if expected.numel() else 1.0
    error = (actual.double() - expected).abs().max().item() if expected.numel() else 0.0
    allowed = TOLERANCE[dtype] * size
    assert error <= allowed, f"{what}: off by {error:.3g}, allowed {allowed:.3g} for {dtype} of size {size:.3g}"


def assert_identical(actual: Tensor, expected: Tensor, what: str = "values") -> None:
    """The same dtype, shape and bits, NaN payloads included."""
    assert actual.dtype == expected.dtype, f"{what}: dtype {actual.dtype}, expected {expected.dtype}"
    assert actual.shape == expected.shape, f"{what}: shape {tuple(actual.shape)}, expected {tuple(expected.shape)}"
    bits = [t.detach().contiguous().reshape(-1).view(torch.uint8) for t in (actual, expected)]
    assert torch.equal(*bits), f"{what}: {actual} is not bit for bit {expected}"
