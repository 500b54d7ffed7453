"""Every backend against the reference in float64, and bitwise repeatability."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING

import pytest
import torch
from covering import usual

import fused_adamp
from fused_adamp.reference import Decision
from fused_adamp.verify import LAYOUTS, SHAPES, Case, cases, check, lay_out, make_gradient, possible

if TYPE_CHECKING:
    from collections.abc import Hashable

CASES = cases()


def factors(case: Case) -> tuple[Hashable, ...]:
    dtypes = case.dtype, case.gradient_dtype
    return case.optimizer, str(case.options), case.shape, case.decision, dtypes, case.layout, case.late, case.scale


@pytest.mark.parametrize("case", usual(CASES, [*map(factors, CASES)]))
def test_every_step_equals_the_reference(case: Case, backend: str) -> None:
    outcome = check(case, backend)
    assert outcome.passed(), outcome
    if "delta" not in case.options:
        assert {theirs for _, theirs in outcome.decisions} == {case.decision}, "the case is not what it says"


@pytest.mark.parametrize("row", [0, 20, 511, 512, 1000, 1535])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_one_row_that_fails_decides_wherever_it_is(row: int, dtype: torch.dtype, backend: str) -> None:
    """Three tiles of the CPU backend, whose first rows it goes by to guess."""
    generator = torch.Generator().manual_seed(0)
    p = torch.nn.Parameter(torch.randn(1536, 64, generator=generator, dtype=torch.float64).to(dtype))
    p.grad = make_gradient(p.detach().double(), Decision.CHANNEL, generator).to(dtype)
    p.grad[row] += 100 * p.detach()[row]
    optimizer = fused_adamp.AdamP([p], lr=0.1, backend=backend)
    optimizer.step()
    assert optimizer.decisions()[p] is Decision.NONE
    (record,) = optimizer.projection_report()
    assert record.cosine == pytest.approx(80, rel=0.02)  # its cosine is almost 1, the threshold is delta / sqrt(64)


@pytest.mark.parametrize("decision", Decision)
@pytest.mark.parametrize("state_dtype", [torch.float32, torch.bfloat16])
def test_bfloat16_weights_are_rounded_once(state_dtype: torch.dtype, decision: Decision, backend: str) -> None:
    """Nothing is recovered from a weight that has been rounded. A value near a tie may go either way."""
    generator = torch.Generator().manual_seed(0)
    p = torch.nn.Parameter(torch.randn(1536, 64, generator=generator, dtype=torch.float64).bfloat16())
    p.grad = make_gradient(p.detach().double(), decision, generator).bfloat16()
    expected, grad = p.detach().double(), p.grad.double()
    options = {"lr": 0.3, "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.1, "delta": 0.1, "wd_ratio": 0.5}
    optimizer = fused_adamp.AdamP([p], **options, state_dtype=state_dtype, backend=backend)  # type: ignore[arg-type]
    optimizer.step()
    moments = torch.zeros_like(expected), torch.zeros_like(expected)
    assert fused_adamp.adamp_ref(expected, grad, *moments, 1, **options) is decision  # type: ignore[arg-type]
    assert optimizer.decisions()[p] is decision
    assert (p.detach() != expected.bfloat16()).double().mean() < 0.005


def test_the_table_reaches_every_decision_layout_and_option() -> None:
    seen = {(case.optimizer, case.decision) for case in CASES}
    assert seen == set(itertools.product(("AdamP", "SGDP"), Decision))
    assert {case.layout for case in CASES} == set(LAYOUTS)
    assert {case.shape for case in CASES} == set(SHAPES)


def _train(steps: int, threads: int, backend: str = "cpu", **options: object) -> list[torch.Tensor]:
    """Steps one parameter of every shape, decision and a few layouts in one optimizer; all weights and state."""
    generator = torch.Generator().manual_seed(1)
    params = []
    decisions = []
    for shape, layout in itertools.product(SHAPES.values(), ("contiguous", "offset")):
        for decision in possible(shape):
            value = torch.randn(shape, generator=generator)
            params.append(torch.nn.Parameter(lay_out(value, layout)))
            decisions.append(decision)
    optimizer = fused_adamp.AdamP(params, lr=0.1, weight_decay=0.1, backend=backend, **options)  # type: ignore[arg-type]
    before = torch.get_num_threads()
    try:
        for _ in range(steps):
            torch.set_num_threads(1)
            for p, decision in zip(params, decisions, strict=True):
                p.grad = make_gradient(p.detach().double(), decision, generator).float()
            torch.set_num_threads(threads)
            optimizer.step()
    finally:
        torch.set_num_threads(before)
    assert set(optimizer.decisions().values()) == set(Decision), "the run does not reach every decision"
    state = [optimizer.state[p][name] for p in params for name in ("step", "exp_avg", "exp_avg_sq")]
    return [p.detach() for p in params] + state


@pytest.fixture(scope="module")
def single_threaded() -> list[torch.Tensor]:
    return _train(3, threads=1)


@pytest.mark.parametrize("threads", [1, 2, 3, 8])
def test_results_are_bitwise_equal_for_any_number_of_threads(threads: int, single_threaded: list[torch.Tensor]) -> None:
    for a, b in zip(single_threaded, _train(3, threads), strict=True):
        assert torch.equal(a, b)


def test_results_are_bitwise_equal_over_a_hundred_runs() -> None:
    p = torch.randn(65, 1111, generator=torch.Generator().manual_seed(0))
    g = make_gradient(p.double(), Decision.LAYER, torch.Generator().manual_seed(1)).float()
    results = []
    for _ in range(100):
        weight = torch.nn.Parameter(p.clone())
        weight.grad = g.clone()
        fused_adamp.AdamP([weight], lr=0.1, backend="cpu").step()
        results.append(weight.detach())
    assert all(torch.equal(results[0], r) for r in results)


@pytest.mark.parametrize("name", ["baseline", "avx2", "avx512"])
def test_every_instruction_set_gives_the_same_numbers(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = _train(2, threads=1)
    monkeypatch.setenv("FUSED_ADAMP_CPU", name)
    try:
        found = _train(2, threads=2)
    except RuntimeError as error:
        if "is not an instruction set that this processor runs" not in str(error):
            raise
        pytest.skip(f"this processor has no {name}")
    for a, b in zip(expected, found, strict=True):
        if name == "baseline":  # rounds the product of a fused multiply-add once more
            torch.testing.assert_close(a, b, rtol=2e-5, atol=2e-6)
        else:
            assert torch.equal(a, b)


def test_an_unknown_instruction_set_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FUSED_ADAMP_CPU", "mmx")
    with pytest.raises(RuntimeError, match=r"FUSED_ADAMP_CPU=mmx .*baseline, avx2 or avx512"):
        _train(1, threads=1)
