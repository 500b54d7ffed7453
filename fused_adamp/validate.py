"""Checks of parameters, gradients and state. Every error message names the tensor and the remedy.

``label`` is a parameter's name in messages: anything that can be formatted.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from fused_adamp.batch import FLOATING
from fused_adamp.fake import has_numbers, traces_fakes
from fused_adamp.options import listed
from fused_adamp.reference import rows_first
from fused_adamp.sharded.dtensor import check_placements, is_distributed, local
from fused_adamp.sharded.flat_slice import check_rows, check_slice
from fused_adamp.tensors import has_storage, overlaps

if TYPE_CHECKING:
    from collections.abc import Sequence

    from fused_adamp.batch import BucketKey

__all__ = ["Label", "check_channel_dim", "check_member", "check_parameter", "check_state", "labels"]


class Label(NamedTuple):
    """A parameter's name in messages. The parameter groups are searched when the message is written, not before."""

    groups: Sequence[dict[str, Any]]
    p: Tensor

    def __str__(self) -> str:
        return labels(self.groups).get(self.p, "a parameter that is in no group")

    def __format__(self, spec: str) -> str:
        return format(str(self), spec)


def labels(groups: Sequence[dict[str, Any]]) -> dict[Tensor, str]:
    """Each parameter's name in messages and reports, in the order of the parameter groups."""
    found = {}
    for number, group in enumerate(groups):
        names = group.get("param_names")
        for index, p in enumerate(group["params"]):
            found[p] = f"parameter {names[index]!r}" if names else f"parameter {index} of group {number}"
    return found


def check_member(p: Tensor, key: BucketKey, state: dict[str, Any], label: object) -> None:
    """Raises ValueError or TypeError if a parameter of a bucket, its gradient or its state cannot be stepped."""
    check_parameter(p, label)
    check_channel_dim(p, key.channel_dim, label)
    if p.grad is not None:
        _check_gradient(p, p.grad, label)
    for name, t in state.items():
        if name in key.storage and isinstance(t, Tensor):
            _check_storage(local(t), f"state {name!r} of ", label)


def check_state(p: Tensor, state: dict[str, Any] | None, key: BucketKey, label: object) -> None:
    """Raises ValueError unless a parameter's state is empty, or has the entries and shapes of its bucket."""
    if not state:
        return
    needed = (*key.moments, "step") if key.adaptive else key.moments
    missing = [name for name in needed if name not in state]
    if missing:
        raise ValueError(
            f"the state of {label} has {sorted(state)} but lacks {missing}: load a whole state_dict, or "
            "clear this parameter's state to start it afresh"
        )
    for name in key.storage:
        if name in state and state[name].shape != p.shape:
            raise ValueError(
                f"state {name!r} of {label} has shape {tuple(state[name].shape)}, the parameter "
                f"{tuple(p.shape)}: load this model's state, or clear this parameter's state to start it afresh"
            )


def check_parameter(p: Tensor, label: object, *, fused: bool | None = None) -> None:
    check_slice(p, label)
    check_placements(p, label)
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
    _check_storage(p, "", label)
    if overlaps(p):
        raise ValueError(
            f"elements of {label} share memory (shape {tuple(p.shape)}, strides {p.stride()}): pass p.contiguous()"
        )


def check_channel_dim(p: Tensor, channel_dim: int | tuple[int, ...], label: object) -> None:
    check_rows(p, channel_dim, label)
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


def _check_storage(t: Tensor, role: str, label: object) -> None:
    """Raises ValueError if elements lie outside the tensor's storage. ``role`` is e.g. "the gradient of "."""
    if not has_storage(t):
        raise ValueError(
            f"the storage of {role}{label} holds {t.untyped_storage().nbytes()} bytes, too few for shape "
            f"{tuple(t.shape)}: an offloading hook may have freed it; bring it back before the step"
        )


def _check_gradient(p: Tensor, g: Tensor, label: object) -> None:
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
    _check_storage(g, "the gradient of ", label)
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
