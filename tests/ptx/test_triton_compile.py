"""Compiled kernels: registers, spills, widths of accesses and alignment. No GPU is needed."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from compile_table import (
    ENVIRONMENT,
    FIRST,
    RULES,
    TARGETS,
    Row,
    Variant,
    cached,
    count,
    is_usual,
    item_sizes,
    variants,
    whole_widths,
)

from fused_adamp.backends import triton as backend

pytestmark = pytest.mark.skipif(backend.load() is not None, reason=str(backend.load()))

SUPPORT = Path(__file__).parents[1] / "support"
VARIANTS = variants()
Rows = dict[Variant, Row]

NVIDIA_REGISTERS = 65536
"""Registers of a multiprocessor."""
AMD_REGISTERS = 4 * 512 * 64
"""Registers of a compute unit: four vector units, each with 512 registers of 64 lanes."""
MOST_REGISTERS = 255
"""The most registers that each of 256 threads can have: then one program fits on a multiprocessor."""


def _python(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs Python in a new process: this one may use Triton's interpreter, which compiles nothing."""
    inherited = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    return subprocess.run(
        [sys.executable, *arguments], env=inherited | environment, capture_output=True, text=True, check=False
    )


@pytest.fixture(scope="module")
def rows(request: pytest.FixtureRequest) -> Rows:
    """The rows of all variants that this run tests, and of those that they are compared with. Compiled together."""
    tested = {item.callspec.params.get("variant") for item in request.session.items if hasattr(item, "callspec")}
    wanted = [v for v in VARIANTS if v in tested or any(_with_float32_weights(w) == v for w in tested if w)]
    found = {variant: cached(variant) for variant in wanted}
    if missing := [str(variant) for variant, row in found.items() if row is None]:
        run = _python(str(SUPPORT / "compile_table.py"), *missing)
        assert run.returncode == 0, run.stderr
        print(run.stdout)
    return {variant: row for variant in wanted if (row := found[variant] or cached(variant))}


def _tensors(variant: Variant, *always: str) -> set[str]:
    adaptive, buffer = RULES[variant.rule]
    return {*always, *(["m"] if buffer else []), *(["v"] if adaptive else [])}


def _weight(variant: Variant) -> set[str]:
    return {"p", "r"} if variant.rounding == "remainder" else {"p"}


def _loaded(variant: Variant) -> set[str]:
    if variant.kernel == "redo_ahead" and not variant.shared:
        return {"g"}
    return {"g", *_weight(variant)} if variant.kernel == "measure" else _tensors(variant, "g", *_weight(variant))


def _stored(variant: Variant) -> set[str]:
    stores = variant.kernel in ("update", "one_pass", "redo")
    return _tensors(variant, *_weight(variant)) if stores else set()


_MISALIGNED = """
import sys
sys.path.insert(0, sys.argv[1])
import torch
from compile_table import Driver, Variant, arguments, assumptions, make_spec
from fused_adamp.backends import triton as backend
from fused_adamp.kernels import plans
from triton.compiler import CompiledKernel
from triton.runtime import driver
driver.set_active(Driver(sys.argv[2]))
torch.cuda.current_device = lambda: 0
CompiledKernel._init_handles = lambda self: None
kernel, spec = plans.dot_kernel, make_spec(Variant("dot", sys.argv[2], rule="SGDP without buffer"))
first = backend._run(kernel, 1, tuple(arguments(kernel)), spec)
shifted = tuple(a.view(-1)[1:] if isinstance(a, torch.Tensor) else a + 1 for a in arguments(kernel))
second = backend._run(kernel, 1, shifted, spec)
print(first.kernel is second.kernel, assumptions(second.kernel))
"""


@pytest.mark.parametrize("target", ["sm_90", "gfx942"])
def test_a_kernel_compiled_for_aligned_arguments_runs_others(target: str, tmp_path: Path) -> None:
    """The host compiles once. It must not let Triton compile in what only the first arguments fulfil."""
    run = _python("-c", _MISALIGNED, str(SUPPORT), target, TRITON_CACHE_DIR=str(tmp_path))
    assert run.returncode == 0, run.stderr
    assert run.stdout.splitlines()[-1] == "True []"


def _with_float32_weights(variant: Variant) -> Variant | None:
    """The variant without a remainder whose run is the same, bit for bit."""
    if variant.rounding not in ("remainder", FIRST):
        return None
    state = "fp32" if variant.rounding == FIRST else variant.dtypes[2]
    return variant._replace(dtypes=("fp32", "fp32", state), rounding="nearest")


def _most_registers(variant: Variant, row: Row) -> int:
    """That a thread may have so that as many programs fit as are counted on."""
    # The noise takes registers, and so do verdicts: one program. Redo computes in float64.
    crowded = variant.kernel == "one_pass" and (variant.rounding == "stochastic" or variant.shared)
    crowded |= variant.kernel.startswith("redo")
    if variant.layout != "ALIGNED" or "fp64" in variant.dtypes or crowded:
        return MOST_REGISTERS
    available = AMD_REGISTERS if TARGETS[variant.target][0] == "hip" else NVIDIA_REGISTERS
    return available // (row.threads * backend._PROGRAMS_PER_MULTIPROCESSOR)


@pytest.mark.parametrize(
    "variant",
    [
        pytest.param(v, id=str(v), marks=() if is_usual(v) or ENVIRONMENT in os.environ else pytest.mark.exhaustive)
        for v in VARIANTS
    ],
)
def test_compiled_kernel(variant: Variant, rows: Rows) -> None:
    row = rows[variant]
    assert row.spill_bytes == 0, f"{row.spill_bytes} bytes a thread spill to memory, at {row.registers} registers"
    most = _most_registers(variant, row)
    assert row.registers <= most, f"{row.registers} registers a thread, {most} would do"
    assert row.assumptions == [], "the code takes more than types of arguments for granted"
    assert set(row.loads) == _loaded(variant)
    assert set(row.stores) == _stored(variant)

    # No compiler decides what is fused: a formula is inlined in many places, and each would be rounded in its own way.
    assert not row.fuses
    for operation in row.arithmetic:
        assert operation.split(".")[0] not in ("add", "sub", "mul") or ".rn" in operation, operation

    # A remainder changes no arithmetic: the same operations in the same order as for float32 weights.
    if whole := rows.get(_with_float32_weights(variant)):
        assert row.sums == whole.sums
        assert row.arithmetic == whole.arithmetic

    widths, size_of = whole_widths(variant), item_sizes(variant)
    for what, accesses in (("loads", row.loads), ("stores", row.stores)):
        if variant.layout == "ALIGNED":  # many elements at a time
            assert all(count(accesses, widths, wide=True).values()), f"{what} {accesses}"
            # Only the end of a vector, which fills no whole 16 bytes, is narrower: in update, and where squares are.
            narrow = 0 if variant.kernel == "dot" else 1
            assert all(n <= narrow for n in count(accesses, widths, wide=False).values()), f"{what} {accesses}"
        else:  # element by element: anything wider would be an error where the address is no multiple of it
            for stream, sizes in accesses.items():
                assert set(sizes) == {size_of[stream]}, f"{what} of {stream} {accesses}"


def test_the_usual_variants_reach_every_kernel_target_layout_and_rounding() -> None:
    for field in ("kernel", "target", "layout", "rounding", "shared"):
        every = {getattr(v, field) for v in VARIANTS}
        assert {getattr(v, field) for v in VARIANTS if is_usual(v)} == every or ENVIRONMENT in os.environ, field
