"""``python -m fused_adamp verify``: is it right here? The cases are those of :mod:`fused_adamp.verify`."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from itertools import zip_longest
from statistics import fmean
from time import monotonic
from typing import TYPE_CHECKING, NamedTuple

from fused_adamp.backends import available
from fused_adamp.commands import Progress, devices, in_words
from fused_adamp.verify import cases, check

if TYPE_CHECKING:
    import torch

    from fused_adamp.batch import Backend
    from fused_adamp.verify import Case, Outcome

__all__ = ["verify"]

_QUICK = 20.0
"""Seconds of all cases together, unless all of them are asked for. Python and torch take a few more to start."""
_SAMPLE = 16
"""Cases of each backend from which the time of all is estimated."""
_SHOWN = 10
"""Failures that are printed in full."""


class Worst(NamedTuple):
    """The largest error over what is allowed, and where it was found."""

    ratio: float
    error: float
    allowed: float
    tensor: str
    case: Case


@dataclass
class Subject:
    """One backend on one device, its cases in the order in which they are checked, and what they have shown so far."""

    device: torch.device
    backend: Backend
    order: list[Case]
    seconds: list[float] = field(default_factory=list)
    counts: dict[torch.dtype, int] = field(default_factory=dict)
    worst: dict[torch.dtype, Worst] = field(default_factory=dict)
    failures: list[str] = field(default_factory=list)

    @property
    def left(self) -> float:
        """Seconds that the other cases will take. The first case is not like them: it loads and compiles."""
        of = self.seconds[1:] or self.seconds or [0.0]
        return fmean(of) * (len(self.order) - len(self.seconds))

    def advance(self) -> None:
        """Checks the next case."""
        case, start = self.order[len(self.seconds)], monotonic()
        try:
            outcome = check(case, self.backend.name, self.device)
        except Exception as error:  # a backend may raise anything; the other cases are checked all the same
            self.failures.append(f"FAILED {self.device} {self.backend.name} {case}: {type(error).__name__}: {error}")
        else:
            self._note(case, outcome)
        self.seconds.append(monotonic() - start)
        self.counts[case.dtype] = self.counts.get(case.dtype, 0) + 1

    def _note(self, case: Case, outcome: Outcome) -> None:
        for tensor, error in outcome.error.items():
            allowed = outcome.allowed[tensor]
            ratio = math.inf if math.isnan(error) else error / allowed
            if case.dtype not in self.worst or ratio > self.worst[case.dtype].ratio:
                self.worst[case.dtype] = Worst(ratio, error, allowed, tensor, case)
        if not outcome.passed():
            wrong = [
                f"{tensor} is off by {error:.2f}, allowed {outcome.allowed[tensor]:.2f}"
                for tensor, error in outcome.error.items()
                if not error <= outcome.allowed[tensor]
            ]
            wrong += [
                f"step {step} decided {ours.name.lower()}, the reference {theirs.name.lower()}"
                for step, (ours, theirs) in enumerate(outcome.decisions, 1)
                if ours != theirs
            ]
            self.failures.append(f"FAILED {self.device} {self.backend.name} {case}: {'; '.join(wrong)}")


def verify(*, full: bool = False) -> int:
    """Checks every available backend against the reference, and prints the worst errors. 1 if any case fails, else 0.

    Without ``full``, each backend gets an equal share of under half a minute, for cases from all over the table.
    However slow the machine is, each backend checks a case of every dtype.
    """
    start, progress = monotonic(), Progress()
    subjects = [
        Subject(device, backend, spread(cases(backend.geometry(2, 1 << 30)[1]) if backend.fused else cases()))
        for device in devices()
        for backend in available(device)
    ]
    total = sum(len(subject.order) for subject in subjects)
    for subject in subjects if full else ():
        for _ in subject.order[:_SAMPLE]:
            progress.show(f"{subject.device} {subject.backend.name}: a sample of {_SAMPLE} cases")
            subject.advance()
    if full:
        progress.clear()
        print(f"{total} cases take about {in_words(sum(subject.left for subject in subjects))}", flush=True)
    for index, subject in enumerate(subjects):
        share = math.inf if full else (_QUICK - (monotonic() - start)) / (len(subjects) - index)
        end = monotonic() + share
        least = len({case.dtype for case in subject.order})  # the first cases have one dtype each
        while len(subject.seconds) < len(subject.order) and (len(subject.seconds) < least or monotonic() < end):
            left = sum(of.left for of in subjects[index:]) if full else max(0.0, _QUICK - (monotonic() - start))
            done = f"{len(subject.seconds)} of {len(subject.order)} cases, {len(subject.failures)} failures"
            progress.show(f"{subject.device} {subject.backend.name}: {done}, {in_words(left)} left")
            subject.advance()
    progress.clear()
    failures = [failure for subject in subjects for failure in subject.failures]
    print("\n".join(["", *_table(subjects), "", *failures[:_SHOWN]]))
    if len(failures) > _SHOWN:
        print(f"and {len(failures) - _SHOWN} more")
    checked = sum(len(subject.seconds) for subject in subjects)
    verdict = f"FAILED: {len(failures)} failures" if failures else "passed: 0 failures"
    more = f"; --full checks all of them in about {in_words(sum(of.left + sum(of.seconds) for of in subjects))}"
    print(f"{verdict} in {checked} of {total} cases, {in_words(monotonic() - start)}{more * (checked < total)}")
    return int(bool(failures))


def spread(table: list[Case]) -> list[Case]:
    """The cases in an order of which every beginning has all dtypes alike, each spread evenly over the table."""
    digits = len(table).bit_length()
    order = sorted(range(len(table)), key=lambda i: f"{i:0{digits}b}"[::-1])
    by_dtype: dict[torch.dtype, list[Case]] = {}
    for i in order:
        by_dtype.setdefault(table[i].dtype, []).append(table[i])
    return [case for turn in zip_longest(*by_dtype.values()) for case in turn if case is not None]


def _table(subjects: list[Subject]) -> list[str]:
    """One line for each backend and dtype of weights."""
    lines = [
        "worst error in units of the last place of the stored dtype",
        f"{'device':<8} {'backend':<10} {'weights':<9} {'cases':>5} {'worst':>7} {'allowed':>7}  {'of':<15} in case",
    ]
    for subject in subjects:
        for dtype, worst in subject.worst.items():
            name = str(dtype).removeprefix("torch.")
            lines.append(
                f"{subject.device!s:<8} {subject.backend.name:<10} {name:<9} {subject.counts[dtype]:>5} "
                f"{worst.error:7.2f} {worst.allowed:7.2f}  {worst.tensor:<15} {worst.case}"
            )
    return lines
