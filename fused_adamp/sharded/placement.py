"""The placement of a parameter: from :func:`place`, else from its class."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch.utils.weak import WeakTensorKeyDictionary

from fused_adamp.sharded.dtensor import Distributed, is_distributed
from fused_adamp.sharded.layout import Whole

if TYPE_CHECKING:
    from collections.abc import MutableMapping

    from torch import Tensor

    from fused_adamp.sharded.layout import Placement

__all__ = ["generation", "place", "placement_of"]

_WHOLE, _DISTRIBUTED = Whole(), Distributed()
_placed: MutableMapping[Tensor, tuple[int, Placement]] = WeakTensorKeyDictionary()
_generation = 0


def place(p: Tensor, placement: Placement) -> None:
    """Sets the placement of a parameter. It is ignored once the parameter has another number of dimensions."""
    global _generation
    _placed[p] = p.ndim, placement
    _generation += 1


def generation() -> int:
    """The number of calls of :func:`place`. While it stays the same, no placement changes."""
    return _generation


def placement_of(p: Tensor) -> Placement:
    """The placement of a parameter."""
    ndim, placement = _placed.get(p, (-1, _WHOLE)) if _placed else (-1, _WHOLE)
    if ndim == p.ndim:
        return placement
    return _DISTRIBUTED if is_distributed(p) else _WHOLE
