"""Memory layout and rows of tensors. Nothing here knows of optimizers."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

__all__ = ["has_storage", "overlaps", "promoted", "rows_cols", "span_of"]


def rows_cols(p: Tensor) -> tuple[int, int]:
    """R and K of a tensor with rows first; a vector or scalar is one row."""
    if p.ndim < 2:
        return 1, p.numel()
    return p.size(0), p.numel() // max(p.size(0), 1)


def span_of(t: Tensor) -> tuple[int, int]:
    """The addresses of a tensor's first byte and of the byte after its last."""
    begin = t.data_ptr()
    return begin, begin + _reach(t) * t.itemsize


def has_storage(t: Tensor) -> bool:
    """Whether all elements lie inside the tensor's storage. Offloading tools free a storage under its tensors."""
    return not t.numel() or (t.storage_offset() + _reach(t)) * t.itemsize <= t.untyped_storage().nbytes()


def _reach(t: Tensor) -> int:
    """The distance from a tensor's first element to its end, in elements. 0 if it has none."""
    if not t.numel():
        return 0
    return 1 + sum((size - 1) * stride for size, stride in zip(t.shape, t.stride(), strict=True))


def overlaps(t: Tensor) -> bool:
    """Whether elements of ``t`` may share memory: true if a stride does not reach past the dimensions below it."""
    end = 0
    for stride, size in sorted(zip(t.stride(), t.shape, strict=True)):
        if size > 1:
            if stride <= end:
                return t.numel() > 0
            end += (size - 1) * stride
    return False


def promoted(dtypes: Sequence[torch.dtype]) -> torch.dtype:
    """The dtype to which torch promotes these; torch's default dtype if there are none."""
    dtype = dtypes[0] if dtypes else torch.get_default_dtype()
    for other in dtypes:
        dtype = torch.promote_types(dtype, other)
    return dtype
