"""Sharded parameters, on real process groups: what state is, and what ranks that differ or fail are told."""

from __future__ import annotations

import copy
import io
import pickle
import warnings
from typing import TYPE_CHECKING, Any

import pytest
import torch
import torch.distributed as dist
from distributed import (
    FLAT,
    LAYOUTS,
    Pair,
    Run,
    assert_within,
    backends,
    build,
    laid_out,
    mesh,
    named,
    random_weights,
    ranks_of,
    run,
)
from tolerances import assert_identical
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from trajectory import MOMENTS, RULES, gradient

from fused_adamp.reference import Decision
from fused_adamp.sharded import exchange
from fused_adamp.sharded.dtensor import local
from fused_adamp.sharded.exchange import Exchange
from fused_adamp.sharded.flat_slice import mark_slice

if TYPE_CHECKING:
    from collections.abc import Callable

pytestmark = pytest.mark.usefixtures("one_thread")

BACKEND = {"backend": backends()[0]}
CAREFUL = {"backend": "reference"}
"""Moves nothing before the ranks have agreed. The fastest may have, by a guess, once the first step is over."""
EVERY_RULE = pytest.mark.parametrize("rule", list(RULES))
SHARDED = pytest.mark.parametrize("layout", [*LAYOUTS[1:], FLAT])
TOLD = pytest.mark.parametrize("layout", ["FSDP2", "TP row", "FSDP2 x TP"])


# State.


def look_at_state(layout: str, rule: str) -> None:
    pair = Pair(layout, rule, "uneven", **BACKEND)
    pair.steps(2)
    for name, p in pair.sharded.params.items():
        state = pair.sharded.optimizer.state[p]
        assert set(state) == {*MOMENTS[rule], *(["step"] if rule == "AdamP" else [])}
        for key in MOMENTS[rule]:
            t = state[key]
            assert (type(t), t.shape, t.stride()) == (type(p.data), p.shape, p.stride()), f"{key} of {name}"
            assert t.dtype is p.dtype
            assert not t.requires_grad
            if isinstance(p, DTensor):
                assert (t.device_mesh, t.placements) == (p.device_mesh, p.placements)
                assert (local(t).shape, local(t).stride()) == (local(p).shape, local(p).stride())
        if rule == "AdamP":
            assert type(state["step"]) is torch.Tensor
            assert (state["step"].shape, state["step"].item()) == ((), 2)


@SHARDED
@EVERY_RULE
def test_state_lies_as_the_parameter(rule: str, layout: str) -> None:
    run(ranks_of(layout, "uneven"), look_at_state, layout, rule)


def copy_and_go_on(layout: str, rule: str) -> None:
    pair = Pair(layout, rule, "uneven", **BACKEND)
    pair.steps(2)
    optimizer = pair.sharded.optimizer
    for copied in (copy.deepcopy, lambda state_dict: pickle.loads(pickle.dumps(state_dict))):
        optimizer.load_state_dict(copied(optimizer.state_dict()))
        pair.steps(2)


@SHARDED
@EVERY_RULE
def test_copies_of_the_state_dict(rule: str, layout: str) -> None:
    run(ranks_of(layout, "uneven"), copy_and_go_on, layout, rule)


# Ranks that differ. The last one is the odd one out.


def odd() -> bool:
    return dist.get_rank() == dist.get_world_size() - 1


def fewer_parameters(run: Run) -> None:
    if odd():
        run.optimizer.param_groups[0]["params"].pop()


def other_order(run: Run) -> None:
    if odd():
        run.optimizer.param_groups[0]["params"].reverse()


def other_shape(run: Run) -> None:
    p = run.params["matrix"]
    rows = torch.zeros(p.size(0) + odd(), p.size(1), dtype=p.dtype)
    other = nn.Parameter(distribute_tensor(rows, p.device_mesh, [Shard(0)] * p.device_mesh.ndim, src_data_rank=None))
    other.grad = torch.ones_like(other)
    run.optimizer.param_groups[0]["params"][0] = other


def other(group: int, **options: Any) -> Callable[[Run], None]:
    def change(run: Run) -> None:
        if odd():
            run.optimizer.param_groups[group].update(options)

    return change


def one_group_more(run: Run) -> None:
    if odd():
        p = run.params["matrix"]
        rows = torch.ones(8, 4, dtype=p.dtype)
        added = nn.Parameter(distribute_tensor(rows, p.device_mesh, p.placements, src_data_rank=None))
        added.grad = torch.ones_like(added)
        run.optimizer.add_param_group({"params": [("added", added)]})


def clip(max_norm: float, everywhere: bool = True) -> Callable[[Run], None]:
    def call(run: Run) -> None:
        if odd():
            run.optimizer.clip_grad_norm_(max_norm)
        elif everywhere:
            run.optimizer.clip_grad_norm_(1.0)

    return call


def max_grad_norm(value: float, elsewhere: float | None) -> Callable[[Run], None]:
    def change(run: Run) -> None:
        for group in run.optimizer.param_groups:
            group["max_grad_norm"] = value if odd() else elsewhere

    return change


DIFFERENCES: dict[str, tuple[Callable[[Run], None], list[str]]] = {
    "fewer parameters": (fewer_parameters, ["shape"]),
    "other order": (other_order, ["shape"]),
    "other shape": (other_shape, ["shape", "8"]),
    "other lr": (other(0, lr=0.5), ["group 0: lr=0.05", "lr=0.5"]),
    "other delta": (other(1, delta=0.7), ["group 1: delta=0.1", "delta=0.7"]),
    "other projection": (other(1, projection="layer"), ["projection='auto'", "projection='layer'"]),
    "other max_norm": (clip(2.0), ["1.0", "2.0"]),
    "other max_grad_norm": (max_grad_norm(2.0, 1.0), ["max_grad_norm=1.0", "max_grad_norm=2.0"]),
    "max_grad_norm on some": (max_grad_norm(2.0, None), ["max_grad_norm=None", "max_grad_norm=2.0"]),
    "clips alone": (clip(1.0, everywhere=False), ["clip"]),
    "one group more": (one_group_more, ["parameter 'added'"]),
}


def changed_step(run: Run, change: Callable[[Run], None]) -> None:
    change(run)
    run.optimizer.step()


def differ(layout: str, name: str, after: tuple[int, ...]) -> None:
    """After so many steps, every rank is told the same, and nothing has moved."""
    change, words = DIFFERENCES[name]
    for steps, backend in (*((steps, CAREFUL) for steps in after), (after[-1], BACKEND)):
        with named(f"after {steps} steps, {backend}"):
            pair = Pair(layout, "AdamP", "even", **backend)
            pair.steps(steps)
            before = pair.sharded.weights()
            pair.give()
            with pytest.raises(ValueError, match="ranks") as caught:
                changed_step(pair.sharded, change)
            told = [""] * dist.get_world_size()
            dist.all_gather_object(told, str(caught.value))
            assert set(told) == {told[0]}, told
            for word in [*words, "rank 0", f"rank {dist.get_world_size() - 1}"]:
                assert word in told[0], told[0]
            if backend is CAREFUL or steps == 0:
                assert_within(pair.sharded.weights(), before, 0)


@TOLD
@pytest.mark.parametrize("name", list(DIFFERENCES))
def test_ranks_that_differ(name: str, layout: str) -> None:
    run(ranks_of(layout, "even"), differ, layout, name, (0, 2))


@pytest.mark.parametrize("name", [name for name in DIFFERENCES if name not in {"other shape", "one group more"}])
def test_ranks_that_differ_about_slices(name: str) -> None:
    run(2, differ, FLAT, name, (0, 2))


@pytest.mark.parametrize("name", [name for name in DIFFERENCES if not name.endswith(("max_norm", "alone"))])
def test_replicas_that_differ(name: str) -> None:
    """They meet in the first step only."""
    run(4, differ, "HSDP", name, (0,))


# Ranks that fail.


SPOILT: dict[str, tuple[Callable[[Tensor], Tensor], type[Exception]]] = {
    "int32": (Tensor.int, TypeError),
    "has shape": (lambda g: g[:, 1:], ValueError),
}
"""Bad gradients: words of the error, a function that spoils the gradient, and the error's type."""


def fail(layout: str, rule: str) -> None:
    """One rank has an error of its own, the others are told, and the optimizer goes on afterwards."""
    for word, (spoil, error) in SPOILT.items():
        for steps, max_norm in ((0, None), (0, 1.0), (2, None), (2, 1.0)):
            with named(f"{word} after {steps} steps, clipping to {max_norm}"):
                pair = Pair(layout, rule, "even", **(CAREFUL if steps else BACKEND))
                pair.steps(steps)
                before = pair.sharded.weights()
                pair.give()
                p = pair.sharded.params["matrix"]
                good = p.grad
                if odd():
                    p.grad = good.clone()
                    p.grad._local_tensor = spoil(local(good))
                with pytest.raises(error if odd() else RuntimeError, match=word if odd() else "another rank"):
                    pair.sharded.advance(max_norm)
                p.grad = good
                assert_within(pair.sharded.weights(), before, 0)
                pair.advance()
                pair.steps(1)


@TOLD
@EVERY_RULE
def test_a_rank_that_fails(rule: str, layout: str) -> None:
    run(ranks_of(layout, "even"), fail, layout, rule)


def fail_with_rows_that_do_not_fit() -> None:
    """Rows that this rank's part has none of, so that not even its layout can be looked at as rows."""
    whole = torch.randn(4, 3, 3)
    p = nn.Parameter(distribute_tensor(whole, mesh(2), [Shard(1)], src_data_rank=None))
    p.grad = distribute_tensor(whole, mesh(2), [Shard(1)], src_data_rank=None)
    optimizer = RULES["AdamP"][0]([p], **BACKEND)
    if dist.get_rank() == 0:
        optimizer.param_groups[0]["channel_dim"] = (0, 2)
    error, words = (ValueError, "cannot be merged") if dist.get_rank() == 0 else (RuntimeError, "another rank")
    with pytest.raises(error, match=words):
        optimizer.step()


def test_a_rank_whose_rows_do_not_fit_tells_the_others() -> None:
    run(2, fail_with_rows_that_do_not_fit)


def fail_with_a_bad_limit(layout: str) -> None:
    """Of one rank, in a step and in a call; the others do not wait for ever."""
    pair = Pair(layout, "AdamP", "even", **CAREFUL)
    pair.steps(1)
    groups = pair.sharded.optimizer.param_groups
    for act in (pair.sharded.optimizer.step, lambda: pair.sharded.optimizer.clip_grad_norm_(1.0)):
        pair.give()
        groups[0]["max_grad_norm"] = -1.0 if odd() else None
        error, words = (ValueError, "max_grad_norm=-1.0 is outside") if odd() else (RuntimeError, "another rank")
        with pytest.raises(error, match=words):
            act()
    groups[0]["max_grad_norm"] = None
    pair.steps(1)


@TOLD
def test_a_rank_with_a_bad_limit_tells_the_others(layout: str) -> None:
    run(ranks_of(layout, "even"), fail_with_a_bad_limit, layout)


# On a GPU nobody waits to read what the ranks have told.


class Done:
    """An event on a device that is never behind."""

    def query(self) -> bool:
        return True


def no_gradient(run: Run) -> None:
    if odd():
        run.params["matrix"].grad = None


def found_later(layout: str, name: str) -> None:
    change, words = LATER[name]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Exchange, "asynchronous", True)
        patch.setattr(exchange, "_event", Done)
        pair = Pair(layout, "AdamP", "even", **CAREFUL)
        pair.steps(3)
        before = pair.sharded.values()
        pair.give()
        change(pair.sharded)
        pair.sharded.optimizer.step()
        assert_within(pair.sharded.values(), before, 0)
        with pytest.raises(ValueError, match=f"in an earlier step, which moved nothing, .* {words}"):
            pair.sharded.optimizer.step()


LATER = {"other lr": (other(0, lr=0.5), "hyperparameters"), "no gradient": (no_gradient, "zeros")}


@TOLD
@pytest.mark.parametrize("name", list(LATER))
def test_what_is_found_later(name: str, layout: str) -> None:
    """The step that goes wrong moves nothing on any rank, and the next one says so on all."""
    run(ranks_of(layout, "even"), found_later, layout, name)


# Flat slices: docs/sharding.md, "Flat buffers".


SLICED = (7, 5)


def take_the_place_of_matrices(rule: str) -> None:
    """As Megatron's optimizer does: two groups of ranks, each with a tensor of its own."""
    cls, defaults = RULES[rule]
    group, own = mesh(2, 2)["b"].get_group(), mesh(2, 2).get_coordinate()
    weights = random_weights({"matrix": SLICED, "gain": (5,)}, own[0])
    whole = Run("whole", weights, rule, **BACKEND)
    optimizer = cls([nn.Parameter(w) for w in weights.values()], **defaults, **BACKEND)
    slices = {}
    for name, w in weights.items():
        cut = 13 if w.ndim > 1 else 5  # within a row; and nothing for the second rank
        begin, end = ((0, cut), (cut, w.numel()))[own[1]]
        slices[name] = mark_slice(nn.Parameter(w.flatten()[begin:end].clone()), w.shape, begin, group)
    optimizer.param_groups[0]["params"] = list(slices.values())
    whole.optimizer = cls(whole.params.values(), **defaults, **BACKEND)
    for count in range(4):
        grads = random_weights({"matrix": SLICED, "gain": (5,)}, 10 * count + own[0])
        grads["matrix"] += whole.params["matrix"].detach() * (count % 2)
        whole.give(grads)
        for name, p in slices.items():
            p.grad = laid_out(grads[name], p) if p.numel() else None
        norms = []
        for one in (optimizer, whole.optimizer):
            norms += [one.clip_grad_norm_(0.1).item()] if count > 1 else []
            one.step()
        assert not norms or norms[0] == pytest.approx(norms[1], rel=1e-12)
        for name, p in slices.items():
            if p.numel():
                decision = optimizer.decisions()[p]
                assert decision == whole.decisions()[name]
            assert_within({name: p}, {name: laid_out(whole.params[name].detach(), p)})


@EVERY_RULE
def test_slices_that_take_the_place_of_matrices(rule: str) -> None:
    run(4, take_the_place_of_matrices, rule)


def overlapping_groups() -> None:
    """One slice over all ranks, one over half of them, and one over another group of the same ranks."""
    cls, defaults = RULES["AdamP"]
    half, again = mesh(2, 2)["b"].get_group(), dist.new_group([0, 1, 2, 3])
    params, whole = [], []
    for number, group in enumerate((dist.group.WORLD, half, again)):
        w = random_weights({"matrix": SLICED}, number)["matrix"]
        at, ranks = dist.get_group_rank(group, dist.get_rank()), group.size()
        begin, end = (min(at * 13, 35), 35 if at == ranks - 1 else min((at + 1) * 13, 35))
        params.append(mark_slice(nn.Parameter(w.flatten()[begin:end].clone()), SLICED, begin, group))
        whole.append(nn.Parameter(w.clone()))
    optimizers = [cls(of, **defaults, **BACKEND) for of in (params, whole)]
    for count in range(3):
        for number, (p, w) in enumerate(zip(params, whole, strict=True)):
            w.grad = random_weights({"matrix": SLICED}, 10 + 3 * count + number)["matrix"]
            p.grad = laid_out(w.grad, p)
        for one in optimizers:
            one.clip_grad_norm_(0.1)
            one.step()
        for p, w in zip(params, whole, strict=True):
            assert_within({"matrix": p}, {"matrix": laid_out(w.detach(), p)})


def test_slices_over_several_groups() -> None:
    run(4, overlapping_groups)


def fail_beside_a_frozen_one() -> None:
    """The ranks of a parameter that is not trained are not told, since they do not wait."""
    cls, defaults = RULES["AdamP"]
    half, at = mesh(2, 2)["b"].get_group(), mesh(2, 2).get_coordinate()[1]
    spans = (dist.group.WORLD, 8 * dist.get_rank(), 8), (half, 16 * at, 16)
    trained, frozen = (mark_slice(nn.Parameter(torch.ones(n)), (8, 4), begin, group) for group, begin, n in spans)
    frozen.requires_grad_(False)
    optimizer = cls([trained, frozen], **defaults, **BACKEND)
    trained.grad = torch.ones_like(trained)
    if odd():
        optimizer.state[trained] = {"exp_avg": torch.zeros(8)}
    with pytest.raises(ValueError if odd() else RuntimeError, match="lacks" if odd() else "another rank"):
        optimizer.step()


def test_a_rank_that_fails_beside_a_frozen_slice() -> None:
    run(4, fail_beside_a_frozen_one)


def nothing_here() -> None:
    """A rank that has nothing of a slice may give it a gradient in one step and none in the next."""
    cls, defaults = RULES["AdamP"]
    w = random_weights({"matrix": SLICED}, 0)["matrix"]
    begin, end = ((0, 35), (35, 35))[dist.get_rank()]
    p = mark_slice(nn.Parameter(w.flatten()[begin:end].clone()), SLICED, begin)
    optimizer = cls([p], **defaults, **BACKEND)
    for count, along in enumerate((0.0, 1.0)):
        whole = gradient(w, "channel") + along * w
        p.grad = laid_out(whole, p) if count == 0 or p.numel() else None
        optimizer.step()
        found: list[Any] = [None, None]
        dist.all_gather_object(found, optimizer.decisions()[p])
        assert found[0] == found[1]
        assert (found[0] is Decision.CHANNEL) == (count == 0)
    saved = io.BytesIO()
    torch.save(optimizer.state_dict(), saved)
    copied = copy.deepcopy(optimizer.state_dict())
    assert [*copied["state"]] == [0]


def test_slice_of_nothing() -> None:
    run(2, nothing_here)


def mark_again() -> None:
    """A later mark counts from the next step on; and an unmarked slice is not taken for a vector."""
    cls, defaults = RULES["AdamP"]
    w = random_weights({"matrix": SLICED}, 0)["matrix"]
    cut = 13
    begin, end = ((0, cut), (cut, 35))[dist.get_rank()]
    p, whole = nn.Parameter(w.flatten()[begin:end].clone()), nn.Parameter(w.flatten().clone())
    optimizers = [cls([of], **defaults, **BACKEND) for of in (p, whole)]

    def advance(seed: int) -> None:
        g = gradient(whole.detach().reshape(SLICED), "channel") + random_weights({"g": SLICED}, seed)["g"] * 1e-4
        whole.grad = g.reshape(whole.shape)
        p.grad = whole.grad.flatten()[begin:end]
        for one in optimizers:
            one.step()
        assert_within({"matrix": p}, {"matrix": whole.detach().flatten()[begin:end]})

    advance(0)
    assert optimizers[0].decisions()[p] is Decision.NONE  # still a vector
    for shape in (SLICED, (5, 7)):
        mark_slice(p, shape, begin)
        state = optimizers[1].state.pop(whole)
        whole = nn.Parameter(whole.detach().reshape(shape))
        optimizers[1].param_groups[0]["params"] = [whole]
        optimizers[1].state[whole] = {k: t.reshape(shape) if t.ndim else t for k, t in state.items()}
        advance(1)
        assert optimizers[0].decisions()[p] is optimizers[1].decisions()[whole]
    # Matrices that were stepped are gone, and a vector holds their memory: a framework's flat buffer.
    buffer = torch.randn(12)
    matrices = [nn.Parameter(buffer[:6].view(2, 3)), nn.Parameter(buffer[6:].view(2, 3))]
    flattened = cls(matrices, **defaults, **BACKEND)
    for matrix in matrices:
        matrix.grad = torch.ones_like(matrix)
    flattened.step()
    flattened.param_groups[0]["params"] = [nn.Parameter(buffer)]
    flattened.param_groups[0]["params"][0].grad = torch.ones(12)
    with pytest.raises(TypeError, match="has taken the place of matrices, whose memory it holds"):
        flattened.step()
    for tensors in ([p], [optimizers[0].state[p]["exp_avg"]]):
        for t in tensors:
            t.data = torch.cat([t.data, t.data])
        p.grad = torch.zeros_like(p)
        with pytest.raises((ValueError, RuntimeError), match=r"(26|44) elements|of (26|44)"):
            optimizers[0].step()
        for t in tensors:
            t.data = t.data[: end - begin]


def test_marks_that_come_late() -> None:
    run(2, mark_again)


MISMARKED: dict[str, tuple[tuple[Any, ...], tuple[Any, ...]]] = {
    r"no slice: it is a tensor of shape \(3, 5\)": ((torch.zeros(3, 5), SLICED, 0), (torch.zeros(20), SLICED, 15)),
    r"begin='x'": ((torch.zeros(13), SLICED, 0), (torch.zeros(22), SLICED, "x")),
    r"shape=30 and begin=0": ((torch.zeros(13), 30, 0), (torch.zeros(22), SLICED, 13)),
    r"different shapes: \[\(7, 5\), \(5, 7\)\]": ((torch.zeros(13), SLICED, 0), (torch.zeros(22), (5, 7), 13)),
    r"go from and to \[\(0, 13\), \(14, 35\)\]": ((torch.zeros(13), SLICED, 0), (torch.zeros(21), SLICED, 14)),
    r"from element 0 to 35, .* \[\(0, 13\), \(12, 35\)\]": (
        (torch.zeros(13), SLICED, 0),
        (torch.zeros(23), SLICED, 12),
    ),
    r"go from and to \[\(0, 13\), \(13, 34\)\]": ((torch.zeros(13), SLICED, 0), (torch.zeros(21), SLICED, 13)),
}
"""Marks of two ranks that do not fit together, by the error that both ranks get."""


def mismark() -> None:
    for words, said in MISMARKED.items():
        with named(words), pytest.raises((TypeError, ValueError), match=words):
            mark_slice(*said[dist.get_rank()])
    one = build(FLAT, {"matrix": torch.zeros(SLICED)}).get_parameter("matrix")
    cls, defaults = RULES["SGDP"]
    with pytest.raises(ValueError, match=r"flat slice of a tensor of shape \(7, 5\): its rows are those of dim 0"):
        cls([one], **defaults, channel_dim=1)
    optimizer = cls([one], **defaults)
    one.data = torch.zeros(3)
    one.grad = torch.zeros(3)
    with pytest.raises(ValueError, match=r"has 3 elements, but was marked as elements (0 to 18|18 to 35) of a tensor"):
        optimizer.step()


def test_slices_that_are_none() -> None:
    run(2, mismark)


# Groups that come later, and torch's wrappers.


def add_group(layout: str, rule: str) -> None:
    pair = Pair(layout, rule, "even", **BACKEND)
    pair.steps(2)
    weights = random_weights({"later": (6, 4)}, 1)
    for one in pair:
        p = build("whole" if one is pair.whole else layout, weights).get_parameter("later")
        one.optimizer.add_param_group({"params": [("later", p)], "lr": 0.01})
        one.params["later"] = p
    pair.steps(3, max_norm=0.5)


@SHARDED
@EVERY_RULE
def test_a_group_that_comes_later(rule: str, layout: str) -> None:
    run(ranks_of(layout, "even"), add_group, layout, rule)


def zero_redundancy(rule: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # torch's own, of torch.jit
        from torch.distributed.optim import ZeroRedundancyOptimizer

    cls, defaults = RULES[rule]
    pair = Pair("whole", rule, "uneven", **BACKEND)
    params = list(pair.sharded.params.values())
    optimizer = ZeroRedundancyOptimizer(params, optimizer_class=cls, **defaults, **BACKEND)
    pair.whole.optimizer = cls(pair.whole.params.values(), **defaults, **BACKEND)
    for _ in range(4):
        pair.give()
        optimizer.step()
        pair.whole.optimizer.step()
    for a, b in zip(pair.sharded.params.values(), pair.whole.params.values(), strict=True):
        assert_identical(a, b)


@EVERY_RULE
def test_zero_redundancy_optimizer(rule: str) -> None:
    """Every rank steps whole parameters of its own."""
    run(2, zero_redundancy, rule)


def compile_step(layout: str, rule: str) -> None:
    pair = Pair(layout, rule, "even", **BACKEND)
    compiled = torch.compile(pair.sharded.optimizer.step, backend="eager")
    for _ in range(3):
        pair.give()
        compiled()
        pair.whole.optimizer.step()
        pair.check()


@pytest.mark.parametrize("layout", ["FSDP2", "FSDP2 x TP", FLAT])
@EVERY_RULE
def test_compiled_step(rule: str, layout: str) -> None:
    run(ranks_of(layout, "even"), compile_step, layout, rule)
