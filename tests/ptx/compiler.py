"""CUDA C++ to PTX by NVRTC, which needs neither a GPU nor a driver nor an installed CUDA toolkit."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

__all__ = ["Made", "made", "ptx", "unavailable"]

FOLDER = Path(__file__).with_name("cuda")
REMEDY = "pip install cuda-bindings nvidia-cuda-nvrtc"


@cache
def unavailable() -> str | None:
    """Why there is no NVRTC here, None if there is."""
    try:
        from cuda.bindings import nvrtc
    except ImportError as error:
        return f"cuda-bindings is missing ({error}); {REMEDY}"
    try:
        nvrtc.nvrtcVersion()
    except Exception as error:  # a library that is not found, under several names
        return f"NVRTC cannot be loaded ({str(error).splitlines()[0]}); {REMEDY}"
    return None


@cache
def ptx(name: str, *defined: str, target: str = "compute_90") -> str:
    """The PTX of a file of cuda/, with these macros defined. Raises RuntimeError as :func:`made` does."""
    return made((FOLDER / name).read_text(), name, *defined, target=target).ptx


class Made(NamedTuple):
    """What NVRTC has made of a source; the cubin is empty unless the target is a GPU, such as sm_90."""

    ptx: str
    cubin: bytes
    log: str


def room(size: int) -> bytes:
    """Bytes for NVRTC to write into: two at least, since Python shares all bytes objects of length 1."""
    return b" " * max(size, 2)


def made(source: str, name: str, *defined: str, target: str = "compute_90") -> Made:
    """Compiles a source, with these macros defined; ``name`` is its name in messages.

    Raises:
        RuntimeError: it does not compile. The message is the compiler's.
    """
    from cuda.bindings import nvrtc

    def done(result: tuple[Any, ...]) -> Any:
        status, *values = result
        if status != nvrtc.nvrtcResult.NVRTC_SUCCESS:
            raise RuntimeError(f"{name}: {status}\n{log()}")
        return values[0] if values else None

    def log() -> str:
        text = room(nvrtc.nvrtcGetProgramLogSize(program)[1])
        nvrtc.nvrtcGetProgramLog(program, text)
        return str(text.rstrip(b"\0 "), "utf-8")

    _, program = nvrtc.nvrtcCreateProgram(source.encode(), name.encode(), 0, [], [])
    options = [
        f"--gpu-architecture={target}",
        "--std=c++17",
        "--fmad=false",
        "--generate-line-info",
        "--ptxas-options=-v",
        *(f"-D{macro}" for macro in defined),
    ]
    done(nvrtc.nvrtcCompileProgram(program, len(options), [option.encode() for option in options]))
    text = room(done(nvrtc.nvrtcGetPTXSize(program)))
    done(nvrtc.nvrtcGetPTX(program, text))
    size = done(nvrtc.nvrtcGetCUBINSize(program))
    code = room(size)
    if size:
        done(nvrtc.nvrtcGetCUBIN(program, code))
    found = Made(str(text.rstrip(b"\0 "), "utf-8"), code[:size], log())
    done(nvrtc.nvrtcDestroyProgram(program))
    return found
