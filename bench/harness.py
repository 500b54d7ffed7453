"""What all three benchmarks do: sides that step in turns, percentiles, bytes per parameter, and what ran where.

Needs torch alone: bench/gpu.py runs on machines where nothing is installed.
"""

from __future__ import annotations

import datetime
import os
import statistics
import subprocess
import time
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from bench.workloads import expected_decision
from fused_adamp.reference import Decision

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import Tensor
    from torch.optim import Optimizer

ROOT = Path(__file__).parent.parent
Row = dict[str, Any]
"""One measurement, as the result files have it."""

LR = 1e-8
"""So small that no step of a run changes what the cosine test says of the inputs; the time does not depend on it."""
MAX_NORM = 1e30
"""Of gradient clipping: never reached, so that values stay as they are from round to round. The cost is that of
clipping all the same: torch multiplies every gradient in place by a coefficient that is clamped to 1."""


# Who steps.


class Dtypes(NamedTuple):
    """Weights and gradients of one dtype, state of another (None: the same one), and how bfloat16 is kept."""

    weights: torch.dtype = torch.float32
    state: torch.dtype | None = None
    rounding: str = "nearest"

    @property
    def options(self) -> dict[str, Any]:
        """Of our optimizers."""
        return {"state_dtype": self.state, "rounding": self.rounding}

    @property
    def remainder(self) -> int:
        """Bytes per parameter that the optimizer keeps of the weight."""
        return 2 if self.rounding == "remainder" else 0

    def moment_bytes(self, moments: int) -> int:
        """Bytes per parameter of so many moments."""
        return moments * (self.state or self.weights).itemsize

    def bytes_per_param(self, moments: int, *, split: bool = False, clip_passes: int = 0) -> int:
        """Bytes that a step reads and writes per parameter, caches aside.

        reads g, p and moments, writes p and moments: 28 for two float32 moments, 20 for one
        the remainder is part of p
        split: reads g and p once more, to measure before the update: 36 and 28
        clipping: torch's reads g, then reads and writes it, 3 passes: 12 more. Ours reads g, 1 pass: 4 more
        """
        g = self.weights.itemsize
        p = g + self.remainder
        return (1 + split + clip_passes) * g + (2 + split) * p + 2 * self.moment_bytes(moments)


class Family(NamedTuple):
    """Optimizers that keep as many moments and are measured against the same peer, named as in the results."""

    peer: str
    moments: int

    @property
    def ratio(self) -> str:
        """The key of a row's time over the peer's."""
        return f"ratio_to_{self.peer}"


ADAM = Family(peer="adamw_fused", moments=2)
SGD = Family(peer="sgd_fused", moments=1)


def torch_clip(optimizer: Optimizer, params: Sequence[Tensor]) -> None:
    torch.nn.utils.clip_grad_norm_(params, MAX_NORM)


def our_clip(optimizer: Any, params: Sequence[Tensor]) -> None:
    optimizer.clip_grad_norm_(MAX_NORM)


class Contestant(NamedTuple):
    """An optimizer under test.

    Attributes:
        optimizer, backend: as the results name them.
        family: what it is compared with.
        make: the optimizer, from its parameters.
        cases: the decisions it is timed with (see :func:`bench.workloads.tensors`).
        clips: whether to clip before the step; its peer then clips too.
        clip: how it clips.
        dtypes: of what it steps and keeps.
    """

    optimizer: str
    backend: str
    family: Family
    make: Callable[[list[Tensor]], Optimizer]
    cases: tuple[Decision, ...] = (Decision.NONE,)
    clips: tuple[bool, ...] = (False,)
    clip: Callable[[Optimizer, Sequence[Tensor]], None] = torch_clip
    dtypes: Dtypes = Dtypes()


def making(optimizer: Callable[..., Optimizer], **arguments: Any) -> Callable[[list[Tensor]], Optimizer]:
    """A contestant's ``make``, with the learning rate and the weight decay that all share."""
    return partial(optimizer, lr=LR, weight_decay=1e-2, **arguments)


class Side:
    """A contestant with parameters, gradients and state of its own, so that those compared share no cache line."""

    def __init__(self, contestant: Contestant, params: list[Tensor]) -> None:
        self.contestant = contestant
        self.params = params
        self.optimizer: Any = contestant.make(params)

    def __str__(self) -> str:
        return f"{self.contestant.optimizer} {self.contestant.backend}"

    def step(self, clip: bool) -> None:
        """What is timed."""
        if clip:
            self.contestant.clip(self.optimizer, self.params)
        self.optimizer.step()

    def check_decisions(self, case: Decision) -> None:
        """Of ours: whatever the steps did to the weights, the timed ones were of this case."""
        for p, decision in self.optimizer.decisions().items():
            assert decision is expected_decision(p, case), f"{self}: {decision!r} of a weight {tuple(p.shape)}"


# What is measured.


def seconds(step: Callable[[], object]) -> float:
    start = time.perf_counter()
    step()
    return time.perf_counter() - start


def in_turns(clocks: Sequence[Callable[[], float]], rounds: int) -> list[list[float]]:
    """What each clock says in every round.

    A round has one step of everybody, so that whatever else the machine does disturbs all of them, and leaves the
    ratios of the steps of one round.
    """
    times: list[list[float]] = [[] for _ in clocks]
    for _ in range(rounds):
        for clock, mine in zip(clocks, times, strict=True):
            mine.append(clock())
    return times


def ratios(times: Sequence[float], peer: Sequence[float]) -> list[float]:
    """Time over the peer's, round by round. Their median is the number that is quoted."""
    return [mine / theirs for mine, theirs in zip(times, peer, strict=True)]


def spread(name: str, values: Sequence[float]) -> Row:
    """The 20th, 50th and 80th percentile."""
    deciles = statistics.quantiles(values, n=10, method="inclusive") if len(values) > 1 else [*values] * 9
    return {f"{name}_p{10 * i}": deciles[i - 1] for i in (2, 5, 8)}


def measured(side: Side, clip: bool, ms: Sequence[float], bytes_per_param: int | None) -> Row:
    """What every benchmark writes of a side's rounds. GB/s are None where the bytes were not counted."""
    params = sum(p.numel() for p in side.params)
    return {
        "params": params,
        "optimizer": side.contestant.optimizer,
        "backend": side.contestant.backend,
        "clip": clip,
        "rounds": len(ms),
        **spread("ms", ms),
        "bytes_per_param": bytes_per_param,
        "gbps": bytes_per_param * params / statistics.median(ms) / 1e6 if bytes_per_param else None,
    }


def unavoidable(contestant: Contestant, clip: bool) -> int:
    """Bytes per parameter, every tensor read and written once, clipping as torch does it.

    What an optimizer moves beyond that makes its GB/s of this formula lower, and what it saves makes them higher.
    """
    return contestant.dtypes.bytes_per_param(contestant.family.moments, clip_passes=3 * clip)


def against_peer(family: Family, ms: Sequence[float], peer_ms: Sequence[float]) -> Row:
    return {"peer": family.peer, **spread("peer_ms", peer_ms), family.ratio: statistics.median(ratios(ms, peer_ms))}


def copy_gbps(
    clock: Callable[[Callable[[], object]], float], size: int = 1 << 28, device: torch.device | None = None
) -> float:
    """What the memory can do: GB/s read and written by a copy of so many bytes, which no cache should hold."""
    source = torch.ones(size // 4, device=device)
    target = torch.empty_like(source)
    ((_, *copies),) = in_turns([lambda: clock(lambda: target.copy_(source))], 11)  # the first finds its memory
    return 2 * source.nbytes / statistics.median(copies) / 1e9


# What ran where.


def provenance(commit: str | None = None) -> Row:
    """Torch, the day, and the commit: the given one, or what git says. Result files written before do not count."""
    status = _git("status", "--porcelain", "--untracked-files=no")
    return {
        "torch": torch.__version__,
        "commit": commit or _git("rev-parse", "--short=7", "HEAD") or "unknown",
        "uncommitted_changes": None if status is None else bool(status),
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
    }


def environment(cpu: Row) -> Row:
    """What a CPU's results depend on. ``cpu``: what pytest-benchmark says of it."""
    return {
        "device": cpu["brand_raw"],
        "cores": cpu["count"],
        "threads": torch.get_num_threads(),
        "isa": torch.backends.cpu.get_cpu_capability(),
        "huge_pages": _selected("/sys/kernel/mm/transparent_hugepage/enabled"),
        **provenance(),
    }


def _git(*arguments: str) -> str | None:
    """What git says of the checkout, None if there is none; of a repository around it, it says nothing."""
    ceiling = os.environ | {"GIT_CEILING_DIRECTORIES": str(ROOT.parent)}
    try:
        run = subprocess.run(["git", *arguments], cwd=ROOT, env=ceiling, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return run.stdout.strip()


def _selected(path: str) -> str | None:
    """The word in brackets of a kernel setting such as ``always [madvise] never``; None where there is no such file."""
    file = Path(path)
    return file.read_text().partition("[")[2].partition("]")[0] if file.exists() else None
