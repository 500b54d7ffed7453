"""The emulator in the place of a GPU, under the project's own host code, and Triton's own compiler or NVRTC.

    with Harness(Schedule(seed=1)).installed() as harness:
        AdamP(params, lr=0.1, backend=BACKEND).step()
    assert not harness.take()

Tensors are on the CPU. Every launch runs with a number of programs, of resident CTAs and an interleaving by chance from
the seed, unless the schedule fixes them.
"""

from __future__ import annotations

import hashlib
import os
import random
from contextlib import ExitStack, contextmanager
from functools import cache
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple
from unittest import mock

import compiler
import emulator
import torch

from fused_adamp.backends import cuda, jobs
from fused_adamp.backends import triton as backend
from fused_adamp.backends.device import ARGUMENTS, DeviceBackend
from fused_adamp.batch import ABSENT

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from fused_adamp.batch import Batch

__all__ = ["BACKEND", "EMULATED", "Emulated", "Harness", "Schedule", "unavailable"]

EMULATED = "FUSED_ADAMP_EMULATED"
"""Environment variable that names the backend whose kernels are emulated: ``triton``, the default, or ``cuda``."""
BACKEND = os.environ.get(EMULATED) or "triton"

WRITTEN = {"coefficients", "sums", "findings", "counters", "decisions", "results", "tickets"}
"""The tables among the kernels' arguments that kernels may write."""
WARP = 32
TILE = 1 << backend._LOG_TILE


def unavailable() -> str | None:
    """Why the backend's compiled kernels cannot be run here, None if they can."""
    if BACKEND == "cuda":
        return emulator.unavailable() or compiler.unavailable()
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
    tiles: int | None = None
    """Tiles of a job of the CUDA C++ kernels, at most."""
    jitter: int = 0
    """Seed of the errors of approximate instructions, the same for all kernels, since one GPU runs them; 0: none."""
    capability: int = 90
    """For which GPU Triton compiles."""
    idle_redo: bool = True
    """Whether a redo kernel is compiled and run that finds no mark at all, and so does nothing."""
    traffic: bool = False
    """Whether to count what is moved of each parameter's tensors."""


class Harness:
    """Launches that the backend would make on a GPU.

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
        with ExitStack() as stack:
            for patch in chain(self._on_device(), self._on_nvrtc() if BACKEND == "cuda" else self._on_triton()):
                stack.enter_context(patch)
            yield self

    def _on_device(self) -> Iterator[Any]:
        """The changes to what all backends share."""
        yield mock.patch.object(DeviceBackend, "arguments", self._arguments(DeviceBackend.arguments))
        yield mock.patch.object(DeviceBackend, "step", self._poisoned(DeviceBackend.step))

    def _on_nvrtc(self) -> Iterator[Any]:
        """The changes to the CUDA C++ backend. Tiles and jobs are smaller, so that small parameters have several."""
        yield mock.patch.object(cuda.CudaBackend, "unavailable", return_value=None)
        yield mock.patch.object(cuda, "_run", self._run(NvrtcLauncher))
        yield mock.patch.object(cuda, "_resident", self._programs)
        yield mock.patch.object(cuda, "_TILE", TILE)
        tiles = self.schedule.tiles or self.chance.choice((1, 4))
        yield mock.patch.object(cuda.CudaBackend, "block", 4 * TILE // tiles)
        yield mock.patch.object(jobs, "_DOT_RUN", 4 * TILE)

    def _on_triton(self) -> Iterator[Any]:
        """The changes to the Triton backend and to Triton."""
        import triton.runtime.driver
        from triton import knobs
        from triton.backends.nvidia.compiler import CUDABackend

        yield mock.patch.object(backend, "interpreted", return_value=True)  # so that tensors on the CPU are taken
        yield mock.patch.object(backend, "_not_interpretable", return_value=None)
        yield mock.patch.object(backend, "_run", self._run(TritonLauncher))
        yield mock.patch.object(backend, "_programs", self._programs)
        yield mock.patch.object(CUDABackend, "make_cubin", return_value=b"no GPU")  # PTX is enough, and ptxas is slow
        yield mock.patch.object(triton.runtime.driver, "_active", _Driver(self.schedule.capability))
        yield knobs.cache.scope()
        knobs.cache.dir = str(emulator.cache_folder() / "triton")  # its own: the cubins there are empty

    def take(self) -> list[str]:
        """Returns the findings since the last call."""
        found, self._findings = self._findings, []
        return found

    def _programs(self, device: torch.device) -> int:
        return self.schedule.programs or self.chance.choice((1, 2, 3, 7))

    @staticmethod
    def _poisoned(step: Callable[..., int]) -> Callable[..., int]:
        """A step before which scratch is NaN: what a step reads of it, it has to write first."""

        def poisoned(it: DeviceBackend, batch: Batch) -> int:
            work = batch.bucket.scratch
            if batch.bucket.shared is None:  # else sums were measured before the step
                for scratch in (work.sums, work.findings, work.coefficients):
                    scratch.fill_(float("nan"))
            return step(it, batch)

        return poisoned

    def _arguments(self, original: Callable[..., Any]) -> Callable[..., Any]:
        """The method, which remembers the tensors that kernels reach by the table of addresses."""

        def remembering(it: DeviceBackend, batch: Batch, tables: Any, *rest: Any) -> Any:
            self._tensors[tables.addresses.data_ptr()] = self._reached(batch)
            return original(it, batch, tables, *rest)

        return remembering

    @staticmethod
    def _reached(batch: Batch) -> list[tuple[str, torch.Tensor, bool]]:
        """Names, tensors and whether kernels may write them."""
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
        return tensors

    def _run(self, launcher: type[Launcher]) -> Callable[..., Emulated]:
        """Replaces the backend's function that makes a run."""

        def run(kernel: Any, grid: int, arguments: tuple[Any, ...], spec: Any) -> Emulated:
            key = kernel, spec
            if key not in self.kernels:
                self.kernels[key] = launcher(self, kernel, spec)
            return Emulated(self.kernels[key], grid, arguments)

        return run

    @staticmethod
    def _is_marked(arguments: dict[str, Any]) -> bool:
        """Whether a stage has ever left something to redo: that of another epoch, a redo kernel has to pass over."""
        from fused_adamp.kernels.tables import DOT_LEFT, MEASURE_LEFT, TILES_LEFT

        marks = arguments["counters"][:, [which.value for which in (MEASURE_LEFT, DOT_LEFT, TILES_LEFT)]]
        return bool(marks.any())

    def launch(self, it: Launcher, grid: int, arguments: tuple[Any, ...]) -> None:
        """Runs a kernel to its end and keeps what was found."""
        chosen, chance = self.schedule, self.chance
        named = dict(zip(ARGUMENTS, arguments, strict=False))
        if it.name.startswith("redo") and not chosen.idle_redo and not self._is_marked(named):
            return
        it.compile(arguments)
        memory = emulator.Memory()
        values: list[int | float | bytes] = []
        for name, argument in named.items():
            if isinstance(argument, torch.Tensor):
                memory.add(name, argument, writable=name in WRITTEN)
                values.append(argument.data_ptr())
                it.check(name, values[-1])
            else:
                values.append(argument)
        tensors = self._tensors[named["addresses"].data_ptr()]
        for name, tensor, writable in tensors:
            memory.add(name, tensor, writable=writable)
        scratch = len(it.kernel.module.parameters) - len(values)  # Triton's own, of which there is none
        outcome = it.kernel.launch(
            (grid,),
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
    """A kernel that is compiled when it is launched first.

    Attributes:
        name: the kernel's name.
        shared, warps: bytes of dynamic shared memory, and warps of a CTA.
    """

    kernel: emulator.Kernel
    shared: int
    warps: int

    def __init__(self, harness: Harness, source: Any, spec: Any) -> None:
        self.harness, self.source, self.spec = harness, source, spec
        self.name = source if isinstance(source, str) else source.__name__
        self.label = " ".join([self.name, *(str(getattr(value, "value", value)) for value in spec)])

    def ptx(self, arguments: tuple[Any, ...]) -> str:
        """Compiles the kernel for these arguments, and sets the attributes."""
        raise NotImplementedError

    def compile(self, arguments: tuple[Any, ...]) -> None:
        if not hasattr(self, "kernel"):
            self.kernel = decoded(self.harness.transform(self.name, self.ptx(arguments)))

    def check(self, name: str, address: int) -> None:
        """Raises AssertionError if the compiled code takes more for granted of an argument than it is."""


class TritonLauncher(Launcher):
    def ptx(self, arguments: tuple[Any, ...]) -> str:
        assert self.source.arg_names[:-1] == [*ARGUMENTS[: len(arguments)]]
        compiled = backend.compile_kernel(self.source, arguments, self.spec)
        self._aligned = {self.source.arg_names[i] for i, *_ in compiled.src.attrs}
        self.shared, self.warps = compiled.metadata.shared, compiled.metadata.num_warps
        return str(compiled.asm["ptx"])

    def check(self, name: str, address: int) -> None:
        assert name not in self._aligned or address % 16 == 0, f"{self.label}: {name} is compiled as aligned"


class NvrtcLauncher(Launcher):
    shared, warps = 0, cuda._THREADS // WARP

    def ptx(self, arguments: tuple[Any, ...]) -> str:
        return nvrtc_ptx(self.name, self.spec, self.harness.schedule.capability)


class Emulated(NamedTuple):
    """A launch: :class:`fused_adamp.backends.device.Run`."""

    kernel: Launcher
    grid: int
    arguments: tuple[Any, ...]

    def start(self) -> None:
        self.kernel.harness.launch(self.kernel, self.grid, self.arguments)


@cache
def nvrtc_ptx(kernel: str, spec: cuda.Spec, capability: int) -> str:
    """The PTX of a kernel of csrc/cuda_step.cu, kept in the emulator's cache."""
    macros = [f"{name}={value}" for name, value in cuda.options(kernel, spec).items()]
    key = repr((cuda.source(), macros, capability, cuda.nvrtc_version(), Path(compiler.__file__).read_text()))
    path = emulator.cache_folder() / "nvrtc" / f"{kernel}-{hashlib.sha256(key.encode()).hexdigest()[:32]}.ptx"
    if not path.exists():
        made = compiler.made(cuda.source(), "cuda_step.cu", *macros, target=f"compute_{capability}")
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_suffix(f".{os.getpid()}")
        unfinished.write_text(made.ptx)
        unfinished.rename(path)
    return path.read_text()


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
