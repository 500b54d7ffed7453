"""The types that the front end and the backends share: one step's tensors, and the tables that go with them.

The front end builds a :class:`Batch` for each bucket in every step (``gather.py``) and hands it to a :class:`Backend`.
This module imports nothing else of the package.
"""

from __future__ import annotations

import enum
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, Protocol

import torch
from torch import Tensor

if TYPE_CHECKING:
    from collections.abc import Container, Sequence

__all__ = [
    "ABSENT",
    "COLUMNS",
    "FLOATING",
    "PROJECTIONS",
    "RESULTS",
    "ROW_SHARES",
    "SHARES",
    "UNDECIDED",
    "Backend",
    "Batch",
    "BucketKey",
    "Members",
    "Need",
    "Rule",
    "Scalars",
    "Shared",
    "Sharing",
]

FLOATING = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
"""The dtypes of parameters, gradients and state."""

COLUMNS = (
    *("group", "projected", "rows", "cols", "tile_rows", "tile_cols", "first_tile"),
    *("sharing", "first_row", "first_number", "row_numbers"),
)
"""The columns of :attr:`Members.table`. csrc/tables.h reads them by the same names in the same order."""

RESULTS = ("cosine", "norm")
"""The columns of :attr:`Members.results`."""

PROJECTIONS = ("auto", "channel", "layer", "none")
"""The values of the option ``projection``. :attr:`Scalars.projection` is an index into this."""

UNDECIDED = 255
"""The decision of a parameter that has not been stepped."""

SHARES = ("limit", "cosine", "pg", "gg", "pp", "pu")
"""The columns of :attr:`Shared.shares`."""

ROW_SHARES = ("pg", "gg", "pp", "pu")
"""The columns of :attr:`Shared.rows`."""


class Need(enum.IntFlag):
    """The sums that :meth:`Backend.measure` is asked for, member by member."""

    TEST = 1
    """p.g, g.g and p.p, and whether every row passes the cosine test."""
    DOT = 2
    """p.u and p.p, u being the update that the next step would make."""
    SQUARE = 4
    """g.g."""


class Sharing(enum.IntEnum):
    """How the rows of a parameter lie on the ranks. A column of :attr:`Members.table`."""

    LOCAL = 0
    """All of it is here."""
    SHARED = 1
    """Whole rows are here, others elsewhere; vectors too are said to be so."""
    SPLIT = 2
    """Each row here has parts on other ranks."""


class Scalars(NamedTuple):
    """A row of the hyperparameter table, computed in double. csrc/algorithm.h reads it in the same order.

    ``m = momentum m + gain g``; with nesterov ``u = momentum m + nesterov_gain g`` in place of ``m``; the adaptive
    rule (AdamP) divides u by its denominator and corrects both biases. ``lr * decay`` is w of a parameter that is not
    projected. ``projection`` is an index of :data:`PROJECTIONS`. Where the hyperparameter is a tensor that is not on
    the CPU, so are the numbers made from it: 0-dim float64.
    """

    lr: float | Tensor
    momentum: float | Tensor
    gain: float | Tensor
    nesterov_gain: float | Tensor
    beta2: float | Tensor
    gain2: float | Tensor
    eps: float | Tensor
    decay: float | Tensor
    delta: float | Tensor
    wd_ratio: float | Tensor
    sign: float
    nesterov: float
    project_buffer: float
    projection: float


class Rule(Protocol):
    """The optimizer as a backend sees it: its momentum rule, and the rule's numbers for a parameter group."""

    adaptive: ClassVar[bool]

    def scalars(self, group: dict[str, Any]) -> Scalars:
        """The group's hyperparameters, ready for a kernel."""

    def reference_step(
        self, p: Tensor, g: Tensor, moments: Sequence[Tensor], step: Tensor | None, group: dict[str, Any]
    ) -> int:
        """One step of the reference on one tensor. Returns its :class:`~fused_adamp.reference.Decision`."""


class BucketKey(NamedTuple):
    """The properties that all members of one bucket have in common.

    ``moments`` are stored as ``state_dtype``; ``rounding`` is one of :data:`fused_adamp.precision.ROUNDINGS`, "nearest"
    wherever nothing is stored in bfloat16; ``channel_dim`` is the dimension whose indices are rows.
    """

    backend: Backend
    device: torch.device
    dtype: torch.dtype
    moments: tuple[str, ...]
    state_dtype: torch.dtype
    rounding: str = "nearest"
    channel_dim: int | tuple[int, ...] = 0
    adaptive: bool = True

    @property
    def storage(self) -> dict[str, torch.dtype]:
        """The state that has the parameter's shape: key and dtype."""
        remainder = {"remainder": torch.int16} if self.rounding == "remainder" else {}
        return dict.fromkeys(self.moments, self.state_dtype) | remainder

    @property
    def counters(self) -> dict[str, torch.dtype]:
        """The state that is one number, counted up in every step: key and dtype.

        Steps are counted in float32 like in torch.optim: exact up to 16,777,216.
        """
        step = {"step": torch.float32} if self.adaptive else {}
        return step | ({"rounding_seed": torch.int64} if self.rounding == "stochastic" else {})


class Shared(NamedTuple):
    """Tables that a backend and the front end exchange for members that lie on several ranks.

    Attributes:
        needs: ``(P,)`` uint8, of :class:`Need`: the sums that :meth:`Backend.measure` has to compute. 0 for members
            that do not take part.
        shares: ``(P, len(SHARES))`` float64, this rank's share of the sums, for gradients times the batch's scale. The
            rows here pass the test at a further scale s if ``s < limit``; ``cosine`` is the largest of a row over
            its threshold. For vectors and SPLIT members, ignore limit and cosine.
        rows: ``(rows, len(ROW_SHARES))`` float64, the same for every row of SPLIT members.
        verdicts: ``(P, 2)`` float64: the decision, :data:`UNDECIDED` for LOCAL members, on which the backend decides
            alone; and the projection c of a member with the decision LAYER.
        row_projections: ``(rows,)`` float64: c of every row of SPLIT members, 0 where they are not projected.
    """

    needs: Tensor
    shares: Tensor
    rows: Tensor
    verdicts: Tensor
    row_projections: Tensor


class Members:
    """The members of a bucket as a backend sees them. Most parameters are one member each.

    A parameter that lies here in several pieces is a member for each of them.

    Attributes:
        key: what all members have in common.
        params: the parameter of each member.
        index: for every parameter, the index of its first member.
        groups: the indices of the members' parameter groups.
        table: ``(P, len(COLUMNS))`` int64 on the CPU, a row for each member: group index; 1 if the parameter has two or
            more dimensions, else 0; R rows of K columns on this rank; rows and columns of a tile; index of the first
            tile; a value of :class:`Sharing`; for SPLIT members the index of their first row in :attr:`Shared.rows`;
            the number of their first element in the whole tensor, and the step of these numbers from row to row. A tile
            never spans members. It holds whole rows, or one piece of a row that is wider than a tile.
        tiles: the number of tiles.
        shared: None if no member lies on several ranks.
        decisions: ``(P,)`` uint8 on the device, the last :class:`~fused_adamp.reference.Decision` of each member, or
            :data:`UNDECIDED`.
        results: ``(P, len(RESULTS))`` float64 on the device, from the last step of each member: the largest cosine of a
            row over its threshold, and the weight's norm before the step. NaN if the member was not tested.
        distributed: whether any parameter is a DTensor.
        has_own_tensors: whether a batch holds the tensors of parameters and state themselves. Else it holds views,
            which are new in every step.
        scratch: an object that the backend keeps between steps.
        marks: where the tensors of the last batch lay, by their role: :func:`fused_adamp.host.marks_of`.
    """

    key: BucketKey
    params: list[Tensor]
    index: dict[Tensor, int]
    groups: list[int]
    table: Tensor
    tiles: int
    shared: Shared | None
    decisions: Tensor
    results: Tensor
    distributed: bool
    has_own_tensors: bool
    scratch: Any
    marks: dict[str, Any]


class Batch(NamedTuple):
    """One bucket's tensors in one step. A member without gradient has :data:`ABSENT` in place of all its tensors.

    Attributes:
        bucket: the bucket of the members.
        params, grads: the members' weights and gradients, with rows first (dim 0 is the output channel). For DTensors,
            all tensors are the local parts.
        moments: ``moments[k][i]`` is member i's state under ``bucket.key.moments[k]``, with rows first.
        steps, seeds, remainders: the members' other state; empty if they have none of that kind.
        groups: the optimizer's parameter groups.
        rule: the optimizer.
        notes: what has been found out about these tensors, for the next call with the same batch.
        scale: the factor of the gradients (AMP's unscaling, clipping), as a float64 tensor of one element on the
            bucket's device; None is 1.
        found_inf: a tensor of one element on the bucket's device. If it is not 0, nothing changes. None is 0.
        final: whether ``scale`` is the step's, and the step is sure to be taken.
    """

    bucket: Members
    params: list[Tensor]
    grads: list[Tensor]
    moments: list[list[Tensor]]
    steps: list[Tensor]
    seeds: list[Tensor]
    remainders: list[Tensor]
    groups: list[dict[str, Any]]
    rule: Rule
    notes: dict[str, Any]
    scale: Tensor | None = None
    found_inf: Tensor | None = None
    final: bool = False

    @property
    def has_state(self) -> bool:
        """Whether the batch has all kinds of the members' state."""
        kinds = [*self.moments, self.remainders, self.steps, self.seeds]
        return sum(map(bool, kinds)) == len(self.bucket.key.storage) + len(self.bucket.key.counters)

    def only(self, members: Container[int]) -> Batch:
        """The batch with only the members at these indices; the others have :data:`ABSENT` as gradient and state."""

        def keep(tensors: list[Tensor]) -> list[Tensor]:
            return [t if i in members else ABSENT for i, t in enumerate(tensors)]

        return self._replace(
            grads=keep(self.grads),
            moments=list(map(keep, self.moments)),
            steps=keep(self.steps),
            seeds=keep(self.seeds),
            remainders=keep(self.remainders),
            notes={},
        )

    @property
    def stored(self) -> list[list[Tensor]]:
        """Lists of the members' weights, gradients, each moment, and remainders if there are any."""
        return [self.params, self.grads, *self.moments, *([self.remainders] if self.remainders else [])]


ABSENT = torch.empty(0, dtype=torch.bool, device="cpu")
"""Replaces the gradient and state of a parameter without gradient in this step. It is bool, which no gradient is."""


class Backend(Protocol):
    """The interface between the front end and a backend. Instances are stateless."""

    name: str
    fused: bool
    mixes_moments: bool
    """Whether a parameter's moments may have different dtypes."""

    def unavailable(self, device: torch.device) -> str | None:
        """Why this backend cannot step parameters on ``device`` here, with the remedy; None if it can."""

    def zeros_like(self, p: Tensor, dtype: torch.dtype) -> Tensor:
        """A new moment: zeros of the shape and device of ``p``, with its strides if they are dense."""

    def geometry(self, rows: int, cols: int) -> tuple[int, int]:
        """Rows and columns of a tile of a parameter of ``rows`` rows and ``cols`` columns, both at least 1."""

    def counters_device(self, device: torch.device) -> torch.device:
        """The device of the step counts and seeds of parameters on ``device``."""

    def scratch(self, bucket: Members) -> Any:
        """A new object for :attr:`Members.scratch`, which the backend keeps between steps."""

    def first_stale(self, batch: Batch) -> int:
        """Index of the first member that does not fit the bucket's table, -1 if all do. Writes nothing."""

    def square_norm(self, batch: Batch) -> Tensor | None:
        """The sum of the squares of the batch's gradients, without its scale: 0-dim float64 on the bucket's device.

        None unless weights and gradients fit the bucket's table. The backend keeps no result for later calls.
        """

    def measure(self, batch: Batch) -> None:
        """Computes this rank's sums for the exchange before a step. Writes ``bucket.shared``: shares and rows.

        For each member with a gradient, it writes the sums that its ``needs`` ask for, and nothing else. The batch must
        fit the bucket's table. If the batch is ``final``, members with both TEST and DOT may already be moved, by a
        guess that the step corrects. No sum of a member is asked for twice in a step.
        """

    def step(self, batch: Batch) -> int:
        """One optimizer step over the batch, unless :meth:`first_stale` is not -1; returns that index.

        For members that lie on several ranks it uses the verdicts and row_projections of ``bucket.shared``.
        """
