"""FakeTensors, which have no data: torch's FakeTensorMode makes them, to plan memory or to trace."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch._subclasses.fake_tensor import FakeTensor

from fused_adamp.sharded.dtensor import local

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from fused_adamp.batch import BucketKey

__all__ = ["has_numbers", "new_state", "touch", "traces_fakes"]

_FAKE = torch._C._TorchDispatchModeKey.FAKE
_mode_of = torch._C._get_dispatch_mode


def has_numbers(t: Any) -> bool:
    """Whether a tensor has data, so is not a FakeTensor. For a DTensor, its local part is asked."""
    return not isinstance(local(t), FakeTensor)


def traces_fakes() -> bool:
    """Whether a FakeTensorMode is active, in which new tensors have no numbers."""
    return _mode_of(_FAKE) is not None


def new_state(p: Tensor, key: BucketKey) -> dict[str, Tensor]:
    """All state of a parameter, by key, with the shapes and dtypes of :func:`fused_adamp.bucket.new_state`."""
    counters = {name: local(p).new_zeros((), dtype=dtype) for name, dtype in key.counters.items()}
    storage = {name: torch.zeros_like(p, dtype=dtype, requires_grad=False) for name, dtype in key.storage.items()}
    return counters | storage


def touch(written: Sequence[Tensor]) -> None:
    """Writes to the tensors that a step writes, so that versions count up, and modes and allocators see the writes.

    A real tensor among them raises FakeTensorMode's own error.
    """
    for t in written:
        t.mul_(1)
