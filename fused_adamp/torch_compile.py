"""A step inside torch.compile: one operator, which looks the optimizer up when the compiled code runs and steps it."""

from __future__ import annotations

from itertools import count
from typing import TYPE_CHECKING
from weakref import WeakValueDictionary

import torch

if TYPE_CHECKING:
    from torch import Tensor

    from fused_adamp.memory import Owner

__all__ = ["OPTIMIZERS", "register"]

OPTIMIZERS: WeakValueDictionary[str, Owner] = WeakValueDictionary()
"""The optimizers that are alive, by handle. A string: of an int that changes, Dynamo would make a symbol."""

_numbers = count()


def register(optimizer: Owner) -> str:
    """Returns the handle by which compiled code finds the optimizer."""
    handle = f"{type(optimizer).__name__} {next(_numbers)}"
    OPTIMIZERS[handle] = optimizer
    return handle


@torch.no_grad()
def _optimizer_step(
    params: list[Tensor], grads: list[Tensor], options: list[Tensor], members: list[int], names: list[str], handle: str
) -> None:
    """Steps the optimizer's parameters ``members``, as if the others had no gradient.

    Compiled code may compute on copies that it writes back later (functionalization). So while the step runs, the
    optimizer's own tensors use the data of the arguments: parameters, gradients, and hyperparameters that are tensors.

    Args:
        params, grads: the tensors of these parameters in compiled code.
        options, names: hyperparameters that are tensors, each with "group index, space, name".
        members: the parameters' indices in the order of the parameter groups.
        handle: the optimizer's, from :func:`register`.
    """
    optimizer = OPTIMIZERS[handle]
    groups = optimizer.param_groups
    own = [p for group in groups for p in group["params"]]
    pairs = [(own[i], p) for i, p in zip(members, params, strict=True)]
    for name, option in zip(names, options, strict=True):
        group, _, key = name.partition(" ")
        pairs.append((groups[int(group)][key], option))
    replaced = [(tensor, tensor.data, given) for tensor, given in pairs if given is not tensor]
    before = [p.grad for p in own]
    during = dict(zip(members, grads, strict=True))
    try:
        for tensor, _, given in replaced:
            tensor.data = given
        for i, p in enumerate(own):
            if before[i] is not during.get(i):
                p.grad = during.get(i)
        optimizer._step()
    finally:
        for i, p in enumerate(own):
            if before[i] is not during.get(i):
                p.grad = before[i]
        for tensor, data, _ in replaced:
            tensor.data = data


def _optimizer_step_fake(*_: object) -> None:
    """Does nothing: the operator returns nothing, and its schema lists the tensors that it writes."""


_library = torch.library.Library("fused_adamp", "FRAGMENT")  # type: ignore[no-untyped-call]
_library.define(  # type: ignore[no-untyped-call]
    "optimizer_step(Tensor(a!)[] params, Tensor[] grads, Tensor[] options, int[] members, str[] names, str handle)"
    " -> ()",
    tags=(torch.Tag.needs_exact_strides, torch.Tag.cudagraph_unsafe),
)
_library.impl("optimizer_step", _optimizer_step, "CompositeExplicitAutograd")  # type: ignore[no-untyped-call]
torch.library.register_fake("fused_adamp::optimizer_step", _optimizer_step_fake, lib=_library)
