"""What the compilers make of the kernels, as far as speed and alignment depend on it. No GPU takes part."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from compile_table import ENVIRONMENT, RULES, TARGETS, Row, Variant, count, item_sizes, variants, whole_widths

from fused_adamp.backends import triton as backend

pytestmark = pytest.mark.skipif(backend.load() is not None, reason=str(backend.load()))

SUPPORT = Path(__file__).parents[1] / "support"
WHICH = os.environ.get(ENVIRONMENT, "usual")
VARIANTS = variants(WHICH)
Rows = dict[Variant, Row]

NVIDIA_REGISTERS = 65536
"""Of a multiprocessor."""
AMD_REGISTERS = 4 * 512 * 64
"""Of a compute unit: four vector units, each with 512 registers of 64 lanes."""
MOST_REGISTERS = 255
"""That a thread of 256 can have: one program on a multiprocessor."""


def _python(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """In a process of its own: this one may run the kernels in Triton's interpreter, which compiles nothing."""
    inherited = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    return subprocess.run(
        [sys.executable, *arguments], env=inherited | environment, capture_output=True, text=True, check=False
    )


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Rows:
    path = tmp_path_factory.mktemp("compile") / "rows.jsonl"
    run = _python(str(SUPPORT / "compile_table.py"), "--json", str(path), **{ENVIRONMENT: WHICH})
    assert run.returncode == 0, run.stderr
    print(run.stdout)
    found = [Row(**json.loads(line, object_hook=_with_numbers)) for line in path.read_text().splitlines()]
    return dict(zip(VARIANTS, found, strict=True))


def _with_numbers(fields: dict[str, object]) -> dict[str | int, object]:
    """JSON's keys are strings, also those that were sizes."""
    return {int(key) if key.isdecimal() else key: value for key, value in fields.items()}


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


every_variant = pytest.mark.parametrize("variant", VARIANTS, ids=str)
aligned = pytest.mark.parametrize("variant", [v for v in VARIANTS if v.layout == "ALIGNED"], ids=str)
unaligned = pytest.mark.parametrize("variant", [v for v in VARIANTS if v.layout != "ALIGNED"], ids=str)


@every_variant
def test_nothing_is_spilled_to_memory(variant: Variant, rows: Rows) -> None:
    row = rows[variant]
    assert row.spill_bytes == 0, f"{variant}: {row.spill_bytes} bytes a thread, at {row.registers} registers"


@every_variant
def test_as_many_programs_fit_as_are_counted_on(variant: Variant, rows: Rows) -> None:
    row = rows[variant]
    most = MOST_REGISTERS
    # The noise takes registers, and so do verdicts: one program. Redo computes in float64.
    crowded = variant.kernel == "one_pass" and (variant.rounding == "stochastic" or variant.shared)
    crowded |= variant.kernel.startswith("redo")
    if variant.layout == "ALIGNED" and "fp64" not in variant.dtypes and not crowded:
        available = AMD_REGISTERS if TARGETS[variant.target][0] == "hip" else NVIDIA_REGISTERS
        most = available // (row.threads * backend._PROGRAMS_PER_MULTIPROCESSOR)
    assert row.registers <= most, f"{variant}: {row.registers} registers a thread, {most} would do"


@every_variant
def test_the_code_takes_only_types_of_arguments_for_granted(variant: Variant, rows: Rows) -> None:
    assert rows[variant].assumptions == []


@every_variant
def test_each_kernel_accesses_the_tensors_it_says(variant: Variant, rows: Rows) -> None:
    row = rows[variant]
    assert set(row.loads) == _loaded(variant), variant
    assert set(row.stores) == _stored(variant), variant


@every_variant
def test_no_compiler_decides_what_is_fused(variant: Variant, rows: Rows) -> None:
    """A formula is inlined in many places, and each would be rounded in its own way."""
    assert not rows[variant].fuses
    for operation in rows[variant].arithmetic:
        assert operation.split(".")[0] not in ("add", "sub", "mul") or ".rn" in operation, operation


def _with_float32_weights(variant: Variant) -> Variant:
    return variant._replace(dtypes=("fp32", "fp32", variant.dtypes[2]), rounding="nearest")


with_remainder = [v for v in VARIANTS if v.rounding == "remainder" and _with_float32_weights(v) in VARIANTS]


@pytest.mark.parametrize("variant", with_remainder, ids=str)
def test_a_remainder_changes_no_arithmetic(variant: Variant, rows: Rows) -> None:
    """The same operations in the same order as for float32 weights: so the run is the same, bit for bit."""
    row, whole = rows[variant], rows[_with_float32_weights(variant)]
    assert row.sums == whole.sums
    assert row.arithmetic == whole.arithmetic


@aligned
def test_aligned_tensors_are_accessed_many_elements_at_a_time(variant: Variant, rows: Rows) -> None:
    row, widths = rows[variant], whole_widths(variant)
    for what, accesses in (("loads", row.loads), ("stores", row.stores)):
        assert all(count(accesses, widths, wide=True).values()), f"{variant}: {what} {accesses}"
        # Only the end of a vector, which fills no whole 16 bytes, is narrower: in update, and where only squares are.
        narrow = 0 if variant.kernel == "dot" else 1
        assert all(n <= narrow for n in count(accesses, widths, wide=False).values()), f"{variant}: {what} {accesses}"


@unaligned
def test_other_tensors_are_accessed_element_by_element(variant: Variant, rows: Rows) -> None:
    """Anything wider would be an error where the address is no multiple of it."""
    row, size_of = rows[variant], item_sizes(variant)
    for accesses in (row.loads, row.stores):
        for stream, sizes in accesses.items():
            assert set(sizes) == {size_of[stream]}, f"{variant}: {stream} {accesses}"
