"""What a step of the Triton backend does beyond verify's table of cases: scaling, clipping, rounding, what ranks share,
CUDA graphs.

test_triton.py runs this file under each plan in a process of its own, since Triton decides when it is imported whether
it interprets. By hand:

    TRITON_INTERPRET=1 FUSED_ADAMP_PLAN=split python -m pytest tests/triton_in_interpreter.py
"""

from __future__ import annotations

import copy
import itertools
import math
import os
from typing import TYPE_CHECKING, Any

import pytest
import test_range
import test_shares
import torch
from torch import Tensor
from torch.nn import Parameter
from torch.utils._python_dispatch import TorchDispatchMode

from fused_adamp import SGDP, AdamP
from fused_adamp.backends import triton
from fused_adamp.bucket import COLUMNS, RESULTS, ROW_SHARES, SHARES, Batch, Need
from fused_adamp.precision import join, split
from fused_adamp.reference import Decision
from fused_adamp.sharding import Sharing
from fused_adamp.verify import Case, cases, lay_out, make_gradient, shapes

if TYPE_CHECKING:
    from collections.abc import Callable

    from fused_adamp.bucket import Scalars
    from fused_adamp.projected import ProjectedOptimizer

pytestmark = [
    pytest.mark.skipif(not triton.interpreted(), reason="TRITON_INTERPRET=1 is not set: test_triton.py sets it"),
    pytest.mark.filterwarnings("ignore"),  # the interpreter's; and rows of a tile that are not there divide 0 by 0
]

PLAN = os.environ.get(triton.PLAN)
TILE = 1 << triton._LOG_TILE
ADAMP = {"lr": 0.1, "weight_decay": 0.1}
SGDP_ = {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.1}

MODEL: tuple[tuple[tuple[int, ...], Decision], ...] = (
    ((), Decision.NONE),
    ((TILE + 3,), Decision.NONE),
    ((0, 3), Decision.NONE),
    ((33, 65), Decision.CHANNEL),
    ((40, 129), Decision.LAYER),
    ((4, 3, 3, 3), Decision.LAYER),
    ((5, 24), Decision.NONE),
    ((2, TILE + 8), Decision.CHANNEL),
    ((1, 3 * TILE), Decision.CHANNEL),
)
"""Every way through the kernels: of several tiles and of one, in rows, in a wide row, in a row of many tiles."""


@pytest.fixture(autouse=True)
def _one_thread(one_thread: None) -> None:
    pass


def model(
    shapes: tuple[tuple[tuple[int, ...], Decision], ...] = MODEL, dtype: torch.dtype = torch.float32
) -> list[Parameter]:
    """Parameters with gradients, the same at every call."""
    generator = torch.Generator().manual_seed(0)
    params = []
    for shape, decision in shapes:
        p = Parameter(torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype))
        p.grad = make_gradient(p.detach().double(), decision, generator).to(dtype)
        params.append(p)
    return params


def pair(make: type[ProjectedOptimizer], params: list[Parameter], **options: Any) -> tuple[Any, Any]:
    """Ours and the reference's optimizer of the same weights."""
    torch.manual_seed(0)
    theirs = [Parameter(p.detach().clone()) for p in params]
    for p, other in zip(params, theirs, strict=True):
        other.grad = None if p.grad is None else p.grad.clone()
    return make(params, **options, backend="triton"), make(theirs, **options, backend="reference")  # type: ignore[call-arg]


def params_of(optimizer: ProjectedOptimizer) -> list[Parameter]:
    return [p for group in optimizer.param_groups for p in group["params"]]


def tensors(optimizer: ProjectedOptimizer) -> list[Tensor]:
    """Weights and state, in a fixed order."""
    states = [(p, optimizer.state.get(p, {})) for p in params_of(optimizer)]
    return [t for p, state in states for t in (p.detach(), *(state[name] for name in sorted(state)))]


def results(optimizer: ProjectedOptimizer) -> dict[str, list[float]]:
    (bucket,) = optimizer.buckets
    return dict(zip(RESULTS, bucket.results.T.tolist(), strict=True))


def assert_same(ours: ProjectedOptimizer, theirs: ProjectedOptimizer) -> None:
    """Decisions, weights and state, to float32's rounding, and what the report says."""
    assert list(ours.decisions().values()) == list(theirs.decisions().values())
    for a, b in zip(tensors(ours), tensors(theirs), strict=True):
        torch.testing.assert_close(a, b, rtol=2e-5, atol=2e-6, check_dtype=False)
    for name, values in results(ours).items():
        expected = torch.tensor(results(theirs)[name])
        # The cosine of an orthogonal pair is what rounding leaves of it.
        torch.testing.assert_close(torch.tensor(values), expected, rtol=2e-5, atol=1e-4, equal_nan=True)


# Scaling and clipping.


@pytest.mark.parametrize(("make", "options"), [(AdamP, ADAMP), (SGDP, SGDP_)])
def test_a_clipped_step_equals_the_reference(make: Any, options: Any) -> None:
    ours, theirs = pair(make, model((*MODEL, ((2, 17 * TILE), Decision.CHANNEL))), **options)
    ours.found_inf = torch.ones(1)  # makes state and moves nothing: only then do kernels take the norm
    ours.step()
    del ours.found_inf
    for number in range(1 + (make is SGDP)):
        expected = torch.nn.utils.get_total_norm([p.grad for p in params_of(ours)])
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
def test_a_step_decides_by_what_it_finds(change: str, norms: tuple[float, ...]) -> None:
    shapes = MODEL[3:6]
    ours, theirs = pair(AdamP, model(shapes), **ADAMP)
    for optimizer in (ours, theirs):
        optimizer.step()
        optimizer.clip_grad_norm_(0.5, norms[0])
        p = params_of(optimizer)[0]
        if change == "gradient":
            p.grad.copy_(p.detach())
        elif change == "weight":
            p.detach().copy_(p.grad)
        elif change == "weight through .data":
            p.data.copy_(p.grad)
        elif change == "delta":
            optimizer.param_groups[0]["delta"] = 1e3
        elif change == "a gradient missing":
            p.grad = None
        for norm_type in norms[1:]:
            optimizer.clip_grad_norm_(0.5, norm_type)
        optimizer.step()
    assert_same(ours, theirs)


def test_the_norm_leaves_out_what_has_no_gradient_any_more() -> None:
    optimizer = AdamP(model(MODEL[3:6]), **ADAMP, backend="triton")
    optimizer.clip_grad_norm_(1.0)
    params_of(optimizer)[0].grad = None
    expected = torch.nn.utils.get_total_norm([p.grad for p in params_of(optimizer) if p.grad is not None])
    torch.testing.assert_close(optimizer.clip_grad_norm_(1.0), expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
@pytest.mark.parametrize("clip", [False, True])
def test_a_step_on_infinite_gradients_moves_nothing(rounding: str, clip: bool) -> None:
    params = model((MODEL[1], ((17, 65), Decision.CHANNEL), MODEL[5]), torch.bfloat16)
    optimizer = AdamP(params, **ADAMP, rounding=rounding, backend="triton")
    optimizer.step()
    (bucket,) = optimizer.buckets
    before = [t.clone() for t in (*tensors(optimizer), bucket.decisions, bucket.results)]
    for found_inf, moves in ((1.0, False), (math.nan, False), (0.0, True)):
        for p in params:
            p.grad.copy_(torch.randn(p.shape))
        optimizer.grad_scale, optimizer.found_inf = torch.tensor([4.0]), torch.tensor([found_inf])
        if clip:
            optimizer.clip_grad_norm_(1.0)
        optimizer.step()
        after = [*tensors(optimizer), bucket.decisions, bucket.results]
        same = [torch.equal(a.nan_to_num(7), b.nan_to_num(7)) for a, b in zip(after, before, strict=True)]
        assert all(same) != moves, (found_inf, same)


def test_the_scale_decides_where_the_clamp_of_tiny_norms_does() -> None:
    """Gradients along the weight, so small that eps stands in for their norm until they are scaled up."""
    seen = set()
    for factor in (0.0, 1.0, 1e3, 1e6, math.nan):
        params = model(tuple((shape, Decision.NONE) for shape in ((17, 65), (3, 9), (2, TILE + 8), (1, 2 * TILE))))
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


@pytest.mark.parametrize("eps", [1e-8, 0.0])
def test_a_gradient_of_zeros_is_orthogonal_unless_nothing_clamps_its_norm(eps: float) -> None:
    params = model(MODEL[3:6])
    for p in params:
        p.grad.zero_()
    ours, theirs = pair(SGDP, params, **SGDP_, eps=eps)
    for optimizer in (ours, theirs):
        optimizer.step()
    assert list(ours.decisions().values()) == list(theirs.decisions().values())
    assert set(ours.decisions().values()) == {Decision.CHANNEL if eps else Decision.NONE}


# Projections and their report.


def test_the_results_are_those_of_tested_parameters() -> None:
    shapes = ((33, 65), (2, TILE + 8), (2, 17 * TILE), (5,), (4, 9), (4, 9), (4, 9), (4, 9))
    params = model(tuple((shape, Decision.NONE) for shape in shapes))
    params[7].grad[0, 0] = math.nan
    groups = [{"params": params[:4] + params[7:]}, {"params": params[4:5], "projection": "layer"}]
    groups += [{"params": params[5:6], "projection": "none"}, {"params": params[6:7], "delta": 0.0}]
    optimizer = AdamP(groups, **ADAMP, backend="triton")
    optimizer.step()
    (bucket,) = optimizer.buckets
    found = {id(p): row.tolist() for p, row in zip(bucket.params, bucket.results, strict=True)}
    for i, p in enumerate(params):
        cosine, norm = found[id(p)]
        if i in (0, 1, 2):
            before = model(tuple((shape, Decision.NONE) for shape in shapes))[i].detach().flatten(1).double()
            g = p.grad.flatten(1).double()
            expected = torch.nn.functional.cosine_similarity(g, before).abs().max() / 0.1 * math.sqrt(g.size(1))
            assert (cosine, norm) == pytest.approx((expected.item(), before.norm().item()), rel=1e-5)
        elif i == 7:
            assert cosine == math.inf
        else:
            assert math.isnan(cosine)
            assert math.isnan(norm)
    decisions = [optimizer.decisions()[p] for p in params[4:]]
    assert decisions == [Decision.LAYER, Decision.NONE, Decision.NONE, Decision.NONE]


# Squares that leave float32.


RANGES = {
    "gradient": (1e20, 1.0, 1e-8),
    "weight": (1e-30, 1e20, 1e-8),
    "both": (1e20, 1e20, 1e-8),
    "tiny": (1e-30, 1e-20, 0.0),
    "apart": (1e30, 1e-20, 0.0),
}
"""Sizes of gradients and weights, and eps: small enough that it does not hide what is lost below."""

RANGE_MODEL: tuple[tuple[tuple[int, ...], Decision], ...] = (
    ((TILE + 3,), Decision.NONE),
    ((3, 70), Decision.NONE),
    ((3, 70), Decision.CHANNEL),
    ((2, 600), Decision.LAYER),
    ((4, 513), Decision.NONE),
    ((4, 513), Decision.CHANNEL),
    ((4, 513), Decision.LAYER),
    ((2, TILE + 8), Decision.CHANNEL),
)
"""A vector, rows in two widths of blocks, a wide row, and layer views of one tile and of several."""


def range_model(g_size: float, p_size: float, shapes: Any = RANGE_MODEL) -> list[Parameter]:
    """All of these leave float32; of one more tensor only the last of many rows."""
    params = model(shapes)
    for p in params:
        p.detach().mul_(p_size)
        p.grad.mul_(g_size)
    (late,) = model((((40, 65), Decision.CHANNEL),))
    late.detach()[39] *= p_size
    late.grad[39] *= g_size
    return [*params, late]


@pytest.mark.parametrize("sizes", RANGES)
@pytest.mark.parametrize("rule", ["AdamP", "SGDP"])
def test_squares_that_leave_float32(rule: str, sizes: str) -> None:
    """Decision and step are the float64 reference's."""
    g_size, p_size, eps = RANGES[sizes]
    make, options = test_range.OPTIONS[rule]
    params = range_model(g_size, p_size)
    before = [p.detach().clone() for p in params]
    optimizer = make(params, **options, eps=eps, backend="triton")
    optimizer.step()
    for p, old in zip(params, before, strict=True):
        projection = "auto" if p.ndim > 1 else "none"
        want, moved, state = test_range.reference(rule, old, p.grad, eps, projection)
        assert optimizer.decisions()[p] == want, p.shape
        # The second moment is kept in float32, where it has to fit; and so has c.
        large, small = (state.abs() < test_range.LARGEST).all(), (state > test_range.LEAST).all()
        if large and (rule == "SGDP" or eps > 0 or small) and sizes != "apart":
            off = test_range.off(rule, p, old, moved, want) if p.ndim > 1 else vector_off(p, moved)
            assert off < 64, p.shape


def vector_off(p: Tensor, moved: Tensor) -> float:
    error = (p.detach().double() - moved).abs().max() / moved.abs().max()
    return float(error) / torch.finfo(torch.float32).eps


@pytest.mark.parametrize("projection", ["channel", "layer"])
def test_a_fixed_projection_of_squares_that_leave_float32(projection: str) -> None:
    """Nothing is measured: dot or update finds out, when other tiles may have moved."""
    make, options = test_range.OPTIONS["SGDP"]
    params = range_model(1e20, 1e20, [case for case in RANGE_MODEL[1:] if case[1] is not Decision.NONE])
    before = [p.detach().clone() for p in params]
    optimizer = make(params, **options, projection=projection, backend="triton")
    optimizer.step()
    for p, old in zip(params, before, strict=True):
        want, moved, _ = test_range.reference("SGDP", old, p.grad, 1e-8, projection)
        assert optimizer.decisions()[p] == want
        assert test_range.off("SGDP", p, old, moved, want) < 64, p.shape


def test_what_has_left_float32_is_done_again_in_that_step_alone() -> None:
    shapes = RANGE_MODEL[2:4]
    params = range_model(1e20, 1e20, shapes)
    optimizer = SGDP(params, **SGDP_, backend="triton")
    optimizer.step()
    before = copy.deepcopy(tensors(optimizer))
    optimizer.found_inf = torch.ones(1)
    optimizer.step()
    assert all(map(torch.equal, tensors(optimizer), before))
    del optimizer.found_inf
    ordinary = model((*shapes, ((40, 65), Decision.CHANNEL)))
    for p, other in zip(params, ordinary, strict=True):
        p.data.copy_(other.data)
        p.grad.copy_(other.grad)
        optimizer.state[p]["momentum_buffer"].zero_()
    fresh = SGDP(ordinary, **SGDP_, backend="triton")
    fresh.step()
    optimizer.step()
    assert [*optimizer.decisions().values()] == [*fresh.decisions().values()]
    assert all(map(torch.equal, tensors(optimizer), tensors(fresh)))


def test_the_norm_of_gradients_whose_squares_leave_float32() -> None:
    optimizer = SGDP(model((*MODEL[1:2], *MODEL[3:5])), **SGDP_, backend="triton")
    optimizer.step()
    for p in params_of(optimizer):
        p.grad.mul_(1e20)
    expected = math.sqrt(sum(float(p.grad.double().square().sum()) for p in params_of(optimizer)))
    assert float(optimizer.clip_grad_norm_(1.0)) == pytest.approx(expected, rel=1e-5)
    optimizer.step()
    assert all(p.isfinite().all() for p in params_of(optimizer))


# Precision.


@pytest.mark.parametrize(("make", "options"), [(AdamP, ADAMP), (SGDP, SGDP_ | {"project_buffer": True})])
@pytest.mark.parametrize("layout", ["contiguous", "transposed"])
def test_a_weight_with_a_remainder_is_the_float32_weight_bit_for_bit(make: Any, options: Any, layout: str) -> None:
    shapes = MODEL if layout == "contiguous" else (((17, 65), Decision.CHANNEL), ((9, 129), Decision.LAYER))
    whole = [Parameter(lay_out(p.detach(), layout)) for p in model(shapes)]
    halves = [Parameter(lay_out(split(p.detach().contiguous())[0], layout)) for p in whole]
    generator = torch.Generator().manual_seed(1)
    ours = make(halves, **options, rounding="remainder", backend="triton")
    expected = make(whole, **options, backend="triton")
    for number in range(2):
        for p, half in zip(whole, halves, strict=True):
            g = torch.randn(p.shape, generator=generator).bfloat16()
            if number == 1 and p.ndim == 2 and p.numel():
                g[0, 0] = math.nan
            half.grad, p.grad = lay_out(g, layout), lay_out(g.float(), layout)
        if number == 0:  # makes the state
            before = [p.detach().clone() for p in whole]
            ours.step()
            for p, half in zip(before, halves, strict=True):
                high, low = split(p.contiguous())
                half.detach().copy_(high)
                ours.state[half]["remainder"].copy_(low)
                for name, tensor in ours.state[half].items():
                    if name != "remainder":
                        tensor.zero_()
        ours.step()
        expected.step()
        for p, half in zip(whole, halves, strict=True):
            state = ours.state[half]
            high, low = split(p.detach().contiguous())
            assert torch.equal(half.detach().view(torch.int16), high.view(torch.int16))
            assert torch.equal(state["remainder"], low)
            assert half.isnan().any() or torch.equal(
                join(half.detach().contiguous(), state["remainder"].contiguous()), p
            )
            for name, moment in expected.state[p].items():
                assert torch.equal(state[name].nan_to_num(7), moment.nan_to_num(7)), name


@pytest.mark.parametrize("make", [AdamP, SGDP])
@pytest.mark.parametrize("dtypes", [(torch.bfloat16, torch.bfloat16), (torch.float32, torch.bfloat16)])
def test_stochastic_rounding_is_the_reference_s_bit_for_bit(make: Any, dtypes: tuple[torch.dtype, torch.dtype]) -> None:
    """On numbers of so few digits that float32 is exact, in any order. AdamP's quotient is not: its weights stay."""
    options = {"delta": 0.0, "rounding": "stochastic", "state_dtype": dtypes[1]}
    options |= {"lr": 0.0, "betas": (0.5, 0.5)} if make is AdamP else {"lr": 0.5, "momentum": 0.5, "dampening": 0.5}
    for shape, layout, channel_dim in (
        ((TILE + 3,), "contiguous", 0),
        ((17, 129), "contiguous", 0),
        ((17, 128), "transposed", 0),
        ((6, 5, 4), "contiguous", 1),
        ((6, 5, 4, 3), "channels_last", 0),
        ((2, 2 * TILE), "contiguous", 0),
        ((1, 3 * TILE), "contiguous", 0),
    ):
        generator = torch.Generator().manual_seed(0)
        x = torch.randint(-128, 128, shape, generator=generator) / 16
        params = [Parameter(lay_out(x.to(dtypes[0]), layout))]
        params[0].grad = lay_out((torch.randint(-8, 8, shape, generator=generator) / 8).to(dtypes[0]), layout)
        ours, theirs = pair(make, params, **options, channel_dim=channel_dim)
        rounded = 0
        for _ in range(2):
            torch.manual_seed(7)
            ours.step()
            torch.manual_seed(7)
            theirs.step()
            state, expected = ours.state[params_of(ours)[0]], theirs.state[params_of(theirs)[0]]
            assert state["rounding_seed"] == expected["rounding_seed"]
            for a, b in zip(tensors(ours), tensors(theirs), strict=True):
                assert torch.equal(a, b), (shape, layout)
            moment = state["exp_avg" if make is AdamP else "momentum_buffer"]
            rounded += int((moment.double() * 64 % 1 != 0).sum()) + int(moment.count_nonzero())
        assert rounded > 0


# Parameters on several ranks.


def shared_cases() -> list[Any]:
    """Of the table of cases every shape, and on small matrices every dtype, layout, scale and set of options; each with
    a verdict and a way of asking.
    """
    sizes = {name: math.prod(shape) for name, shape in shapes(TILE).items()}
    settled = {"channel_dim", "projection"}  # before the tensors are seen, or by the verdict
    table = [case for case in cases(TILE) if not case.options.keys() & settled]
    first: dict[object, Case] = {}
    for case in table:
        first.setdefault(case.shape, case)
    for case in sorted(table, key=lambda case: (sizes[case.shape] < 1000, sizes[case.shape])):
        for aspect in ((case.dtype, case.gradient_dtype), case.layout, str(case.options)):
            first.setdefault((case.optimizer, aspect), case)
        first.setdefault(("scale", case.scale), case)
    found, turns = [], itertools.count()
    for case in first.values():
        vector = len(shapes(TILE)[case.shape]) < 2
        turn = next(turns)
        verdict = Decision.NONE if vector else Decision(turn % 3)
        calls = "squares" if vector else [*test_shares.CALLS][turn % len(test_shares.CALLS)]
        found.append(pytest.param(case, verdict, calls, id=f"{case} verdict {verdict.name.lower()} {calls}"))
    return found


@pytest.mark.parametrize(("case", "verdict", "calls"), shared_cases())
def test_shares_and_verdicts(case: Case, verdict: Decision, calls: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """test_shares.py's test, of shapes that are edges for tiles of this size."""
    monkeypatch.setattr(test_shares, "SHAPES", shapes(TILE))
    if 0 in shapes(TILE)[case.shape]:  # of which a step tells nothing: its results stay
        members = [sharing for sharing in test_shares.MEMBERS if sharing is not Sharing.LOCAL]
        monkeypatch.setattr(test_shares, "MEMBERS", members)
    test_shares.test_shares_are_right_and_steps_follow_the_verdicts(case, verdict, calls, "triton", monkeypatch)


def test_an_abandoned_step(monkeypatch: pytest.MonkeyPatch) -> None:
    test_shares.test_an_abandoned_step_leaves_nothing_to_the_next(False, "triton", monkeypatch)


SHARINGS = (Sharing.SHARED, Sharing.SPLIT, Sharing.SHARED, Sharing.SPLIT, Sharing.LOCAL)
SHARED_MODEL = tuple((shape, Decision.NONE) for shape in ((9, 65), (9, 65), (2, TILE + 8), (1, 17 * TILE), (5, 24)))


def shared_model(
    monkeypatch: pytest.MonkeyPatch, make: Any = AdamP, options: Any = ADAMP, dtype: torch.dtype = torch.float32
) -> tuple[Any, Batch]:
    """An optimizer that is said to share its parameters with other ranks, and the batch of its next step."""
    optimizer = make(model(SHARED_MODEL, dtype), **options, backend="triton")
    bucket = test_shares.sharded(monkeypatch, optimizer, "triton", SHARINGS)
    bucket.shared.needs.fill_(Need.TEST)
    bucket.shared.verdicts[:4, 0] = Decision.NONE
    return optimizer, test_shares.batch_of(optimizer, bucket)


def shares(batch: Batch) -> list[Tensor]:
    """What a measurement says, from a clean slate."""
    shared = batch.bucket.shared
    assert shared is not None
    for tensor in (shared.shares, shared.rows):
        tensor.zero_()
    batch.bucket.key.backend.measure(batch)
    return [shared.shares.clone(), shared.rows.clone()]


@pytest.mark.parametrize(("g_size", "p_size"), [(1e20, 1e20)])
def test_ranks_are_told_of_squares_that_leave_float32(
    g_size: float, p_size: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    optimizer, batch = shared_model(monkeypatch, SGDP, SGDP_)
    shared = batch.bucket.shared
    shared.needs.fill_(Need.TEST | Need.DOT)
    for p in params_of(optimizer):
        p.detach().mul_(p_size)
        p.grad.mul_(g_size)
    found, rows = shares(test_shares.batch_of(optimizer, batch.bucket))
    for i, (p, sharing) in enumerate(zip(params_of(optimizer), SHARINGS, strict=True)):
        if sharing is Sharing.LOCAL:
            continue
        member = test_shares.Products(optimizer, p, 1.0)
        first = int(batch.bucket.table[i, COLUMNS.index("first_row")])
        for number, name in enumerate(ROW_SHARES):
            member.check(name, found[i, SHARES.index(name)].reshape(1))
            if sharing is Sharing.SPLIT:
                member.check(name, rows[first : first + p.size(0), number])


@pytest.mark.parametrize("rounding", ["nearest", "stochastic", "remainder"])
def test_before_there_is_state_weights_and_gradients_are_measured(
    rounding: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    optimizer, batch = shared_model(monkeypatch, options=ADAMP | {"rounding": rounding}, dtype=torch.bfloat16)
    bare = batch._replace(moments=[], steps=[], seeds=[], remainders=[])
    assert all(map(torch.equal, shares(bare), shares(batch)))
    before = copy.deepcopy(tensors(optimizer))
    assert batch.bucket.key.backend.step(batch) == -1
    assert not any(map(torch.equal, tensors(optimizer), before))
    bare.bucket.key.backend.measure(bare)


@pytest.mark.parametrize("scale", [0.0, 1e-3, 1e6, math.inf, math.nan])
def test_limits_are_of_a_further_scale(scale: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """The limits themselves are numbers, and passing them at 1 is passing the test of the scaled gradient."""
    optimizer, batch = shared_model(monkeypatch, SGDP, SGDP_)
    for p in params_of(optimizer):
        p.grad = p.detach() * torch.logspace(-13, -12, p.size(0))[:, None]
    batch = test_shares.batch_of(optimizer, batch.bucket)
    scaled = torch.tensor([scale], dtype=torch.float64)
    limits = shares(batch._replace(scale=scaled))[0][:, 0]
    raw = shares(batch)[0][:, 0]
    assert not limits.isnan().any()
    if not math.isfinite(scale):
        assert not limits.any()
    else:
        torch.testing.assert_close(limits, raw / scale, rtol=1e-4, atol=0)
    assert scale or limits.isinf().all()


@pytest.mark.parametrize("make", [AdamP, SGDP])
def test_parts_are_rounded_by_chance_as_the_whole_is(make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """On numbers of so few digits that float32 is exact: test_stochastic_rounding_is_the_reference_s_bit_for_bit."""
    options: dict[str, Any] = {"delta": 0.0, "rounding": "stochastic"}
    options |= {"lr": 0.0, "betas": (0.5, 0.5)} if make is AdamP else {"lr": 0.5, "momentum": 0.5, "dampening": 0.5}
    rows, cols = 6, 3 * TILE + 24
    generator = torch.Generator().manual_seed(0)
    weight = torch.randint(-128, 128, (rows, cols), generator=generator).bfloat16() / 16
    gradient = torch.randint(-8, 8, (rows, cols), generator=generator).bfloat16() / 8
    whole = Parameter(weight.clone())
    whole.grad = gradient.clone()
    reference = make([whole], **options, backend="reference")
    torch.manual_seed(7)
    reference.step()
    seed = reference.state[whole]["rounding_seed"] - 1
    cuts = [(slice(2, 5), slice(0, cols)), (slice(0, rows), slice(16, 80)), (slice(1, 4), slice(8, 8 + TILE + 16))]
    numbers = [(part[0].start * cols + part[1].start, cols) for part in cuts]
    params = [Parameter(weight[part].clone()) for part in cuts]
    for p, part in zip(params, cuts, strict=True):
        p.grad = gradient[part].clone()
    ours = make(params, **options, backend="triton")
    bucket = test_shares.sharded(monkeypatch, ours, "triton", [Sharing.SHARED, *[Sharing.SPLIT] * 2], numbers)
    bucket.shared.verdicts.zero_()
    for tensor in test_shares.state_of(ours, bucket):
        tensor.zero_()
    for p in params:
        ours.state[p]["rounding_seed"].fill_(seed)
    assert bucket.key.backend.step(test_shares.batch_of(ours, bucket)) == -1
    for p, part in zip(params, cuts, strict=True):
        assert torch.equal(p.detach(), whole.detach()[part]), part
        for name in reference.moments(reference.param_groups[0]):
            assert torch.equal(ours.state[p][name], reference.state[whole][name][part]), (name, part)


def test_infinite_gradients_move_no_shared_weight(monkeypatch: pytest.MonkeyPatch) -> None:
    optimizer, batch = shared_model(monkeypatch)
    before = copy.deepcopy(tensors(optimizer))
    measured = shares(batch)
    stopped = batch._replace(found_inf=torch.ones(1))
    assert all(map(torch.equal, shares(stopped), measured))
    assert batch.bucket.key.backend.step(stopped) == -1
    assert all(map(torch.equal, tensors(optimizer), before))


def test_moments_of_two_dtypes_are_given_one() -> None:
    ours, theirs = pair(AdamP, model(MODEL[3:5]), **ADAMP)
    for optimizer in (ours, theirs):
        optimizer.step()
        for p in params_of(optimizer):
            optimizer.state[p]["exp_avg"] = optimizer.state[p]["exp_avg"].double()
        optimizer.step()
    assert_same(ours, theirs)


# Hyperparameters on the device, and CUDA graphs.


class OnDevice(AdamP):
    """AdamP whose lr and betas are tensors that the host must not read. On a GPU they lie there; here there is none."""

    learning_rate: Tensor

    def scalars(self, group: dict[str, Any]) -> Scalars:
        row = super().scalars(group)
        lr = self.learning_rate.double().reshape(())
        beta = torch.full((), row.beta2, dtype=torch.float64)
        return row._replace(lr=lr, beta2=beta, gain2=1 - beta)


def on_device(params: list[Parameter], **options: Any) -> OnDevice:
    optimizer = OnDevice(params, **options, backend="triton")
    optimizer.learning_rate = torch.tensor(float(options["lr"]), dtype=torch.float32)
    return optimizer


def test_hyperparameters_on_the_device_are_copied_there_in_every_step(monkeypatch: pytest.MonkeyPatch) -> None:
    ours, expected = on_device(model(MODEL[3:6]), **ADAMP), AdamP(model(MODEL[3:6]), **ADAMP, backend="triton")
    uploads = 0
    upload = triton.Tables.upload

    def counted(*arguments: Any) -> None:
        nonlocal uploads
        uploads += 1
        upload(*arguments)

    monkeypatch.setattr(triton.Tables, "upload", counted)
    for number, lr in enumerate((0.5, 0.25, 1.0)):
        ours.learning_rate.fill_(lr)
        expected.param_groups[0]["lr"] = lr
        uploads = 0
        ours.step()
        assert (uploads == 0) == (number > 0)
        expected.step()
    assert all(map(torch.equal, tensors(ours), tensors(expected)))


class Graph(TorchDispatchMode):
    """What a CUDA graph is to the backend: a capture records operators and launches and carries out none that write to
    tensors that are there; a replay repeats all of them on the capture's tensors.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        super().__init__()
        self.calls: list[Callable[[], object]] = []
        self._patch = monkeypatch

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func._schema.is_mutable:
            self.calls.append(lambda: func(*args, **kwargs))
            return args[0] if func._schema.returns else None
        out = func(*args, **kwargs)
        if isinstance(out, Tensor) and "empty" not in str(func):
            self.calls.append(lambda: out.copy_(func(*args, **kwargs)))
        return out

    def capture(self, step: Callable[[], object]) -> None:
        with self._patch.context() as patch:
            patch.setattr(triton, "_capturing", lambda device: True)
            patch.setattr(
                triton._Run,
                "start",
                lambda run: self.calls.append(lambda: run.kernel[(run.grid, 1, 1)](*run.arguments)),
            )
            with self:
                step()

    def replay(self) -> None:
        for call in self.calls:
            call()


def test_replays_of_a_graph_share_and_go_by_the_verdicts_of_the_day(monkeypatch: pytest.MonkeyPatch) -> None:
    batches = [shared_model(monkeypatch, options=ADAMP | {"capturable": True})[1] for _ in range(2)]
    for batch in batches:
        for tensor in test_shares.state_of(batch.rule, batch.bucket):
            tensor.fill_(0.5)

    def train(batch: Batch) -> list[Tensor]:
        batch.bucket.key.backend.measure(batch)
        batch.bucket.key.backend.step(batch)
        return results_of(batch)

    def results_of(batch: Batch) -> list[Tensor]:
        stored = test_shares.state_of(batch.rule, batch.bucket)
        return [*batch.params, *stored, batch.bucket.decisions, *batch.bucket.shared[1:3]]

    captured, eager = batches
    train(captured), train(eager)
    graph = Graph(monkeypatch)
    graph.capture(lambda: train(captured))
    for number, replays in enumerate((True, False, True)):
        for batch in batches:
            batch.bucket.shared.needs.fill_((Need.TEST, Need.DOT, Need.SQUARE)[number])
            batch.bucket.shared.verdicts[:4] = torch.tensor([number, 0.5])
            batch.bucket.shared.row_projections.fill_(0.25 * number)
        found = [t.clone() for t in train(eager)]
        if replays:
            graph.replay()
        else:
            train(captured)
        assert all(map(torch.equal, results_of(captured), found)), number


@pytest.mark.parametrize(
    ("clip", "rounding", "distance"),
    [(False, "nearest", 1.0), (True, "nearest", 1.0), (False, "stochastic", 1.0), (False, "nearest", 1e19)],
)
def test_replays_of_a_graph_step_like_eager_steps(
    clip: bool, rounding: str, distance: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where squares leave float32, for which a replay has marks of its own."""
    dtype = torch.float32 if rounding == "nearest" else torch.bfloat16
    targets = [distance * torch.randn(p.shape, dtype=dtype) for p in model(MODEL[2:7])]

    def train(optimizer: ProjectedOptimizer) -> None:
        with torch.no_grad():
            for p, target in zip(params_of(optimizer), targets, strict=True):
                p.grad = 2 * (p.detach() - target)
            if clip:
                optimizer.clip_grad_norm_(1.0)
            optimizer.step()

    options = ADAMP | {"rounding": rounding}
    captured, eager = (on_device(model(MODEL[2:7], dtype), **options, capturable=flag) for flag in (True, False))
    graph = Graph(monkeypatch)
    for optimizer in (captured, eager):
        torch.manual_seed(0)  # the first step draws the seeds of stochastic rounding
        train(optimizer)
    before = copy.deepcopy(tensors(captured))
    graph.capture(lambda: train(captured))
    assert all(map(torch.equal, tensors(captured), before))
    for number, replays in enumerate((True, True, False, True)):
        for optimizer in (captured, eager):
            optimizer.learning_rate.fill_(0.5 ** (number % 3))
        if replays:
            graph.replay()
        else:
            train(captured)
        train(eager)
        assert all(map(torch.equal, tensors(captured), tensors(eager))), number
        assert captured.buckets[0].decisions.equal(eager.buckets[0].decisions)


def test_a_capture_measures_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    """Clipped before the capture, stepped in it: a replay must not use what was measured once."""
    optimizer = on_device(model(MODEL[3:6]), **ADAMP, capturable=True)
    optimizer.step()
    optimizer.clip_grad_norm_(1.0)
    graph = Graph(monkeypatch)
    grids: list[int] = []
    with monkeypatch.context() as patch:
        patch.setattr(triton, "_run", lambda kernel, grid, *rest: grids.append(grid) or triton._Run(kernel, grid, ()))
        graph.capture(optimizer.step)
    assert max(grids) > 1
    if PLAN == "split":
        assert grids[0] > 1


def test_a_capture_is_refused_where_it_would_go_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    p, late = model(((3, 4), Decision.NONE) for _ in range(2))
    optimizer = AdamP([p], **ADAMP, backend="triton")
    monkeypatch.setattr(triton, "_capturing", lambda device: True)
    with pytest.raises(RuntimeError, match="take a step like the one to be captured before the capture"):
        optimizer.step()
    monkeypatch.undo()
    optimizer.step()
    monkeypatch.setattr(triton, "_capturing", lambda device: True)
    before = copy.deepcopy(tensors(optimizer))
    for call in (optimizer.step, lambda: optimizer.clip_grad_norm_(1.0)):
        with pytest.raises(RuntimeError, match=r"capturable=False: pass capturable=True to the optimizer"):
            call()
    assert all(map(torch.equal, tensors(optimizer), before))
    # A group that does not take part may be as it likes.
    optimizer.param_groups[0]["capturable"] = True
    late.grad = None
    optimizer.add_param_group({"params": [late], "capturable": False})
