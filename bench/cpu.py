"""Times one optimizer step on the CPU, contestant and peer in turns. bench/report.py makes the tables.

pytest-benchmark keeps the runs and knows the machine; the clock and the rounds are the harness's.
"""

from __future__ import annotations

import gc
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

import pytest
import torch
from torch import Tensor

from bench.contestants import CONTESTANTS
from bench.harness import Contestant, Side, against_peer, copy_gbps, in_turns, measured, seconds, unavoidable
from bench.workloads import expected_decision, tensors
from fused_adamp.reference import Decision, decide

if TYPE_CHECKING:
    from collections.abc import Iterator

    from pytest_benchmark.fixture import BenchmarkFixture

SECONDS = 4.0
"""Of timed rounds per test, as far as the two limits allow. Both sides count."""
ROUNDS = (5, 40)
"""Fewest for the slow contestants; most for the small models."""


class Run(NamedTuple):
    workload: str
    case: Decision
    clip: bool
    contestant: str

    def __str__(self) -> str:
        clip = "clip" if self.clip else "noclip"
        return f"{self.workload}-{self.case.name.lower()}-{clip}-{self.contestant}"


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Every contestant in the cases it asks for; those that share inputs follow each other."""
    if "run" in metafunc.fixturenames:
        runs = [
            Run(workload, case, clip, name)
            for workload in metafunc.config.option.workload
            for case in Decision
            for clip in (False, True)
            for name, contestant in CONTESTANTS.items()
            if case in contestant.cases and clip in contestant.clips
        ]
        metafunc.parametrize("run", runs, ids=str)


@pytest.fixture(autouse=True)
def _collected() -> Iterator[None]:
    """No garbage collection while a clock runs, on either side of a pair, and no tensors of the test before."""
    gc.collect()
    gc.freeze()  # what is alive now is not this test's; passing over it saves a second per test
    gc.disable()
    yield
    gc.enable()


def test_step(run: Run, benchmark: BenchmarkFixture, pytestconfig: pytest.Config) -> None:
    contestant = CONTESTANTS[run.contestant]
    family, dtypes = contestant.family, contestant.dtypes
    peer = side_of(CONTESTANTS[family.peer], run)
    peer.step(run.clip)
    side = side_of(contestant, run)
    before = _live_bytes()
    side.step(run.clip)
    held = _live_bytes() - before
    state = dtypes.moment_bytes(family.moments) + dtypes.remainder

    # The steps above made the state. The next round warms up and says how many more there is time for.
    clocks = [partial(seconds, partial(each.step, run.clip)) for each in (peer, side)]
    pair = sum(clock() for clock in clocks)
    rounds = pytestconfig.option.rounds or int(min(max(SECONDS / pair, ROUNDS[0]), ROUNDS[1]))
    times = benchmark.pedantic(in_turns, args=(clocks, rounds))
    peer_ms, ms = ([1e3 * s for s in each] for each in times)
    row = measured(side, run.clip, ms, unavoidable(contestant, run.clip)) | against_peer(family, ms, peer_ms)
    benchmark.extra_info.update(
        workload=run.workload,
        dtype=str(dtypes.weights).removeprefix("torch."),
        case=run.case.name.lower(),
        **row,
        ratio_of_medians=row["ms_p50"] / row["peer_ms_p50"],
        # Between steps: tensors that Python can reach, less the state.
        extra_memory=(held / row["params"] - state) / dtypes.weights.itemsize,
    )
    # Whatever the steps did to the weights, the timed rounds were of this case.
    for p in side.params:
        assert p.grad is not None
        assert decide(p.grad.float(), p.detach().float(), delta=0.1, eps=1e-8) is expected_decision(p, run.case)


def test_copy(benchmark: BenchmarkFixture) -> None:
    benchmark.extra_info["copy_gbps"] = benchmark.pedantic(copy_gbps, args=(seconds,))


def side_of(contestant: Contestant, run: Run) -> Side:
    """With clones of the workload's weights and gradients."""
    weights, grads = tensors(run.workload, run.case)
    params = [w.to(contestant.dtypes.weights, copy=True).requires_grad_() for w in weights]
    for p, g in zip(params, grads, strict=True):
        p.grad = g.to(p.dtype, copy=True)
    return Side(contestant, params)


def _live_bytes() -> int:
    """Bytes of memory of the tensors that Python has made in this test and still holds, each counted once."""
    # type(), because isinstance() would wake the lazy modules that pose as other classes.
    tensors = [x for x in gc.get_objects() if issubclass(type(x), Tensor) and x.layout is torch.strided]
    storages = [t.untyped_storage() for t in tensors]
    total, end = 0, 0
    for begin, size in sorted((s.data_ptr(), s.nbytes()) for s in storages):  # some are parts of others
        total += max(0, begin + size - max(begin, end))
        end = max(end, begin + size)
    return total
