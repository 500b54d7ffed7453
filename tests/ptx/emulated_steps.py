"""Steps of the Triton backend whose kernels, compiled for sm_90, run in the emulator. Compared with the reference.

test_emulated.py runs this file and those beside it under each plan, in a process of its own. By hand:

    FUSED_ADAMP_PLAN=split python -m pytest tests/ptx/emulated_steps.py
    FUSED_ADAMP_PLAN=split python -m pytest -m "" tests/ptx/emulated_steps.py     # takes its time
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from harness import BACKEND, Harness, Schedule
from models import (
    ADAMP,
    MODEL,
    PLAN,
    SGDP_,
    TILE,
    Shapes,
    assert_same,
    every_alignment,
    exhaustive,
    grad_of,
    model,
    pair,
    params_of,
    tensors,
    usual_under,
)
from tolerances import assert_close
from torch.nn import Parameter

from fused_adamp import SGDP, AdamP
from fused_adamp.reference import Decision
from fused_adamp.verify import make_gradient

pytestmark = pytest.mark.usefixtures("emulated")

STEPS = 2
KERNELS = {
    "one_pass": {"one_pass_kernel", "redo_kernel"},
    "split": {"measure_kernel", "dot_kernel", "update_kernel", "redo_kernel"},
}


def steps(harness: Harness, count: int) -> None:
    """Steps the model in the emulator and in the reference, and compares all of it after each step."""
    generator = torch.Generator().manual_seed(0)
    values = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape, _ in MODEL]
    with harness.installed():  # in the place of the fixture's
        ours, theirs = (
            AdamP([Parameter(v.float()) for v in values], lr=0.1, weight_decay=0.1, backend=name)
            for name in (BACKEND, "reference")
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
    assert kernels == KERNELS[PLAN] - ({"redo_kernel"} if BACKEND == "cuda" else set())
    assert harness.launches == STEPS * len(kernels)


WEAKER = {
    "triton": [("gpu.acq_rel.add", "gpu.relaxed.add"), ("gpu.release.exch", "gpu.relaxed.exch")],
    "cuda": [("atom.acq_rel.gpu", "atom.relaxed.gpu"), ("st.release.gpu", "st.relaxed.gpu")],
}[BACKEND]
WEAKER += [{"triton": ("gpu.acquire", "gpu.relaxed"), "cuda": ("ld.acquire.gpu", "ld.relaxed.gpu")}[BACKEND]]
if PLAN == "split":  # its kernels wait for nobody
    del WEAKER[1:]


@pytest.mark.parametrize(("strong", "weak"), WEAKER)
def test_kernels_with_weaker_order_are_found(strong: str, weak: str) -> None:
    """A planted fault: threads that tell each other of their results do not order them."""
    changed = []

    def transform(name: str, ptx: str) -> str:
        changed.append(ptx.count(strong))
        return ptx.replace(strong, weak)

    for seed in range(8):  # a race needs an interleaving that shows it
        schedule = Schedule(seed=seed, resident=3, programs=3, policy="by chance", tiles=1)
        harness = Harness(schedule, transform=transform)
        with harness.installed():
            params = [Parameter(torch.randn(shape)) for shape, _ in MODEL]
            for p in params:
                p.grad = torch.randn_like(p)
            optimizer = AdamP(params, lr=0.1, backend=BACKEND)
            for _ in range(3):
                optimizer.step()
        assert sum(changed) > 0
        if any(finding.split("\n")[1].strip().startswith("race at") for finding in harness.take()):
            return
    pytest.fail("no race was found")


def test_more_parameters_than_one_program_prepares() -> None:
    """All of them have to be prepared before the first one is stepped."""
    ours, theirs = pair(AdamP, model((*[((5,), Decision.NONE)] * 200, *MODEL[3:5])), **ADAMP)
    for _ in range(2):
        for optimizer in (ours, theirs):
            optimizer.step()
        assert_same(ours, theirs)


@pytest.mark.parametrize("row", [0, 31, 32, 70, 199])
def test_one_row_decides_for_all(row: int) -> None:
    """Wherever it lies in a tile, and in whichever warp."""
    params = model((((200, 8), Decision.CHANNEL),))
    grad_of(params[0])[row] = params[0].detach()[row]
    ours, theirs = pair(SGDP, params, **SGDP_)
    for optimizer in (ours, theirs):
        optimizer.step()
    assert_same(ours, theirs)
    assert [*ours.decisions().values()] != [Decision.CHANNEL]


# Scaling and clipping.


@every_alignment
@pytest.mark.parametrize(("make", "options"), [(AdamP, ADAMP), (SGDP, SGDP_)])
def test_a_clipped_step_equals_the_reference(make: Any, options: Any, whole: Shapes) -> None:
    ours, theirs = pair(make, model((*whole, ((2, 17 * TILE), Decision.CHANNEL))), **options)
    ours.found_inf = torch.ones(1)  # makes state and moves nothing: only then do kernels take the norm
    ours.step()
    del ours.found_inf
    for number in range(1 + (make is SGDP)):
        expected = torch.nn.utils.get_total_norm([grad_of(p) for p in params_of(ours)])
        norms = [optimizer.clip_grad_norm_(0.5) for optimizer in (ours, theirs)]
        torch.testing.assert_close(norms[0], expected, rtol=1e-5, atol=0)
        for optimizer in (ours, theirs):
            optimizer.step()
        assert_same(ours, theirs)
        assert ours.decisions()[params_of(ours)[3]] is Decision.CHANNEL or number > 0


@pytest.mark.parametrize("norms", [(2.0,), (2.0, 1.0), (2.0, float("inf"))])
@pytest.mark.parametrize(
    "change", ["gradient", "weight", "weight through .data", "delta", "a gradient missing", "nothing"]
)
@every_alignment
def test_a_step_decides_by_what_it_finds(change: str, norms: tuple[float, ...], whole: Shapes) -> None:
    ours, theirs = pair(AdamP, model(whole[3:6]), **ADAMP)
    for optimizer in (ours, theirs):
        optimizer.step()
        optimizer.clip_grad_norm_(0.5, norms[0])
        p = params_of(optimizer)[0]
        if change == "gradient":
            grad_of(p).copy_(p.detach())
        elif change == "weight":
            p.detach().copy_(grad_of(p))
        elif change == "weight through .data":
            p.data.copy_(grad_of(p))
        elif change == "delta":
            optimizer.param_groups[0]["delta"] = 1e3
        elif change == "a gradient missing":
            p.grad = None
        for norm_type in norms[1:]:
            optimizer.clip_grad_norm_(0.5, norm_type)
        optimizer.step()
    assert_same(ours, theirs)


def test_the_norm_leaves_out_what_has_no_gradient_any_more() -> None:
    optimizer = AdamP(model(MODEL[3:6]), **ADAMP, backend=BACKEND)
    optimizer.clip_grad_norm_(1.0)
    params_of(optimizer)[0].grad = None
    expected = torch.nn.utils.get_total_norm([p.grad for p in params_of(optimizer) if p.grad is not None])
    torch.testing.assert_close(optimizer.clip_grad_norm_(1.0), expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize("rounding", [usual_under("one_pass", "nearest"), usual_under("split", "stochastic")])
@pytest.mark.parametrize("clip", [False, True])
@pytest.mark.parametrize("cols", [72, pytest.param(65, marks=exhaustive)])
def test_a_step_on_infinite_gradients_moves_nothing(rounding: str, clip: bool, cols: int) -> None:
    params = model((MODEL[1], ((17, cols), Decision.CHANNEL), MODEL[5]), torch.bfloat16)
    optimizer: Any = AdamP(params, **ADAMP, rounding=rounding, backend=BACKEND)
    optimizer.step()
    (bucket,) = optimizer.buckets
    before = [t.clone() for t in (*tensors(optimizer), bucket.decisions, bucket.results)]
    for found_inf, moves in ((1.0, False), (math.nan, False), (0.0, True)):
        for p in params:
            grad_of(p).copy_(torch.randn(p.shape))
        optimizer.grad_scale, optimizer.found_inf = torch.tensor([4.0]), torch.tensor([found_inf])
        if clip:
            optimizer.clip_grad_norm_(1.0)
        optimizer.step()
        after = [*tensors(optimizer), bucket.decisions, bucket.results]
        same = [torch.equal(a.nan_to_num(7), b.nan_to_num(7)) for a, b in zip(after, before, strict=True)]
        assert all(same) != moves, (found_inf, same)


@pytest.mark.parametrize(
    "shapes",
    [((17, 72), (3, 16), (2, TILE + 8), (1, 2 * TILE)), pytest.param(((17, 65), (3, 9)), marks=exhaustive)],
    ids=["aligned", "flat"],
)
def test_the_scale_decides_where_the_clamp_of_tiny_norms_does(shapes: tuple[tuple[int, ...], ...]) -> None:
    """Gradients along the weight, so small that eps stands in for their norm until they are scaled up."""
    seen = set()
    for factor in (0.0, 1.0, 1e3, 1e6, math.nan):
        params = model(tuple((shape, Decision.NONE) for shape in shapes))
        for p in params:
            p.grad = p.detach() * torch.logspace(-13, -12, p.size(0))[:, None]
        ours, theirs = pair(SGDP, params, **SGDP_)
        for optimizer in (ours, theirs):
            optimizer.grad_scale = torch.tensor([1 / factor if factor else math.inf], dtype=torch.float64)
            optimizer.step()
        decisions = list(ours.decisions().values())
        assert decisions == list(theirs.decisions().values()), factor
        seen.update(decisions)
        for a, b in zip(tensors(ours), tensors(theirs), strict=True):
            torch.testing.assert_close(a, b, rtol=2e-5, atol=2e-6, equal_nan=True)
    assert seen >= {Decision.CHANNEL, Decision.NONE}


@every_alignment
@pytest.mark.parametrize("eps", [1e-8, 0.0])
def test_a_gradient_of_zeros_is_orthogonal_unless_nothing_clamps_its_norm(eps: float, whole: Shapes) -> None:
    params = model(whole[3:6])
    for p in params:
        grad_of(p).zero_()
    ours, theirs = pair(SGDP, params, **SGDP_, eps=eps)
    for optimizer in (ours, theirs):
        optimizer.step()
    assert list(ours.decisions().values()) == list(theirs.decisions().values())
    assert set(ours.decisions().values()) == {Decision.CHANNEL if eps else Decision.NONE}


@every_alignment
@pytest.mark.parametrize(("make", "options"), [(AdamP, ADAMP), (SGDP, SGDP_)])
def test_without_eps_nothing_is_divided_by_nothing(make: Any, options: Any, whole: Shapes) -> None:
    """Nor in the parts of a block that are no elements."""
    ours, theirs = pair(make, model(whole), **options, eps=0.0)
    for optimizer in (ours, theirs):
        optimizer.step()
    assert_same(ours, theirs)


def test_without_eps_a_gradient_that_is_scaled_to_nothing_is_orthogonal_to_nothing() -> None:
    """The cosine of nothing is 0/0 then, though that of the gradient before it was scaled is 0."""
    ours, theirs = pair(SGDP, model(MODEL[3:5]), **SGDP_, eps=0.0)
    for optimizer in (ours, theirs):
        optimizer.grad_scale = torch.tensor([math.inf], dtype=torch.float64)
        optimizer.step()
    assert [*ours.decisions().values()] == [*theirs.decisions().values()] == 2 * [Decision.NONE]


# Projections and their report.


@pytest.mark.parametrize(("large", "small"), [((33, 72), (4, 16)), pytest.param((33, 65), (4, 9), marks=exhaustive)])
@pytest.mark.parametrize("eps", [1e-8, 0.0])
def test_the_results_are_those_of_tested_parameters(large: tuple[int, int], small: tuple[int, int], eps: float) -> None:
    shapes = (large, (2, TILE + 8), (2, 17 * TILE), (5,), *[small] * 4)
    params = model(tuple((shape, Decision.NONE) for shape in shapes))
    grad_of(params[7])[0, 0] = math.nan
    groups: list[dict[str, Any]] = [{"params": params[:4] + params[7:]}, {"params": params[4:5], "projection": "layer"}]
    groups += [{"params": params[5:6], "projection": "none"}, {"params": params[6:7], "delta": 0.0}]
    optimizer = AdamP(groups, **ADAMP, eps=eps, backend=BACKEND)
    optimizer.step()
    (bucket,) = optimizer.buckets
    found = {id(p): row.tolist() for p, row in zip(bucket.params, bucket.results, strict=True)}
    for i, p in enumerate(params):
        cosine, norm = found[id(p)]
        if i in (0, 1, 2):
            before = model(tuple((shape, Decision.NONE) for shape in shapes))[i].detach().flatten(1).double()
            g = grad_of(p).flatten(1).double()
            expected = torch.nn.functional.cosine_similarity(g, before).abs().max() / 0.1 * math.sqrt(g.size(1))
            assert (cosine, norm) == pytest.approx((expected.item(), before.norm().item()), rel=1e-5)
        elif i == 7:
            assert cosine == math.inf
        else:
            assert math.isnan(cosine)
            assert math.isnan(norm)
    decisions = [optimizer.decisions()[p] for p in params[4:]]
    assert decisions == [Decision.LAYER, Decision.NONE, Decision.NONE, Decision.NONE]


@exhaustive
def test_moments_of_two_dtypes_are_given_one() -> None:
    ours, theirs = pair(AdamP, model(MODEL[3:5]), **ADAMP)
    for optimizer in (ours, theirs):
        optimizer.step()
        for p in params_of(optimizer):
            optimizer.state[p]["exp_avg"] = optimizer.state[p]["exp_avg"].double()
        optimizer.step()
    assert_same(ours, theirs)
