"""The Triton backend: kernels/ over a bucket, one launch (one pass) or three (split), and two more where ranks share.

One more follows each of these, of float32 math: it does again, in float64, what has left float32's range.

What a kernel reads besides the tensors stays on the device between steps and is uploaded again only when it changed:
the addresses when a tensor moved, the hyperparameters when one has another value. Nothing here waits for the device.

**CUDA graphs.** With ``capturable=True`` a step, and a ``clip_grad_norm_`` before it, can be captured::

    optimizer = fused_adamp.AdamP(params, lr=torch.tensor(1e-3, device="cuda"), capturable=True)
    train()  # on a side stream, as torch asks for: makes the state, compiles and loads the kernels
    with torch.cuda.graph(graph):
        train()
    lr_tensor.fill_(...); graph.replay()

A replay repeats launches with the arguments they had. So hyperparameters are those of the capture, but for tensors on
the GPU, which each replay reads; what a captured step uploads, each replay uploads again, into tables that no other
step uses; and what tells one step from the next is counted on the device.
"""

from __future__ import annotations

import math
import os
from functools import cache, lru_cache
from itertools import chain
from typing import TYPE_CHECKING, Any, NamedTuple
from weakref import ref

import torch
from torch import Tensor

from fused_adamp.batch import ABSENT, COLUMNS, Scalars, Sharing
from fused_adamp.bucket import first_stale
from fused_adamp.precision import ROUNDINGS
from fused_adamp.tensors import are_same, has_storage, rows_cols

if TYPE_CHECKING:
    from collections.abc import Sequence

    from fused_adamp.batch import Batch, Members

__all__ = ["PLAN", "TritonBackend"]

PLAN = "FUSED_ADAMP_PLAN"
"""Environment variable that forces a plan: ``one_pass`` or ``split``."""

_OLDEST = (3, 3)
_UNINTERPRETED_NUMPY = (2, 4)
"""This numpy and later refuse int(array([1])), which the interpreters of older versions of Triton need."""
_INTERPRETS_ANY_NUMPY = (3, 7)
_LOG_TILE = 11
"""A tile of 2048 elements, 8 in each of 256 threads: two programs fit on a multiprocessor (128 registers a thread)."""
_WIDEST_ROW = 1 << 15
"""Elements of a row up to which one program takes it whole, a tile at a time; its second look finds them in cache."""
_WARPS = 8
_WINDOW = 1 << 20
"""Elements, 8 MB of float32 weights and gradients, that the one-pass plan measures ahead of updating them."""
_RUN = 1 << 13
"""Elements of a job, in whole tiles: the loads that lead to the first, one after the other, are cached for the next."""
_DOT_RUN = 1 << 16
"""Elements of a job in a stage that most often has nothing to do."""
_PROGRAMS_PER_MULTIPROCESSOR = 2
_INNER = 2
"""Dimensions beyond dim 0 that a strided parameter may have after merging."""


@lru_cache(maxsize=1)
def load() -> str | None:
    """Imports Triton; returns None, or why that is of no use and what would help."""
    try:
        import triton
    except ImportError as error:
        return f"Triton is missing ({error}); pip install triton"
    if _version(triton) < _OLDEST:
        return f"Triton {triton.__version__} is too old; pip install 'triton>={_dotted(_OLDEST)}'"
    return None


def _version(module: Any) -> tuple[int, ...]:
    return tuple(int(part) for part in module.__version__.split(".")[:2])


def _dotted(version: tuple[int, ...]) -> str:
    return ".".join(map(str, version))


def interpreted() -> bool:
    """Whether Triton runs its kernels in Python, on the CPU."""
    return os.environ.get("TRITON_INTERPRET", "") not in ("", "0")


def _not_interpretable() -> str | None:
    """Why Triton's interpreter cannot run the kernels, None if it can."""
    import triton

    remedy = f"pip install 'numpy<{_dotted(_UNINTERPRETED_NUMPY)}'"
    try:
        import numpy
    except ImportError as error:
        return f"TRITON_INTERPRET=1 needs numpy, which is missing ({error}); {remedy}"
    if _version(triton) < _INTERPRETS_ANY_NUMPY and _version(numpy) >= _UNINTERPRETED_NUMPY:
        return f"the interpreter of Triton {triton.__version__} fails with numpy {numpy.__version__}; {remedy}"
    return None


@cache
def _too_old(index: int | None) -> str | None:
    """Why this GPU cannot run the kernels, None if it can."""
    if torch.version.hip:
        return None
    capability = torch.cuda.get_device_capability(index)
    if capability < (8, 0):
        return f"its compute capability is {capability[0]}.{capability[1]}, Triton's kernels need 8.0 (A100) or later"
    return None


class Tables:
    """The tables that kernels read besides the tensors, as they were uploaded last, and the launches.

    A captured step has its own, since its uploads do not happen before a replay and happen again in each.
    """

    def __init__(self, bucket: Members, *, captured: bool) -> None:
        from fused_adamp.kernels import stages, tiles

        device, count = bucket.key.device, len(bucket.params)
        self.device = device
        self.table = torch.empty(count, tiles.COLUMNS.value, dtype=torch.int64, device=device)
        self.addresses = torch.empty(count, tiles.ADDRESSES.value, dtype=torch.int64, device=device)
        self.strides = torch.empty(count, tiles.STRIDES.value, dtype=torch.int64, device=device)
        self.scalars = torch.empty(0, stages.SCALARS.value, dtype=torch.float64, device=device)
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
        """Copies in the order of the current stream, without waiting for it."""
        if self.device.type == "cuda":
            source = source.pin_memory()  # returns to its pool only after the stream has read it
        if self._kept is not None:  # a graph reads it in every replay
            self._kept.append(source)
        target.copy_(source, non_blocking=True)

    def uploaded(self, source: Tensor) -> Tensor:
        """A copy on the device."""
        target = torch.empty_like(source, device=self.device)
        self.upload(target, source)
        return target

    def set_scalars(self, rows: list[Scalars]) -> None:
        """Uploads hyperparameters if a number changed, and in any case copies those that are tensors, unread."""
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
        from fused_adamp.kernels import stages

        device, count = bucket.key.device, len(bucket.params)
        _refuse_capture(device)
        owners = torch.repeat_interleave(torch.arange(count, dtype=torch.int32, device="cpu"), _tiles(bucket.table))
        self.owners = owners.to(device)
        self.coefficients = torch.zeros(count, stages.COEFFICIENTS.value, dtype=torch.float64, device=device)
        self.sums = torch.zeros(max(bucket.tiles, 1), stages.SUMS.value, dtype=torch.float64, device=device)
        self.findings = torch.zeros(count, stages.FINDINGS.value, dtype=torch.float64, device=device)
        self.counters = torch.zeros(count, stages.COUNTERS.value, dtype=torch.int64, device=device)
        self.one = torch.ones(1, dtype=torch.float64, device=device)
        self.zero = torch.zeros(1, dtype=torch.float64, device=device)
        self.parts = _parts(bucket).to(device)
        self.replays = torch.zeros(1, dtype=torch.int64, device=device)
        self.epoch = 0
        self.counts_on_device = False
        self.eager = Tables(bucket, captured=False)
        self.captured: list[Tables] = []

    def tables(self, batch: Batch, *, capturing: bool) -> Tables:
        """The tables of eager steps. A captured norm or step gets new ones."""
        if not capturing:
            return self.eager
        self.captured.append(Tables(batch.bucket, captured=True))
        return self.captured[-1]

    def advance(self, batch: Batch) -> None:
        """Another epoch. Once a step may be captured the device counts: of a replay the host knows nothing."""
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
    """One pass: of the one kernel. Split: of measure, dot and update."""
    blocks: int
    """Jobs that prepare, the first of them all."""
    ahead: list[Tensor]
    """The one job list of what comes ahead of a step, once it has been asked for: :func:`_jobs_ahead`."""


class TritonBackend:
    name = "triton"
    fused = True
    mixes_moments = False  # a kernel is compiled for one dtype of state

    def unavailable(self, device: torch.device) -> str | None:
        reason = load()
        if reason is None and device.type == "cpu" and not interpreted():
            reason = "it steps parameters on GPUs; on the CPU only with TRITON_INTERPRET=1, to test the kernels"
        elif reason is None and device.type == "cuda":
            reason = _too_old(device.index)
        elif reason is None and device.type != "cpu":
            reason = f"it knows CUDA and ROCm devices, not {device.type!r}"
        if reason is None and interpreted():
            reason = _not_interpretable()
        return reason

    def geometry(self, rows: int, cols: int) -> tuple[int, int]:
        """Rows and columns of a tile: what a block of registers holds, or a wide row, or a piece of a very wide one."""
        from fused_adamp.kernels.stages import NARROWEST, WIDTH_STEP

        tile = 1 << _LOG_TILE
        for log_width in range(NARROWEST.value, _LOG_TILE + WIDTH_STEP.value, WIDTH_STEP.value):
            if cols <= min(1 << log_width, tile):
                return min(rows, max(tile >> log_width, 1)), cols
        return 1, cols if rows > 1 and cols <= _WIDEST_ROW else tile

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
        from fused_adamp.kernels.stages import GG

        work = batch.bucket.scratch
        with _on(batch.bucket.key.device):
            if not batch.has_state:  # before the first step: what it needs cannot be lined up yet
                if self.first_stale(batch) >= 0:
                    return None
                norms = [torch.linalg.vector_norm(g, dtype=torch.float64) for g in batch.grads if g is not ABSENT]
                return torch.stack(norms).square().sum()
            tables = self._lined_up(batch, state=False)
            if tables is None:
                return None
            runs = [run for launch in tables.launches for run in _square_runs(batch, tables, launch)]
            squares: Tensor = work.sums[:, GG.value]
            squares.zero_()  # of the members that are absent
            for run in runs:
                run.start()
            return squares.sum()

    def measure(self, batch: Batch) -> None:
        with _on(batch.bucket.key.device):
            tables = self._lined_up(batch)
            assert tables is not None, "the front end has checked that the batch fits"
            runs = [run for launch in tables.launches for run in _share_runs(batch, tables, launch)]
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
            runs = [run for launch in tables.launches for run in _step_runs(batch, tables, launch)]
            for run in runs:
                run.start()
        return -1

    def _lined_up(self, batch: Batch, *, state: bool = True) -> Tables | None:
        """The tables of an epoch that measures and does not step; None unless :meth:`first_stale` is -1.

        Without ``state`` it reads gradients alone.
        """
        work: Workspace = batch.bucket.scratch
        tables = work.tables(batch, capturing=_captured(batch))
        if self._refresh(batch, tables, state=state) >= 0:
            return None
        work.advance(batch)
        return tables

    def _refresh(self, batch: Batch, tables: Tables, *, state: bool = True) -> int:
        """Uploads what has changed, unless :meth:`first_stale` is not -1; returns that index."""
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
    """Makes a GPU the current one."""
    return torch.cuda.device(device if device.type == "cuda" else -1)


def _capturing(device: torch.device) -> bool:
    """Whether what is launched on the device, which is the current one, is captured in a graph."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def _refuse_capture(device: torch.device) -> None:
    with _on(device):
        if _capturing(device):
            raise RuntimeError(
                "the optimizer's state would be made inside of a CUDA graph, which would make it anew in every replay: "
                "take a step like the one to be captured before the capture"
            )


def _captured(batch: Batch) -> bool:
    """Whether the batch is stepped inside of a capture.

    Raises:
        RuntimeError: it is, and a group does not expect that. Nothing has moved then.
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
    """How tensors lie in memory, wherever that is."""

    strides: list[tuple[int, ...]]
    sizes: list[torch.Size]
    dtypes: list[torch.dtype]

    @classmethod
    def of(cls, tensors: list[Tensor]) -> _Layout:
        return cls(list(map(Tensor.stride, tensors)), list(map(Tensor.size, tensors)), [t.dtype for t in tensors])


class _Seen(NamedTuple):
    """The tensors that tables were made from. The tables are good for the same ones: :meth:`fits`."""

    layout: _Layout
    """That of weights and gradients."""
    weights: list[int]
    """Addresses."""
    gradients: list[int]
    state: list[int]
    tensors: list[ref[Tensor]]
    """The state."""
    state_layout: _Layout

    @classmethod
    def of(cls, batch: Batch) -> _Seen:
        state = _state(batch)
        weights, gradients, places = (list(map(Tensor.data_ptr, of)) for of in (batch.params, batch.grads, state))
        return cls(_layout_of(batch), weights, gradients, places, list(map(ref, state)), _Layout.of(state))

    def fits(self, batch: Batch, *, state: bool) -> bool:
        """Whether all is as it was, but that gradients may lie elsewhere. ``state``: whether that has to be, too.

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
        """Whether gradients at other addresses are aligned as those before them, and inside their storage."""
        from fused_adamp.kernels.tiles import WIDEST_LOAD

        return all(
            (a - b) % WIDEST_LOAD.value == 0 and has_storage(g)
            for a, b, g in zip(self.gradients, addresses, gradients, strict=True)
            if a != b
        )

    def _state_fits(self, state: list[Tensor]) -> bool:
        same = self.state == list(map(Tensor.data_ptr, state))
        return same and (are_same(self.tensors, state) or self.state_layout == _Layout.of(state))


def _state(batch: Batch) -> list[Tensor]:
    return list(chain(*batch.moments, batch.steps, batch.seeds, batch.remainders))


def _layout_of(batch: Batch) -> _Layout:
    """The layout of a batch's weights and gradients, looked up once in a batch."""
    if "layout" not in batch.notes:
        batch.notes["layout"] = _Layout.of([*batch.params, *batch.grads])
    layout: _Layout = batch.notes["layout"]
    return layout


def _move_gradients(tables: Tables, batch: Batch, addresses: list[int]) -> None:
    """Uploads new addresses of gradients that lie as those before them."""
    from fused_adamp.kernels import tiles

    present = [0 if g is ABSENT else address for g, address in zip(batch.grads, addresses, strict=True)]
    tables.places[:, tiles.G.value] = torch.tensor(present, dtype=torch.int64, device="cpu")
    tables.upload(tables.addresses, tables.places)


def _table(bucket: Members) -> Tensor:
    """A bucket's table with two columns more: kernels/tiles.py."""
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
    """Where every member's parts of ``bucket.shared`` lie, for kernels/stages.py; nothing where nobody shares it."""
    from fused_adamp.kernels import stages

    shared, table = bucket.shared, bucket.table
    parts = torch.empty(
        0 if shared is None else len(table), stages.PLACES_OF_PARTS.value, dtype=torch.int64, device="cpu"
    )
    if shared is not None:
        index = torch.arange(len(table), device="cpu")
        first_row, sharing = (table[:, COLUMNS.index(name)] for name in ("first_row", "sharing"))
        roles = (
            (stages.NEED, shared.needs, index),
            (stages.SHARES, shared.shares, index),
            (stages.ROW_SHARES, shared.rows, first_row),
            (stages.VERDICT, shared.verdicts, index),
            (stages.GIVEN, shared.row_projections, first_row),
        )
        for role, tensor, row in roles:
            parts[:, role.value] = tensor.data_ptr() + row * tensor.stride(0) * tensor.itemsize
        split = sharing == Sharing.SPLIT
        parts[:, stages.GIVEN_STEP.value] = split
        parts[~split, stages.GIVEN.value] = parts[~split, stages.VERDICT.value] + shared.verdicts.itemsize
    return parts


def _plan(batch: Batch, tables: Tables) -> None:
    """Uploads addresses and strides, and lines up the launches: parameters by the kernel they need."""
    from fused_adamp.kernels import tiles

    addresses, strides = ([[0] * table.size(1) for _ in batch.params] for table in (tables.addresses, tables.strides))
    members: dict[Any, list[int]] = {}
    for i, (p, g) in enumerate(zip(batch.params, batch.grads, strict=True)):
        if g is ABSENT:
            continue
        moments = [moment[i] for moment in batch.moments]
        roles = dict(zip((tiles.P, tiles.G, tiles.M, tiles.V), (p, g, *moments), strict=False))
        if batch.remainders:
            roles[tiles.R] = batch.remainders[i]
        counters = ((tiles.STEP, batch.steps), (tiles.SEED, batch.seeds))
        for role, tensor in (*roles.items(), *((role, counts[i]) for role, counts in counters if counts)):
            addresses[i][role.value] = tensor.data_ptr()
        # Noise goes by the element's number in the tensor, wherever it lies.
        sizes, inner = _collapse([*roles.values()], any_order=not batch.seeds)
        layout = _layout([*roles.values()], inner)
        if layout == tiles.STRIDED.value:
            if len(sizes) > _INNER or math.prod(sizes) >= 1 << 31:
                raise ValueError(
                    f"a parameter of shape {tuple(p.shape)} and strides {p.stride()}, with a gradient of strides "
                    f"{g.stride()}, lies in memory in a way that the kernels cannot follow: rows of fewer than 2^31 "
                    f"elements in at most {_INNER} dimensions after merging; pass p.contiguous()"
                )
            strides[i][0] = sizes[-1]
            for (role, tensor), steps in zip(roles.items(), inner, strict=True):
                outer = tensor.stride(0) if tensor.ndim >= 2 else 0
                first = 1 + 3 * role.value
                strides[i][first : first + 3] = [outer, *([0] * (_INNER - len(steps))), *steps]
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
    """The sizes of the dimensions beyond dim 0, and each tensor's strides in them, merged where all tensors allow it.

    The order within a row means nothing to the algorithm as long as all tensors agree on it: where any will do, the
    first tensor's strides sort the dimensions. A vector is one row.
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


def _layout(roles: Sequence[Tensor], inner: list[list[int]]) -> int:
    from fused_adamp.kernels import tiles

    p = roles[0]
    rows, cols = rows_cols(p)
    if p.numel() == 0:
        return int(tiles.ALIGNED.value)
    if any(s != [1] or (rows > 1 and t.stride(0) != cols) for s, t in zip(inner, roles, strict=True)):
        return int(tiles.STRIDED.value)
    at_vectors = all(t.data_ptr() % tiles.WIDEST_LOAD.value == 0 for t in roles)
    aligned = at_vectors and (p.ndim < 2 or cols % tiles.VECTOR.value == 0)
    return int(tiles.ALIGNED.value if aligned else tiles.FLAT.value)


def _launch(
    batch: Batch, tables: Tables, members: tuple[torch.dtype, torch.dtype, torch.dtype | None, int], indices: list[int]
) -> Launch:
    from fused_adamp.kernels import plans, stages

    bucket = batch.bucket
    p, g, state, layout = members
    shared = bucket.shared is not None
    if state is None:  # before the first step: there is nothing yet that kernels could load besides
        spec = make_spec(p, g, p, layout, adaptive=False, buffer=False, shared=shared)
    else:
        rule = {"adaptive": batch.rule.adaptive, "buffer": bool(batch.moments)}
        spec = make_spec(p, g, state, layout, **rule, rounding=bucket.key.rounding, shared=shared)
    elements = bucket.table[:, COLUMNS.index("rows")] * bucket.table[:, COLUMNS.index("cols")]
    width: int = stages.PREPARE_BLOCK.value
    blocks = (len(indices) + width - 1) // width
    order = _order(bucket)
    # A shared parameter is not measured in the step, so one pass would find nothing in cache.
    fits = not shared and int(elements[indices].max()) <= 4 * _WINDOW
    plan = _forced_plan() or ("one_pass" if fits else "split")
    prepare = torch.tensor(
        [(plans.PREPARE.value, block, 1) for block in range(blocks)], dtype=torch.int32, device="cpu"
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
    tickets = torch.zeros(plans.TICKETS.value, dtype=torch.int64, device=tables.device)
    return Launch(spec, plan, indices, active, tickets, jobs, blocks, [])


def _jobs_ahead(batch: Batch, tables: Tables, launch: Launch) -> Tensor:
    """The jobs of the norm, or of a bucket that ranks share, of what they tell each other."""
    from fused_adamp.kernels import plans

    if not launch.ahead:
        order = _order(batch.bucket)
        if batch.bucket.shared is not None:
            parts = [*map(order.share, launch.indices)]
        else:
            parts = [order.jobs(plans.SQUARE.value, i, _RUN) for i in launch.indices]
        launch.ahead.append(tables.uploaded(torch.cat(parts)))
    return launch.ahead[0]


def _forced_plan() -> str | None:
    plan = os.environ.get(PLAN)
    if plan not in (None, "", "one_pass", "split"):
        raise ValueError(f"{PLAN}={plan!r} is not a plan: choose 'one_pass' or 'split', or leave it unset")
    return plan


class _Order(NamedTuple):
    """The jobs of one parameter in one stage: rows of (stage, first tile, tiles)."""

    stages: tuple[int, ...]
    """The numbers of measure, dot, update, share and share nothing."""
    counts: list[int]
    first: list[int]
    sizes: list[int]
    """Elements of a tile."""
    projected: list[bool]
    local: list[bool]

    def measure(self, i: int) -> Tensor:
        return self.jobs(self.stages[0], i, _RUN if self.projected[i] and self.local[i] else None)

    def dot(self, i: int) -> Tensor:
        return self.jobs(self.stages[1], i, _DOT_RUN if self.projected[i] and self.counts[i] > 1 else None)

    def update(self, i: int) -> Tensor:
        """Backwards: what was measured last is still in cache."""
        return self.jobs(self.stages[2], i, _RUN).flip(0)

    def share(self, i: int) -> Tensor:
        if self.counts[i] == 0:
            return torch.tensor([[self.stages[4], i, 1]], dtype=torch.int32, device="cpu")
        return self.jobs(self.stages[3], i, _RUN)

    def jobs(self, stage: int, i: int, run: int | None) -> Tensor:
        if run is None:
            return torch.empty(0, 3, dtype=torch.int32, device="cpu")
        width = max(run // self.sizes[i], 1)
        begin, end = self.first[i], self.first[i] + self.counts[i]
        tile = torch.arange(begin, end, width, dtype=torch.int32, device="cpu")
        return torch.stack([torch.full_like(tile, stage), tile, (end - tile).clamp(max=width)], dim=1)


def _order(bucket: Members) -> _Order:
    from fused_adamp.kernels import plans

    names = "first_tile", "tile_rows", "tile_cols", "projected", "sharing"
    first, tile_rows, tile_cols, projected, sharing = (bucket.table[:, COLUMNS.index(name)] for name in names)
    stages = plans.MEASURE, plans.DOT, plans.UPDATE, plans.SHARE, plans.SHARE_NOTHING
    numbers = (
        _tiles(bucket.table),
        first,
        (tile_rows * tile_cols).clamp(min=1 << _LOG_TILE),  # however few they are, they take a block of registers
        projected != 0,
        sharing == Sharing.LOCAL,
    )
    return _Order(tuple(stage.value for stage in stages), *(column.tolist() for column in numbers))


def make_spec(
    p: torch.dtype,
    g: torch.dtype,
    state: torch.dtype,
    layout: int,
    *,
    adaptive: bool,
    buffer: bool,
    rounding: str = "nearest",
    shared: bool = False,
) -> Any:
    """The spec that kernels are compiled for: fused_adamp/kernels/tiles.py."""
    import triton.language as tl

    from fused_adamp.kernels.tiles import Spec

    types = {
        torch.float32: tl.float32,
        torch.float64: tl.float64,
        torch.bfloat16: tl.bfloat16,
        torch.float16: tl.float16,
    }
    number = tl.float64 if p == torch.float64 else tl.float32
    access = 4 if p == torch.float32 or rounding == "remainder" else 8
    flags = layout, adaptive, buffer, ROUNDINGS.index(rounding), shared, access, _LOG_TILE, 1 << _LOG_TILE
    return Spec(types[p], types[g], types[state], number, *map(tl.constexpr, flags))


def in_float64(spec: Any) -> Any:
    """The same tensors, with the math in float64."""
    import triton.language as tl

    return spec._replace(number=tl.float64)


def compile_options(kernel: Any, spec: Any, target: str) -> dict[str, int]:
    """How a kernel of plans.py is compiled, besides what the spec says; for ``"cuda"`` or ``"hip"``.

    A launch refuses options that the target does not know.
    """
    from fused_adamp.kernels.precision import REMAINDER, STOCHASTIC
    from fused_adamp.kernels.tiles import FLAT, STRIDED

    # The kernels name their fused operations. A compiler that fuses others may round each copy of a formula in its way.
    options = {"num_warps": _WARPS, "enable_fp_fusion": False}
    if target != "cuda":  # LLVM counts on two programs by itself
        return options
    # Registers. Left to itself, ptxas tries for one program more on a multiprocessor, and spills.
    name, layout, shared, rounding = kernel.__name__, spec.layout.value, spec.shared.value, spec.rounding.value
    flat = layout == FLAT.value
    crowded = layout == STRIDED.value or spec.number.primitive_bitwidth == 64
    crowded |= name == "update_kernel" and flat and (shared or rounding == STOCHASTIC.value)
    crowded |= name == "one_pass_kernel" and (flat or shared or rounding == STOCHASTIC.value)
    measure = 96 if flat and rounding == REMAINDER.value else 80
    options["maxnreg"] = 255 if crowded else measure if name == "measure_kernel" else 128
    return options


class _AnyAddress:
    """Stands in for a tensor where a kernel is compiled, and says nothing about where it lies or how large it is.

    Triton would take it for granted, in every later launch, that an address is a multiple of 16 if this tensor's is.
    The kernels gain nothing from that: the tiles' addresses come from a table, and the layout says how they lie.
    """

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype

    def data_ptr(self) -> int:
        return 1


def compile_kernel(kernel: Any, arguments: Sequence[Any], spec: Any) -> Any:
    """A kernel for the GPU that Triton's driver names, not loaded; for all arguments of the types of these."""
    from triton.runtime import driver

    stand_ins = [_AnyAddress(a.dtype) if isinstance(a, Tensor) else a for a in arguments]
    options = compile_options(kernel, spec, driver.active.get_current_target().backend)
    return kernel.warmup(*stand_ins, S=spec, grid=(1,), **options)


# From launches to kernels.


class _Run(NamedTuple):
    kernel: Any
    grid: int
    arguments: tuple[Any, ...]

    def start(self) -> None:
        self.kernel[(self.grid, 1, 1)](*self.arguments)


_compiled: dict[Any, Any] = {}


def _square_runs(batch: Batch, tables: Tables, launch: Launch) -> list[_Run]:
    from fused_adamp.kernels import plans

    jobs = _jobs_ahead(batch, tables, launch)
    run = _run(plans.measure_kernel, len(jobs), _arguments(batch, tables, launch, jobs), launch.spec)
    return [run, *_redo_runs(plans.redo_ahead_kernel, batch, tables, launch)]


def _share_runs(batch: Batch, tables: Tables, launch: Launch) -> list[_Run]:
    from fused_adamp.kernels import plans

    prepare = [launch.jobs[0][: launch.blocks]] if launch.spec.adaptive.value else []
    runs = [
        _run(plans.share_kernel, len(jobs), _arguments(batch, tables, launch, jobs), launch.spec)
        for jobs in (*prepare, _jobs_ahead(batch, tables, launch))
    ]
    return runs + _redo_runs(plans.redo_ahead_kernel, batch, tables, launch)


def _step_runs(batch: Batch, tables: Tables, launch: Launch) -> list[_Run]:
    from fused_adamp.kernels import plans

    redo = _redo_runs(plans.redo_kernel, batch, tables, launch)
    if launch.plan == "one_pass":
        (jobs,) = launch.jobs
        arguments = (*_arguments(batch, tables, launch, jobs), len(jobs), launch.blocks)
        programs = min(len(jobs), _programs(tables.device))
        return [_run(plans.one_pass_kernel, programs, arguments, launch.spec), *redo]
    kernels = plans.measure_kernel, plans.dot_kernel, plans.update_kernel
    runs = [
        _run(kernel, len(jobs), _arguments(batch, tables, launch, jobs), launch.spec)
        for kernel, jobs in zip(kernels, launch.jobs, strict=True)
        if len(jobs)
    ]
    return runs + redo


def _redo_runs(kernel: Any, batch: Batch, tables: Tables, launch: Launch) -> list[_Run]:
    """The launch that repeats in float64 what has left float32's range; none if the math is in float64 already."""
    spec = in_float64(launch.spec)
    if spec == launch.spec:
        return []
    arguments = _arguments(batch, tables, launch, launch.active)  # of jobs there are none
    return [_run(kernel, len(launch.active), arguments, spec)]


def _arguments(batch: Batch, tables: Tables, launch: Launch, jobs: Tensor) -> tuple[Any, ...]:
    """The arguments that all kernels take."""
    bucket, work = batch.bucket, batch.bucket.scratch
    return (
        tables.table,
        tables.addresses,
        tables.strides,
        work.owners,
        tables.scalars,
        work.one if batch.scale is None else batch.scale,
        work.zero if batch.found_inf is None else batch.found_inf.double(),
        work.coefficients,
        work.sums,
        work.findings,
        work.counters,
        bucket.decisions,
        bucket.results,
        work.parts,
        launch.tickets,
        work.replays,
        launch.active,
        jobs,
        work.epoch,
        len(launch.active),
    )


def _run(kernel: Any, grid: int, arguments: tuple[Any, ...], spec: Any) -> _Run:
    if interpreted():
        return _Run(kernel, grid, (*arguments, spec))
    key = (kernel, spec, torch.cuda.current_device())
    if key not in _compiled:
        compiled = compile_kernel(kernel, arguments, spec)
        compiled._init_handles()  # loads it on the device: what does not fit there fails here
        _compiled[key] = compiled
    return _Run(_compiled[key], grid, (*arguments, spec))


@cache
def _programs(device: torch.device) -> int:
    if device.type != "cuda":
        return 2
    return _PROGRAMS_PER_MULTIPROCESSOR * torch.cuda.get_device_properties(device).multi_processor_count
