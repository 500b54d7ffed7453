"""DTensors: the part that lies on this rank, and the layout that follows from the placements."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch

from fused_adamp.batch import Sharing
from fused_adamp.sharded.layout import Layout, Rows

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor
    from torch.distributed import ProcessGroup
    from torch.distributed.tensor import DTensor

__all__ = ["Distributed", "check_placements", "copy", "is_distributed", "like", "local", "local_gradient"]


def is_distributed(t: Any) -> bool:
    """Whether a tensor is a DTensor. Asks the class alone: torch.distributed.tensor takes long to import."""
    return hasattr(type(t), "placements") and hasattr(type(t), "device_mesh")


def local(t: Tensor) -> Tensor:
    """The local part of a DTensor; any other tensor as it is."""
    if not is_distributed(t):
        return t
    part: Any = _as_dtensor(t)._local_tensor  # to_local() makes a new tensor of a Parameter
    return part.wait() if hasattr(part, "wait") else part  # type: ignore[no-any-return]


def like(t: Tensor, p: Tensor) -> Tensor:
    """A DTensor with the mesh and placements of ``p`` and ``t`` as its local tensor; ``t`` if p is no DTensor."""
    if not is_distributed(p):
        return t
    place = _as_dtensor(p)
    return type(place).from_local(
        t, place.device_mesh, place.placements, run_check=False, shape=p.shape, stride=p.stride()
    )


def local_gradient(p: Tensor) -> Tensor | None:
    """The local part of a parameter's gradient, redistributed first if its placements differ from the parameter's."""
    g = p.grad
    if g is None or not is_distributed(p) or not is_distributed(g):
        return g
    place, gradient = _as_dtensor(p), _as_dtensor(g)
    if gradient.placements != place.placements:
        gradient = gradient.redistribute(place.device_mesh, place.placements)
    return local(gradient)


def copy(source: Tensor, target: Tensor) -> None:
    """Copies ``source`` to ``target``, of the same shape. Either may be a DTensor."""
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


def check_placements(p: Tensor, label: object) -> None:
    """Raises TypeError if a DTensor has a placement that is neither Shard, in FSDP2's variant or not, nor Replicate."""
    for placement in _as_dtensor(p).placements if is_distributed(p) else ():
        if not placement.is_replicate() and not hasattr(placement, "dim"):
            raise TypeError(
                f"{label} has the placement {placement!r}, which is neither Shard nor Replicate: redistribute it "
                "first, e.g. p.redistribute(placements=[Replicate()])"
            )


class Distributed:
    """A DTensor."""

    is_shared = True

    def shape(self, p: Tensor) -> tuple[int, ...]:
        return tuple(p.shape)

    def in_words(self, p: Tensor) -> str:
        return f"shape {tuple(p.shape)}, {_as_dtensor(p).placements} on {_as_dtensor(p).device_mesh}"

    def layouts(self, p: Tensor, channel_dim: int | tuple[int, ...]) -> list[Layout]:
        from torch.distributed.tensor._utils import compute_local_shape_and_global_offset  # takes long to import

        dims = channel_dim if isinstance(channel_dim, tuple) else (channel_dim,)
        row_dims = [d % p.ndim for d in dims] if p.ndim >= 2 else []
        order = [*row_dims, *(d for d in range(p.ndim) if d not in row_dims)]
        mesh, placements = _as_dtensor(p).device_mesh, _as_dtensor(p).placements
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
        return [
            Layout(
                sharing,
                rows=math.prod(p.size(d) for d in row_dims),
                cols=math.prod(p.size(d) for d in order[len(row_dims) :]),
                row_groups=tuple(row_groups),
                col_groups=tuple(col_groups),
                numbers=_numbers(p.shape, local(p).shape, offset, order, len(row_dims)),
                replica_groups=tuple(replica_groups),
                holders=math.prod(group.size() for group in (*row_groups, *col_groups)),
                part=Rows(channel_dim),
                split_rows=math.prod(local(p).size(d) for d in row_dims) if col_groups else 0,
            )
        ]


def _numbers(
    whole: Sequence[int], part: Sequence[int], offset: Sequence[int], order: Sequence[int], n_row_dims: int
) -> tuple[int, int] | None:
    """:attr:`Layout.numbers` of a part of a tensor.

    Args:
        whole, part, offset: sizes of the tensor and of the part, and the index of the part's first element.
        order: the dimensions, those of rows first. Elements are numbered in this order.
        n_row_dims: how many of them are rows' dimensions.
    """
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
