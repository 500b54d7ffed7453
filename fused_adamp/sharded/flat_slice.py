"""Slices of flat buffers, as ZeRO and Megatron make them. No other module knows of them.

A slice is a vector: elements ``begin`` to ``end`` of a contiguous tensor. :func:`mark_slice` tells the package. A slice
is up to three members of a bucket: its whole rows, and the parts of the two rows that it cuts.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, NamedTuple

import torch.distributed as dist

from fused_adamp.batch import Sharing
from fused_adamp.sharded.dtensor import is_distributed, local
from fused_adamp.sharded.layout import Layout
from fused_adamp.sharded.placement import place, placement_of
from fused_adamp.tensors import span_of

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Sequence

    from torch import Tensor
    from torch.distributed import ProcessGroup

    from fused_adamp.batch import Members

__all__ = ["FlatSlice", "Piece", "check_rows", "check_slice", "mark_slice", "refuse_flat_buffers"]

_REMEDY = (
    "Say of what it is a slice, by fused_adamp.mark_slice(p, shape=..., begin=...) on all ranks: see docs/sharding.md. "
    "Or shard with FSDP2, or keep parameters whole (DistributedDataParallel, ZeroRedundancyOptimizer)"
)


class Piece(NamedTuple):
    """The part of a slice that lies in whole rows, or in one row.

    Attributes:
        size: elements of the slice.
        begin: the piece's first.
        rows, cols: its shape.
    """

    size: int
    begin: int
    rows: int
    cols: int

    def of(self, t: Tensor, *, copy: bool = False) -> Tensor:
        """The piece of a tensor that lies as the slice: ``(rows, cols)``. RuntimeError if it has another size."""
        if t.numel() != self.size:
            raise RuntimeError(f"a slice of {self.size} elements cannot be stepped with a tensor of {t.numel()}")
        return t[self.begin : self.begin + self.rows * self.cols].view(self.rows, self.cols)


class FlatSlice(NamedTuple):
    """The placement that :func:`mark_slice` gives a parameter.

    Attributes:
        whole: the shape of the whole tensor.
        begin, end: the slice's first element in the whole tensor, and the element after its last.
        group: the ranks that have slices of it.
        cut_rows: the rows of which no rank has all.
        holders: how many ranks have elements.
    """

    whole: tuple[int, ...]
    begin: int
    end: int
    group: ProcessGroup
    cut_rows: tuple[int, ...]
    holders: int

    @property
    def is_shared(self) -> bool:
        return True

    def shape(self, p: Tensor) -> tuple[int, ...]:
        return self.whole

    def in_words(self, p: Tensor) -> str:
        return f"shape {self.whole}, in slices on {self.group.size()} ranks"  # ranks need not agree on which

    def layouts(self, p: Tensor, channel_dim: int | tuple[int, ...]) -> list[Layout]:
        """The layouts of the slice's pieces that are not empty: the end of a row, whole rows, the beginning of a row.

        A slice of a vector, or without elements, has one layout.
        """
        size = self.end - self.begin
        if len(self.whole) < 2 or 0 in self.whole:
            return [
                Layout(
                    Sharing.SHARED,
                    rows=1,
                    cols=math.prod(self.whole),
                    row_groups=(self.group,),
                    numbers=(self.begin, size),
                    holders=self.holders,
                    holds=size > 0,
                )
            ]
        cols = math.prod(self.whole[1:])
        head = min(-self.begin % cols, size)
        tail = (size - head) % cols
        whole_rows = Piece(size, head, (size - head) // cols, cols)
        pieces = [Piece(size, 0, 1, head), whole_rows, Piece(size, size - tail, 1, tail)]
        return [self._layout(piece) for piece in pieces if piece.rows * piece.cols] or [self._layout(whole_rows)]

    def _layout(self, piece: Piece) -> Layout:
        rows, cols = self.whole[0], math.prod(self.whole[1:])
        is_cut = piece.cols < cols
        return Layout(
            Sharing.SPLIT if is_cut else Sharing.SHARED,
            rows,
            cols,
            col_groups=(self.group,),
            numbers=(self.begin + piece.begin, cols),
            holders=self.holders,
            holds=self.end > self.begin,
            part=piece,
            split_rows=len(self.cut_rows),
            first_split_row=self.cut_rows.index((self.begin + piece.begin) // cols) if is_cut else 0,
        )


def mark_slice(p: Tensor, shape: Sequence[int], begin: int, group: ProcessGroup | None = None) -> Tensor:
    """Marks a vector as a slice of a flattened tensor whose slices lie on several ranks.

    Optimizers that shard flat buffers (ZeRO, Megatron's) make such slices. With the mark, a step tests and projects the
    rows of the tensor, also those that are cut. All ranks of the group must call this for each such tensor in the same
    order, and pass the slice to their optimizer. A rank without elements of the tensor passes an empty slice.

    Args:
        p: ``(n,)``, the parameter: elements ``begin`` to ``begin + n`` of the tensor.
        shape: the shape of the whole tensor.
        begin: the index of the slice's first element in the flattened tensor, 0 or more.
        group: the ranks that have slices of the tensor; all ranks by default.

    Returns:
        p. The mark is on this object, not on copies of it.

    Raises:
        TypeError, ValueError: p is not a vector, or the ranks' slices do not cover the tensor exactly once. On every
            rank.
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
    place(p, FlatSlice(shape, begin, begin + p.numel(), group, tuple(cut_rows), len(spans)))
    return p


# Refusals: fused_adamp/validate.py asks for them.


def check_slice(p: Tensor, label: object) -> None:
    """Raises TypeError for a part of a flat buffer that is not marked, ValueError for one whose mark does not fit."""
    if getattr(p, "_fsdp_flattened", False) or getattr(p, "_is_flat_param", False):  # FSDP1's marks
        raise TypeError(
            f"{label} is part of a flat parameter of FSDP1, of which no rows are left: stepped, it would never be "
            "projected. Shard with FSDP2 (torch.distributed.fsdp.fully_shard), or keep the parameters whole, e.g. with "
            "DistributedDataParallel"
        )
    flat = placement_of(p)
    if isinstance(flat, FlatSlice):
        if p.numel() != flat.end - flat.begin:
            raise ValueError(
                f"{label} has {p.numel()} elements, but was marked as elements {flat.begin} to {flat.end} of a tensor "
                f"of shape {flat.whole}: call fused_adamp.mark_slice again, on all ranks"
            )
    elif p.ndim == 1 and p._base is not None and _crosses_rows(p, p._base):
        raise TypeError(
            f"{label} is a one-dimensional slice of a tensor of shape {tuple(p._base.shape)}: stepped as a vector, it "
            f"would never be projected. {_REMEDY}"
        )


def check_rows(p: Tensor, channel_dim: int | tuple[int, ...], label: object) -> None:
    """Raises ValueError if ``channel_dim`` is not 0 for a marked slice of a matrix."""
    flat = placement_of(p)
    if isinstance(flat, FlatSlice) and len(flat.whole) >= 2 and channel_dim not in (0, (0,)):
        raise ValueError(
            f"channel_dim={channel_dim} does not fit {label}, a flat slice of a tensor of shape {flat.whole}: its rows "
            "are those of dim 0; pass channel_dim=0"
        )


def refuse_flat_buffers(
    params: Collection[Tensor], buckets: Sequence[Members], label: Callable[[Tensor], object]
) -> None:
    """Raises TypeError if a new vector spans the memory of matrices that were stepped before and are gone now."""
    before = {p for bucket in buckets for p in bucket.index}
    gone = [span_of(local(p)) for p in before if p.ndim >= 2 and p not in params]
    for p in params if gone else ():
        if p.ndim == 1 and p not in before and not isinstance(placement_of(p), FlatSlice):
            begin, end = span_of(p)
            if any(begin <= first and last <= end and first < last for first, last in gone):
                raise TypeError(
                    f"{label(p)} has taken the place of matrices, whose memory it holds: a vector is never projected. "
                    f"{_REMEDY}"
                )


def _crosses_rows(p: Tensor, matrix: Tensor) -> bool:
    """Whether a contiguous vector is a run of a contiguous matrix's elements that crosses from one row to the next."""
    if matrix.ndim < 2 or not matrix.is_contiguous() or not p.is_contiguous() or not 0 < p.numel() < matrix.numel():
        return False
    cols = matrix.numel() // matrix.size(0)
    first = p.storage_offset() - matrix.storage_offset()
    return first // cols != (first + p.numel() - 1) // cols
