"""Parameters on several ranks: from a DTensor's placements, or a flat slice, to the sums that its step needs."""

from __future__ import annotations

import enum
import math
from itertools import pairwise
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.distributed as dist
from torch.utils.weak import WeakTensorKeyDictionary

if TYPE_CHECKING:
    from collections.abc import MutableMapping, Sequence

    from torch import Tensor
    from torch.distributed import ProcessGroup
    from torch.distributed.tensor import DTensor

__all__ = [
    "FlatSlice",
    "Layout",
    "Piece",
    "Sharing",
    "in_words",
    "is_distributed",
    "is_shared",
    "layouts_of",
    "like",
    "local",
    "mark_slice",
    "marks",
    "schedule",
    "shape_of",
    "slice_of",
    "split_rows",
]


class Sharing(enum.IntEnum):
    """How the rows of a parameter lie on the ranks. A column of :attr:`fused_adamp.bucket.Bucket.table`."""

    LOCAL = 0
    """All of it is here."""
    SHARED = 1
    """Whole rows are here, others elsewhere; vectors too are said to be so."""
    SPLIT = 2
    """Each row here has parts on other ranks."""


class Piece(NamedTuple):
    """The part of a matrix that a flat slice has in one piece: whole rows, or a part of one row.

    Attributes:
        size: elements of the slice.
        begin: the piece's first.
        rows, cols: its shape.
        cut: of a part of a row its place in :attr:`FlatSlice.cut_rows`.
    """

    size: int
    begin: int
    rows: int
    cols: int
    cut: int | None = None

    def of(self, t: Tensor) -> Tensor:
        """The piece of a tensor that lies as the slice: ``(rows, cols)``. RuntimeError if it has another size."""
        if t.numel() != self.size:
            raise RuntimeError(f"a slice of {self.size} elements cannot be stepped with a tensor of {t.numel()}")
        return t[self.begin : self.begin + self.rows * self.cols].view(self.rows, self.cols)


class Layout(NamedTuple):
    """Where a parameter lies, with rows first.

    Attributes:
        sharing: how its rows lie on the ranks.
        rows, cols: R and K of the whole.
        row_groups, col_groups: the process groups that share out its rows, and those that share out its columns.
        numbers: the number of the first element here in the whole, counted row by row, and how many lie from row to
            row; None where the elements here do not follow each other like that.
        replica_groups: the process groups of which every rank has the same part.
        holders: how many ranks of those groups have to have a gradient, if any has one; holds: whether this rank does.
        piece: which part of a flat slice this is about; None: all that is here.
    """

    sharing: Sharing
    rows: int
    cols: int
    row_groups: tuple[ProcessGroup, ...]
    col_groups: tuple[ProcessGroup, ...]
    numbers: tuple[int, int] | None
    replica_groups: tuple[ProcessGroup, ...] = ()
    holders: int = 1
    holds: bool = True
    piece: Piece | None = None


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
    """A tensor on this rank as a DTensor that lies as ``p`` does, whose local shape it has; as it is if p is none."""
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


def in_words(p: Tensor) -> str:
    """Shape and place of a parameter that lies on several ranks, in the same words on all of them."""
    if flat := slice_of(p):
        return f"shape {flat.shape}, in slices on {flat.group.size()} ranks"  # which, not all ranks need to agree on
    return f"shape {tuple(p.shape)}, {_as_dtensor(p).placements} on {_as_dtensor(p).device_mesh}"


def shape_of(p: Tensor) -> tuple[int, ...]:
    """The shape of the whole tensor."""
    flat = slice_of(p)
    return tuple(p.shape) if flat is None else flat.shape


def split_rows(p: Tensor, here: int) -> int:
    """How many rows of a parameter are split: all that are here; of flat slices those that are cut, on all ranks."""
    flat = slice_of(p)
    return here if flat is None else len(flat.cut_rows)


def odd_placement(p: Tensor) -> Any:
    """A placement of a DTensor that is neither Shard, in FSDP2's variant or not, nor Replicate; None if all are."""
    placements = _as_dtensor(p).placements if is_distributed(p) else ()
    return next((x for x in placements if not x.is_replicate() and not hasattr(x, "dim")), None)


def layouts_of(p: Tensor, channel_dim: int | tuple[int, ...]) -> list[Layout]:
    """How a parameter lies on the ranks; of the slice of a matrix, how each of its pieces does."""
    flat = slice_of(p)
    return [_layout_of(p, channel_dim)] if flat is None else flat.layouts()


def _layout_of(p: Tensor, channel_dim: int | tuple[int, ...]) -> Layout:
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
    holders = math.prod(group.size() for group in (*row_groups, *col_groups))
    return Layout(sharing, rows, cols, tuple(row_groups), tuple(col_groups), numbers, tuple(replica_groups), holders)


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


class FlatSlice(NamedTuple):
    """The record of :func:`mark_slice`: a parameter is elements ``begin`` to ``end`` of a tensor that lies row by row.

    Attributes:
        shape: of the whole tensor.
        group: the ranks that have slices of it.
        cut_rows: the rows of which no rank has all.
        holders: how many ranks have elements.
    """

    shape: tuple[int, ...]
    begin: int
    end: int
    group: ProcessGroup
    cut_rows: tuple[int, ...]
    holders: int

    def layouts(self) -> list[Layout]:
        """Those of the end of a row, of whole rows and of the beginning of a row, if there are; of a vector its own."""
        size = self.end - self.begin
        if len(self.shape) < 2 or 0 in self.shape:
            whole = Layout(Sharing.SHARED, 1, math.prod(self.shape), (self.group,), (), (self.begin, size))
            return [whole._replace(holders=self.holders, holds=size > 0)]
        rows, cols = self.shape[0], math.prod(self.shape[1:])
        head = min(-self.begin % cols, size)
        tail = (size - head) % cols
        whole_rows = Piece(size, head, (size - head) // cols, cols)
        pieces = [self._part_of_row(0, head), whole_rows, self._part_of_row(size - tail, tail)]
        layouts = []
        for piece in [piece for piece in pieces if piece.rows * piece.cols] or [whole_rows]:
            sharing = Sharing.SHARED if piece.cut is None else Sharing.SPLIT
            numbers = self.begin + piece.begin, cols
            layouts.append(Layout(sharing, rows, cols, (), (self.group,), numbers, (), self.holders, size > 0, piece))
        return layouts

    def _part_of_row(self, begin: int, cols: int) -> Piece:
        row = (self.begin + begin) // math.prod(self.shape[1:])
        return Piece(self.end - self.begin, begin, 1, cols, self.cut_rows.index(row) if cols else None)


_slices: MutableMapping[Tensor, FlatSlice] = WeakTensorKeyDictionary()
_marks = 0


def marks() -> int:
    """How often :func:`mark_slice` has been called."""
    return _marks


def slice_of(p: Tensor) -> FlatSlice | None:
    """The record of :func:`mark_slice` for a parameter; None without one."""
    return _slices[p] if p.ndim == 1 and p in _slices else None


def is_shared(p: Tensor) -> bool:
    """Whether a parameter may lie on several ranks, each with a part of it."""
    return is_distributed(p) or slice_of(p) is not None


def mark_slice(p: Tensor, shape: Sequence[int], begin: int, group: ProcessGroup | None = None) -> Tensor:
    """Says that a vector is a slice of a tensor that lies flat in a buffer, row by row, cut up among ranks.

    Optimizers that shard flat buffers (ZeRO, Megatron's) make such slices. The step then tests and projects the rows
    of the tensor, also those that are cut. All ranks of the group call this for each such tensor in the same order,
    those that have nothing of it too, with a slice of no elements; and all give the slice to their optimizer.

    Args:
        p: ``(n,)``, the parameter: elements ``begin`` to ``begin + n`` of the tensor.
        shape: of the tensor.
        begin: 0 or more.
        group: the ranks that have slices of the tensor; all ranks by default.

    Returns:
        p. The mark is on this object, not on copies of it.

    Raises:
        TypeError, ValueError: p is no vector; the ranks' slices are not the tensor. On every rank.
    """
    group = dist.group.WORLD if group is None else group
    if group is None or isinstance(group, int):  # as torch says that a rank is no member
        raise ValueError(
            "mark_slice tells the ranks of a process group: call torch.distributed.init_process_group, and pass a group"
            " that this rank is a member of"
        )
    mistake = None
    if p.ndim != 1 or is_distributed(p):
        mistake = f"it is {'a DTensor' if is_distributed(p) else 'a tensor'} of shape {tuple(p.shape)}, not a vector"
    try:
        shape, begin = tuple(map(int, shape)), int(begin)
    except (TypeError, ValueError) as error:
        mistake, shape, begin = f"shape={shape!r} and begin={begin!r} ({error})", (), 0
    told: list[Any] = [None] * group.size()
    dist.all_gather_object(told, (mistake, shape, begin, begin + p.numel()), group=group)
    for rank, (wrong, *_) in enumerate(told):
        if wrong is not None:
            raise TypeError(f"rank {rank} of the group has marked what is no slice: {wrong}")
    if any(other != shape for _, other, _, _ in told):
        raise ValueError(f"the ranks of the group name different shapes: {[other for _, other, _, _ in told]}")
    spans = sorted((first, last) for _, _, first, last in told if first < last)
    ends = [0, *(last for _, last in spans)]
    if [first for first, _ in spans] != ends[:-1] or ends[-1] != math.prod(shape):
        raise ValueError(
            f"the slices of a tensor of shape {shape} are to follow each other from element 0 to {math.prod(shape)}, "
            f"those of the ranks of the group go from and to {[(first, last) for _, _, first, last in told]}"
        )
    cols = math.prod(shape[1:])
    cut_rows = sorted({end // cols for end in ends if cols and end % cols})
    _slices[p] = FlatSlice(shape, begin, begin + p.numel(), group, tuple(cut_rows), len(spans))
    global _marks
    _marks += 1
    return p


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
