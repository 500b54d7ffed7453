"""Steps of the Triton backend whose kernels, compiled for sm_90, run in the emulator. Compared with the reference.

test_emulated.py runs this file under each plan in a process of its own, since another may interpret the kernels. By hand:

    FUSED_ADAMP_PLAN=one_pass python -m pytest tests/ptx/emulated_steps.py
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import pytest
import torch
from harness import Harness, Schedule, unavailable
from tolerances import assert_close
from torch.nn import Parameter

from fused_adamp import AdamP
from fused_adamp.backends import triton
from fused_adamp.reference import Decision
from fused_adamp.verify import make_gradient

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = pytest.mark.skipif(unavailable() is not None, reason=f"{unavailable()}; no compiled kernel was run")

PLAN = os.environ.get(triton.PLAN) or "one_pass"
TILE = 1 << triton._LOG_TILE
MODEL = (
    ((24, 16), Decision.CHANNEL),
    ((40, 136), Decision.LAYER),
    ((16, 16), Decision.NONE),
    ((300,), Decision.NONE),
    ((2, TILE + 8), Decision.CHANNEL),
)
"""Each decision, of one tile and of several. All are aligned, so that one kernel a stage has to be compiled."""
STEPS = 2
KERNELS = {
    "one_pass": {"one_pass_kernel", "redo_kernel"},
    "split": {"measure_kernel", "dot_kernel", "update_kernel", "redo_kernel"},
}


@pytest.fixture(autouse=True)
def _one_thread(one_thread: None) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(triton.PLAN, PLAN)
        yield


def steps(harness: Harness, count: int) -> None:
    """Steps a model in the emulator and in the reference, and compares weights, state and decisions after each step."""
    generator = torch.Generator().manual_seed(0)
    values = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape, _ in MODEL]
    with harness.installed():
        ours, theirs = (
            AdamP([Parameter(v.float()) for v in values], lr=0.1, weight_decay=0.1, backend=name)
            for name in ("triton", "reference")
        )
        for _ in range(count):
            pairs = list(zip(*(o.param_groups[0]["params"] for o in (ours, theirs)), strict=True))
            for (p, q), (_, decision) in zip(pairs, MODEL, strict=True):
                p.grad = make_gradient(p.detach().double(), decision, generator).float()
                q.grad = p.grad.clone()
            ours.step()
            theirs.step()
            for n, (p, q) in enumerate(pairs):
                assert_close(p, q, f"weight {n}")
                for key, state in ours.state[p].items():
                    assert_close(state, theirs.state[q][key], f"{key} {n}")
            assert [*ours.decisions().values()] == [*theirs.decisions().values()]
            assert [*ours.decisions().values()] == [decision for _, decision in MODEL]


@pytest.mark.parametrize("resident", [1, 3])
def test_compiled_steps_equal_the_reference(resident: int) -> None:
    harness = Harness(Schedule(seed=resident, resident=resident, programs=3))
    steps(harness, STEPS)
    assert not (found := harness.take()), "\n".join(found)
    kernels = {launcher.label.split()[0] for launcher in harness.kernels.values()}
    assert kernels == KERNELS[PLAN]
    assert harness.launches == STEPS * len(kernels)


@pytest.mark.skipif(PLAN != "one_pass", reason="the kernels of the split plan wait for nobody")
@pytest.mark.parametrize(
    ("strong", "weak"),
    [("gpu.release.exch", "gpu.relaxed.exch"), ("gpu.acq_rel.add", "gpu.relaxed.add"), ("gpu.acquire", "gpu.relaxed")],
)
def test_kernels_with_weaker_order_are_found(strong: str, weak: str) -> None:
    """A planted fault: threads that tell each other of their results do not order them."""
    changed = []

    def transform(name: str, ptx: str) -> str:
        changed.append(ptx.count(strong))
        return ptx.replace(strong, weak)

    harness = Harness(Schedule(seed=1, resident=3, programs=3), transform=transform)
    with harness.installed():
        params = [Parameter(torch.randn(shape)) for shape, _ in MODEL]
        for p in params:
            p.grad = torch.randn_like(p)
        optimizer = AdamP(params, lr=0.1, backend="triton")
        for _ in range(3):
            optimizer.step()
    assert sum(changed) > 0
    assert any(finding.split("\n")[1].strip().startswith("race at") for finding in harness.take())
