"""The order protocol of the one-pass kernel, visited state by state: protocol.py."""

from __future__ import annotations

from itertools import groupby

import pytest
import torch
from protocol import FAULTS, Job, Parameter, Protocol, jobs_of, search
from torch.nn import Parameter as Weight

from fused_adamp import AdamP
from fused_adamp.backends import jobs as order
from fused_adamp.backends import triton
from fused_adamp.backends.jobs import STAGES

WIDE = Parameter(tiles=2, matrix=True, tested=True, projected=True, wide=True)
CHANNEL = Parameter(tiles=2, matrix=True, tested=True, projected=True, wide=False)
NONE = Parameter(tiles=2, matrix=True, tested=True, projected=False, wide=True)
FORCED = Parameter(tiles=2, matrix=True, tested=False, projected=True, wide=True)
VECTOR = Parameter(tiles=2, matrix=False, tested=False, projected=False, wide=False)
SCALAR = Parameter(tiles=1, matrix=False, tested=False, projected=False, wide=False)

SMALL = {
    "a wide view": [WIDE],
    "rows within tiles": [CHANNEL],
    "nothing projected": [NONE],
    "a forced view": [FORCED],
    "a vector": [VECTOR],
}


@pytest.mark.parametrize("blocks", [1, 2, 3])
@pytest.mark.parametrize("parameters", SMALL.values(), ids=SMALL)
def test_every_interleaving_ends_and_orders_all_accesses(parameters: list[Parameter], blocks: int) -> None:
    outcome = search(parameters, blocks=blocks)
    assert not outcome.faults
    assert outcome.states > len(jobs_of(parameters))


@pytest.mark.parametrize("leftover", [0, 1, 2, 5])
def test_whatever_a_broken_off_step_left_in_the_counters(leftover: int) -> None:
    assert not search([WIDE], blocks=2, leftover=leftover).faults


def test_two_jobs_prepare() -> None:
    assert not search([WIDE], blocks=2, prepare=2).faults


def test_two_parameters() -> None:
    assert not search([WIDE, SCALAR], blocks=2).faults


@pytest.mark.exhaustive
@pytest.mark.parametrize(
    ("parameters", "blocks", "prepare", "window"),
    [([WIDE, SCALAR], 3, 1, 1), ([WIDE], 3, 2, 1), ([WIDE, WIDE], 2, 1, 1), ([WIDE, CHANNEL], 2, 1, 2)],
)
def test_larger_launches(parameters: list[Parameter], blocks: int, prepare: int, window: int) -> None:
    assert not search(parameters, blocks=blocks, prepare=prepare, window=window).faults


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: next(n for n in fault._fields if not getattr(fault, n)))
def test_each_order_wait_and_barrier_is_needed(fault: Protocol) -> None:
    """Without any one of the orders, waits and barriers, the search finds a fault: so none is superfluous."""
    assert search([WIDE], blocks=2, protocol=fault).faults


def test_jobs_in_another_order_wait_for_ever() -> None:
    jobs = jobs_of([WIDE])
    late = [job for job in jobs if job.stage != "measure"] + [job for job in jobs if job.stage == "measure"]
    assert search([WIDE], blocks=2, jobs=late).faults == {"deadlock: waits for concluded"}
    assert search([WIDE], blocks=2, jobs=jobs[1:] + jobs[:1]).faults == {"deadlock: waits for prepared"}


@pytest.mark.skipif(triton.load() is not None, reason=str(triton.load()))
def test_the_jobs_are_those_of_the_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(order.PLAN, "one_pass")
    monkeypatch.setattr(triton, "interpreted", lambda: True)
    monkeypatch.setattr(triton, "_not_interpretable", lambda: None)
    monkeypatch.setattr(order, "_WINDOW", 1)
    launched = []
    monkeypatch.setattr(triton._Run, "start", lambda run: launched.append(run))
    params = [Weight(torch.randn(4, order._RUN)), Weight(torch.randn(2 * order._RUN)), Weight(torch.randn(8))]
    for p in params:
        p.grad = torch.ones_like(p)
    AdamP(params, backend="triton").step()
    first, *_ = launched
    arguments = dict(zip(first.kernel.arg_names, first.arguments, strict=False))
    owners, jobs = arguments["owners"].tolist(), arguments["jobs"].tolist()
    theirs = [Job(STAGES[n], -1 if STAGES[n] == "prepare" else owners[tile], tile) for n, tile, _ in jobs]
    assert _in_short(theirs) == _in_short(jobs_of([WIDE._replace(tiles=4), VECTOR, SCALAR]))


def _in_short(jobs: list[Job]) -> list[tuple[str, int, bool]]:
    """Stages and parameters, with whether their tiles come backwards."""
    found = []
    for (stage, parameter), group in groupby(jobs, lambda job: (job.stage, job.parameter)):
        tiles = [job.tile for job in group]
        found.append((stage, parameter, tiles != sorted(tiles)))
    return found
