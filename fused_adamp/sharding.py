"""Parameters on several ranks: from a DTensor's placements to the sums that its step needs, and their collectives."""

from __future__ import annotations

import enum
import math
from itertools import pairwise
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor
    from torch.distributed import ProcessGroup
    from torch.distributed.tensor import DTensor

__all__ = ["Layout", "Sharing", "is_distributed", "layout_of", "like", "local", "schedule"]


class Sharing(enum.IntEnum):
    """How the rows of a parameter lie on the ranks. A column of :attr:`fused_adamp.bucket.Bucket.table`."""

    LOCAL = 0
    """All of it is here."""
    SHARED = 1
    """Whole rows are here, others elsewhere; vectors too are said to be so."""
    SPLIT = 2
    """Of every row here, parts are elsewhere."""


class Layout(NamedTuple):
    """Where a parameter lies, with rows first.

    Attributes:
        sharing: how its rows lie on the ranks.
        rows, cols: R and K of the whole.
        row_groups, col_groups: the process groups that share out its rows, and those that share out its columns.
        numbers: the number of the first element here in the whole, counted row by row, and how many lie from row to
            row; None where the elements here do not follow each other like that.
        replica_groups: the process groups of which every rank has the same part.
    """

    sharing: Sharing
    rows: int
    cols: int
    row_groups: tuple[ProcessGroup, ...]
    col_groups: tuple[ProcessGroup, ...]
    numbers: tuple[int, int] | None
    replica_groups: tuple[ProcessGroup, ...] = ()


def is_distributed(t: Any) -> bool:
    """Whether a tensor is a DTensor. Asks the class alone: torch.distributed.tensor takes long to import."""
    return hasattr(type(t), "placements") and hasattr(type(t), "device_mesh")


def local(t: Tensor) -> Tensor:
    """What this rank holds of a DTensor; any other tensor as it is."""
    if not is_distributed(t):
        return t
    part: Any = _as_dtensor(t)._local_tensor  # to_local() makes a new tensor of a Parameter
    return part.wait() if hasattr(part, "wait") else part  # type: ignore[no-any-return]


def like(t: Tensor, p: Tensor) -> Tensor:
    """A tensor on this rank as a DTensor that lies as ``p`` does, whose local shape it has; as it is if p is none."""
    if not is_distributed(p):
        return t
    place = _as_dtensor(p)
    return type(place).from_local(
        t, place.device_mesh, place.placements, run_check=False, shape=p.shape, stride=p.stride()
    )


def local_gradient(p: Tensor) -> Tensor | None:
    """What this rank holds of a parameter's gradient, which is redistributed if it does not lie as the parameter."""
    g = p.grad
    if g is None or not is_distributed(p) or not is_distributed(g):
        return g
    place, gradient = _as_dtensor(p), _as_dtensor(g)
    if gradient.placements != place.placements:
        gradient = gradient.redistribute(place.device_mesh, place.placements)
    return local(gradient)


def copy(source: Tensor, target: Tensor) -> None:
    """Copies between tensors of one shape, whether they are DTensors or whole."""
    if is_distributed(target) and not is_distributed(source):
        from torch.distributed.tensor import distribute_tensor

        place = _as_dtensor(target)
        source = distribute_tensor(source, place.device_mesh, place.placements, src_data_rank=None)
    elif is_distributed(source) and not is_distributed(target):
        sendable = source.int() if source.dtype == torch.int16 else source  # gloo and NCCL know no 16-bit integers
        source = _as_dtensor(sendable).full_tensor()
    target.copy_(source)


def _as_dtensor(t: Tensor) -> DTensor:
    return t  # type: ignore[return-value]


def odd_placement(p: Tensor) -> Any:
    """A placement of a DTensor that is neither Shard, in FSDP2's variant or not, nor Replicate; None if all are."""
    placements = _as_dtensor(p).placements if is_distributed(p) else ()
    return next((x for x in placements if not x.is_replicate() and not hasattr(x, "dim")), None)


def layout_of(p: Tensor, channel_dim: int | tuple[int, ...]) -> Layout:
    """How a parameter lies on the ranks of its mesh."""
    dims = channel_dim if isinstance(channel_dim, tuple) else (channel_dim,)
    row_dims = [d % p.ndim for d in dims] if p.ndim >= 2 else []
    order = [*row_dims, *(d for d in range(p.ndim) if d not in row_dims)]
    rows = math.prod(p.size(d) for d in row_dims)
    cols = p.numel() // max(rows, 1) if p.numel() else math.prod(p.size(d) for d in order[len(row_dims) :])
    if not is_distributed(p):
        return Layout(Sharing.LOCAL, rows, cols, (), (), (0, cols))
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    place = _as_dtensor(p)
    mesh, placements = place.device_mesh, place.placements
    row_groups: list[ProcessGroup] = []
    col_groups: list[ProcessGroup] = []
    replica_groups: list[ProcessGroup] = []
    for mesh_dim, placement in enumerate(placements):
        if mesh.size(mesh_dim) == 1 or mesh.get_coordinate() is None:
            continue
        groups = replica_groups
        if not placement.is_replicate():  # then it is a Shard, or what FSDP2 makes of it beside tensor parallelism
            by_rows = not row_dims or placement.dim in row_dims  # type: ignore[attr-defined]
            groups = row_groups if by_rows else col_groups
        groups.append(mesh.get_group(mesh_dim))
    sharing = Sharing.SPLIT if col_groups else Sharing.SHARED if row_groups else Sharing.LOCAL
    _, offset = compute_local_shape_and_global_offset(p.shape, mesh, placements)
    numbers = _numbers(p.shape, local(p).shape, offset, order, len(row_dims))
    return Layout(sharing, rows, cols, tuple(row_groups), tuple(col_groups), numbers, tuple(replica_groups))


def _numbers(
    whole: Sequence[int], part: Sequence[int], offset: Sequence[int], order: Sequence[int], n_row_dims: int
) -> tuple[int, int] | None:
    """:attr:`Layout.numbers` of a part of a tensor, whose dimensions are numbered in this order, rows' first."""
    if math.prod(part) == 0:
        return 0, 0
    weights = [math.prod(whole[d] for d in order[i + 1 :]) for i in range(len(order))]
    first = sum(offset[d] * weight for d, weight in zip(order, weights, strict=True))
    steps = []
    for begin, end, last in ((0, n_row_dims, None), (n_row_dims, len(order), 1)):
        dims = [(part[d], w) for d, w in zip(order[begin:end], weights[begin:end], strict=True) if part[d] > 1]
        joined = all(outer[1] == inner[0] * inner[1] for outer, inner in pairwise(dims))
        if not joined or (last and dims and dims[-1][1] != last):
            return None
        steps.append(dims[-1][1] if dims else math.prod(part[d] for d in order[n_row_dims:]))
    return first, steps[0]


def schedule(layouts: Sequence[Layout]) -> list[ProcessGroup]:
    """The order of collectives that completes everybody's sums: columns before rows.

    A parameter's row sums are complete after the last group that shares out its columns; only then can its rows be
    counted and added up over the groups that share them out. As a rule each group comes once. One that shares out one
    parameter's rows and another's columns may have to come twice.
    """
    pending = [(list(layout.col_groups), list(layout.row_groups)) for layout in layouts]
    order = []
    while any(cols or rows for cols, rows in pending):
        wanted = dict.fromkeys(group for cols, rows in pending for group in (*cols, *rows))
        group = min(wanted, key=lambda g: sum(g in rows and bool(cols) for cols, rows in pending))
        order.append(group)
        for cols, rows in pending:
            ready = cols or rows
            if group in ready:
                ready.remove(group)
    return order
