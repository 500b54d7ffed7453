"""The Triton backend: kernels/ over a bucket, one launch (one pass) or three (split).

What a kernel reads besides the tensors stays on the device between steps and is uploaded again only when it changed:
the addresses when a tensor moved, the hyperparameters when one has another value. Nothing here waits for the device.
"""

from __future__ import annotations

import math
import os
from functools import cache, lru_cache
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from fused_adamp.bucket import ABSENT, COLUMNS, first_stale, rows_cols

if TYPE_CHECKING:
    from collections.abc import Sequence

    from fused_adamp.bucket import Batch, Bucket

__all__ = ["PLAN", "TritonBackend"]

PLAN = "FUSED_ADAMP_PLAN"
"""Environment variable that forces a plan: ``one_pass`` or ``split``."""

_OLDEST = (3, 3)
_LOG_TILE = 11
"""A tile of 2048 elements, 8 in each of 256 threads: two programs fit on a multiprocessor (128 registers a thread)."""
_WIDEST_ROW = 1 << 15
"""Elements of a row up to which one program takes it whole, a tile at a time; its second look finds them in cache."""
_WARPS = 8
_WINDOW = 1 << 20
"""Elements, 8 MB of float32 weights and gradients, that the one-pass plan measures ahead of updating them."""
_DOT_TILES = 32
"""Tiles that one program takes in a stage that most often has nothing to do."""
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
    version = tuple(int(part) for part in triton.__version__.split(".")[:2])
    if version < _OLDEST:
        wanted = ".".join(map(str, _OLDEST))
        return f"Triton {triton.__version__} is too old; pip install 'triton>={wanted}'"
    return None


def interpreted() -> bool:
    """Whether Triton runs its kernels in Python, on the CPU."""
    return os.environ.get("TRITON_INTERPRET", "") not in ("", "0")


@cache
def _too_old(index: int | None) -> str | None:
    """Why this GPU cannot run the kernels, None if it can."""
    if torch.version.hip:
        return None
    capability = torch.cuda.get_device_capability(index)
    if capability < (8, 0):
        return f"its compute capability is {capability[0]}.{capability[1]}, Triton's kernels need 8.0 (A100) or later"
    return None


class Workspace:
    """What the launches of one bucket share, on its device."""

    def __init__(self, bucket: Bucket) -> None:
        from fused_adamp.kernels import plans, stages, tiles

        device, count = bucket.key.device, len(bucket.params)
        owners = torch.repeat_interleave(torch.arange(count, dtype=torch.int32), _tiles(bucket.table))
        self.device = device
        self.owners = owners.to(device)
        self.table = torch.empty_like(bucket.table, device=device)
        self.addresses = torch.zeros(count, tiles.ADDRESSES.value, dtype=torch.int64, device=device)
        self.strides = torch.zeros(count, tiles.STRIDES.value, dtype=torch.int64, device=device)
        self.coefficients = torch.zeros(count, stages.COEFFICIENTS.value, dtype=torch.float64, device=device)
        self.sums = torch.zeros(max(bucket.tiles, 1), stages.SUMS.value, dtype=torch.float64, device=device)
        self.projections = torch.zeros(count, dtype=torch.float64, device=device)
        self.counters = torch.zeros(count, stages.COUNTERS.value, dtype=torch.int64, device=device)
        self.tickets = torch.zeros(plans.TICKETS.value, dtype=torch.int64, device=device)
        self.scalars = torch.zeros(0, stages.SCALARS.value, dtype=torch.float64, device=device)
        self.seen_tensors: tuple[list[Any], ...] = ()
        self.seen_scalars: list[Any] = []
        self.seen_groups: list[int] = []
        self.seen_members: dict[Any, list[int]] = {}
        self.launches: list[Launch] = []
        self.epoch = 0

    def upload(self, target: Tensor, source: Tensor) -> None:
        """Copies in the order of the current stream, without waiting for it."""
        # The pinned copy returns to its pool only after the stream has read it.
        target.copy_(source.pin_memory() if self.device.type == "cuda" else source, non_blocking=True)

    def uploaded(self, source: Tensor) -> Tensor:
        """A copy on the device."""
        target = torch.empty_like(source, device=self.device)
        self.upload(target, source)
        return target


class Launch(NamedTuple):
    """The parameters of a bucket that one compiled kernel steps."""

    spec: Any
    plan: str
    active: Tensor
    jobs: tuple[Tensor, ...]
    """One pass: of the one kernel. Split: of measure, dot and update."""
    blocks: int
    """Jobs that prepare, the first of them all."""


class TritonBackend:
    name = "triton"
    fused = True

    def unavailable(self, device: torch.device) -> str | None:
        reason = load()
        if reason is None and device.type == "cpu" and not interpreted():
            reason = "it steps parameters on GPUs; on the CPU only with TRITON_INTERPRET=1, to test the kernels"
        elif reason is None and device.type == "cuda":
            reason = _too_old(device.index)
        elif reason is None and device.type != "cpu":
            reason = f"it knows CUDA and ROCm devices, not {device.type!r}"
        return reason

    def geometry(self, rows: int, cols: int) -> tuple[int, int]:
        """Rows and columns of a tile: what a block of registers holds, or a wide row, or a piece of a very wide one."""
        from fused_adamp.kernels.stages import NARROWEST, WIDTH_STEP

        tile = 1 << _LOG_TILE
        for log_width in range(NARROWEST.value, _LOG_TILE + WIDTH_STEP.value, WIDTH_STEP.value):
            if cols <= min(1 << log_width, tile):
                return min(rows, max(tile >> log_width, 1)), cols
        return 1, cols if rows > 1 and cols <= _WIDEST_ROW else tile

    def zeros(self, numel: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        return torch.zeros(numel, dtype=dtype, device=device)

    def steps_device(self, device: torch.device) -> torch.device:
        return device

    def scratch(self, bucket: Bucket) -> Workspace:
        return Workspace(bucket)

    def first_stale(self, batch: Batch) -> int:
        stale = first_stale(batch)
        if stale < 0:
            for i, step in enumerate(batch.steps):
                if step is not ABSENT and not (
                    step.dtype == torch.float32 and step.numel() == 1 and step.device == batch.bucket.key.device
                ):
                    return i
        return stale

    def step(self, batch: Batch) -> int:
        bucket, work = batch.bucket, batch.bucket.scratch
        seen = _fingerprint(batch)
        if seen != work.seen_tensors:
            stale = self.first_stale(batch)
            if stale >= 0:
                return stale
            _plan(batch)
            work.seen_tensors = seen
        if bucket.groups != work.seen_groups:
            work.upload(work.table, bucket.table)
            work.seen_groups = list(bucket.groups)
        scalars = [batch.rule.scalars(group) for group in batch.groups]
        if scalars != work.seen_scalars:
            if len(scalars) != len(work.scalars):
                work.scalars = work.scalars.new_zeros(len(scalars), work.scalars.size(1))
            work.upload(work.scalars, torch.tensor(scalars, dtype=torch.float64))
            work.seen_scalars = scalars
        with torch.cuda.device(bucket.key.device if bucket.key.device.type == "cuda" else -1):
            # Everything that can fail comes before the first launch.
            runs = [run for launch in work.launches for run in _runs(bucket, launch)]
            for run in runs:
                run.start()
        return -1


# From tensors to launches.


def _fingerprint(batch: Batch) -> tuple[list[Any], ...]:
    """Changes whenever an address, a stride, a shape or a dtype does."""
    tensors = [*batch.bucket.params, *batch.grads, *(t for moment in batch.moments for t in moment), *batch.steps]
    return (
        list(map(Tensor.data_ptr, tensors)),
        list(map(Tensor.stride, tensors)),
        list(map(Tensor.size, tensors)),
        [t.dtype for t in tensors],
    )


def _tiles(table: Tensor) -> Tensor:
    """The number of tiles of each parameter of a bucket's table."""
    rows, cols, tile_rows, tile_cols = (table[:, COLUMNS.index(n)] for n in ("rows", "cols", "tile_rows", "tile_cols"))
    return (rows + tile_rows - 1) // tile_rows * ((cols + tile_cols - 1) // tile_cols)


def _plan(batch: Batch) -> None:
    """Uploads addresses and strides, and lines up the launches: parameters by the kernel they need."""
    from fused_adamp.kernels import tiles

    bucket, work = batch.bucket, batch.bucket.scratch
    addresses = [[0] * work.addresses.size(1) for _ in bucket.params]
    strides = torch.zeros(work.strides.shape, dtype=torch.int64)
    members: dict[Any, list[int]] = {}
    for i, (p, g) in enumerate(zip(bucket.params, batch.grads, strict=True)):
        if g is ABSENT or p.numel() == 0:
            continue
        roles = [p, g, *(moment[i] for moment in batch.moments)]
        addresses[i][: len(roles)] = [tensor.data_ptr() for tensor in roles]
        if batch.steps:
            addresses[i][tiles.STEP.value] = batch.steps[i].data_ptr()
        sizes, inner = _collapse(roles)
        layout = _layout(roles, inner)
        if layout == tiles.STRIDED.value:
            if len(sizes) > _INNER or math.prod(sizes) >= 1 << 31:
                raise ValueError(
                    f"a parameter of shape {tuple(p.shape)} and strides {p.stride()}, with a gradient of strides "
                    f"{g.stride()}, lies in memory in a way that the kernels cannot follow: rows of fewer than 2^31 "
                    f"elements in at most {_INNER} dimensions after merging; pass p.contiguous()"
                )
            strides[i, 0] = sizes[-1]
            for role, (tensor, steps) in enumerate(zip(roles, inner, strict=True)):
                outer = tensor.stride(0) if tensor.ndim >= 2 else 0
                strides[i, 1 + 3 * role :][:3] = torch.tensor([outer, *([0] * (_INNER - len(steps))), *steps])
        state = roles[2].dtype if len(roles) > 2 else p.dtype
        members.setdefault((p.dtype, g.dtype, state, layout), []).append(i)
    work.upload(work.addresses, torch.tensor(addresses))
    if strides.any():
        work.upload(work.strides, strides)
    if members != work.seen_members:  # gradients may lie elsewhere in every step; what there is to do stays the same
        work.launches = [_launch(batch, spec, indices) for spec, indices in members.items()]
        work.seen_members = members


def _collapse(roles: Sequence[Tensor]) -> tuple[list[int], list[list[int]]]:
    """The sizes of the dimensions beyond dim 0, and each tensor's strides in them, merged where all tensors allow it.

    The order within a row means nothing to the algorithm as long as all tensors agree on it: the first tensor's strides
    sort the dimensions. A vector is one row.
    """
    p = roles[0]
    dims = sorted((d for d in range(min(p.ndim, 2) // 2, p.ndim) if p.size(d) != 1), key=lambda d: -p.stride()[d])
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
    if any(s != [1] or (rows > 1 and t.stride(0) != cols) for s, t in zip(inner, roles, strict=True)):
        return int(tiles.STRIDED.value)
    at_vectors = all(t.data_ptr() % tiles.WIDEST_LOAD.value == 0 for t in roles)
    aligned = at_vectors and (p.ndim < 2 or cols % tiles.VECTOR.value == 0)
    return int(tiles.ALIGNED.value if aligned else tiles.FLAT.value)


def _launch(batch: Batch, members: tuple[torch.dtype, torch.dtype, torch.dtype, int], indices: list[int]) -> Launch:
    from fused_adamp.kernels import plans, stages

    bucket, work = batch.bucket, batch.bucket.scratch
    p, g, state, layout = members
    spec = make_spec(p, g, state, layout, adaptive=batch.rule.adaptive, buffer=bool(batch.moments))
    elements = bucket.table[:, COLUMNS.index("rows")] * bucket.table[:, COLUMNS.index("cols")]
    projected = bucket.table[:, COLUMNS.index("projected")].bool()
    first = bucket.table[:, COLUMNS.index("first_tile")]
    width: int = stages.PREPARE_BLOCK.value
    blocks = (len(indices) + width - 1) // width
    order = _Order(
        (plans.MEASURE.value, plans.DOT.value, plans.UPDATE.value),
        _tiles(bucket.table).tolist(),
        first.tolist(),
        projected.tolist(),
    )
    plan = _forced_plan() or ("one_pass" if int(elements[indices].max()) <= 4 * _WINDOW else "split")
    prepare = torch.tensor([(plans.PREPARE.value, block, 1) for block in range(blocks)], dtype=torch.int32)
    if plan == "split":
        parts = [prepare, *map(order.measure, indices)], [*map(order.dot, indices)], [*map(order.update, indices)]
        jobs = tuple(work.uploaded(torch.cat(part)) for part in parts)
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
        jobs = (work.uploaded(torch.cat(pieces)),)
    return Launch(spec, plan, work.uploaded(torch.tensor(indices, dtype=torch.int32)), jobs, blocks)


def _forced_plan() -> str | None:
    plan = os.environ.get(PLAN)
    if plan not in (None, "", "one_pass", "split"):
        raise ValueError(f"{PLAN}={plan!r} is not a plan: choose 'one_pass' or 'split', or leave it unset")
    return plan


class _Order(NamedTuple):
    """The jobs of one parameter in one stage: rows of (stage, first tile, tiles)."""

    stages: tuple[int, int, int]
    """The numbers of measure, dot and update."""
    counts: list[int]
    first: list[int]
    projected: list[bool]

    def measure(self, i: int) -> Tensor:
        return self._jobs(self.stages[0], i, 1 if self.projected[i] else None)

    def dot(self, i: int) -> Tensor:
        return self._jobs(self.stages[1], i, _DOT_TILES if self.projected[i] and self.counts[i] > 1 else None)

    def update(self, i: int) -> Tensor:
        """Backwards: what was measured last is still in cache."""
        return self._jobs(self.stages[2], i, 1).flip(0)

    def _jobs(self, stage: int, i: int, width: int | None) -> Tensor:
        if width is None:
            return torch.empty(0, 3, dtype=torch.int32)
        begin, end = self.first[i], self.first[i] + self.counts[i]
        tile = torch.arange(begin, end, width, dtype=torch.int32)
        return torch.stack([torch.full_like(tile, stage), tile, (end - tile).clamp(max=width)], dim=1)


def make_spec(p: torch.dtype, g: torch.dtype, state: torch.dtype, layout: int, *, adaptive: bool, buffer: bool) -> Any:
    """What the kernels are compiled for: fused_adamp/kernels/tiles.py."""
    import triton.language as tl

    from fused_adamp.kernels.tiles import Spec

    types = {
        torch.float32: tl.float32,
        torch.float64: tl.float64,
        torch.bfloat16: tl.bfloat16,
        torch.float16: tl.float16,
    }
    number = tl.float64 if p == torch.float64 else tl.float32
    flags = map(tl.constexpr, (layout, adaptive, buffer, _LOG_TILE, 1 << _LOG_TILE))
    return Spec(types[p], types[g], types[state], number, *flags)


def compile_options(kernel: Any, spec: Any) -> dict[str, int]:
    """How a kernel of plans.py is compiled, besides what the spec says."""
    from fused_adamp.kernels.tiles import ALIGNED

    options = {"num_warps": _WARPS}
    # Registers. Left to itself, ptxas tries for one program more on a multiprocessor, and spills.
    if spec.number.primitive_bitwidth == 64:
        options["maxnreg"] = 255
    elif spec.layout.value == ALIGNED.value and kernel.__name__ == "update_kernel":
        options["maxnreg"] = 128
    return options


# From launches to kernels.


class _Run(NamedTuple):
    kernel: Any
    grid: int
    arguments: tuple[Any, ...]

    def start(self) -> None:
        self.kernel[(self.grid, 1, 1)](*self.arguments)


_compiled: dict[Any, Any] = {}


def _runs(bucket: Bucket, launch: Launch) -> list[_Run]:
    from fused_adamp.kernels import plans

    work = bucket.scratch
    work.epoch += 1
    tensors = (
        work.table,
        work.addresses,
        work.strides,
        work.owners,
        work.scalars,
        work.coefficients,
        work.sums,
        bucket.decisions,
        work.projections,
        work.counters,
        work.tickets,
        launch.active,
    )
    numbers = (work.epoch, len(launch.active))
    if launch.plan == "one_pass":
        (jobs,) = launch.jobs
        arguments = (*tensors, jobs, *numbers, len(jobs), launch.blocks)
        return [_run(plans.one_pass_kernel, min(len(jobs), _programs(work.device)), arguments, launch.spec)]
    kernels = plans.measure_kernel, plans.dot_kernel, plans.update_kernel
    return [
        _run(kernel, len(jobs), (*tensors, jobs, *numbers), launch.spec)
        for kernel, jobs in zip(kernels, launch.jobs, strict=True)
        if len(jobs)
    ]


def _run(kernel: Any, grid: int, arguments: tuple[Any, ...], spec: Any) -> _Run:
    if interpreted():
        return _Run(kernel, grid, (*arguments, spec))
    key = (kernel, spec, torch.cuda.current_device())
    if key not in _compiled:
        compiled = kernel.warmup(*arguments, S=spec, grid=(1,), **compile_options(kernel, spec))
        compiled._init_handles()  # loads it on the device: what does not fit there fails here
        _compiled[key] = compiled
    return _Run(_compiled[key], grid, (*arguments, spec))


@cache
def _programs(device: torch.device) -> int:
    if device.type != "cuda":
        return 2
    return _PROGRAMS_PER_MULTIPROCESSOR * torch.cuda.get_device_properties(device).multi_processor_count
