"""The CUDA C++ backend on the host: tiles, refusals, the cache of compiled kernels, launches."""

from __future__ import annotations

import ctypes
import sys
import warnings
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
import torch

import fused_adamp
from fused_adamp.backends import cuda
from fused_adamp.backends.device import ARGUMENTS

if TYPE_CHECKING:
    from pathlib import Path

SPEC = cuda.Spec(torch.float32, torch.float32, torch.float32, "aligned", True, True, "nearest", False)
needs_nvrtc = pytest.mark.skipif(cuda.load() is not None, reason=str(cuda.load()))


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """An empty cache on disk, and nothing remembered of an earlier test."""
    monkeypatch.setenv(cuda.CACHE, str(tmp_path / "kernels"))
    cuda._warn.cache_clear()
    cuda._unsupported.cache_clear()
    cuda._core.cache_clear()
    cuda._shape.cache_clear()
    monkeypatch.setattr(cuda, "_loaded", {})


# Tiles.


@pytest.mark.parametrize("rows", [1, 3, 255, 256, 257, 100_000])
@pytest.mark.parametrize("cols", [1, 9, 32, 33, 768, 8192, 8193, 32768, 32769, 1 << 20])
def test_a_block_works_on_a_tile(rows: int, cols: int) -> None:
    tile_rows, tile_cols = cuda.CudaBackend().geometry(rows, cols)
    assert 1 <= tile_rows <= min(rows, cuda._THREADS)
    assert tile_cols <= cols
    whole_rows = tile_cols == cols
    assert whole_rows or (tile_rows == 1 and tile_cols == cuda._TILE)
    assert tile_rows * tile_cols <= max(cuda._TILE, tile_cols)
    if rows > 1 and not whole_rows:
        assert cols > cuda._WIDEST_ROW


@pytest.mark.parametrize(
    ("changes", "width"),
    [
        ({}, 4),
        ({"p": torch.float64}, 2),
        ({"p": torch.bfloat16, "g": torch.bfloat16}, 4),
        ({"p": torch.bfloat16, "g": torch.bfloat16, "state": torch.bfloat16}, 8),
        ({"p": torch.float16, "g": torch.float16, "state": torch.float16}, 8),
        ({"p": torch.float16, "state": torch.float16}, 4),
        ({"state": torch.bfloat16}, 4),
        ({"p": torch.bfloat16, "g": torch.bfloat16, "state": torch.bfloat16, "rounding": "remainder"}, 4),
        ({"layout": "flat"}, 1),
        ({"layout": "strided"}, 1),
    ],
)
def test_a_thread_accesses_16_bytes_of_the_widest_dtype(changes: dict[str, Any], width: int) -> None:
    """But with a remainder, as many elements as of a float32 weight: the sums are the same then."""
    assert SPEC._replace(**changes).width == width


# Refusals.


def test_without_cuda_core_the_reason_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("cuda", "cuda.core", "cuda.bindings"):
        monkeypatch.setitem(sys.modules, name, None)
    reason = cuda.load.__wrapped__()
    assert reason is not None
    assert "cuda-core is missing" in reason
    assert "pip install 'fused_adamp[cuda]'" in reason


def test_on_the_cpu_it_is_refused() -> None:
    p = torch.nn.Parameter(torch.ones(2, 2))
    p.grad = torch.ones(2, 2)
    with pytest.raises(RuntimeError, match="it steps parameters on NVIDIA GPUs"):
        fused_adamp.AdamP([p], backend="cuda").step()
    assert torch.equal(p.detach(), torch.ones(2, 2))


@pytest.mark.parametrize(
    ("capability", "driver", "known", "reason"),
    [
        ((7, 5), 13, [75, 90], "its compute capability is 7.5, the kernels need 8.0"),
        ((9, 0), 13, [90], None),
        ((9, 0), 14, [90], None),
        ((12, 0), 13, [80, 90], "NVRTC 13.1 does not know sm_120; pip install -U nvidia-cuda-nvrtc"),
        (
            (9, 0),
            12,
            [90],
            r"the driver loads code of CUDA 12, and NVRTC 13.1 makes newer code; update the driver, or pip",
        ),
    ],
)
def test_a_gpu_or_driver_that_does_not_fit_is_refused_with_the_remedy(
    capability: tuple[int, int], driver: int, known: list[int], reason: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: capability)
    monkeypatch.setattr(cuda, "nvrtc_version", lambda: (13, 1))
    monkeypatch.setattr(cuda, "_driver_version", lambda: driver)
    monkeypatch.setattr(cuda, "_architectures", lambda: known)
    monkeypatch.setattr(cuda, "load", lambda: None)
    found = cuda.CudaBackend().unavailable(torch.device("cuda", 0))
    assert (found is None) == (reason is None)
    assert reason is None or reason in str(found)


# The cache.


@needs_nvrtc
def test_a_kernel_is_compiled_once(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    compile_ = cuda._compile
    monkeypatch.setattr(cuda, "_compile", lambda *arguments: calls.append(arguments) or compile_(*arguments))
    code = cuda.compiled("dot_kernel", SPEC, "sm_90")
    assert code.startswith(b"\x7fELF")
    assert cuda.compiled("dot_kernel", SPEC, "sm_90") == code
    assert len(calls) == 1


@pytest.fixture
def compilations(monkeypatch: pytest.MonkeyPatch) -> list[tuple[dict[str, Any], str]]:
    """What would have been compiled."""
    found: list[tuple[dict[str, Any], str]] = []

    def compile_(macros: dict[str, Any], architecture: str) -> bytes:
        found.append((macros, architecture))
        return repr((macros, architecture)).encode()

    monkeypatch.setattr(cuda, "_compile", compile_)
    monkeypatch.setattr(cuda, "nvrtc_version", lambda: (13, 1))
    return found


def twice(kernel: str) -> list[bytes]:
    return [cuda.compiled(kernel, SPEC, "sm_90") for _ in range(2)]


def test_each_kernel_spec_architecture_source_and_compiler_has_a_place_of_its_own(
    compilations: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def make() -> None:
        cuda.compiled("dot_kernel", SPEC, "sm_90")
        cuda.compiled("update_kernel", SPEC, "sm_90")
        cuda.compiled("dot_kernel", SPEC, "sm_80")
        cuda.compiled("dot_kernel", SPEC._replace(layout="flat"), "sm_90")

    make()
    make()
    assert len(compilations) == 4
    monkeypatch.setattr(cuda, "nvrtc_version", lambda: (13, 2))
    make()
    assert len(compilations) == 8
    monkeypatch.setattr(cuda, "source", lambda: "another source")
    make()
    assert len(compilations) == 12


@pytest.mark.parametrize(
    "damage", [lambda data: data[:-1], lambda data: data[:40] + b"?" + data[41:], lambda data: b""]
)
def test_a_damaged_file_is_made_anew_with_one_warning(damage: Any, compilations: list[Any], tmp_path: Path) -> None:
    code = cuda.compiled("dot_kernel", SPEC, "sm_90")
    (path,) = (tmp_path / "kernels").iterdir()
    path.write_bytes(damage(path.read_bytes()))
    with pytest.warns(RuntimeWarning, match="is damaged") as warned:
        assert twice("dot_kernel") == [code, code]
    assert len(warned) == 1
    assert len(compilations) == 2


def test_a_folder_that_cannot_be_written_is_one_warning(
    compilations: list[Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv(cuda.CACHE, str(tmp_path / "file" / "kernels"))
    with pytest.warns(RuntimeWarning, match=f"{cuda.CACHE} names another folder") as warned:
        twice("dot_kernel")
    assert len(warned) == 1
    assert len(compilations) == 2


def test_no_file_is_left_unfinished(compilations: list[Any], tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        cuda.compiled("dot_kernel", SPEC, "sm_90")
    assert [path.suffix for path in (tmp_path / "kernels").iterdir()] == [".cubin"]


# Launches, with a stand-in for cuda.core.


class Core:
    """What the backend uses of cuda.core. It notes launches."""

    def __init__(self) -> None:
        self.launches: list[tuple[Any, ...]] = []
        self.Stream = SimpleNamespace(from_handle=lambda handle: ("stream", handle))
        self.Device = lambda index: SimpleNamespace(set_current=lambda: None)
        self.ObjectCode = SimpleNamespace(from_cubin=lambda code: SimpleNamespace(get_kernel=lambda name: (name, code)))
        self.LaunchConfig = lambda grid, block: (grid, block)

    def launch(self, *arguments: Any) -> None:
        self.launches.append(arguments)


@pytest.fixture
def core(monkeypatch: pytest.MonkeyPatch, compilations: list[Any]) -> Core:
    made = Core()
    monkeypatch.setattr(cuda, "_core", lambda: made)
    monkeypatch.setattr(cuda.CudaBackend, "unavailable", lambda self, device: None)
    monkeypatch.setattr(cuda, "_resident", lambda device: 264)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: SimpleNamespace(cuda_stream=1234))
    return made


def optimizer() -> fused_adamp.AdamP:
    params = [torch.nn.Parameter(torch.ones(*shape)) for shape in ((64, 64), (8,), (300, 9))]
    for p in params:
        p.grad = torch.ones_like(p)
    return fused_adamp.AdamP(params, backend="cuda")


def test_a_launch_gets_addresses_and_32_bit_numbers(core: Core) -> None:
    optimizer().step()
    assert len(core.launches) == 2, "one for the aligned parameters, one for the flat one"
    for stream, (grid, block), (name, code), *given in core.launches:
        assert stream == ("stream", 1234)
        assert (name, block) == ("one_pass_kernel", cuda._THREADS)
        assert 1 <= grid <= 264
        assert b"'FUSED_ADAMP_one_pass_kernel': 1" in code
        assert len(given) == len(ARGUMENTS)
        for argument, of in zip(given, ARGUMENTS, strict=True):
            number = of in ("epoch", "n_active", "n_jobs", "n_blocks")
            assert isinstance(argument, ctypes.c_int32 if number else int), of


def test_cuda_core_passes_addresses_in_64_bits_and_numbers_in_32() -> None:
    """Its own packing of a kernel's arguments, which needs no GPU."""
    handler = pytest.importorskip("cuda.core._kernel_arg_handler")
    packed = handler.ParamHolder((1 << 46, ctypes.c_int32(-5)))
    address, number = ctypes.cast(packed.ptr, ctypes.POINTER(ctypes.c_void_p))[:2]
    assert ctypes.c_uint64.from_address(address).value == 1 << 46
    assert ctypes.c_int32.from_address(number).value == -5


def test_a_kernel_is_loaded_once(core: Core, compilations: list[Any]) -> None:
    ours = optimizer()
    for _ in range(3):
        ours.step()
    assert len(core.launches) == 6
    assert len(compilations) == 2


@pytest.mark.parametrize("fails", ["compile", "load"])
def test_a_kernel_that_does_not_load_leaves_everything_as_it_was(
    fails: str, core: Core, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise MemoryError("no room for the kernel")

    if fails == "compile":
        monkeypatch.setattr(cuda, "compiled", fail)
    else:
        core.ObjectCode.from_cubin = fail
    ours = optimizer()
    for _ in range(2):
        with pytest.raises(MemoryError):
            ours.step()
    assert not core.launches
    for p in ours.param_groups[0]["params"]:
        assert torch.equal(p.detach(), torch.ones_like(p))
        assert all(not tensor.any() for tensor in ours.state[p].values())
