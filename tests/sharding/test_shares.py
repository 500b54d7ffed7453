"""The backends' part in steps of sharded parameters, without process groups: shares against float64, steps by verdicts.

Members of a bucket are said to lie on several ranks, yet all of each is here. So what ranks would add up is one share,
and the verdict's projection is the one that the reference is forced to make of the same tensor.
"""

from __future__ import annotations

import itertools
import math
import random
from typing import TYPE_CHECKING, Any, NamedTuple

import pytest
import torch
from covering import usual
from test_backends import factors
from tolerances import assert_identical
from torch import Tensor

from fused_adamp import SGDP, AdamP
from fused_adamp.backends import BACKENDS, available
from fused_adamp.batch import ABSENT, COLUMNS, ROW_SHARES, SHARES, UNDECIDED, Batch, Need, Sharing
from fused_adamp.bucket import Bucket, new_state
from fused_adamp.gather import bucket_key
from fused_adamp.reference import Decision
from fused_adamp.sharded.layout import Layout
from fused_adamp.sharded.placement import place
from fused_adamp.verify import (
    _STOCHASTIC,
    SHAPES,
    TOLERANCE,
    Case,
    _reference,
    _stored,
    _ulps,
    cases,
    lay_out,
    make_gradient,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

pytestmark = pytest.mark.usefixtures("one_thread")

MEMBERS = (Sharing.SHARED, Sharing.SPLIT, Sharing.LOCAL, Sharing.SHARED)
"""The members of a bucket; the last has no gradient. No vector is split."""

STEPS = 3
"""The step count of all members."""

UNTOUCHED = -7.0
"""The value that fills shares and rows before a measurement."""

SUMS = {Need.TEST: ("pg", "gg", "pp"), Need.DOT: ("pp", "pu"), Need.SQUARE: ("gg",)}
"""The columns of shares that each need asks for."""

CALLS: dict[str, tuple[Need, ...]] = {
    "final": (Need.TEST | Need.DOT,),
    "at once": (Need.TEST | Need.DOT,),
    "one by one": (Need.TEST | Need.SQUARE, Need.DOT),
    "dot": (Need.DOT,),
    "squares": (Need.SQUARE,),
    "unasked": (),
}
"""The needs of each call of ``measure`` before the step. For "final", the batch is final too."""


class Said(NamedTuple):
    """A placement that has one layout, whatever the parameter."""

    layout: Layout
    is_shared: bool = True

    def shape(self, p: Tensor) -> tuple[int, ...]:
        return tuple(p.shape)

    def in_words(self, p: Tensor) -> str:
        return str(self.layout)

    def layouts(self, p: Tensor, channel_dim: Any) -> list[Layout]:
        return [self.layout]


def sharded(
    optimizer: Any,
    backend: str,
    sharings: Sequence[Sharing],
    numbers: Sequence[tuple[int, int] | None] = (),
) -> Bucket:
    """The optimizer's parameters in one bucket, with state, said to lie on several ranks."""
    (group,) = optimizer.param_groups
    params = group["params"]
    for p, sharing, number in itertools.zip_longest(params, sharings, numbers):
        cols = math.prod(p.shape[1:]) if p.ndim >= 2 else p.numel()
        place(p, Said(Layout(sharing, 0, cols, numbers=number or (0, cols))))
    ours = next(b for b in BACKENDS if b.name == backend)
    bucket = Bucket(bucket_key(optimizer, params[0], group, ours), params)
    for p in params:
        names = *bucket.key.counters, *bucket.key.storage
        optimizer.state[p] = state = {name: new_state(bucket.key, name, p) for name in names}
        for name in bucket.key.moments:
            state[name].normal_().abs_()
        for name in bucket.key.counters:
            state[name].fill_(STEPS)
    return bucket


def state_of(optimizer: Any, bucket: Bucket) -> list[Tensor]:
    """The members' state of the parameters' shapes."""
    return [optimizer.state[p][name] for p in bucket.params for name in bucket.key.storage]


def batch_of(optimizer: Any, bucket: Bucket, *, scale: float = 1, final: bool = False) -> Batch:
    def kind(name: str) -> list[Tensor]:
        return [ABSENT if p.grad is None else optimizer.state[p][name] for p in bucket.params]

    return Batch(
        bucket=bucket,
        params=[ABSENT if p.grad is None else p.detach() for p in bucket.params],
        grads=[ABSENT if p.grad is None else p.grad for p in bucket.params],
        moments=[kind(name) for name in bucket.key.moments],
        steps=kind("step") if "step" in bucket.key.counters else [],
        seeds=kind("rounding_seed") if "rounding_seed" in bucket.key.counters else [],
        remainders=kind("remainder") if "remainder" in bucket.key.storage else [],
        groups=optimizer.param_groups,
        rule=optimizer,
        notes={},
        scale=None if scale == 1 else torch.tensor([scale], dtype=torch.float64),
        final=final,
    )


class Products:
    """The products that are summed for a member, float64 ``(R, K)`` each; and the tolerance of a backend's sums."""

    def __init__(self, optimizer: Any, p: Any, scale: float) -> None:
        (group,) = optimizer.param_groups
        state, updates = optimizer.state[p], list[Tensor]()

        def note(_: Tensor, w: Tensor, u: Tensor) -> tuple[Decision, Tensor]:
            updates.append(u)
            return Decision.NONE, u

        weight, grad = _stored(optimizer, p, "p").to(torch.float64, copy=True), p.grad.double() * scale
        moments = [state[name].double() for name in optimizer.moments(group)]
        step = torch.ones(()) + state.get("step", 0)
        group = group | {"projection": note}
        optimizer.reference_step(weight.clone(), grad, [m.clone() for m in moments], step, group)
        sizes = [m.abs() for m in moments]  # u rounds at the size of its terms
        optimizer.reference_step(weight.clone(), grad.abs(), sizes, step, group | {"maximize": False})
        shape = (p.size(0), math.prod(p.shape[1:])) if p.ndim >= 2 else (1, p.numel())
        self.p, self.g, self.u, self.u_size = (t.reshape(shape) for t in (weight, grad, *updates))
        self.eps, self.delta = group["eps"], group["delta"]
        # 64 terms are summed in the dtype of the computation, some more from lane to lane; u rounds up to eight times.
        self.unit = 80 * torch.finfo(torch.promote_types(p.dtype, torch.float32)).eps

    def __getitem__(self, name: str) -> Tensor:
        left, right = name
        product: Tensor = getattr(self, left) * getattr(self, right)
        return product

    def check(self, name: str, got: Tensor) -> None:
        """``got``: the sums of the rows, or of all elements. The sign of p.g means nothing."""
        products, sizes = self[name], self.p.abs() * self.u_size if name == "pu" else self[name].abs()
        shape = (got.numel(), products.numel() // max(got.numel(), 1))
        want, allowed = products.reshape(shape).sum(1), self.unit * sizes.reshape(shape).sum(1)
        error = (got.abs() - want.abs()).abs() if name == "pg" else (got - want).abs()
        assert (error <= allowed).all(), f"{name}: {got} instead of {want}"

    def check_test(self, limit: float, cosine: float) -> None:
        rows, cols = self.p.shape
        if not rows or not cols:
            assert (limit, cosine) == (math.inf, 0)
            return
        a = self.delta / math.sqrt(cols) * self.p.norm(dim=1).clamp(min=self.eps)
        pg, g = self["pg"].sum(1).abs(), self.g.norm(dim=1)
        want = torch.where(pg < a * g, math.inf, (a * self.eps / pg).nan_to_num(0, posinf=math.inf)).min().item()
        exact = self.unit * math.sqrt(cols) / self.delta if self.delta else math.inf
        assert limit == want or abs(limit - want) <= 2 * exact * want, f"limit {limit} instead of {want}"
        want = (pg / (a * g.clamp(min=self.eps))).nan_to_num(math.inf, posinf=math.inf).max().item()
        assert cosine == want or abs(cosine - want) <= exact * (1 + want), f"cosine {cosine} instead of {want}"


def expect_shares(member: Products, sharing: Sharing, needs: int, shares: Tensor, rows: Tensor) -> None:
    """The right numbers of all that was asked, else what was there before. ``rows``: of the member, if it is split."""
    found = dict(zip(SHARES, shares, strict=True))
    for name, by_row in zip(ROW_SHARES, rows.T, strict=True):
        needed = needs & sum(need for need, names in SUMS.items() if name in names)
        if not needed:
            assert found[name] == UNTOUCHED, f"{name} was not asked"
            assert (by_row == UNTOUCHED).all(), f"{name} of rows was not asked"
        elif sharing is not Sharing.SPLIT or needed & ~Need.DOT:
            member.check(name, found[name].reshape(1))
        if sharing is Sharing.SPLIT and needed & ~Need.SQUARE:
            member.check(name, by_row)
    if not needs & Need.TEST:
        assert found["limit"] == found["cosine"] == UNTOUCHED, "the test was not asked"
    elif sharing is not Sharing.SPLIT:
        member.check_test(float(found["limit"]), float(found["cosine"]))


def judge(bucket: Bucket, i: int, member: Products, decision: Decision) -> None:
    """The verdict, with the projections that the member's sums give."""
    shared, first = bucket.shared, int(bucket.table[i, COLUMNS.index("first_row")])
    assert shared is not None
    pu, pp = member["pu"].sum(1), member["pp"].sum(1)
    if decision is Decision.LAYER:
        pu, pp = (t.sum().expand(len(t)) for t in (pu, pp))
    c = pu / (pp.sqrt() + member.eps).square() if decision else torch.zeros_like(pu)
    shared.verdicts[i, 0] = decision
    if bucket.layouts[i].sharing is Sharing.SPLIT:
        shared.row_projections[first : first + len(c)] = c
    elif decision is Decision.LAYER and len(c):
        shared.verdicts[i, 1] = c[0]


def table() -> list[Any]:
    """Some of verify's cases, each with a verdict and calls drawn by chance: guesses are wrong more often than not."""
    chance = random.Random(0)
    found, varied = [], []
    for case in cases():
        if case.options.keys() & {"channel_dim", "projection"} or chance.random() < 0.7:
            continue  # settled before a backend sees the tensors, or by the verdict
        vector = len(SHAPES[case.shape]) < 2
        # An update of fifty times the weight recovers it to as many roundings, if rows along it are then projected.
        settled = vector or case.options["lr"] == 50
        verdict = case.decision if settled else chance.choice([*Decision])
        calls = chance.choice(["squares", "unasked"] if vector else [*CALLS])
        for backend in available(torch.device("cpu")):
            name = f"{case} verdict {verdict.name.lower()} {calls} {backend.name}"
            found.append(pytest.param(case, verdict, calls, backend.name, id=name))
            varied.append((*factors(case), verdict, calls, backend.name))
    return usual(found, varied)


@pytest.mark.parametrize(("case", "verdict", "calls", "backend"), table())
def test_shares_are_right_and_steps_follow_the_verdicts(
    case: Case, verdict: Decision, calls: str, backend: str
) -> None:
    vector = len(SHAPES[case.shape]) < 2
    sharings = [Sharing.SHARED if vector and x is Sharing.SPLIT else x for x in MEMBERS]
    torch.manual_seed(1)
    generator = torch.Generator().manual_seed(1)
    whole = "contiguous" if case.layout == "gradient transposed" else case.layout
    values = [torch.randn(SHAPES[case.shape], dtype=torch.float64, generator=generator) for _ in MEMBERS]
    params = [torch.nn.Parameter(lay_out(value.to(case.dtype), whole)) for value in values]
    optimizer = (AdamP if case.optimizer == "AdamP" else SGDP)(params, **case.options, backend=backend)
    bucket = sharded(optimizer, backend, sharings)
    (group,), shared, idle = optimizer.param_groups, bucket.shared, params[-1].detach().clone()
    assert shared is not None
    for p in params[:-1]:
        gradient = make_gradient(p.detach().double().contiguous(), case.decision, generator, late=case.late)
        p.grad_dtype = case.gradient_dtype or case.dtype
        p.grad = lay_out(gradient.to(p.grad_dtype), "transposed" if case.layout.startswith("grad") else whole)
    members = [Products(optimizer, p, case.scale) for p in params[:-1]]
    wanted = []
    for p, sharing in zip(params, sharings[:-1], strict=False):
        group["projection"] = "auto" if sharing is Sharing.LOCAL else verdict.name.lower()
        wanted.append(_reference(optimizer, p, case.scale))
        group["projection"] = "auto"
    batch = batch_of(optimizer, bucket, scale=case.scale, final=calls == "final")
    stored = [t for p in params for t in (p, *optimizer.state[p].values())]
    before = [t.detach().clone() for t in stored]
    for needs in CALLS[calls]:
        shared.shares.fill_(UNTOUCHED)
        shared.rows.fill_(UNTOUCHED)
        asked = [Need.SQUARE & needs if x is Sharing.LOCAL else needs for x in sharings]
        shared.needs.copy_(torch.tensor(asked))
        bucket.key.backend.measure(batch)
        for i, (member, sharing) in enumerate(zip(members, sharings, strict=False)):
            rows = shared.rows if sharing is Sharing.SPLIT else shared.rows[:0]
            expect_shares(member, sharing, asked[i], shared.shares[i], rows)
        assert (shared.shares[-1] == UNTOUCHED).all(), "a member without gradient has shares"
    if not batch.final:
        for was, now in zip(before, stored, strict=True):
            assert_identical(now, was, "what measure leaves alone")
    for i, (member, sharing) in enumerate(zip(members, sharings, strict=False)):
        if sharing is not Sharing.LOCAL:
            judge(bucket, i, member, verdict)
    bucket.results.fill_(UNTOUCHED)
    assert bucket.key.backend.step(batch) == -1
    for i, (p, sharing, (want, size, decision)) in enumerate(zip(params, sharings, wanted, strict=False)):
        empty = sharing is not Sharing.LOCAL and p.numel() == 0
        assert bucket.decisions[i] == (verdict if empty else decision)
        assert (bucket.results[i] == UNTOUCHED).all() == (sharing is not Sharing.LOCAL)
        assert optimizer.state[p].get("step", STEPS + 1) == STEPS + 1
        for name, expected in want.items():
            got = _stored(optimizer, p, name)
            by_chance = case.options.get("rounding") == "stochastic" and got.dtype == torch.bfloat16
            allowed = _STOCHASTIC if by_chance else TOLERANCE[got.dtype]
            assert _ulps(got, expected, size[name]) <= allowed, f"{name} of the {sharing.name} member"
    assert bucket.decisions[-1] == UNDECIDED
    assert_identical(params[-1].detach(), idle, "a member without gradient")


@pytest.mark.parametrize("final", [True, False])
def test_an_abandoned_step_leaves_nothing_to_the_next(final: bool, backend: str) -> None:
    """Another rank failed after measure: the next step is that of an optimizer which finds what the first has left."""
    generator = torch.Generator().manual_seed(0)
    param = torch.nn.Parameter(torch.randn(70, 96, generator=generator))
    param.grad = make_gradient(param.detach().double(), Decision.CHANNEL, generator).float()
    results: list[list[Tensor]] = []
    optimizer = AdamP([param], lr=0.1, backend=backend)
    abandoned = sharded(optimizer, backend, [Sharing.SHARED])
    assert abandoned.shared is not None
    abandoned.shared.needs.fill_(Need.TEST | Need.DOT)
    abandoned.key.backend.measure(batch_of(optimizer, abandoned, final=final))
    found = [t.clone() for t in (param.detach(), *optimizer.state[param].values())]
    for bucket in (abandoned, sharded(optimizer, backend, [Sharing.SHARED])):
        stored = (param.detach(), *optimizer.state[param].values())
        for t, value in zip(stored, found, strict=True):
            t.copy_(value)
        assert bucket.shared is not None
        bucket.shared.needs.fill_(Need.TEST | Need.DOT)
        bucket.key.backend.measure(batch_of(optimizer, bucket))
        judge(bucket, 0, Products(optimizer, param, 1), Decision.CHANNEL)
        bucket.key.backend.step(batch_of(optimizer, bucket))
        results.append([t.clone() for t in stored])
    for a, b in zip(*results, strict=True):
        assert_identical(a, b)


@pytest.mark.parametrize(
    ("sharing", "part"), [(Sharing.SHARED, (slice(5, 20), ...)), (Sharing.SPLIT, (..., slice(3, 40)))]
)
def test_chance_goes_by_the_number_in_the_whole(sharing: Sharing, part: tuple[Any, ...], backend: str) -> None:
    """A part that is stepped alone is the part of the whole, bit for bit."""
    whole, grad = torch.randn(2, 31, 70).bfloat16()
    results = []
    for p, g, how, number in (
        (whole, grad, Sharing.LOCAL, None),
        (whole[part].clone(), grad[part].clone(), sharing, (whole[part].storage_offset(), whole.size(1))),
    ):
        param = torch.nn.Parameter(p.clone())
        param.grad = g
        optimizer = AdamP([param], lr=0.1, rounding="stochastic", projection="none", backend=backend)
        bucket = sharded(optimizer, backend, [how], [number])
        state = optimizer.state[param]
        for name in bucket.key.moments:
            state[name].zero_()
        if bucket.shared is not None:
            bucket.shared.verdicts.zero_()
        bucket.key.backend.step(batch_of(optimizer, bucket))
        results.append([param.detach(), *(state[name] for name in bucket.key.moments)])
    for of_whole, of_part in zip(*results, strict=True):
        assert_identical(of_part, of_whole[part])


@pytest.mark.parametrize("verdict", Decision)
def test_results_are_bitwise_equal_for_any_number_of_threads(verdict: Decision) -> None:
    shapes = [shape for shape in SHAPES.values() if len(shape) == 2]
    runs = []
    for threads in (1, 2, 8):
        generator = torch.Generator().manual_seed(2)
        torch.manual_seed(2)
        params = [torch.nn.Parameter(torch.randn(shape, generator=generator)) for shape in 2 * shapes]
        for p in params:
            p.grad = torch.randn(p.shape, generator=generator)
        optimizer = AdamP(params, lr=0.1, backend="cpu")
        bucket = sharded(optimizer, "cpu", sorted([Sharing.SHARED, Sharing.SPLIT] * len(shapes)))
        shared = bucket.shared
        assert shared is not None
        shared.needs.fill_(Need.TEST | Need.DOT)
        for i, p in enumerate(params):
            judge(bucket, i, Products(optimizer, p, 1), verdict)
        torch.set_num_threads(threads)
        bucket.key.backend.measure(batch_of(optimizer, bucket, final=True))
        bucket.key.backend.step(batch_of(optimizer, bucket))
        torch.set_num_threads(1)
        runs.append([p.detach() for p in params] + [shared.shares, shared.rows, *state_of(optimizer, bucket)])
    for run in runs[1:]:
        for a, b in zip(runs[0], run, strict=True):
            assert_identical(a, b)
