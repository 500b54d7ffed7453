"""The emulator in the place of a GPU, under the project's own host code and Triton's own compiler.

    with Harness(Schedule(seed=1)).installed() as harness:
        AdamP(params, lr=0.1, backend="triton").step()
    assert not harness.take()

Tensors are on the CPU. Every launch runs with a number of programs, of resident CTAs and an interleaving by chance from
the seed, unless the schedule fixes them.
"""

from __future__ import annotations

import random
from contextlib import contextmanager
from functools import cache, partial
from typing import TYPE_CHECKING, Any, NamedTuple
from unittest import mock

import emulator
import torch

from fused_adamp.backends import triton as backend
from fused_adamp.batch import ABSENT

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from fused_adamp.batch import Batch

__all__ = ["Harness", "Schedule", "unavailable"]

WRITTEN = {"coefficients", "sums", "findings", "counters", "decisions", "results", "tickets"}
"""The tables among the kernels' arguments that kernels may write."""
WARP = 32


def unavailable() -> str | None:
    """Why compiled kernels of the Triton backend cannot be run here, None if they can."""
    if backend.interpreted():
        return "TRITON_INTERPRET is set, so Triton compiles nothing"
    return emulator.unavailable() or backend.load()


class Schedule(NamedTuple):
    """How launches run. Values of None are drawn anew for each launch."""

    seed: int = 0
    programs: int | None = None
    """CTAs of the one-pass kernel."""
    resident: int | None = None
    """CTAs that run at once."""
    policy: str | None = None
    """One of the emulator's ``POLICIES``."""
    jitter: int = 0
    """Seed of the errors of approximate instructions, the same for all kernels, since one GPU runs them; 0: none."""
    capability: int = 90
    """For which GPU Triton compiles."""
    idle_redo: bool = True
    """Whether a redo kernel is compiled and run that finds no mark at all, and so does nothing."""
    traffic: bool = False
    """Whether to count what is moved of each parameter's tensors."""


class Harness:
    """Launches that the Triton backend would make on a GPU.

    Args:
        schedule: how they run.
        transform: changes a kernel's PTX, given its name and text. For planted faults.
    """

    def __init__(
        self, schedule: Schedule | None = None, *, transform: Callable[[str, str], str] = lambda name, ptx: ptx
    ) -> None:
        self.schedule = schedule or Schedule()
        self.transform = transform
        self.chance = random.Random(self.schedule.seed)
        self.kernels: dict[Any, Launcher] = {}
        self.launches = self.instructions = self.switches = 0
        self.traffic: dict[str, emulator.Traffic] = {}
        """By tensor, as "p[0]"."""
        self.harmless: list[str] = []
        self._findings: list[str] = []
        self._tensors: dict[int, list[tuple[str, torch.Tensor, bool]]] = {}
        """By the address of a table of addresses: names, tensors to which it leads, and whether kernels may write."""

    @contextmanager
    def installed(self) -> Iterator[Harness]:
        """Puts the emulator in the place of the GPU until the context ends."""
        import triton.runtime.driver
        from triton import knobs
        from triton.backends.nvidia.compiler import CUDABackend

        patches = [
            mock.patch.object(backend, "interpreted", return_value=True),  # so that tensors on the CPU are taken
            mock.patch.object(backend, "_not_interpretable", return_value=None),
            mock.patch.object(backend, "_run", self._run),
            mock.patch.object(backend, "_programs", self._programs),
            mock.patch.object(backend, "_arguments", partial(self._arguments, backend._arguments)),
            mock.patch.object(backend.TritonBackend, "step", self._poisoned(backend.TritonBackend.step)),
            mock.patch.object(CUDABackend, "make_cubin", return_value=b"no GPU"),  # PTX is enough, and ptxas is slow
            mock.patch.object(triton.runtime.driver, "_active", _Driver(self.schedule.capability)),
            knobs.cache.scope(),
        ]
        for patch in patches:
            patch.__enter__()
        knobs.cache.dir = str(emulator.cache_folder() / "triton")  # its own: the cubins there are empty
        try:
            yield self
        finally:
            for patch in reversed(patches):
                patch.__exit__(None, None, None)

    def take(self) -> list[str]:
        """Returns the findings since the last call."""
        found, self._findings = self._findings, []
        return found

    def _programs(self, device: torch.device) -> int:
        return self.schedule.programs or self.chance.choice((1, 2, 3, 7))

    @staticmethod
    def _poisoned(step: Callable[..., int]) -> Callable[..., int]:
        """A step before which scratch is NaN: what a step reads of it, it has to write first."""

        def poisoned(it: backend.TritonBackend, batch: Batch) -> int:
            work = batch.bucket.scratch
            if batch.bucket.shared is None:  # else sums were measured before the step
                for scratch in (work.sums, work.findings, work.coefficients):
                    scratch.fill_(float("nan"))
            return step(it, batch)

        return poisoned

    def _arguments(self, original: Callable[..., Any], batch: Batch, tables: Any, *rest: Any) -> Any:
        """Remembers the tensors that kernels reach by the table of addresses."""
        names = batch.bucket.key.moments
        by_role = [("p", batch.params, True), ("g", batch.grads, False), ("step", batch.steps, True)]
        by_role += [("seed", batch.seeds, True), ("remainder", batch.remainders, True)]
        by_role += [(name, moments, True) for name, moments in zip(names, batch.moments, strict=False)]
        tensors = [
            (f"{name}[{i}]", tensor, writable)
            for name, members, writable in by_role
            for i, tensor in enumerate(members)
            if tensor is not ABSENT
        ]
        if batch.bucket.shared is not None:
            shared = batch.bucket.shared._asdict()
            tensors += [(name, tensor, name in ("shares", "rows")) for name, tensor in shared.items()]
        self._tensors[tables.addresses.data_ptr()] = tensors
        return original(batch, tables, *rest)

    def _run(self, kernel: Any, grid: int, arguments: tuple[Any, ...], spec: Any) -> Any:
        key = kernel, spec
        if key not in self.kernels:
            self.kernels[key] = Launcher(self, kernel, spec)
        return backend._Run(self.kernels[key], grid, (*arguments, spec))

    @staticmethod
    def _is_marked(arguments: dict[str, Any]) -> bool:
        """Whether a stage has ever left something to redo: that of another epoch, a redo kernel has to pass over."""
        from fused_adamp.kernels.tables import DOT_LEFT, MEASURE_LEFT, TILES_LEFT

        marks = arguments["counters"][:, [which.value for which in (MEASURE_LEFT, DOT_LEFT, TILES_LEFT)]]
        return bool(marks.any())

    def launch(self, it: Launcher, grid: tuple[int, ...], *arguments: Any) -> None:
        """Runs a kernel to its end and keeps what was found."""
        chosen, chance = self.schedule, self.chance
        named = dict(zip(it.names, arguments, strict=True))
        if it.name.startswith("redo") and not chosen.idle_redo and not self._is_marked(named):
            return
        it.compile(arguments)
        memory = emulator.Memory()
        values: list[int | float | bytes] = []
        for i, (name, argument) in enumerate(zip(it.names, arguments, strict=True)):
            if it.signature[name] == "constexpr":
                continue
            if isinstance(argument, torch.Tensor):
                memory.add(name, argument, writable=name in WRITTEN)
                value = argument.data_ptr()
                assert (i,) not in it.attributes or value % 16 == 0, f"{it.label}: {name} is compiled as aligned"
                values.append(value)
            else:
                values.append(argument)
        tensors = self._tensors[named["addresses"].data_ptr()]
        for name, tensor, writable in tensors:
            memory.add(name, tensor, writable=writable)
        scratch = len(it.kernel.module.parameters) - len(values)  # Triton's own, of which there is none
        outcome = it.kernel.launch(
            grid,
            [*values, *[0] * scratch],
            memory,
            block=(WARP * it.warps,),
            shared=it.shared,
            resident=chosen.resident or chance.choice((1, 2, 3, 7)),
            policy=chosen.policy or chance.choice(("in order", "by chance", "by chance", "priorities")),
            seed=chance.getrandbits(60),
            jitter=chosen.jitter,
            traffic=chosen.traffic,
        )
        for name, _, _ in tensors if chosen.traffic else ():
            moved = outcome.traffic.get(name, emulator.Traffic())
            self.traffic[name] = self.traffic.get(name, emulator.Traffic()).plus(moved)
        self.launches += 1
        self.instructions += outcome.instructions
        self.switches += outcome.switches
        self._findings += [f"{it.label}\n  {finding}" for finding in outcome.findings]
        self.harmless += [f"{it.label}\n  {finding}" for finding in outcome.harmless]


@cache
def decoded(ptx: str) -> emulator.Kernel:
    return emulator.Kernel(ptx)


class Launcher:
    """A kernel that is compiled when it is launched first, as Triton's are: ``launcher[grid](*arguments)``."""

    def __init__(self, harness: Harness, kernel: Any, spec: Any) -> None:
        self.harness, self.names, self.name = harness, kernel.arg_names, kernel.__name__
        self.label = " ".join([self.name, *(str(getattr(value, "value", value)) for value in spec)])
        self.spec = spec
        self._source = kernel
        self._compiled: Any = None

    def compile(self, arguments: tuple[Any, ...]) -> None:
        if self._compiled is not None:
            return
        self._compiled = compiled = backend.compile_kernel(self._source, arguments[:-1], self.spec)
        self.signature, self.attributes = compiled.src.signature, compiled.src.attrs
        self.shared, self.warps = compiled.metadata.shared, compiled.metadata.num_warps
        self.kernel = decoded(self.harness.transform(self.name, compiled.asm["ptx"]))

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return partial(self.harness.launch, self, grid)


class _Driver:
    """Answers Triton's questions about the GPU before it compiles."""

    def __init__(self, capability: int) -> None:
        self.capability = capability

    def get_current_device(self) -> int:
        return self.capability  # by device Triton remembers what it has compiled

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", self.capability, WARP)
