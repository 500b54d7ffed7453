"""Times one optimizer step, contestant and peer in turns. bench/report.py makes the tables."""

from __future__ import annotations

import gc
import statistics
import time
from typing import TYPE_CHECKING, NamedTuple

import pytest
import torch
from torch import Tensor

from bench.contestants import CONTESTANTS, Side
from bench.workloads import WORKLOADS, expected_decision, tensors
from fused_adamp.reference import Decision, decide

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

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
    contestant, workload = CONTESTANTS[run.contestant], WORKLOADS[run.workload]
    family = contestant.family
    weights, grads = tensors(run.workload, run.case)
    peer = Side(CONTESTANTS[family.peer], weights, grads, run.clip)
    peer.step()
    side = Side(contestant, weights, grads, run.clip)
    before = _live_bytes()
    side.step()
    held = _live_bytes() - before
    elements = sum(w.numel() for w in weights)

    # The steps above made the state. The next pair warms up and says how many more there is time for.
    pair = _seconds(peer.step) + _seconds(side.step)
    rounds = pytestconfig.option.rounds or int(min(max(SECONDS / pair, ROUNDS[0]), ROUNDS[1]))
    peer_seconds: list[float] = []
    # The peer steps in the setup of every round, so that the two alternate and share whatever else the machine does.
    benchmark.pedantic(side.step, setup=lambda: peer_seconds.append(_seconds(peer.step)), rounds=rounds)
    seconds = benchmark.stats.stats.data

    bytes_per_param = family.bytes_per_param(run.clip)
    p20, p50, p80 = _milliseconds(seconds)
    peer_p20, peer_p50, peer_p80 = _milliseconds(peer_seconds)
    benchmark.extra_info.update(
        {
            "workload": run.workload,
            "params": workload.params,
            "dtype": str(contestant.dtype).removeprefix("torch."),
            "optimizer": contestant.optimizer,
            "backend": contestant.backend,
            "case": run.case.name.lower(),
            "clip": run.clip,
            "rounds": rounds,
            "ms_p20": p20,
            "ms_p50": p50,
            "ms_p80": p80,
            "bytes_per_param": bytes_per_param,
            "gbps": bytes_per_param * workload.params / p50 / 1e6,
            "peer": family.peer,
            "peer_ms_p20": peer_p20,
            "peer_ms_p50": peer_p50,
            "peer_ms_p80": peer_p80,
            # The number that is quoted: what disturbs a round disturbs both of its steps, and leaves their ratio.
            f"ratio_to_{family.peer}": statistics.median(map(float.__truediv__, seconds, peer_seconds)),
            "ratio_of_medians": p50 / peer_p50,
            # Between steps: tensors that Python can reach, less the state.
            "extra_memory": (held / elements - family.state) / family.weight,
        }
    )
    # Whatever the steps did to the weights, the timed rounds were of this case.
    for p in side.params:
        assert p.grad is not None
        assert decide(p.grad.float(), p.detach().float(), delta=0.1, eps=1e-8) is expected_decision(p, run.case)


def test_copy(benchmark: BenchmarkFixture) -> None:
    """What the memory can do: bytes read and written per second by a copy that no cache holds."""
    source = torch.ones(1 << 26)  # 256 MiB
    target = torch.empty_like(source)
    benchmark.pedantic(target.copy_, args=(source,), rounds=5, warmup_rounds=1)
    benchmark.extra_info["copy_gbps"] = 2 * source.nbytes / statistics.median(benchmark.stats.stats.data) / 1e9


def _seconds(step: Callable[[], object]) -> float:
    start = time.perf_counter()  # pytest-benchmark's clock
    step()
    return time.perf_counter() - start


def _milliseconds(seconds: list[float]) -> tuple[float, float, float]:
    """The 20th, 50th and 80th percentile."""
    deciles = statistics.quantiles(seconds, n=10, method="inclusive")
    return 1e3 * deciles[1], 1e3 * deciles[4], 1e3 * deciles[7]


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
