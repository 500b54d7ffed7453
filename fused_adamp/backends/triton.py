"""The Triton backend: how kernels/ are compiled and launched. device.py, jobs.py and tables.py have the rest."""

from __future__ import annotations

import os
from functools import cache, lru_cache
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from fused_adamp.backends.device import DeviceBackend
from fused_adamp.backends.tables import LAYOUTS
from fused_adamp.precision import ROUNDINGS

if TYPE_CHECKING:
    from collections.abc import Sequence

    from fused_adamp.backends.tables import Launch, Tables
    from fused_adamp.batch import Batch

__all__ = ["TritonBackend"]

_OLDEST = (3, 3)
_UNINTERPRETED_NUMPY = (2, 4)
"""This numpy and later refuse int(array([1])), which the interpreters of older versions of Triton need."""
_INTERPRETS_ANY_NUMPY = (3, 7)
_LOG_TILE = 11
"""A tile of 2048 elements, 8 in each of 256 threads: two programs fit on a multiprocessor (128 registers a thread)."""
_WIDEST_ROW = 1 << 15
"""Elements of a row up to which one program takes it whole, a tile at a time; its second look finds them in cache."""
_WARPS = 8
_PROGRAMS_PER_MULTIPROCESSOR = 2


@lru_cache(maxsize=1)
def load() -> str | None:
    """Imports Triton. Returns None, or why it cannot be used, with the remedy."""
    try:
        import triton
    except ImportError as error:
        return f"Triton is missing ({error}); pip install triton"
    if _version(triton) < _OLDEST:
        return f"Triton {triton.__version__} is too old; pip install 'triton>={_dotted(_OLDEST)}'"
    return None


def _version(module: Any) -> tuple[int, ...]:
    return tuple(int(part) for part in module.__version__.split(".")[:2])


def _dotted(version: tuple[int, ...]) -> str:
    return ".".join(map(str, version))


def interpreted() -> bool:
    """Whether Triton runs its kernels in Python, on the CPU."""
    return os.environ.get("TRITON_INTERPRET", "") not in ("", "0")


def _not_interpretable() -> str | None:
    """Why Triton's interpreter cannot run the kernels, None if it can."""
    import triton

    remedy = f"pip install 'numpy<{_dotted(_UNINTERPRETED_NUMPY)}'"
    try:
        import numpy
    except ImportError as error:
        return f"TRITON_INTERPRET=1 needs numpy, which is missing ({error}); {remedy}"
    if _version(triton) < _INTERPRETS_ANY_NUMPY and _version(numpy) >= _UNINTERPRETED_NUMPY:
        return f"the interpreter of Triton {triton.__version__} fails with numpy {numpy.__version__}; {remedy}"
    return None


@cache
def _too_old(index: int | None) -> str | None:
    """Why this GPU cannot run the kernels, None if it can."""
    if torch.version.hip:
        return None
    capability = torch.cuda.get_device_capability(index)
    if capability < (8, 0):
        return f"its compute capability is {capability[0]}.{capability[1]}, Triton's kernels need 8.0 (A100) or later"
    return None


class TritonBackend(DeviceBackend):
    name = "triton"
    block = 1 << _LOG_TILE

    def unavailable(self, device: torch.device) -> str | None:
        reason = load()
        if reason is None and device.type == "cpu" and not interpreted():
            reason = "it steps parameters on GPUs; on the CPU only with TRITON_INTERPRET=1, to test the kernels"
        elif reason is None and device.type == "cuda":
            reason = _too_old(device.index)
        elif reason is None and device.type != "cpu":
            reason = f"it knows CUDA and ROCm devices, not {device.type!r}"
        if reason is None and interpreted():
            reason = _not_interpretable()
        return reason

    def geometry(self, rows: int, cols: int) -> tuple[int, int]:
        """Rows and columns of a tile: a block of registers of whole rows, a wide row, or a piece of a very wide row."""
        from fused_adamp.kernels.tables import NARROWEST, WIDTH_STEP

        tile = 1 << _LOG_TILE
        for log_width in range(NARROWEST.value, _LOG_TILE + WIDTH_STEP.value, WIDTH_STEP.value):
            if cols <= min(1 << log_width, tile):
                return min(rows, max(tile >> log_width, 1)), cols
        return 1, cols if rows > 1 and cols <= _WIDEST_ROW else tile

    def spec(self, batch: Batch, p: torch.dtype, g: torch.dtype, state: torch.dtype | None, layout: str) -> Any:
        shared = batch.bucket.shared is not None
        rounding = batch.bucket.key.rounding
        if state is None:  # before the first step: there is nothing yet that kernels could load besides
            return first_spec(p, g, layout, rounding, shared=shared)
        rule = {"adaptive": batch.rule.adaptive, "buffer": bool(batch.moments)}
        return make_spec(p, g, state, layout, **rule, rounding=rounding, shared=shared)

    def run(self, kernel: str, programs: int, arguments: tuple[Any, ...], spec: Any) -> _Run:
        from fused_adamp.kernels import plans

        return _run(getattr(plans, kernel), programs, arguments, spec)

    def resident(self, device: torch.device) -> int:
        return _programs(device)

    def redo(self, kernel: str, batch: Batch, tables: Tables, launch: Launch) -> list[_Run]:
        """In float64; nothing if the math is in float64 already."""
        spec = in_float64(launch.spec)
        if spec == launch.spec:
            return []
        given = self.arguments(batch, tables, launch, launch.active)  # of jobs there are none
        return [self.run(kernel, len(launch.active), given, spec)]


def make_spec(
    p: torch.dtype,
    g: torch.dtype,
    state: torch.dtype,
    layout: str,
    *,
    adaptive: bool,
    buffer: bool,
    rounding: str = "nearest",
    shared: bool = False,
) -> Any:
    """The spec that kernels are compiled for: fused_adamp/kernels/tiles.py."""
    import triton.language as tl

    from fused_adamp.kernels.tiles import Spec

    types = {
        torch.float32: tl.float32,
        torch.float64: tl.float64,
        torch.bfloat16: tl.bfloat16,
        torch.float16: tl.float16,
    }
    number = tl.float64 if p == torch.float64 else tl.float32
    words = map(tl.constexpr, (LAYOUTS.index(layout), adaptive, buffer, ROUNDINGS.index(rounding), shared))
    tile = map(tl.constexpr, (_LOG_TILE, 1 << _LOG_TILE))
    return Spec(types[p], types[g], types[state], number, *words, _access(p, rounding), *tile)


def first_spec(p: torch.dtype, g: torch.dtype, layout: str, rounding: str, *, shared: bool) -> Any:
    """The spec of a measurement before the first step. Rows are summed in the order of later steps."""
    bare = make_spec(p, g, p, layout, adaptive=False, buffer=False, shared=shared)
    return bare._replace(access=_access(p, rounding))


def _access(p: torch.dtype, rounding: str) -> Any:
    """Spec.access of weights of this dtype."""
    import triton.language as tl

    return tl.constexpr(4 if p == torch.float32 or rounding == "remainder" else 8)


def in_float64(spec: Any) -> Any:
    """The spec with the math in float64."""
    import triton.language as tl

    return spec._replace(number=tl.float64)


def compile_options(kernel: Any, spec: Any, target: str) -> dict[str, int]:
    """Triton's compile options for a kernel of plans.py; ``target`` is ``"cuda"`` or ``"hip"``.

    A launch fails with options that the target does not know.
    """
    from fused_adamp.kernels.precision import STOCHASTIC
    from fused_adamp.kernels.tables import FLAT, STRIDED

    # The kernels name their fused operations. A compiler that fuses others may round each copy of a formula in its way.
    options = {"num_warps": _WARPS, "enable_fp_fusion": False}
    if target != "cuda":  # LLVM counts on two programs by itself
        return options
    # Registers. Left to itself, ptxas tries for one program more on a multiprocessor, and spills.
    name, layout, shared, rounding = kernel.__name__, spec.layout.value, spec.shared.value, spec.rounding.value
    flat = layout == FLAT.value
    crowded = layout == STRIDED.value or spec.number.primitive_bitwidth == 64
    crowded |= name == "update_kernel" and flat and (shared or rounding == STOCHASTIC.value)
    crowded |= name == "one_pass_kernel" and (flat or shared or rounding == STOCHASTIC.value)
    remains = spec.p.primitive_bitwidth == 16 and spec.access.value == 4  # weights have remainders, or will have them
    measure = 96 if flat and remains else 80
    options["maxnreg"] = 255 if crowded else measure if name == "measure_kernel" else 128
    return options


class _AnyAddress:
    """Replaces a tensor when a kernel is compiled, so that Triton knows its dtype but not its address.

    Otherwise, if the tensor's address is a multiple of 16, Triton would rely on that in every later launch. The kernels
    gain nothing from that: the tiles' addresses come from a table, and the layout says how they are aligned.
    """

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype

    def data_ptr(self) -> int:
        return 1


def compile_kernel(kernel: Any, arguments: Sequence[Any], spec: Any) -> Any:
    """Compiles a kernel for the driver's current GPU and for all arguments of these types. Does not load it."""
    from triton.runtime import driver

    stand_ins = [_AnyAddress(a.dtype) if isinstance(a, Tensor) else a for a in arguments]
    options = compile_options(kernel, spec, driver.active.get_current_target().backend)
    return kernel.warmup(*stand_ins, S=spec, grid=(1,), **options)


# From launches to kernels.


class _Run(NamedTuple):
    kernel: Any
    grid: int
    arguments: tuple[Any, ...]

    def start(self) -> None:
        self.kernel[(self.grid, 1, 1)](*self.arguments)


_compiled: dict[Any, Any] = {}


def _run(kernel: Any, grid: int, arguments: tuple[Any, ...], spec: Any) -> _Run:
    if interpreted():
        return _Run(kernel, grid, (*arguments, spec))
    key = (kernel, spec, torch.cuda.current_device())
    if key not in _compiled:
        compiled = compile_kernel(kernel, arguments, spec)
        compiled._init_handles()  # loads it on the device: what does not fit there fails here
        _compiled[key] = compiled
    return _Run(_compiled[key], grid, (*arguments, spec))


@cache
def _programs(device: torch.device) -> int:
    if device.type != "cuda":
        return 2
    return _PROGRAMS_PER_MULTIPROCESSOR * torch.cuda.get_device_properties(device).multi_processor_count
