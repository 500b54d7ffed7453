"""Two ranks that share a GPU and talk by gloo: the numbers of one process, though no rank waits for what is told."""

from __future__ import annotations

import warnings

import pytest
import torch
import uninstalled  # noqa: F401
from distributed import FLAT, Record, Run, assert_within, record, run
from trajectory import RULES

from fused_adamp.backends import BACKENDS

if not torch.cuda.is_available():
    pytest.skip("no CUDA device: nothing here was checked", allow_module_level=True)


def follow(
    layout: str, rule: str, told: Record, max_norm: float | None, backend: str = "triton", device: str = "cuda"
) -> None:
    """Does in a layout on the GPU what one process did on the CPU."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's, of a mesh of more ranks than GPUs
        ours = Run(layout, _on(device, told.weights), rule, backend=backend)
        for grads, norm, decisions in zip(told.grads, told.norms, told.decisions, strict=True):
            ours.give(_on(device, grads))
            found = ours.advance(max_norm)
            assert ours.decisions() == decisions
            assert max_norm is None or abs(found - norm) <= 1e-12 * norm
        values = ours.values()
        assert_within(values, {name: t if t.ndim == 0 else t.to(device) for name, t in told.values.items()})


def _on(device: str, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: t.to(device) for name, t in tensors.items()}


@pytest.mark.xdist_group("two ranks")
@pytest.mark.parametrize("layout", ["TP column", "TP row", FLAT])
@pytest.mark.parametrize("max_norm", [None, 0.5], ids=["no clip", "clip"])
@pytest.mark.parametrize("rule", list(RULES))
@pytest.mark.parametrize("backend", ["triton", "cuda"])
def test_numbers_of_one_process(backend: str, rule: str, max_norm: float | None, layout: str) -> None:
    (chosen,) = (b for b in BACKENDS if b.name == backend)
    if reason := chosen.unavailable(torch.device("cuda", 0)):
        pytest.skip(f"{backend}: {reason}")
    told = record("even", rule, 5, 0, max_norm, backend="reference")
    run(2, follow, layout, rule, told, max_norm, backend, timeout=100)
