"""Parameters and gradients that are refused, and the words. Every message names the tensor and the remedy.

``label`` is what messages call a parameter: anything that can be formatted.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fused_adamp.bucket import FLOATING, has_storage, overlaps, span_of
from fused_adamp.fake import has_numbers, traces_fakes
from fused_adamp.options import listed
from fused_adamp.reference import rows_first
from fused_adamp.sharding import is_distributed, local, odd_placement, slice_of

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Sequence

    from fused_adamp.bucket import Bucket

__all__ = ["check_channel_dim", "check_gradient", "check_parameter", "check_storage", "refuse_flat_buffers"]

_FLAT_REMEDY = (
    "Say of what it is a slice, by fused_adamp.mark_slice(p, shape=..., begin=...) on all ranks: see docs/sharding.md. "
    "Or shard with FSDP2, or keep parameters whole (DistributedDataParallel, ZeroRedundancyOptimizer)"
)


def _crosses_rows(p: Tensor, matrix: Tensor) -> bool:
    """Whether a contiguous vector is a run of a contiguous matrix's elements that crosses from one row to the next."""
    if matrix.ndim < 2 or not matrix.is_contiguous() or not p.is_contiguous() or not 0 < p.numel() < matrix.numel():
        return False
    cols = matrix.numel() // matrix.size(0)
    first = p.storage_offset() - matrix.storage_offset()
    return first // cols != (first + p.numel() - 1) // cols


def refuse_flat_buffers(
    params: Collection[Tensor], buckets: Sequence[Bucket], label: Callable[[Tensor], object]
) -> None:
    """Raises TypeError if a new vector holds the memory of matrices that were stepped before and are gone now."""
    before = {p for bucket in buckets for p in bucket.index}
    gone = [span_of(local(p)) for p in before if p.ndim >= 2 and p not in params]
    for p in params if gone else ():
        if p.ndim == 1 and p not in before and slice_of(p) is None:
            begin, end = span_of(p)
            if any(begin <= first and last <= end and first < last for first, last in gone):
                raise TypeError(
                    f"{label(p)} has taken the place of matrices, whose memory it holds: a vector is never projected. "
                    f"{_FLAT_REMEDY}"
                )


def check_parameter(p: Tensor, label: object, *, fused: bool | None = None) -> None:
    if getattr(p, "_fsdp_flattened", False) or getattr(p, "_is_flat_param", False):  # FSDP1's marks
        raise TypeError(
            f"{label} is part of a flat parameter of FSDP1, of which no rows are left: stepped, it would never be "
            "projected. Shard with FSDP2 (torch.distributed.fsdp.fully_shard), or keep the parameters whole, e.g. with "
            "DistributedDataParallel"
        )
    flat = slice_of(p)
    if flat is not None and p.numel() != flat.end - flat.begin:
        raise ValueError(
            f"{label} has {p.numel()} elements, but was marked as elements {flat.begin} to {flat.end} of a tensor of "
            f"shape {flat.shape}: call fused_adamp.mark_slice again, on all ranks"
        )
    if flat is None and p.ndim == 1 and p._base is not None and _crosses_rows(p, p._base):
        raise TypeError(
            f"{label} is a one-dimensional slice of a tensor of shape {tuple(p._base.shape)}: stepped as a vector, it "
            f"would never be projected. {_FLAT_REMEDY}"
        )
    if (odd := odd_placement(p)) is not None:
        raise TypeError(
            f"{label} has the placement {odd!r}, which is neither Shard nor Replicate: redistribute it first, e.g. "
            "p.redistribute(placements=[Replicate()])"
        )
    p = local(p)
    if p.is_meta and fused:
        raise RuntimeError(
            "`fused=True` requires all the params to be floating point Tensors of supported devices, but "
            f"{label} is on the meta device and holds no data: materialise it first, e.g. model.to_empty()"
        )
    if p.is_meta:
        raise TypeError(f"{label} is on the meta device and holds no data: materialise it first, e.g. model.to_empty()")
    if p.layout is not torch.strided:
        raise TypeError(f"{label} has layout {p.layout}: pass a dense tensor, e.g. p.to_dense()")
    if p.dtype not in FLOATING:
        remedy = "train torch.view_as_real(p)" if p.is_complex() else "pass a floating-point parameter"
        raise TypeError(f"{label} has dtype {p.dtype}, allowed are {listed(FLOATING)}: {remedy}")
    check_storage(p, "", label)
    if overlaps(p):
        raise ValueError(
            f"elements of {label} share memory (shape {tuple(p.shape)}, strides {p.stride()}): pass p.contiguous()"
        )


def check_channel_dim(p: Tensor, channel_dim: int | tuple[int, ...], label: object) -> None:
    flat = slice_of(p)
    if flat is not None and len(flat.shape) >= 2 and channel_dim not in (0, (0,)):
        raise ValueError(
            f"channel_dim={channel_dim} does not fit {label}, a flat slice of a tensor of shape {flat.shape}: its rows "
            "are those of dim 0; pass channel_dim=0"
        )
    if p.ndim < 2 or channel_dim == 0:
        return
    dims = channel_dim if isinstance(channel_dim, tuple) else (channel_dim,)
    if len({d % p.ndim for d in dims}) < len(dims) or not all(-p.ndim <= d < p.ndim for d in dims):
        raise ValueError(
            f"channel_dim={channel_dim} does not fit {label} of {p.ndim} dimensions (shape {tuple(p.shape)}): pass "
            f"different dimensions from -{p.ndim} to {p.ndim - 1}"
        )
    try:
        rows_first(local(p), channel_dim)
    except RuntimeError as error:
        raise ValueError(
            f"channel_dim={channel_dim} of {label} (shape {tuple(p.shape)}, strides {p.stride()}) cannot be merged "
            "without a copy: pass p.contiguous(), or dimensions that follow each other"
        ) from error


def check_storage(t: Tensor, role: str, label: object) -> None:
    """Raises ValueError if elements lie outside the tensor's storage. ``role`` says whose it is."""
    if not has_storage(t):
        raise ValueError(
            f"the storage of {role}{label} holds {t.untyped_storage().nbytes()} bytes, too few for shape "
            f"{tuple(t.shape)}: an offloading hook may have freed it; bring it back before the step"
        )


def check_gradient(p: Tensor, g: Tensor, label: object) -> None:
    if is_distributed(p) != is_distributed(g):
        kinds = ("a plain tensor", "a DTensor")
        raise TypeError(
            f"the gradient of {label} is {kinds[is_distributed(g)]}, the parameter {kinds[is_distributed(p)]}: make "
            "the gradient lie as the parameter does, e.g. by DTensor.from_local"
        )
    if g.shape == p.shape:
        p, g = local(p), local(g)
    if g.layout is not torch.strided:
        raise TypeError(
            f"the gradient of {label} has layout {g.layout}: use sparse=False, or p.grad = p.grad.to_dense()"
        )
    if g.shape != p.shape:
        raise ValueError(f"the gradient of {label} has shape {tuple(g.shape)}, the parameter {tuple(p.shape)}")
    check_storage(g, "the gradient of ", label)
    if g.device != p.device:
        raise ValueError(f"the gradient of {label} is on {g.device}, the parameter on {p.device}: move one of them")
    if g.dtype not in FLOATING:
        raise TypeError(f"the gradient of {label} has dtype {g.dtype}, allowed are {listed(FLOATING)}")
    if has_numbers(p) != has_numbers(g) and not traces_fakes():
        kinds = ("a tensor of FakeTensorMode", "a real tensor")
        raise TypeError(
            f"the gradient of {label} is {kinds[has_numbers(g)]}, the parameter {kinds[has_numbers(p)]}: make both in "
            "the same mode"
        )
