"""Compiled kernels of parameters on several ranks: what they tell, and how they follow verdicts.

See emulated_steps.py.
"""

from __future__ import annotations

import copy
import itertools
import math
from typing import TYPE_CHECKING, Any

import pytest
import test_shares
import torch
from harness import BACKEND
from models import ADAMP, PLAN, SGDP_, TILE, Shapes, exhaustive, grad_of, model, params_of, tensors
from torch import Tensor
from torch.nn import Parameter

from fused_adamp import SGDP, AdamP
from fused_adamp.batch import COLUMNS, ROW_SHARES, SHARES, Batch, Need, Sharing
from fused_adamp.reference import Decision
from fused_adamp.verify import Case, cases, shapes

if TYPE_CHECKING:
    from collections.abc import Sequence

pytestmark = [
    pytest.mark.usefixtures("emulated"),
    *([] if PLAN == "split" else [exhaustive]),  # the plan that sharded parameters take, unless another is forced
]


def is_usual(case: Case) -> bool:
    """Whether it needs the kernels that are compiled without being asked for exhaustive tests."""
    shape = shapes(TILE)[case.shape]
    plain = (case.optimizer, case.dtype, case.gradient_dtype) == ("AdamP", torch.float32, None)
    whole = len(shape) < 2 or math.prod(shape[1:]) % 8 == 0
    return plain and whole and case.layout == "contiguous" and not case.options.keys() & {"state_dtype", "rounding"}


def shared_cases() -> list[Any]:
    """Every shape of the table of cases, and on small matrices every dtype, layout, scale and set of options.

    Each case comes with a verdict and a way of asking.
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
        marks = () if is_usual(case) else exhaustive
        name = f"{case} verdict {verdict.name.lower()} {calls}"
        found.append(pytest.param(case, verdict, calls, id=name, marks=marks))
    return found


@pytest.mark.parametrize(("case", "verdict", "calls"), shared_cases())
def test_shares_and_verdicts(case: Case, verdict: Decision, calls: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """test_shares.py's test, of shapes that are edges for tiles of this size."""
    monkeypatch.setattr(test_shares, "SHAPES", shapes(TILE))
    if 0 in shapes(TILE)[case.shape]:  # of which a step tells nothing: its results stay
        members = [sharing for sharing in test_shares.MEMBERS if sharing is not Sharing.LOCAL]
        monkeypatch.setattr(test_shares, "MEMBERS", members)
    test_shares.test_shares_are_right_and_steps_follow_the_verdicts(case, verdict, calls, BACKEND)


def test_an_abandoned_step() -> None:
    test_shares.test_an_abandoned_step_leaves_nothing_to_the_next(False, BACKEND)


SHARINGS = (Sharing.SHARED, Sharing.SPLIT, Sharing.SHARED, Sharing.SPLIT, Sharing.LOCAL)
SHARED_MODEL: Shapes = tuple(
    (shape, Decision.NONE) for shape in ((9, 72), (9, 72), (2, TILE + 8), (1, 17 * TILE), (5, 24))
)
FLAT_SHARED_MODEL: Shapes = (*[((9, 65), Decision.NONE)] * 2, *SHARED_MODEL[2:])
every_alignment = pytest.mark.parametrize(
    "whole",
    [pytest.param(SHARED_MODEL, id="aligned"), pytest.param(FLAT_SHARED_MODEL, id="some flat", marks=exhaustive)],
)


def shared_model(
    whole: Shapes,
    make: Any = AdamP,
    options: Any = ADAMP,
    dtype: torch.dtype = torch.float32,
) -> tuple[Any, Batch]:
    """An optimizer that is said to share its parameters with other ranks, and the batch of its next step."""
    optimizer = make(model(whole, dtype), **options, backend=BACKEND)
    bucket = test_shares.sharded(optimizer, BACKEND, SHARINGS)
    assert bucket.shared is not None
    bucket.shared.needs.fill_(Need.TEST)
    bucket.shared.verdicts[:4, 0] = Decision.NONE
    return optimizer, test_shares.batch_of(optimizer, bucket)


def shares(batch: Batch) -> list[Tensor]:
    """The shares of the parameters and of the rows that ``measure`` writes into zeroed tables."""
    shared = batch.bucket.shared
    assert shared is not None
    for tensor in (shared.shares, shared.rows):
        tensor.zero_()
    batch.bucket.key.backend.measure(batch)
    return [shared.shares.clone(), shared.rows.clone()]


@every_alignment
def test_ranks_are_told_of_squares_that_leave_float32(whole: Shapes) -> None:
    optimizer, batch = shared_model(whole, SGDP, SGDP_)
    shared = batch.bucket.shared
    assert shared is not None
    shared.needs.fill_(Need.TEST | Need.DOT)
    for p in params_of(optimizer):
        p.detach().mul_(1e20)
        grad_of(p).mul_(1e20)
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


@exhaustive
@pytest.mark.parametrize(
    ("rounding", "dtype"),
    [
        ("nearest", torch.float32),
        *((name, torch.bfloat16) for name in ("nearest", "stochastic", "remainder")),
    ],
)
@every_alignment
def test_before_there_is_state_weights_and_gradients_are_measured(
    rounding: str, dtype: torch.dtype, whole: Shapes
) -> None:
    optimizer, batch = shared_model(whole, options=ADAMP | {"rounding": rounding}, dtype=dtype)
    for p in params_of(optimizer):  # of so many sizes that a sum depends on its order
        grad_of(p).mul_(torch.logspace(3, -12, p.numel()).reshape(p.shape))
    bare = batch._replace(moments=[], steps=[], seeds=[], remainders=[])
    assert all(map(torch.equal, shares(bare), shares(batch)))
    before = copy.deepcopy(tensors(optimizer))
    assert batch.bucket.key.backend.step(batch) == -1
    assert not any(map(torch.equal, tensors(optimizer), before))
    bare.bucket.key.backend.measure(bare)


@pytest.mark.parametrize("scale", [0.0, 1e-3, 1e6, math.inf, math.nan])
@every_alignment
def test_limits_are_of_a_further_scale(scale: float, whole: Shapes) -> None:
    """The limits themselves are numbers, and passing them at 1 is passing the test of the scaled gradient."""
    optimizer, batch = shared_model(whole, SGDP, SGDP_)
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


@exhaustive
@pytest.mark.parametrize("make", [AdamP, SGDP])
def test_parts_are_rounded_by_chance_as_the_whole_is(make: Any) -> None:
    """On numbers of so few digits that float32 is exact: test_stochastic_rounding_is_the_reference_s_bit_for_bit."""
    options: dict[str, Any] = {"delta": 0.0, "rounding": "stochastic"}
    options |= {"lr": 0.0, "betas": (0.5, 0.5)} if make is AdamP else {"lr": 0.5, "momentum": 0.5, "dampening": 0.5}
    rows, cols = 6, 3 * TILE + 24
    generator = torch.Generator().manual_seed(0)
    weight = torch.randint(-128, 128, (rows, cols), generator=generator).bfloat16() / 16
    gradient = torch.randint(-128, 128, (rows, cols), generator=generator).bfloat16() / 8
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
    ours = make(params, **options, backend=BACKEND)
    sharings: Sequence[Sharing] = [Sharing.SHARED, *[Sharing.SPLIT] * 2]
    bucket = test_shares.sharded(ours, BACKEND, sharings, numbers)
    assert bucket.shared is not None
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


@every_alignment
def test_rows_move_by_the_projections_that_all_ranks_have_worked_out(whole: Shapes) -> None:
    """Not by those of this rank's part of the rows: p - (s u + (w - s c) p) grows by s c p with c."""
    moved, c = [], torch.linspace(0.1, 0.5, 9, dtype=torch.float64)
    for factor in (0.0, 1.0):
        torch.manual_seed(0)  # of the state
        optimizer, batch = shared_model(whole)
        shared, p = batch.bucket.shared, params_of(optimizer)[1]
        assert shared is not None
        first = int(batch.bucket.table[1, COLUMNS.index("first_row")])
        shared.verdicts[1, 0] = Decision.CHANNEL
        shared.row_projections[first : first + 9] = factor * c
        before = p.detach().double()
        assert batch.bucket.key.backend.step(batch) == -1
        moved.append(p.detach().double())
    size = ADAMP["lr"] / (1 - 0.9 ** float(optimizer.state[p]["step"]))
    torch.testing.assert_close(moved[1] - moved[0], size * c[:, None] * before, rtol=1e-4, atol=1e-5)


@every_alignment
def test_infinite_gradients_move_no_shared_weight(whole: Shapes) -> None:
    optimizer, batch = shared_model(whole)
    before = copy.deepcopy(tensors(optimizer))
    measured = shares(batch)
    stopped = batch._replace(found_inf=torch.ones(1))
    assert all(map(torch.equal, shares(stopped), measured))
    assert batch.bucket.key.backend.step(stopped) == -1
    assert all(map(torch.equal, tensors(optimizer), before))
