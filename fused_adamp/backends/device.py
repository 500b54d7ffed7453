"""The host side of GPU backends: tables on the device, job lists, workspace, CUDA graphs.

A step takes three launches (split) or one (one pass), and two more before it if ranks share parameters. With float32
math, one more launch follows the step, and the shares: it redoes, in float64, parameters and tiles whose sums have left
float32's range.

Kernels also read tables of addresses and hyperparameters. These stay on the device between steps and are uploaded again
only when a tensor has moved or a hyperparameter has changed. Nothing here waits for the device.

**CUDA graphs.** With ``capturable=True`` a step, and a ``clip_grad_norm_`` before it, can be captured::

    optimizer = fused_adamp.AdamP(params, lr=torch.tensor(1e-3, device="cuda"), capturable=True)
    train()  # on a side stream, as torch asks for: makes the state, compiles and loads the kernels
    with torch.cuda.graph(graph):
        train()
    lr_tensor.fill_(...); graph.replay()

A replay repeats launches with the same arguments. So hyperparameters are those of the capture, except tensors on the
GPU, which each replay reads. Each replay repeats the uploads of the captured step, into tables that no other step uses.
Steps are counted on the device.
"""

from __future__ import annotations

import math
import os
from itertools import chain
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, Protocol
from weakref import ref

import torch
from torch import Tensor

from fused_adamp.batch import ABSENT, COLUMNS, SHARES, Scalars, Sharing
from fused_adamp.bucket import first_stale
from fused_adamp.tensors import are_same, has_storage, rows_cols

if TYPE_CHECKING:
    from collections.abc import Sequence

    from fused_adamp.batch import Batch, Members

__all__ = ["PLAN", "DeviceBackend", "Launch", "Run", "Tables", "Workspace", "jobs_ahead"]

PLAN = "FUSED_ADAMP_PLAN"
"""Environment variable that forces a plan: ``one_pass`` or ``split``."""

STAGES = ("prepare", "measure", "dot", "update", "square", "share", "share_nothing")
"""The first column of a job: ``(stage, first tile, number of tiles)``. In place of the first tile, share_nothing has a
parameter, and prepare a block of parameters."""

LAYOUTS = ("aligned", "flat", "strided")
"""How a parameter's tensors lie in memory. Aligned: rows follow each other, the first starts at a multiple of
WIDEST_LOAD bytes, and their length is a multiple of VECTOR (that of a vector need not be). Flat: rows follow each
other. Strided: anything else."""

ADDRESSES = ("p", "g", "m", "v", "r", "step", "seed")
"""The columns of the address table: weight, gradient, moments, remainder, step count, seed."""

INNER = 2
"""Dimensions beyond dim 0 that a strided parameter may have after merging. A row of the stride table has the size of
the last, then for p, g, m, v and r the strides of dim 0 and of these."""

COEFFICIENTS = ("inverse_bias2", "step_size")
"""The numbers of a parameter that depend on its step count."""

FINDINGS = ("channel_limit", "layer_limit", "found_cosine", "found_norm", "layer_projection")
"""The findings on a parameter: limits of both views, cosine and norm, from measure; c of the layer, from dot."""

COUNTERS = ("measured", "dotted", "concluded", "projection_known", "key", "measure_left", "dot_left", "tiles_left")
"""The counters of a parameter: numbers of tiles that have been measured and dotted; the epochs in which all had been;
the keys of this step's noise; and marks: the last epochs in which sums of measure, dot or update left float32."""

PARTS = ("need", "shares", "row_shares", "verdict", "given", "given_step")
"""A parameter's addresses in :class:`~fused_adamp.batch.Shared`. At ``given`` are c of its rows if they are split, else
the one c of its layer. ``given_step`` is the distance from row to row in numbers: 1 or 0."""

TICKETS = ("ticket", "preparing", "prepared")
"""The counters of a launch."""

WIDEST_LOAD = 16
"""Bytes of one load of a thread."""

VECTOR = 8
"""Elements of one load of a thread, at most."""

PREPARE_BLOCK = 128
"""Parameters that one job prepares."""

STRIDES = 1 + 5 * (1 + INNER)
_WINDOW = 1 << 20
"""Elements, 8 MB of float32 weights and gradients, that the one-pass plan measures ahead of updating them."""
_RUN = 1 << 13
"""Elements of a job, in whole tiles. Later tiles find the tables in cache that the first tile has loaded."""
_DOT_RUN = 1 << 16
"""Elements of a job of dot, which most often has nothing to do."""


class Tables:
    """The tables that kernels read besides the tensors, as last uploaded, and the launches.

    A captured step has tables of its own, since only replays execute its uploads.
    """

    def __init__(self, bucket: Members, *, captured: bool) -> None:
        device, count = bucket.key.device, len(bucket.params)
        self.device = device
        self.table = torch.empty(count, len(COLUMNS) + 2, dtype=torch.int64, device=device)
        self.addresses = torch.empty(count, len(ADDRESSES), dtype=torch.int64, device=device)
        self.strides = torch.empty(count, STRIDES, dtype=torch.int64, device=device)
        self.scalars = torch.empty(0, len(Scalars._fields), dtype=torch.float64, device=device)
        self.cells: list[Tensor] = []
        """The scalars that come from tensors on the device."""
        self.seen: _Seen | None = None
        self.places = torch.empty(0, dtype=torch.int64, device="cpu")
        """The addresses as they were uploaded."""
        self.seen_scalars: tuple[list[list[float]], list[tuple[int, int]]] = [], []
        self.seen_groups: list[int] = []
        self.seen_members: dict[Any, list[int]] = {}
        self.launches: list[Launch] = []
        self._kept: list[Tensor] | None = [] if captured else None

    def upload(self, target: Tensor, source: Tensor) -> None:
        """Copies ``source``, on the CPU, to ``target`` on the device, on the current stream without a sync."""
        if self.device.type == "cuda":
            source = source.pin_memory()  # returns to its pool only after the stream has read it
        if self._kept is not None:  # a graph reads it in every replay
            self._kept.append(source)
        target.copy_(source, non_blocking=True)

    def uploaded(self, source: Tensor) -> Tensor:
        """A copy of ``source``, on the CPU, on the device."""
        target = torch.empty_like(source, device=self.device)
        self.upload(target, source)
        return target

    def set_scalars(self, rows: list[Scalars]) -> None:
        """Uploads hyperparameters, a row per group, if a number has changed; always copies those that are tensors."""
        tensors = {
            (i, j): number for i, row in enumerate(rows) for j, number in enumerate(row) if isinstance(number, Tensor)
        }
        numbers = [[0.0 if isinstance(number, Tensor) else number for number in row] for row in rows]
        if (numbers, [*tensors]) != self.seen_scalars:
            if len(numbers) != len(self.scalars):
                self.scalars = self.scalars.new_empty(len(numbers), self.scalars.size(1))
            self.upload(self.scalars, torch.tensor(numbers, dtype=torch.float64, device="cpu"))
            self.cells = [self.scalars[i, j] for i, j in tensors]
            self.seen_scalars = numbers, [*tensors]
        if tensors:
            torch._foreach_copy_(self.cells, [*tensors.values()])


class Workspace:
    """Memory on the device that all launches of one bucket use."""

    def __init__(self, bucket: Members) -> None:
        device, count = bucket.key.device, len(bucket.params)
        _refuse_capture(device)
        owners = torch.repeat_interleave(torch.arange(count, dtype=torch.int32, device="cpu"), _tiles(bucket.table))
        self.owners = owners.to(device)
        self.coefficients = torch.zeros(count, len(COEFFICIENTS), dtype=torch.float64, device=device)
        self.sums = torch.zeros(max(bucket.tiles, 1), len(SHARES), dtype=torch.float64, device=device)
        self.findings = torch.zeros(count, len(FINDINGS), dtype=torch.float64, device=device)
        self.counters = torch.zeros(count, len(COUNTERS), dtype=torch.int64, device=device)
        self.one = torch.ones(1, dtype=torch.float64, device=device)
        self.zero = torch.zeros(1, dtype=torch.float64, device=device)
        self.parts = _parts(bucket).to(device)
        self.replays = torch.zeros(1, dtype=torch.int64, device=device)
        self.epoch = 0
        self.counts_on_device = False
        self.eager = Tables(bucket, captured=False)
        self.captured: list[Tables] = []

    def tables(self, batch: Batch, *, capturing: bool) -> Tables:
        """The tables of eager steps; new tables for a captured norm or step."""
        if not capturing:
            return self.eager
        self.captured.append(Tables(batch.bucket, captured=True))
        return self.captured[-1]

    def advance(self, batch: Batch) -> None:
        """Begins a new epoch. Once a step may be captured, the device counts, since the host does not see replays."""
        self.counts_on_device = self.counts_on_device or any(group["capturable"] for group in _stepped_groups(batch))
        if self.counts_on_device:
            self.replays.add_(1)
        else:
            self.epoch += 1


class Launch(NamedTuple):
    """The parameters of a bucket that one compiled kernel steps."""

    spec: Any
    plan: str
    indices: list[int]
    active: Tensor
    tickets: Tensor
    jobs: tuple[Tensor, ...]
    """Job lists, ``(n, 3)`` int32. One pass: of the one kernel. Split: of measure, dot and update."""
    blocks: int
    """The number of jobs that prepare. They come first."""
    ahead: list[Tensor]
    """Cache of :func:`jobs_ahead`: empty, or one job list."""


class Run(Protocol):
    """A kernel with its arguments."""

    def start(self) -> None:
        """Launches it on the current stream."""


class DeviceBackend:
    """A backend on a GPU, without the kernels, which a subclass supplies."""

    fused = True
    mixes_moments = False  # a kernel is compiled for one dtype of state
    block: ClassVar[int]
    """Elements that a program holds in registers at once. A smaller tile takes as long."""

    # A subclass supplies these.

    def spec(self, batch: Batch, p: torch.dtype, g: torch.dtype, state: torch.dtype | None, layout: str) -> Any:
        """The properties that a kernel is compiled for: dtypes of weight, gradient and state, and one of LAYOUTS.

        ``state`` is None before the first step, where only the norm of the gradients is computed.
        """
        raise NotImplementedError

    def square_runs(self, batch: Batch, tables: Tables, launch: Launch) -> Sequence[Run]:
        """The kernels that write g.g of each tile of the launch's parameters, for the norm of the gradients."""
        raise NotImplementedError

    def share_runs(self, batch: Batch, tables: Tables, launch: Launch) -> Sequence[Run]:
        """The kernels that write this rank's shares of the launch's parameters."""
        raise NotImplementedError

    def step_runs(self, batch: Batch, tables: Tables, launch: Launch) -> Sequence[Run]:
        """The kernels of a step of the launch's parameters, in order."""
        raise NotImplementedError

    # The protocol of backends.

    def zeros_like(self, p: Tensor, dtype: torch.dtype) -> Tensor:
        _refuse_capture(p.device)
        return torch.zeros_like(p, dtype=dtype)

    def counters_device(self, device: torch.device) -> torch.device:
        return device

    def scratch(self, bucket: Members) -> Workspace:
        return Workspace(bucket)

    def first_stale(self, batch: Batch) -> int:
        if "stale" not in batch.notes:
            seen = batch.bucket.scratch.eager.seen
            fits = seen is not None and seen.fits(batch, state=batch.has_state)
            batch.notes["stale"] = -1 if fits else first_stale(batch)
        return int(batch.notes["stale"])

    def square_norm(self, batch: Batch) -> Tensor | None:
        work = batch.bucket.scratch
        with _on(batch.bucket.key.device):
            if not batch.has_state:  # before the first step: the tables of a step cannot be made yet
                if self.first_stale(batch) >= 0:
                    return None
                norms = [torch.linalg.vector_norm(g, dtype=torch.float64) for g in batch.grads if g is not ABSENT]
                return torch.stack(norms).square().sum()
            tables = self._lined_up(batch, state=False)
            if tables is None:
                return None
            runs = [run for launch in tables.launches for run in self.square_runs(batch, tables, launch)]
            squares: Tensor = work.sums[:, SHARES.index("gg")]
            squares.zero_()  # of the members that are absent
            for run in runs:
                run.start()
            return squares.sum()

    def measure(self, batch: Batch) -> None:
        with _on(batch.bucket.key.device):
            tables = self._lined_up(batch)
            assert tables is not None, "the front end has checked that the batch fits"
            runs = [run for launch in tables.launches for run in self.share_runs(batch, tables, launch)]
            for run in runs:
                run.start()

    def step(self, batch: Batch) -> int:
        work = batch.bucket.scratch
        with _on(batch.bucket.key.device):
            tables = work.tables(batch, capturing=_captured(batch))
            stale = self._refresh(batch, tables)
            if stale >= 0:
                return stale
            work.advance(batch)
            # Everything that can fail comes before the first launch.
            runs = [run for launch in tables.launches for run in self.step_runs(batch, tables, launch)]
            for run in runs:
                run.start()
        return -1

    def _lined_up(self, batch: Batch, *, state: bool = True) -> Tables | None:
        """Refreshes the tables and begins an epoch that measures and does not step. None if a member is stale.

        Without ``state``, the epoch reads only gradients.
        """
        work: Workspace = batch.bucket.scratch
        tables = work.tables(batch, capturing=_captured(batch))
        if self._refresh(batch, tables, state=state) >= 0:
            return None
        work.advance(batch)
        return tables

    def _refresh(self, batch: Batch, tables: Tables, *, state: bool = True) -> int:
        """Uploads tables that have changed, unless a member is stale; returns :meth:`first_stale`."""
        bucket, seen = batch.bucket, tables.seen
        if seen is None or not seen.fits(batch, state=state):
            stale = self.first_stale(batch)
            if stale >= 0:
                return stale
            _plan(batch, tables)
            tables.seen = _Seen.of(batch)
        elif seen.gradients != (moved := list(map(Tensor.data_ptr, batch.grads))):
            _move_gradients(tables, batch, moved)
            tables.seen = seen._replace(gradients=moved)
        if bucket.groups != tables.seen_groups:
            tables.upload(tables.table, _table(bucket))
            tables.seen_groups = list(bucket.groups)
        tables.set_scalars([batch.rule.scalars(group) for group in batch.groups])
        return -1


# CUDA graphs.


def _on(device: torch.device) -> Any:
    """A context manager that makes a GPU the current device; for the CPU it does nothing."""
    return torch.cuda.device(device if device.type == "cuda" else -1)


def _capturing(device: torch.device) -> bool:
    """Whether the current stream of the device is capturing a CUDA graph. The device must be the current one."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def _refuse_capture(device: torch.device) -> None:
    with _on(device):
        if _capturing(device):
            raise RuntimeError(
                "the optimizer's state would be made inside of a CUDA graph, which would make it anew in every replay: "
                "take a step like the one to be captured before the capture"
            )


def _captured(batch: Batch) -> bool:
    """Whether the batch is stepped while a CUDA graph is captured.

    Raises:
        RuntimeError: it is, and a group has capturable=False. Nothing has changed then.
    """
    if not _capturing(batch.bucket.key.device):
        return False
    for group in _stepped_groups(batch):
        if not group["capturable"]:
            raise RuntimeError(
                "the step is being captured in a CUDA graph, but a parameter group has capturable=False: pass "
                "capturable=True to the optimizer, or set it in every group of optimizer.param_groups, and take a step "
                "before the capture"
            )
    return True


def _stepped_groups(batch: Batch) -> list[dict[str, Any]]:
    """The parameter groups with a member that has a gradient."""
    members = {n for n, g in zip(batch.bucket.groups, batch.grads, strict=True) if g is not ABSENT}
    return [batch.groups[n] for n in sorted(members)]


# From tensors to launches.


class _Layout(NamedTuple):
    """Strides, sizes and dtypes of tensors, without their addresses."""

    strides: list[tuple[int, ...]]
    sizes: list[torch.Size]
    dtypes: list[torch.dtype]

    @classmethod
    def of(cls, tensors: list[Tensor]) -> _Layout:
        return cls(list(map(Tensor.stride, tensors)), list(map(Tensor.size, tensors)), [t.dtype for t in tensors])


class _Seen(NamedTuple):
    """The tensors that tables were made from. :meth:`fits` says whether the tables still hold."""

    layout: _Layout
    """The layout of weights and gradients."""
    weights: list[int]
    """Addresses, as in ``gradients`` and ``state``."""
    gradients: list[int]
    state: list[int]
    tensors: list[ref[Tensor]]
    """All state tensors."""
    state_layout: _Layout

    @classmethod
    def of(cls, batch: Batch) -> _Seen:
        state = _state(batch)
        weights, gradients, places = (list(map(Tensor.data_ptr, of)) for of in (batch.params, batch.grads, state))
        return cls(_layout_of(batch), weights, gradients, places, list(map(ref, state)), _Layout.of(state))

    def fits(self, batch: Batch, *, state: bool) -> bool:
        """Whether the batch's tensors are as they were; gradients may have moved. State is compared if ``state``.

        State does not change its layout while it is the same tensor at the same address.
        """
        gradients = list(map(Tensor.data_ptr, batch.grads))
        return (
            self.layout == _layout_of(batch)
            and self.weights == list(map(Tensor.data_ptr, batch.params))
            and (self.gradients == gradients or self._gradients_fit(gradients, batch.grads))
            and (not state or self._state_fits(_state(batch)))
        )

    def _gradients_fit(self, addresses: list[int], gradients: list[Tensor]) -> bool:
        """Whether each gradient that has moved has the old one's alignment, and lies inside its storage."""
        return all(
            (a - b) % WIDEST_LOAD == 0 and has_storage(g)
            for a, b, g in zip(self.gradients, addresses, gradients, strict=True)
            if a != b
        )

    def _state_fits(self, state: list[Tensor]) -> bool:
        same = self.state == list(map(Tensor.data_ptr, state))
        return same and (are_same(self.tensors, state) or self.state_layout == _Layout.of(state))


def _state(batch: Batch) -> list[Tensor]:
    return list(chain(*batch.moments, batch.steps, batch.seeds, batch.remainders))


def _layout_of(batch: Batch) -> _Layout:
    """The layout of a batch's weights and gradients, computed once per batch."""
    if "layout" not in batch.notes:
        batch.notes["layout"] = _Layout.of([*batch.params, *batch.grads])
    layout: _Layout = batch.notes["layout"]
    return layout


def _move_gradients(tables: Tables, batch: Batch, addresses: list[int]) -> None:
    """Uploads the gradients' new addresses, one per member; their layout has not changed."""
    present = [0 if g is ABSENT else address for g, address in zip(batch.grads, addresses, strict=True)]
    tables.places[:, ADDRESSES.index("g")] = torch.tensor(present, dtype=torch.int64, device="cpu")
    tables.upload(tables.addresses, tables.places)


def _table(bucket: Members) -> Tensor:
    """A bucket's table with two more columns: the number of tiles of a member, and of each of its rows."""
    return torch.cat([bucket.table, _tiles(bucket.table)[:, None], _segments(bucket.table)[:, None]], dim=1)


def _segments(table: Tensor) -> Tensor:
    """The number of tiles of a row of each parameter of a bucket's table."""
    cols, tile_cols = (table[:, COLUMNS.index(name)] for name in ("cols", "tile_cols"))
    return (cols + tile_cols - 1) // tile_cols


def _tiles(table: Tensor) -> Tensor:
    """The number of tiles of each parameter of a bucket's table."""
    rows, tile_rows = (table[:, COLUMNS.index(name)] for name in ("rows", "tile_rows"))
    return (rows + tile_rows - 1) // tile_rows * _segments(table)


def _parts(bucket: Members) -> Tensor:
    """Addresses of every member's entries in ``bucket.shared``: ``(P, len(PARTS))`` int64; no rows if it is None."""
    shared, table = bucket.shared, bucket.table
    parts = torch.empty(0 if shared is None else len(table), len(PARTS), dtype=torch.int64, device="cpu")
    if shared is not None:
        index = torch.arange(len(table), device="cpu")
        first_row, sharing = (table[:, COLUMNS.index(name)] for name in ("first_row", "sharing"))
        roles = (
            ("need", shared.needs, index),
            ("shares", shared.shares, index),
            ("row_shares", shared.rows, first_row),
            ("verdict", shared.verdicts, index),
            ("given", shared.row_projections, first_row),
        )
        for role, tensor, row in roles:
            parts[:, PARTS.index(role)] = tensor.data_ptr() + row * tensor.stride(0) * tensor.itemsize
        split = sharing == Sharing.SPLIT
        parts[:, PARTS.index("given_step")] = split
        parts[~split, PARTS.index("given")] = parts[~split, PARTS.index("verdict")] + shared.verdicts.itemsize
    return parts


def _backend_of(batch: Batch) -> DeviceBackend:
    backend = batch.bucket.key.backend
    assert isinstance(backend, DeviceBackend), "the batch is stepped by another backend"
    return backend


def _plan(batch: Batch, tables: Tables) -> None:
    """Uploads addresses and strides, and makes the launches: one for the parameters of each kernel."""
    addresses, strides = ([[0] * table.size(1) for _ in batch.params] for table in (tables.addresses, tables.strides))
    members: dict[Any, list[int]] = {}
    for i, (p, g) in enumerate(zip(batch.params, batch.grads, strict=True)):
        if g is ABSENT:
            continue
        moments = [moment[i] for moment in batch.moments]
        roles = dict(zip(("p", "g", "m", "v"), (p, g, *moments), strict=False))
        if batch.remainders:
            roles["r"] = batch.remainders[i]
        counters = (("step", batch.steps), ("seed", batch.seeds))
        for role, tensor in (*roles.items(), *((role, counts[i]) for role, counts in counters if counts)):
            addresses[i][ADDRESSES.index(role)] = tensor.data_ptr()
        # Noise depends on the element's number in the tensor, not on its address.
        sizes, inner = _collapse([*roles.values()], any_order=not batch.seeds)
        layout = _layout([*roles.values()], inner)
        if layout == "strided":
            if len(sizes) > INNER or math.prod(sizes) >= 1 << 31:
                raise ValueError(
                    f"a parameter of shape {tuple(p.shape)} and strides {p.stride()}, with a gradient of strides "
                    f"{g.stride()}, lies in memory in a way that the kernels cannot follow: rows of fewer than 2^31 "
                    f"elements in at most {INNER} dimensions after merging; pass p.contiguous()"
                )
            strides[i][0] = sizes[-1]
            for (role, tensor), steps in zip(roles.items(), inner, strict=True):
                outer = tensor.stride(0) if tensor.ndim >= 2 else 0
                first = 1 + (1 + INNER) * ADDRESSES.index(role)
                strides[i][first : first + 1 + INNER] = [outer, *([0] * (INNER - len(steps))), *steps]
        state = (moments[0].dtype if moments else p.dtype) if batch.has_state else None
        members.setdefault((p.dtype, g.dtype, state, layout), []).append(i)
    tables.places = torch.tensor(addresses, device="cpu")
    tables.upload(tables.addresses, tables.places)
    if any(map(any, strides)):
        tables.upload(tables.strides, torch.tensor(strides, device="cpu"))
    if members != tables.seen_members:  # gradients may lie elsewhere in every step; what there is to do stays the same
        tables.launches = [_launch(batch, tables, spec, indices) for spec, indices in members.items()]
        tables.seen_members = members


def _collapse(roles: Sequence[Tensor], *, any_order: bool = True) -> tuple[list[int], list[list[int]]]:
    """The sizes of the dimensions after dim 0, and each tensor's strides in them, merged where all tensors allow it.

    A vector is one row. The algorithm allows any order of the elements of a row that is the same for all tensors. With
    ``any_order``, the dimensions are sorted by the first tensor's strides, largest first.
    """
    p = roles[0]
    dims = [d for d in range(min(p.ndim, 2) // 2, p.ndim) if p.size(d) != 1]
    if any_order:
        dims.sort(key=lambda d: -p.stride()[d])
    sizes: list[int] = []
    inner: list[list[int]] = [[] for _ in roles]
    for d in dims:
        if sizes and all(s[-1] == p.size(d) * t.stride(d) for s, t in zip(inner, roles, strict=True)):
            sizes[-1] *= p.size(d)
            for s, t in zip(inner, roles, strict=True):
                s[-1] = t.stride(d)
        else:
            sizes.append(p.size(d))
            for s, t in zip(inner, roles, strict=True):
                s.append(t.stride(d))
    return (sizes, inner) if sizes else ([1], [[1] for _ in roles])


def _layout(roles: Sequence[Tensor], inner: list[list[int]]) -> str:
    p = roles[0]
    rows, cols = rows_cols(p)
    if p.numel() == 0:
        return "aligned"
    if any(s != [1] or (rows > 1 and t.stride(0) != cols) for s, t in zip(inner, roles, strict=True)):
        return "strided"
    at_vectors = all(t.data_ptr() % WIDEST_LOAD == 0 for t in roles)
    aligned = at_vectors and (p.ndim < 2 or cols % VECTOR == 0)
    return "aligned" if aligned else "flat"


def _launch(
    batch: Batch, tables: Tables, members: tuple[torch.dtype, torch.dtype, torch.dtype | None, str], indices: list[int]
) -> Launch:
    bucket = batch.bucket
    backend = _backend_of(batch)
    spec = backend.spec(batch, *members)
    elements = bucket.table[:, COLUMNS.index("rows")] * bucket.table[:, COLUMNS.index("cols")]
    blocks = -(-len(indices) // PREPARE_BLOCK)
    order = _order(bucket, backend.block)
    # A shared parameter is not measured in the step, so one pass would find nothing in cache.
    fits = bucket.shared is None and int(elements[indices].max()) <= 4 * _WINDOW
    plan = _forced_plan() or ("one_pass" if fits else "split")
    prepare = torch.tensor(
        [(STAGES.index("prepare"), block, 1) for block in range(blocks)], dtype=torch.int32, device="cpu"
    )
    if plan == "split":
        parts = [prepare, *map(order.measure, indices)], [*map(order.dot, indices)], [*map(order.update, indices)]
        jobs = tuple(tables.uploaded(torch.cat(part)) for part in parts)
    else:
        windows: list[list[int]] = [[]]
        filled = 0
        for i in indices:
            if windows[-1] and filled + int(elements[i]) > _WINDOW:
                windows.append([])
                filled = 0
            windows[-1].append(i)
            filled += int(elements[i])
        pieces = [prepare]
        for ahead, now in zip([*windows, []], [[], *windows], strict=True):
            pieces += [*map(order.measure, ahead), *map(order.dot, now), *map(order.update, reversed(now))]
        jobs = (tables.uploaded(torch.cat(pieces)),)
    active = tables.uploaded(torch.tensor(indices, dtype=torch.int32, device="cpu"))
    tickets = torch.zeros(len(TICKETS), dtype=torch.int64, device=tables.device)
    return Launch(spec, plan, indices, active, tickets, jobs, blocks, [])


def jobs_ahead(batch: Batch, tables: Tables, launch: Launch) -> Tensor:
    """The jobs, ``(n, 3)`` int32 on the device, of the norm; for a bucket that ranks share, of its shares."""
    if not launch.ahead:
        order = _order(batch.bucket, _backend_of(batch).block)
        if batch.bucket.shared is not None:
            parts = [*map(order.share, launch.indices)]
        else:
            parts = [order.jobs("square", i, _RUN) for i in launch.indices]
        launch.ahead.append(tables.uploaded(torch.cat(parts)))
    return launch.ahead[0]


def _forced_plan() -> str | None:
    plan = os.environ.get(PLAN)
    if plan not in (None, "", "one_pass", "split"):
        raise ValueError(f"{PLAN}={plan!r} is not a plan: choose 'one_pass' or 'split', or leave it unset")
    return plan


class _Order(NamedTuple):
    """The jobs of one parameter in one stage: rows of (stage, first tile, tiles)."""

    counts: list[int]
    first: list[int]
    sizes: list[int]
    """Elements of a tile."""
    projected: list[bool]
    local: list[bool]

    def measure(self, i: int) -> Tensor:
        return self.jobs("measure", i, _RUN if self.projected[i] and self.local[i] else None)

    def dot(self, i: int) -> Tensor:
        return self.jobs("dot", i, _DOT_RUN if self.projected[i] and self.counts[i] > 1 else None)

    def update(self, i: int) -> Tensor:
        """In reverse order: the tiles that were measured last are still in cache."""
        return self.jobs("update", i, _RUN).flip(0)

    def share(self, i: int) -> Tensor:
        if self.counts[i] == 0:
            return torch.tensor([[STAGES.index("share_nothing"), i, 1]], dtype=torch.int32, device="cpu")
        return self.jobs("share", i, _RUN)

    def jobs(self, stage: str, i: int, run: int | None) -> Tensor:
        if run is None:
            return torch.empty(0, 3, dtype=torch.int32, device="cpu")
        width = max(run // self.sizes[i], 1)
        begin, end = self.first[i], self.first[i] + self.counts[i]
        tile = torch.arange(begin, end, width, dtype=torch.int32, device="cpu")
        return torch.stack([torch.full_like(tile, STAGES.index(stage)), tile, (end - tile).clamp(max=width)], dim=1)


def _order(bucket: Members, block: int) -> _Order:
    names = "first_tile", "tile_rows", "tile_cols", "projected", "sharing"
    first, tile_rows, tile_cols, projected, sharing = (bucket.table[:, COLUMNS.index(name)] for name in names)
    numbers = (
        _tiles(bucket.table),
        first,
        (tile_rows * tile_cols).clamp(min=block),
        projected != 0,
        sharing == Sharing.LOCAL,
    )
    return _Order(*(column.tolist() for column in numbers))
