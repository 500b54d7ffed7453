"""Passes over a bucket's tensors that every step makes on the host, each as one call.

Each function is here in Python and in csrc/host.cpp. The compiled one is called where the extension is built and torch
has DLPack's C interface.
"""

from __future__ import annotations

import importlib
from array import array
from functools import cache
from itertools import repeat
from operator import is_
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar
from weakref import ref

from torch import Tensor

from fused_adamp.batch import ABSENT
from fused_adamp.tensors import has_storage

if TYPE_CHECKING:
    from collections.abc import Mapping

    from fused_adamp.batch import Batch

__all__ = [
    "WIDEST_LOAD",
    "Marks",
    "are_same",
    "are_tensors",
    "compiled",
    "entries",
    "gradients",
    "marks",
    "marks_of",
    "present",
]

_T = TypeVar("_T")
_VERSION = 1  # csrc/host.cpp

WIDEST_LOAD = 16
"""Bytes of one load of a thread of a GPU. csrc/host.cpp has it too."""


@cache
def compiled() -> Any:
    """The module of the compiled functions; None if it is not built, has none of them, or those of other sources."""
    try:
        module = importlib.import_module("fused_adamp._C")
    except ImportError:
        return None
    return module if getattr(module, "host", None) == _VERSION else None


class Marks(NamedTuple):
    """Where tensors lie, and how: two objects that stay the same ones as long as that does not change. No tensor is
    kept.
    """

    addresses: Any
    """A buffer of int64, one for each tensor."""
    layout: Any
    """The tensors' sizes, strides and dtypes. Tensors with the same object also have the same alignment to WIDEST_LOAD,
    and those that have moved lie on the same device, inside their storage."""


def marks_of(batch: Batch, role: str, tensors: list[Tensor], *, settled: bool = False) -> Marks:
    """The marks of a batch's tensors in one role, from one look per batch. They are the last batch's if they fit."""
    found: Marks | None = batch.notes.get(role)
    if found is None:
        known = batch.bucket.marks
        found = batch.notes[role] = known[role] = marks(known.get(role), tensors, settled=settled)
    return found


def marks(old: Marks | None, tensors: list[Tensor], *, settled: bool = False) -> Marks:
    """The tensors' marks: ``old`` if nothing has changed since; with the old layout if tensors have only moved.

    A tensor may have moved if it is aligned as it was and lies inside its storage. Tensors without strides, and those
    that have elements but no address, get marks that differ from all others.

    Args:
        settled: the same tensor at the same address has the same layout, as is true of state. In Python that is faster.
    """
    c = compiled()
    if c is None:
        return _marks(old, tensors, settled=settled)
    found = c.marks(*(old or (None, None)), tensors)
    return old if found is None and old is not None else Marks(*found)


class _Layout:
    """What :attr:`Marks.layout` is without the extension."""

    def __init__(self, words: tuple[Any, ...], tensors: list[Tensor]) -> None:
        self.words = words
        self.devices = [t.device for t in tensors]
        self.tensors: list[ref[Tensor]] = []
        """Those that have been looked at last, if they are settled."""


def _unknown() -> Marks:
    return Marks(array("q"), _Layout((), []))


def _marks(old: Marks | None, tensors: list[Tensor], *, settled: bool) -> Marks:
    old = old if old is not None and isinstance(old.layout, _Layout) else _unknown()
    layout: _Layout = old.layout
    try:
        addresses = array("q", map(Tensor.data_ptr, tensors))
        same = addresses == old.addresses
        if settled and same and are_same([its() for its in layout.tensors], tensors):
            return old
        words = (list(map(Tensor.stride, tensors)), list(map(Tensor.size, tensors)), [t.dtype for t in tensors])
    except RuntimeError:
        return _unknown()
    if 0 in addresses and any(not a and t.numel() for a, t in zip(addresses, tensors, strict=True)):
        return _unknown()
    fits = words == layout.words and all(
        (a - b) % WIDEST_LOAD == 0 and t.device == device and has_storage(t)
        for a, b, t, device in zip(old.addresses, addresses, tensors, layout.devices, strict=True)
        if a != b
    )
    layout = layout if fits else _Layout(words, tensors)
    if settled:
        layout.tensors = list(map(ref, tensors))
    return old if fits and same else Marks(addresses, layout)


def are_same(first: list[Any], second: list[Any]) -> bool:
    """Whether the lists hold the same objects."""
    c = compiled()
    if c is None:
        return len(first) == len(second) and all(map(is_, first, second))
    return bool(c.are_same(first, second))


def are_tensors(objects: list[Any]) -> bool:
    """Whether all objects are tensors."""
    c = compiled()
    return all(map(isinstance, objects, repeat(Tensor))) if c is None else bool(c.are_tensors(objects))


def gradients(params: list[Tensor]) -> tuple[list[Tensor], int]:
    """The gradients, with ABSENT where there is none; and how many there are."""
    c = compiled()
    if c is not None:
        found: tuple[list[Tensor], int] = c.gradients(params, ABSENT)
        return found
    grads: list[Any] = [p.grad for p in params]
    missing = sum(map(is_, grads, repeat(None)))
    return [ABSENT if g is None else g for g in grads] if missing else grads, len(grads) - missing


def present(members: list[_T], grads: list[Tensor]) -> list[_T]:
    """The members that have a gradient: ``members`` itself if all do."""
    c = compiled()
    if c is not None:
        found: list[_T] = c.present(members, grads, ABSENT)
        return found
    if any(map(is_, grads, repeat(ABSENT))):
        return [member for member, g in zip(members, grads, strict=True) if g is not ABSENT]
    return members


def entries(
    params: list[Tensor], grads: list[Tensor], state: Mapping[Any, Any], names: tuple[str, ...]
) -> list[list[Any]] | None:
    """The parameters' state, a list for each of the names; None if a parameter with a gradient lacks an entry.

    A parameter whose gradient is ABSENT has ABSENT in place of its state.
    """
    c = compiled()
    if c is not None and isinstance(state, dict):
        found: list[list[Any]] | None = c.entries(params, grads, state, names, ABSENT)
        return found
    none = dict[str, Any]()
    try:
        if any(map(is_, grads, repeat(ABSENT))):
            without = dict.fromkeys(names, ABSENT)
            states = [without if g is ABSENT else state.get(p, none) for p, g in zip(params, grads, strict=True)]
        elif len(state) == len(params) and all(map(is_, state, params)):  # no parameter is hashed
            states = list(state.values())
        else:
            states = list(map(state.get, params, repeat(none)))
        return [[of[name] for of in states] for name in names]
    except KeyError:
        return None
