"""How a parameter lies on the ranks, whatever its kind."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple, Protocol

from fused_adamp.batch import Sharing
from fused_adamp.reference import rows_first
from fused_adamp.tensors import rows_cols

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor
    from torch.distributed import ProcessGroup

__all__ = ["Layout", "Part", "Placement", "Rows", "Whole", "schedule"]


class Part(Protocol):
    """A part of a parameter: one member of a bucket."""

    def of(self, t: Tensor, *, copy: bool = False) -> Tensor:
        """The member's part of ``t``, a tensor of the parameter's local shape, with rows first.

        It is a view. If no view has rows first, it is a copy with ``copy``, else an error.
        """


class Rows(NamedTuple):
    """The whole local part of a parameter. The indices of ``channel_dim`` are the rows."""

    channel_dim: int | tuple[int, ...] = 0

    def of(self, t: Tensor, *, copy: bool = False) -> Tensor:
        return rows_first(t, self.channel_dim, copy=copy)


class Layout(NamedTuple):
    """How one member lies on the ranks, with rows first.

    Attributes:
        sharing: how its rows lie on the ranks.
        rows, cols: R and K of the whole parameter.
        row_groups, col_groups: the process groups over which its rows are sharded, and those of its columns.
        numbers: the number of the first element here in the whole, counted row by row, and the step of these numbers
            from row to row; None if the elements here are not numbered like that.
        replica_groups: the process groups in which every rank has the same part.
        holders: the number of ranks of the row and column groups that must have a gradient, if any of them has one.
        holds: whether this rank is one of them.
        part: the member's part of the parameter.
        split_rows: the number of rows of the parameter that are split, on all ranks together.
        first_split_row: the index of the member's first split row among these.
    """

    sharing: Sharing
    rows: int
    cols: int
    row_groups: tuple[ProcessGroup, ...] = ()
    col_groups: tuple[ProcessGroup, ...] = ()
    numbers: tuple[int, int] | None = None
    replica_groups: tuple[ProcessGroup, ...] = ()
    holders: int = 1
    holds: bool = True
    part: Part = Rows()
    split_rows: int = 0
    first_split_row: int = 0


class Placement(Protocol):
    """How a kind of parameter is placed on the ranks."""

    @property
    def is_shared(self) -> bool:
        """Whether it may lie on several ranks, each with a part of it."""

    def shape(self, p: Tensor) -> tuple[int, ...]:
        """The shape of the whole parameter."""

    def layouts(self, p: Tensor, channel_dim: int | tuple[int, ...]) -> list[Layout]:
        """The layouts of the parameter's members on this rank, in their order."""

    def in_words(self, p: Tensor) -> str:
        """Shape and placement as text, the same on all ranks that share the parameter."""


class Whole:
    """A parameter that lies on this rank alone."""

    is_shared = False

    def shape(self, p: Tensor) -> tuple[int, ...]:
        return tuple(p.shape)

    def layouts(self, p: Tensor, channel_dim: int | tuple[int, ...]) -> list[Layout]:
        rows, cols = rows_cols(rows_first(p, channel_dim))
        return [Layout(Sharing.LOCAL, rows, cols, numbers=(0, cols), part=Rows(channel_dim))]

    def in_words(self, p: Tensor) -> str:
        return f"shape {tuple(p.shape)}, whole on this rank"


def schedule(layouts: Sequence[Layout]) -> list[ProcessGroup]:
    """The process groups in the order of the collectives that complete all sums: columns before rows.

    A parameter's row sums are complete after the last group that shards its columns. Only then can its rows be counted
    and added up over the groups that shard its rows. Usually each group comes once. A group that shards the rows of one
    parameter and the columns of another may have to come twice.
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
