"""The CUDA C++ kernels as NVRTC compiles them: registers, spills, widths of accesses. No GPU is needed."""

from __future__ import annotations

import pytest
from compile_table import Variant, is_usual, item_sizes
from cuda_table import KERNELS, TARGETS, blocks, row_of, spec_of, variants
from test_triton_compile import NVIDIA_REGISTERS, _with_float32_weights

from fused_adamp.backends import cuda

pytestmark = pytest.mark.skipif(cuda.load() is not None, reason=str(cuda.load()))

VARIANTS = variants()


@pytest.mark.parametrize(
    "variant", [pytest.param(v, id=str(v), marks=() if is_usual(v) else pytest.mark.exhaustive) for v in VARIANTS]
)
def test_compiled_kernel(variant: Variant) -> None:
    row, spec = row_of(variant), spec_of(variant)
    assert row.spill_bytes == 0, f"{row.spill_bytes} bytes a thread spill to memory, at {row.registers} registers"
    assert row.registers <= NVIDIA_REGISTERS // (cuda._THREADS * blocks(variant))

    # No compiler decides what is fused: a formula is inlined in many places, and each would be rounded in its own way.
    for operation in row.arithmetic:
        assert operation.split(".")[0] not in ("add", "sub", "mul") or ".rn" in operation, operation

    # A remainder changes no arithmetic: the same operations as for float32 weights.
    if whole := _with_float32_weights(variant):
        assert row.arithmetic == row_of(whole).arithmetic

    sizes = {size for stream, size in item_sizes(variant).items() if stream != "r" or spec.rounding == "remainder"}
    wide = {min(cuda.WIDEST_LOAD, spec.width * size) for size in sizes}
    for what, accesses in (("loads", row.loads), ("stores", row.stores)):
        assert set(accesses) <= wide | sizes, f"{what} {accesses}"
        if spec.layout == "aligned" and accesses:  # element by element only at the end of a vector
            whole_accesses = sum(n for size, n in accesses.items() if size in wide)
            assert sum(accesses.values()) - whole_accesses <= 5, f"{what} {accesses}"
            assert whole_accesses, f"{what} {accesses}"
    assert bool(row.stores) == (variant.kernel in ("update", "one_pass"))


def test_the_usual_variants_reach_every_kernel_target_layout_and_rounding() -> None:
    usual = list(filter(is_usual, VARIANTS))
    assert {v.kernel for v in usual} == set(KERNELS)
    assert {v.target for v in usual} == set(TARGETS)
    for field in ("layout", "rounding", "shared"):
        assert {getattr(v, field) for v in usual} == {getattr(v, field) for v in VARIANTS}, field
