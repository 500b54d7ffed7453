"""The CUDA C++ backend: how csrc/cuda_step.cu is compiled where it runs, by NVRTC, and launched.

device.py, jobs.py and tables.py have the rest. Neither nvcc nor a CUDA toolkit is needed: ``pip install
'fused_adamp[cuda]'`` brings NVIDIA's ``cuda-core`` and NVRTC. What has been compiled is kept in a folder on disk.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import re
import tempfile
import warnings
from functools import cache, lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from fused_adamp.backends.device import DeviceBackend
from fused_adamp.backends.tables import LAYOUTS
from fused_adamp.host import WIDEST_LOAD

if TYPE_CHECKING:
    from fused_adamp.batch import Batch

__all__ = ["CACHE", "CudaBackend", "Spec", "options", "source"]

CACHE = "FUSED_ADAMP_CUDA_CACHE"
"""Environment variable that names the folder of compiled kernels."""

REMEDY = "pip install 'fused_adamp[cuda]'"

_THREADS = 256
_TILE = 1 << 13
"""Elements of a tile."""
_WIDEST_ROW = 1 << 15
"""Elements of a row up to which one tile has it whole; its second look finds them in cache."""
_BLOCKS = {"measure_kernel": 3, "dot_kernel": 3}
"""Blocks that a multiprocessor has registers for, where they are not two. No kernel takes more registers."""
_BLOCKS_PER_MULTIPROCESSOR = 2
_TYPES = {torch.float32: "float", torch.float64: "double", torch.bfloat16: "Bfloat16", torch.float16: "Float16"}


class Spec(NamedTuple):
    """The properties of tensors and rule that a kernel is compiled for.

    Attributes:
        p, g, state: dtypes in memory. The math is in float64 for float64 weights, else in float32.
        layout: one of LAYOUTS.
        adaptive, buffer: the momentum rule.
        rounding: one of :data:`fused_adamp.precision.ROUNDINGS`.
        shared: whether parameters may lie on several ranks.
    """

    p: torch.dtype
    g: torch.dtype
    state: torch.dtype
    layout: str
    adaptive: bool
    buffer: bool
    rounding: str
    shared: bool

    @property
    def width(self) -> int:
        """Elements of one access of a thread: 16 bytes of the widest dtype, so that a warp fills sectors of memory.

        It says which elements a thread holds, and so in which order a row is summed: the same for weights in float32 as
        for those in bfloat16 with a remainder.
        """
        if self.layout != "aligned":
            return 1
        weight = torch.float32 if self.rounding == "remainder" else self.p
        return WIDEST_LOAD // max(dtype.itemsize for dtype in (weight, self.g, self.state))


# From the source to a kernel.


@cache
def source() -> str:
    """csrc/cuda_step.cu with its headers in the place of their includes."""
    installed, checkout = Path(__file__).parents[1] / "csrc", Path(__file__).parents[2] / "csrc"
    folder = installed if installed.exists() else checkout
    seen: set[str] = set()

    def expanded(name: str) -> str:
        if name in seen:
            return ""
        seen.add(name)
        text = (folder / name).read_text().replace("#pragma once\n", "")
        return re.sub(r'^#include "(.*)"$', lambda found: expanded(found[1]), text, flags=re.MULTILINE)

    return expanded("cuda_step.cu")


def options(kernel: str, spec: Spec) -> dict[str, Any]:
    """The macros that choose a kernel and its properties: csrc/cuda_step.cu."""
    wide = spec.p == torch.float64
    macros = {
        "P": _TYPES[spec.p],
        "G": _TYPES[spec.g],
        "STATE": _TYPES[spec.state],
        "LAYOUT": LAYOUTS.index(spec.layout),
        "WIDTH": spec.width,
        "ADAPTIVE": int(spec.adaptive),
        "BUFFER": int(spec.buffer),
        "STOCHASTIC": int(spec.rounding == "stochastic"),
        "REMAINDER": int(spec.rounding == "remainder"),
        "SHARED": int(spec.shared),
        "BLOCKS": 1 if wide else _BLOCKS.get(kernel, _BLOCKS_PER_MULTIPROCESSOR),
        kernel: 1,
    }
    return {f"FUSED_ADAMP_{name}": value for name, value in macros.items()}


@cache
def _core() -> Any:
    """NVIDIA's cuda.core, whose older versions are called experimental."""
    try:
        from cuda import core

        core.Program  # noqa: B018
    except (ImportError, AttributeError):
        from cuda.core import experimental as core
    return core


@lru_cache(maxsize=1)
def load() -> str | None:
    """Imports cuda.core and NVRTC. Returns None, or why they cannot be used, with the remedy."""
    try:
        _core()
        from cuda.bindings import nvrtc
    except ImportError as error:
        return f"cuda-core is missing ({error}); {REMEDY}"
    try:
        nvrtc.nvrtcVersion()
    except Exception as error:  # a library that is not found, under several names
        return f"NVRTC cannot be loaded ({str(error).splitlines()[0]}); {REMEDY}"
    return None


def nvrtc_version() -> tuple[int, int]:
    """NVRTC's, as in CUDA 13.0."""
    from cuda.bindings import nvrtc

    _, major, minor = nvrtc.nvrtcVersion()
    return major, minor


def versions() -> dict[str, str | None]:
    """NVRTC's version, and that of the newest CUDA whose code the driver loads; ``missing`` says why there is none."""
    if missing := load():
        return {"nvrtc": None, "driver": None, "missing": missing}
    driver = _driver_version()
    return {"nvrtc": ".".join(map(str, nvrtc_version())), "driver": str(driver) if driver else None, "missing": None}


def _driver_version() -> int:
    """The major number of the newest CUDA whose code the driver loads; 0 if there is no driver."""
    from cuda.bindings import driver

    try:
        return int(driver.cuDriverGetVersion()[1]) // 1000
    except RuntimeError:  # the library is not there
        return 0


def _architectures() -> list[int]:
    """Those that NVRTC compiles for, as in 90."""
    from cuda.bindings import nvrtc

    return list(nvrtc.nvrtcGetSupportedArchs()[1])


@cache
def _unsupported(index: int | None) -> str | None:
    """Why kernels for this GPU cannot be compiled or loaded, None if they can."""
    major, minor = torch.cuda.get_device_capability(index)
    if (major, minor) < (8, 0):
        return f"its compute capability is {major}.{minor}, the kernels need 8.0 (A100) or later"
    nvrtc = nvrtc_version()
    if 10 * major + minor not in _architectures():
        return f"NVRTC {nvrtc[0]}.{nvrtc[1]} does not know sm_{major}{minor}; pip install -U nvidia-cuda-nvrtc"
    if (driver := _driver_version()) < nvrtc[0]:
        return (
            f"the driver loads code of CUDA {driver}, and NVRTC {nvrtc[0]}.{nvrtc[1]} makes newer code; update the "
            f"driver, or pip install 'cuda-core[cu{driver}]' 'cuda-bindings=={driver}.*' 'nvidia-cuda-nvrtc-cu{driver}'"
        )
    return None


def cache_folder() -> Path:
    """Where compiled kernels are kept."""
    if CACHE in os.environ:
        return Path(os.environ[CACHE])
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fused_adamp" / "cuda"


def compiled(kernel: str, spec: Spec, architecture: str) -> bytes:
    """The kernel's code for an architecture such as ``sm_90``: from the cache, or compiled now."""
    macros = options(kernel, spec)
    key = hashlib.sha256(repr((source(), macros, architecture, nvrtc_version())).encode()).hexdigest()
    path = cache_folder() / f"{kernel}-{architecture}-{key[:32]}.cubin"
    code = _read(path)
    if code is None:
        code = _compile(macros, architecture)
        _write(path, code)
    return code


def _compile(macros: dict[str, Any], architecture: str) -> bytes:
    core = _core()
    chosen = core.ProgramOptions(
        arch=architecture,
        std="c++17",
        fma=False,  # the formulas name their fused operations
        define_macro=[(name, str(value)) for name, value in macros.items()],
    )
    return bytes(core.Program(source(), "c++", chosen).compile("cubin").code)


def _read(path: Path) -> bytes | None:
    """What :func:`_write` has written, None if it is not there or not whole."""
    try:
        data = path.read_bytes()
    except OSError:
        return None
    digest, code = data[:32], data[32:]
    if hashlib.sha256(code).digest() == digest:
        return code
    _warn(f"fused_adamp compiles its CUDA kernels again: {path} is damaged")
    return None


def _write(path: Path, code: bytes) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
            file.write(hashlib.sha256(code).digest() + code)
        Path(file.name).replace(path)
    except OSError as error:
        _warn(f"fused_adamp cannot keep its compiled CUDA kernels ({error}); {CACHE} names another folder")


@cache
def _warn(message: str) -> None:
    """Once for each message."""
    warnings.warn(message, RuntimeWarning, stacklevel=2)


# From launches to kernels.


class CudaBackend(DeviceBackend):
    name = "cuda"
    block = 1 << 11
    measures_alone = True

    def unavailable(self, device: torch.device) -> str | None:
        if device.type != "cuda" or torch.version.hip:
            return "it steps parameters on NVIDIA GPUs"
        return load() or _unsupported(device.index)

    def geometry(self, rows: int, cols: int) -> tuple[int, int]:
        """Rows and columns of a tile: as many rows as threads at most, a wide row, or a piece of a very wide row."""
        if cols > (_WIDEST_ROW if rows > 1 else _TILE):
            return 1, _TILE
        return min(rows, max(_TILE // cols, 1), _THREADS), cols

    def spec(self, batch: Batch, p: torch.dtype, g: torch.dtype, state: torch.dtype | None, layout: str) -> Spec:
        rounding, shared = batch.bucket.key.rounding, batch.bucket.shared is not None
        if state is None:  # before the first step: there is nothing yet that kernels could load besides
            # No state is read. Its dtype lets rows be summed in the order of later steps: Spec.width.
            unread = torch.float32 if rounding == "remainder" else p
            return Spec(p, g, unread, layout, adaptive=False, buffer=False, rounding="nearest", shared=shared)
        return Spec(p, g, state, layout, batch.rule.adaptive, bool(batch.moments), rounding, shared)

    def run(self, kernel: str, programs: int, arguments: tuple[Any, ...], spec: Spec) -> _Run:
        return _run(kernel, programs, arguments, spec)

    def resident(self, device: torch.device) -> int:
        return _resident(device)


class _Run(NamedTuple):
    kernel: Any
    grid: int
    arguments: tuple[Any, ...]

    def start(self) -> None:
        core = _core()
        stream = core.Stream.from_handle(torch.cuda.current_stream().cuda_stream)
        given = [a.data_ptr() if isinstance(a, Tensor) else ctypes.c_int32(a) for a in self.arguments]
        core.launch(stream, _shape(self.grid), self.kernel, *given)


@lru_cache(maxsize=1024)
def _shape(blocks: int) -> Any:
    return _core().LaunchConfig(grid=blocks, block=_THREADS)


_loaded: dict[Any, Any] = {}


def _run(kernel: str, grid: int, arguments: tuple[Any, ...], spec: Spec) -> _Run:
    key = kernel, spec, torch.cuda.current_device()
    if key not in _loaded:
        core, capability = _core(), torch.cuda.get_device_capability()
        code = compiled(kernel, spec, f"sm_{capability[0]}{capability[1]}")
        core.Device(torch.cuda.current_device()).set_current()
        _loaded[key] = core.ObjectCode.from_cubin(code).get_kernel(kernel)
    return _Run(_loaded[key], grid, arguments)


@cache
def _resident(device: torch.device) -> int:
    return _BLOCKS_PER_MULTIPROCESSOR * torch.cuda.get_device_properties(device).multi_processor_count
