"""Builds the CPU extension where a C++ compiler and torch's headers are found; without, the package still installs.

The extension uses torch's stable ABI and Python's limited API: one binary serves torch 2.11 and later and Python 3.10
and later. Its kernels are compiled once per instruction set, to be chosen when they run.
"""

from __future__ import annotations

import os
import platform
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from importlib.util import find_spec
from itertools import chain
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

CSRC = Path("csrc")
SOURCES = ["cpu.cpp", "cpu_bind.cpp", "cpu_plan.cpp", "cpu_stages.cpp", "cpu_tensors.cpp"]
SOURCES += ["host.cpp", "registration.cpp"]
KERNELS = "cpu_kernels.cpp"
FLAGS = ["-std=c++17", "-O3", "-g0", "-Wall", "-fvisibility=hidden"]  # without debug symbols: a tenth of the size
FLAGS += ["-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math"]  # vectorizable, and never fused by surprise
AVX2 = ["-mavx2", "-mfma", "-mf16c"]
AVX512 = [*AVX2, "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl"]
GCC_12 = ["-Wno-uninitialized", "-Wno-maybe-uninitialized"]  # warns of its own header: gcc.gnu.org/PR105593
INSTRUCTIONS = {"baseline": [], "avx2": AVX2, "avx512": [*AVX512, *GCC_12]}
TORCH_2_11 = "0x020b000000000000"
PYTHON_3_10 = "0x030a0000"


def torch_directory() -> Path | None:
    """Where torch is installed. Under pip's build isolation it cannot be imported but still lies in site-packages."""
    spec = find_spec("torch")
    found = [Path(spec.origin).parent] if spec and spec.origin else []
    found += [Path(sysconfig.get_path(name)) / "torch" for name in ("platlib", "purelib")]
    return next((path for path in found if (path / "include/torch/csrc/stable/library.h").exists()), None)


class BuildExtension(build_ext):
    """Compiles the kernels once per instruction set and links them with the rest."""

    def build_extension(self, ext: Extension) -> None:
        torch = torch_directory()
        if torch is None:
            raise CompileError("torch's headers were not found: install torch first, and pass --no-build-isolation")
        ext.include_dirs = [str(torch / "include"), str(CSRC)]
        ext.library_dirs = [str(torch / "lib")]
        ext.libraries = ["torch_cpu", "torch"]
        x86 = platform.machine().lower() in {"x86_64", "amd64"} and sys.platform != "win32"
        ext.define_macros = [("TORCH_TARGET_VERSION", TORCH_2_11), ("Py_LIMITED_API", PYTHON_3_10)]
        ext.define_macros += [("FUSED_ADAMP_X86", "1")] if x86 else []
        ext.extra_compile_args = ["/std:c++17", "/O2"] if sys.platform == "win32" else FLAGS
        names = [name for name in INSTRUCTIONS if x86 or name == "baseline"]
        with ThreadPoolExecutor(os.cpu_count()) as pool:  # each takes a minute or more
            compiled = pool.map(partial(self.compile_kernels, ext), names)
            ext.extra_objects = list(chain.from_iterable(compiled))
        super().build_extension(ext)

    def compile_kernels(self, ext: Extension, instructions: str) -> list[str]:
        """The object files of one instruction set."""
        return self.compiler.compile(
            [str(CSRC / KERNELS)],
            output_dir=str(Path(self.build_temp) / instructions),
            include_dirs=ext.include_dirs,
            macros=[("FUSED_ADAMP_INSTRUCTIONS", instructions)],
            extra_postargs=[*ext.extra_compile_args, *INSTRUCTIONS[instructions]],
            depends=ext.depends,
        )


setup(
    ext_modules=[
        Extension(
            "fused_adamp._C",
            sources=[str(CSRC / name) for name in SOURCES],
            depends=[str(path) for path in sorted(CSRC.iterdir())],
            py_limited_api=True,
            optional="FUSED_ADAMP_REQUIRE_EXTENSION" not in os.environ,
        )
    ],
    cmdclass={"build_ext": BuildExtension},
    options={"bdist_wheel": {"py_limited_api": "cp310"}},
)
