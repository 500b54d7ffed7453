"""What the host spends on one step of a GPU backend, part by part: ``python -m bench.host``.

Needs no GPU. Tensors are on the CPU and launches are stubs, so what is left is the host's work. The peer is torch's
AdamW(fused=True), whose operator is a stub too. Times of a busy machine say little: take the least.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import platform
import statistics
import time
from collections import defaultdict
from contextlib import ExitStack, contextmanager
from functools import partial, wraps
from typing import TYPE_CHECKING, Any
from unittest import mock

import torch
from torch.nn import Parameter

from bench.harness import LR, MAX_NORM, in_turns, seconds
from fused_adamp import AdamP, clipping, gather, host
from fused_adamp.backends import triton
from fused_adamp.backends.device import DeviceBackend
from fused_adamp.backends.tables import Tables
from fused_adamp.sharded import agreement

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

SHAPE = (64, 64)
COUNTS = (200, 300, 2000)
IN_A_ROW = 4

PARTS: list[tuple[str, Any, str]] = [
    ("tensors looked up", agreement, "gather"),
    ("clipping", clipping, "scaled"),
    ("tables compared", Tables, "moved"),
    ("addresses uploaded", Tables, "move"),
    ("shared memory", gather, "rounds_of"),
    ("tables, the rest", DeviceBackend, "_refresh"),
    ("hyperparameters", Tables, "set_scalars"),
    ("launches prepared", triton.TritonBackend, "step_runs"),
    ("step, the rest", DeviceBackend, "step"),
    ("versions counted", torch.autograd.graph, "increment_version"),
    ("front end, the rest", AdamP, "_step"),
]
"""Each part: its name, and the function whose time it is, less that of the parts that it calls."""
REST = "torch.optim's hooks"


class Stub:
    """A launch that does nothing."""

    def start(self) -> None:
        pass


STUB = Stub()


def _stub(*_: Any, **__: Any) -> Stub:
    return STUB


def _yes() -> bool:
    return True


def _nothing(*_: Any, **__: Any) -> None:
    pass


@contextmanager
def stubbed() -> Iterator[None]:
    """Lets the Triton backend take tensors on the CPU, and replaces all launches and torch's operator by stubs."""
    with (
        mock.patch.object(triton, "interpreted", _yes),
        mock.patch.object(triton, "_not_interpretable", _nothing),
        mock.patch.object(triton, "_run", _stub),
        mock.patch.object(torch, "_fused_adamw_", _nothing),
    ):
        yield


class Stopwatch:
    """The time that each part takes, without the time of the parts that it calls."""

    def __init__(self) -> None:
        self.spent: defaultdict[str, float] = defaultdict(float)
        self._inner = [0.0]

    def timed(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(function)
        def timed(*args: Any, **kwargs: Any) -> Any:
            self._inner.append(0.0)
            start = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                whole = time.perf_counter() - start
                self.spent[name] += whole - self._inner.pop()
                self._inner[-1] += whole

        return timed

    @contextmanager
    def watching(self) -> Iterator[None]:
        with ExitStack() as stack:
            for name, owner, attribute in PARTS:
                stack.enter_context(mock.patch.object(owner, attribute, self.timed(name, getattr(owner, attribute))))
            yield


class Side:
    """An optimizer, and two sets of gradients to take turns with."""

    def __init__(self, make: Callable[..., Any], count: int) -> None:
        self.params = [Parameter(torch.randn(SHAPE)) for _ in range(count)]
        self.gradients = [[torch.randn(SHAPE) for _ in self.params] for _ in range(2)]
        self.optimizer = make(self.params, lr=LR, weight_decay=1e-2)
        self.move()
        self.optimizer.step()

    def move(self) -> None:
        """Replaces all gradients, as backward does after zero_grad()."""
        self.gradients.reverse()
        for p, g in zip(self.params, self.gradients[0], strict=True):
            p.grad = g

    def clipped_step(self) -> None:
        self.optimizer.clip_grad_norm_(MAX_NORM)
        self.optimizer.step()

    def clock(self, run: Callable[[], Any], *, moves: bool) -> float:
        if moves:
            self.move()
        return seconds(run)

    def least(self, run: Callable[[], Any], *, moves: bool) -> float:
        """The least time of a few runs in a row: the first finds in cache what another side has left there."""
        return min(self.clock(run, moves=moves) for _ in range(IN_A_ROW))


def keep_data_apart() -> None:
    """Lets glibc allocate tensors' data outside of the heap, so that the host's objects lie together as beside a GPU.

    Otherwise 16 KB of data lie between one tensor's object and the next, and caches hold few of them.
    """
    if hasattr(ctypes.CDLL(None), "mallopt"):
        threshold = -3  # malloc.h, M_MMAP_THRESHOLD
        ctypes.CDLL(None).mallopt(threshold, torch.Size(SHAPE).numel())


def microseconds(times: list[float]) -> tuple[float, float]:
    """The least and the median."""
    return 1e6 * min(times), 1e6 * statistics.median(times)


def totals(count: int, rounds: int) -> None:
    """Prints the time of a whole step, ours with and without csrc/host.cpp, and torch's."""
    ours = Side(partial(AdamP, backend="triton"), count)
    peer = Side(partial(torch.optim.AdamW, fused=True), count)
    with mock.patch.object(host, "compiled", _nothing):
        plain = Side(partial(AdamP, backend="triton"), count)
    for label, moves in (("nothing changed", False), ("gradients moved", True)):

        def without(moves: bool = moves) -> float:
            with mock.patch.object(host, "compiled", _nothing):
                return plain.least(plain.optimizer.step, moves=moves)

        clocks = [partial(side.least, side.optimizer.step, moves=moves) for side in (ours, peer)]
        mine, theirs, python = in_turns([*clocks, without], rounds)
        row = " ".join(f"{least:8.0f} {median:8.0f}" for least, median in map(microseconds, (mine, python, theirs)))
        print(f"{count:5} {label:20} {row}")
    ((*clipped,),) = in_turns([partial(ours.least, ours.clipped_step, moves=True)], rounds)
    print(f"{count:5} {'clip, moved':20} {microseconds(clipped)[0]:8.0f} {microseconds(clipped)[1]:8.0f}")


def parts(count: int, rounds: int, *, moves: bool) -> None:
    """Prints what the parts of a step cost."""
    side, found = Side(partial(AdamP, backend="triton"), count), defaultdict(list)
    for _ in range(rounds):
        watch = Stopwatch()
        with watch.watching():
            whole = side.clock(side.optimizer.step, moves=moves)
        for name, *_ in PARTS:
            found[name].append(watch.spent[name])
        found[REST].append(whole - sum(watch.spent.values()))
    for name, times in found.items():
        least, median = microseconds(times)
        print(f"{count:5} {name:36} {least:8.1f} {median:8.1f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, nargs="*", default=COUNTS)
    parser.add_argument("--rounds", type=int, default=200)
    chosen = parser.parse_args()
    gc.disable()
    keep_data_apart()
    print(f"torch {torch.__version__}, Python {platform.python_version()}; us a step, least and median")
    with torch.no_grad(), stubbed():
        print(f"{'':26} {'compiled':>17} {'Python alone':>17} {'AdamW(fused)':>17}")
        for count in chosen.count:
            totals(count, chosen.rounds)
        for moves in (False, True):
            print(f"\nparts, {'gradients moved' if moves else 'nothing changed'}")
            for count in chosen.count:
                parts(count, chosen.rounds, moves=moves)


if __name__ == "__main__":
    main()
