"""All of a GPU backend that is not code for a GPU: a step from start to end, the workspace, CUDA graphs.

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

from typing import TYPE_CHECKING, Any, ClassVar, Protocol

import torch
from torch import Tensor

from fused_adamp.backends.jobs import TICKETS, Order, blocks_of, one_pass, plan_for, split
from fused_adamp.backends.tables import (
    COEFFICIENTS,
    COUNTERS,
    FINDINGS,
    Kind,
    Launch,
    Tables,
    marks_by_role,
    parts_of,
    place,
    table_of,
    tiles_of,
)
from fused_adamp.batch import ABSENT, SHARES
from fused_adamp.bucket import first_stale
from fused_adamp.host import present

if TYPE_CHECKING:
    from collections.abc import Sequence

    from fused_adamp.batch import Batch, Members

__all__ = ["ARGUMENTS", "DeviceBackend", "Run", "Workspace"]


class Workspace:
    """Memory on the device that all launches of one bucket use."""

    def __init__(self, bucket: Members) -> None:
        device, count = bucket.key.device, len(bucket.params)
        _refuse_capture(device)
        owners = torch.repeat_interleave(torch.arange(count, dtype=torch.int32, device="cpu"), tiles_of(bucket.table))
        self.owners = owners.to(device)
        self.coefficients = torch.zeros(count, len(COEFFICIENTS), dtype=torch.float64, device=device)
        self.sums = torch.zeros(max(bucket.tiles, 1), len(SHARES), dtype=torch.float64, device=device)
        self.findings = torch.zeros(count, len(FINDINGS), dtype=torch.float64, device=device)
        self.counters = torch.zeros(count, len(COUNTERS), dtype=torch.int64, device=device)
        self.one = torch.ones(1, dtype=torch.float64, device=device)
        self.zero = torch.zeros(1, dtype=torch.float64, device=device)
        self.parts = parts_of(bucket).to(device)
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
        if not self.counts_on_device and any(group["capturable"] for group in batch.groups):
            self.counts_on_device = any(group["capturable"] for group in _stepped_groups(batch))
        if self.counts_on_device:
            self.replays.add_(1)
        else:
            self.epoch += 1


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
    measures_alone: ClassVar[bool] = False
    """Whether update measures a parameter of one tile by itself."""

    # A subclass supplies these.

    def spec(self, batch: Batch, p: torch.dtype, g: torch.dtype, state: torch.dtype | None, layout: str) -> Any:
        """The properties that a kernel is compiled for: dtypes of weight, gradient and state, and one of LAYOUTS.

        ``state`` is None before the first step, where only the norm of the gradients is computed.
        """
        raise NotImplementedError

    def run(self, kernel: str, programs: int, arguments: tuple[Any, ...], spec: Any) -> Run:
        """A kernel by its name in kernels/plans.py, compiled and loaded; ``programs``: how many are launched."""
        raise NotImplementedError

    def resident(self, device: torch.device) -> int:
        """How many programs the device runs at once: so many are launched of a kernel that draws its jobs."""
        raise NotImplementedError

    def redo(self, kernel: str, batch: Batch, tables: Tables, launch: Launch) -> Sequence[Run]:
        """The kernel that redoes what has left the range of its numbers, if the backend needs one."""
        return ()

    def arguments(self, batch: Batch, tables: Tables, launch: Launch, jobs: Tensor) -> tuple[Any, ...]:
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

    # The kernels of a launch's parameters, in order.

    def square_runs(self, batch: Batch, tables: Tables, launch: Launch) -> list[Run]:
        """They write g.g of each tile, for the norm of the gradients."""
        jobs = self.jobs_ahead(batch, tables, launch)
        run = self.run("measure_kernel", len(jobs), self.arguments(batch, tables, launch, jobs), launch.spec)
        return [run, *self.redo("redo_ahead_kernel", batch, tables, launch)]

    def share_runs(self, batch: Batch, tables: Tables, launch: Launch) -> list[Run]:
        """They write this rank's shares."""
        prepare = [launch.jobs[0][: launch.blocks]] if batch.rule.adaptive else []
        runs = [
            self.run("share_kernel", len(jobs), self.arguments(batch, tables, launch, jobs), launch.spec)
            for jobs in (*prepare, self.jobs_ahead(batch, tables, launch))
        ]
        return [*runs, *self.redo("redo_ahead_kernel", batch, tables, launch)]

    def step_runs(self, batch: Batch, tables: Tables, launch: Launch) -> list[Run]:
        """They step."""
        redo = self.redo("redo_kernel", batch, tables, launch)
        if launch.plan == "one_pass":
            (jobs,) = launch.jobs
            given = (*self.arguments(batch, tables, launch, jobs), len(jobs), launch.blocks)
            programs = min(len(jobs), self.resident(tables.device))
            return [self.run("one_pass_kernel", programs, given, launch.spec), *redo]
        runs = [
            self.run(kernel, len(jobs), self.arguments(batch, tables, launch, jobs), launch.spec)
            for kernel, jobs in zip(("measure_kernel", "dot_kernel", "update_kernel"), launch.jobs, strict=True)
            if len(jobs)
        ]
        return [*runs, *redo]

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
            moved = batch.bucket.scratch.eager.moved(batch, state=batch.has_state)
            batch.notes["stale"] = first_stale(batch) if moved is None else -1
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
        bucket, moved = batch.bucket, tables.moved(batch, state=state)
        if moved:
            tables.move(moved)
        elif moved is None:
            stale = self.first_stale(batch)
            if stale >= 0:
                return stale
            members = place(batch, tables)
            if members != tables.seen_members:  # gradients may lie elsewhere in every step; the jobs stay the same
                tables.launches = [self._launch(batch, tables, kind, indices) for kind, indices in members.items()]
                tables.seen_members = members
            tables.seen = marks_by_role(batch, state=True)
        if tables.seen_groups is not bucket.groups:
            tables.upload(tables.table, table_of(bucket))
            tables.seen_groups = bucket.groups
        tables.set_scalars([batch.rule.scalars(group) for group in batch.groups])
        return -1

    def _launch(self, batch: Batch, tables: Tables, kind: Kind, indices: list[int]) -> Launch:
        plan = plan_for(batch.bucket, indices)
        jobs = (one_pass if plan == "one_pass" else split)(self._order(batch), indices)
        active = tables.uploaded(torch.tensor(indices, dtype=torch.int32, device="cpu"))
        tickets = torch.zeros(len(TICKETS), dtype=torch.int64, device=tables.device)
        uploaded = tuple(map(tables.uploaded, jobs))
        return Launch(self.spec(batch, *kind), plan, indices, active, tickets, uploaded, blocks_of(indices), [])

    def _order(self, batch: Batch) -> Order:
        return Order.of(batch.bucket, self.block, measures_alone=self.measures_alone)

    def jobs_ahead(self, batch: Batch, tables: Tables, launch: Launch) -> Tensor:
        """The jobs, ``(n, 3)`` int32 on the device, of the norm; for a bucket that ranks share, of its shares."""
        if not launch.ahead:
            order = self._order(batch)
            jobs = order.square if batch.bucket.shared is None else order.share
            launch.ahead.append(tables.uploaded(torch.cat([*map(jobs, launch.indices)])))
        return launch.ahead[0]


ARGUMENTS = (
    *("table", "addresses", "strides", "owners", "scalars", "scale", "found_inf", "coefficients", "sums", "findings"),
    *("counters", "decisions", "results", "parts", "tickets", "replays", "active", "jobs", "epoch", "n_active"),
    *("n_jobs", "n_blocks"),
)
"""The names of the kernels' arguments, which kernels/plans.py describes. The last two are those of one pass alone."""


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
    return [batch.groups[n] for n in sorted({*present(batch.bucket.groups, batch.grads)})]
