"""An optimizer that is told to do one thing after the other, beside a model that remembers nothing.

An :class:`Op` is one action. :meth:`Machine.do` runs it, in one process or on every rank in lockstep, and compares.
The model is what a user of torch.optim sees: weights, gradients, moments, step counts, options, and at most one pending
clip. It computes each step in float64 by adamp_ref or sgdp_ref from the tensors as they are now.
"""

from __future__ import annotations

import copy
import functools
import math
from collections import Counter
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from distributed import full, laid_out, mesh
from tolerances import TOLERANCE, assert_identical
from torch import Tensor, nn
from torch.distributed.tensor import Shard, distribute_tensor
from trajectory import RULES, Hand, gradient, near_threshold

from fused_adamp.backends import triton
from fused_adamp.reference import Decision, decide, rows_first
from fused_adamp.sharded.dtensor import local
from fused_adamp.sharded.placement import placement_of

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator, Sequence

F32, F64 = torch.float32, torch.float64


_NORM = {2.0: TOLERANCE[F32], 1.0: 8 * TOLERANCE[F32], math.inf: TOLERANCE[F32]}
"""How far a norm may be off, and so a clipped step: tiles of float32 are added up in float32; by torch, all of it."""


class Op(NamedTuple):
    """A method of :class:`Machine` and its arguments."""

    name: str
    options: dict[str, Any]


class Place(NamedTuple):
    """A parameter to begin with: its parameter group, and the dimension that two ranks share out, if any."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    group: int
    shard: int | None


_TILES = {"cpu": 32768, "triton": 1 << triton._LOG_TILE, "reference": 64}


def places(backend: str, *, sharded: bool) -> list[Place]:
    """Two buckets in two groups: matrices, vectors, equal shapes; rows of several tiles, or rows that are split."""
    wide = (4, 160) if sharded else (2, _TILES[backend] // 2 + 8)
    return [
        Place((6, 10), F32, 0, 0),
        Place(wide, F32, 0, 0),
        Place((5, 7), F64, 0, 1),
        Place((3,), F64, 0, None),
        Place((6, 10), F32, 1, 0),
        Place((9,), F32, 1, 0),
        Place((4, 3, 3, 3), F64, 1, 0),
    ]


OPTIONS: dict[str, list[Any]] = {
    "lr": [0.05, 0.0, 0.1],
    "weight_decay": [0.1, 0.0],
    "wd_ratio": [0.3, 1.0],
    "delta": [0.1, 0.6, 30.0, 0.0],
    "eps": [1e-8, 1e-2],
    "nesterov": [False, True],
    "maximize": [False, True],
    "projection": ["auto", "channel", "layer", "none"],
    "betas": [(0.8, 0.95), (0.0, 0.5)],
    "momentum": [0.8, 0.0],
    "dampening": [0.25, 0.0],
    "project_buffer": [False, True],
    "channel_dim": [0, 1],
    "state_dtype": [None, F64],
}
"""Values that options take."""

COUNT = len(places("reference", sharded=False))


@dataclass
class Entry:
    """The model's record of one parameter."""

    place: Place
    moments: dict[str, Tensor] = field(default_factory=dict)
    """In float64, whole; without an entry they are zero."""
    step: int = 0


class Evidence(NamedTuple):
    """A parameter's whole weight and gradient in float64, at the time of a clip or a step."""

    weight: Tensor
    gradient: Tensor


class Pending(NamedTuple):
    """A clip that no step has used: what was asked for, and what there was then.

    A step uses it as if it were made now. Only if there were no writes but through ``.data``, it goes by what was then.
    """

    max_norm: float
    norm_type: float
    unscaled: bool
    seen: list[tuple[Tensor, Tensor, int, int]]
    """Weights and gradients, and how often each had been written, but for writes through ``.data``."""
    evidence: dict[int, Evidence]
    test_options: list[Any]

    def noticed(self, now: list[tuple[Tensor, Tensor, int, int]]) -> bool:
        """Whether any tensor is another or was written."""
        same = len(self.seen) == len(now) and all(
            a[0] is b[0] and a[1] is b[1] and a[2:] == b[2:] for a, b in zip(self.seen, now, strict=True)
        )
        return not same


class PlannedError(RuntimeError):
    """Raised by closures and hooks."""


class Machine:
    """An optimizer and its model. Every rank has one, and the models are equal.

    Attributes:
        entries: of each parameter, in the order of the parameter groups.
        pending: the clip that the next step is to use.
        writes: how often a tensor was written in ways that autograd counts, or that move it.
        blind: whether something was written through ``.data`` since the pending clip.
        precision: of the norm that the last step has clipped; 0 if it has not.
        met: how often the run came through what it is about.
    """

    def __init__(self, rule: str, backend: str, *, sharded: bool = False) -> None:
        torch.manual_seed(0)
        self.rule, self.sharded = rule, sharded
        self.entries = [Entry(place) for place in places(backend, sharded=sharded)]
        cls, defaults = RULES[rule]
        groups = [
            {"params": [self._parameter(entry.place) for entry in self.entries if entry.place.group == group]} | own
            for group, own in enumerate(({}, {"lr": 0.02, "weight_decay": 0.3, "wd_ratio": 0.5}))
        ]
        self.optimizer: Any = cls(groups, **defaults, backend=backend)  # type: ignore[arg-type]
        self.pending: Pending | None = None
        self.saved: tuple[Any, list[Entry]] | None = None
        self.writes: Counter[Tensor] = Counter()
        self.blind = False
        self.precision = 0.0
        self.met: Counter[str] = Counter()

    def do(self, op: Op) -> None:
        getattr(self, op.name)(**op.options)
        self.check()

    # Parameters and groups.

    @property
    def params(self) -> list[Any]:
        return [p for group in self.optimizer.param_groups for p in group["params"]]

    @property
    def groups(self) -> list[dict[str, Any]]:
        """The parameter group of every parameter."""
        return [group for group in self.optimizer.param_groups for _ in group["params"]]

    @property
    def _members(self) -> list[int]:
        return [i for i, p in enumerate(self.params) if p.grad is not None]

    def _evidence(self) -> dict[int, Evidence]:
        params = self.params
        return {i: Evidence(_whole(params[i]), _whole(params[i].grad)) for i in self._members}

    def _seen(self) -> list[tuple[Tensor, Tensor, int, int]]:
        with_gradient = [p for p in self.params if p.grad is not None]
        return [(p, p.grad, self.writes[p], self.writes[p.grad]) for p in with_gradient]

    def _test_options(self) -> list[Any]:
        return [[group[name] for name in ("eps", "delta", "projection")] for group in self.optimizer.param_groups]

    def _parameter(self, place: Place) -> nn.Parameter:
        value = torch.randn(place.shape, dtype=place.dtype)
        if self.sharded and place.shard is not None:
            value = distribute_tensor(value, mesh(2), [Shard(place.shard)], src_data_rank=None)
        return nn.Parameter(value)

    def _chosen(self, which: Collection[int] | None) -> list[int]:
        return [i for i in range(len(self.entries)) if which is None or i in which]

    # Gradients and weights.

    def give(self, which: Collection[int] | None, kind: str, how: str, seed: int) -> None:
        """New gradients of a kind of trajectory.KINDS, or zeros; ``how`` says by which kind of write."""
        torch.manual_seed(seed)
        for i in self._chosen(which):
            p = self.params[i]
            value = gradient(_whole(p), kind) if kind != "zero" else torch.zeros(p.shape, dtype=F64)
            value = laid_out(value.to(p.dtype), p)
            if how == "inference" and not placement_of(p).is_shared:
                with torch.inference_mode():
                    p.grad = value.clone()
                self.writes[p.grad] += 1
            elif p.grad is None or how in {"replace", "inference"}:
                p.grad = value
            else:
                self._write(p.grad, value, how)

    def scale_gradients(self, which: Collection[int] | None, factor: float, how: str) -> None:
        for i in self._chosen(which):
            g = self.params[i].grad
            if g is not None:
                self._write(g, g.detach() * factor, how)

    def drop(self, which: Collection[int] | None) -> None:
        for i in self._chosen(which):
            self.params[i].grad = None

    def zero_grad(self, set_to_none: bool) -> None:
        if any(g is not None and g.is_inference() for g in (p.grad for p in self.params)):
            set_to_none = True
        self.optimizer.zero_grad(set_to_none=set_to_none)
        for p in self.params:
            if p.grad is not None:
                self.writes[p.grad] += 1

    def swap_gradients(self) -> None:
        """Two parameters of one shape exchange theirs."""
        p, q = (self.params[i] for i in (0, 4))
        if p.shape == q.shape:
            p.grad, q.grad = q.grad, p.grad

    def move(self, i: int, kind: str, how: str, seed: int) -> None:
        """Writes a weight: a random one, or the parameter's own gradient, so that the cosine test changes."""
        torch.manual_seed(seed)
        p = self.params[i]
        value = laid_out(torch.randn(p.shape, dtype=p.dtype), p)
        if kind == "gradient" and p.grad is not None and full(p.grad).any():
            value = p.grad.detach() * 1.0
        if how == "storage" and not placement_of(p).is_shared:
            p.data = value
            self.writes[p] += 1
        else:
            self._write(p, value, how)

    def _write(self, t: Any, value: Tensor, how: str) -> None:
        with torch.inference_mode(t.is_inference()), torch.no_grad():
            if how == "data":
                local(t).data.copy_(local(value))
                self.blind = True
            else:
                t.copy_(value)
                self.writes[t] += 1

    def _settle(self) -> None:
        """After a change of buckets a step may measure anew what was written through ``.data``: now it has to."""
        for p in self.params:
            if self.blind and p.grad is not None:
                self._write(p.grad, p.grad.detach() * 1.0, "in place")

    # Options, groups and state.

    def option(self, group: int, name: str, pick: int) -> None:
        if name in self.optimizer.defaults:
            values = OPTIONS[name]
            self.optimizer.param_groups[group][name] = values[pick % len(values)]
            self._settle()

    def limit(self, max_norm: float | None) -> None:
        """Every step clips to it, but for one that a clip is pending for."""
        for group in self.optimizer.param_groups:
            group["max_grad_norm"] = max_norm

    def replace(self, i: int, keep_state: bool, keep_gradient: bool, seed: int) -> None:
        """Another parameter takes the place of one, perhaps with its state or its gradient."""
        torch.manual_seed(seed)
        old, new = self.params[i], self._parameter(self.entries[i].place)
        members = self.groups[i]["params"]
        members[next(n for n, p in enumerate(members) if p is old)] = new
        new.grad = old.grad if keep_gradient else None
        state = self.optimizer.state.pop(old, None)
        if keep_state and state is not None:
            self.optimizer.state[new] = state
        else:
            self.entries[i] = Entry(self.entries[i].place)
        self._settle()

    def reorder(self, group: int) -> None:
        """Parameters in another order within their group."""
        entries = dict(zip(self.params, self.entries, strict=True))
        self.optimizer.param_groups[group]["params"].reverse()
        self.entries = [entries[p] for p in self.params]
        self.saved = None
        self._settle()

    def forget(self, i: int) -> None:
        """A parameter's state is taken away."""
        self.optimizer.state.pop(self.params[i], None)
        self.entries[i] = Entry(self.entries[i].place)

    def write_state(self, i: int, factor: float, how: str) -> None:
        """Moments are written in place, or are other tensors."""
        state = self.optimizer.state.get(self.params[i], {})
        for name, moment in self.entries[i].moments.items():
            if name in state:
                if how == "replace":
                    state[name] = state[name] * factor
                else:
                    state[name].mul_(factor)
                self.entries[i].moments[name] = moment * factor

    def save(self) -> None:
        self.saved = copy.deepcopy((self.optimizer.state_dict(), self.entries))

    def load(self, saved: bool) -> None:
        """Loads the state_dict that :meth:`save` has kept, or the current one."""
        state, entries = copy.deepcopy(self.saved) if saved and self.saved else (self.optimizer.state_dict(), None)
        self.optimizer.load_state_dict(copy.deepcopy(state))
        self.entries = entries or self.entries
        self._settle()

    # Clips.

    def clip(self, max_norm: float, norm_type: float) -> None:
        with self._moves_no_weight():
            self._clip(max_norm, norm_type)

    def _clip(self, max_norm: float, norm_type: float) -> None:
        evidence, seen = self._evidence(), self._seen()
        scale = getattr(self.optimizer, "grad_scale", None)
        norm = self.optimizer.clip_grad_norm_(max_norm, norm_type).item()
        self.pending = Pending(max_norm, norm_type, scale is not None, seen, evidence, self._test_options())
        self.blind = False
        expected = _norm(evidence, norm_type, None if scale is None else scale.item())
        assert abs(norm - expected) <= _NORM[norm_type] * expected, f"norm {norm}, not {expected}"
        self.met["clip"] += 1

    def clip_infinite(self, i: int) -> None:
        """A norm that is not finite raises, and an earlier clip still counts."""
        p = self.params[i]
        if p.grad is None or p.grad.is_inference():
            return
        value = p.grad.detach() * 1.0
        self._write(p.grad, value * math.inf, "in place")
        _raises(RuntimeError, lambda: self.optimizer.clip_grad_norm_(1.0, error_if_nonfinite=True))
        self._write(p.grad, value, "in place")

    # Steps.

    def scale(self, scale: float | None) -> None:
        """Sets or deletes ``grad_scale`` on the optimizer, as GradScaler does."""
        if scale is not None:
            self.optimizer.grad_scale = torch.tensor(scale)
        elif hasattr(self.optimizer, "grad_scale"):
            del self.optimizer.grad_scale

    def step(
        self,
        scale: float | None,
        found_inf: float | None,
        hook: tuple[float, float] | None,
        closure: Sequence[Op] | None,
    ) -> None:
        """As GradScaler steps, perhaps; a clip in a step hook; ops in a closure."""
        handle = self.optimizer.register_step_pre_hook(lambda *_: self._clip(*hook) if hook else None)
        if scale is not None:
            self.scale(scale)
        if found_inf is not None:
            self.optimizer.found_inf = torch.tensor([found_inf])
        before: list[tuple[dict[int, Evidence], list[Tensor]]] = []

        def evaluate() -> float:
            for op in closure or ():
                getattr(self, op.name)(**op.options)
            before.append((self._evidence(), [_whole(p) for p in self.params]))
            return 1.5

        assert self.optimizer.step(evaluate) == 1.5
        handle.remove()
        self._compare(*before[0], skipped=bool(found_inf))
        self.pending, self.blind = None, False
        if scale is not None:
            self.scale(None)
        if found_inf is not None:
            del self.optimizer.found_inf

    def fail(self, kind: str, call: str, i: int) -> None:
        """A step or a clip that raises, on all ranks, moves nothing, and an earlier clip still counts."""
        p, state = self.params[i], self.optimizer.state.get(self.params[i], {})
        planned = kind in {"closure", "hook"}
        call = "step" if kind == "shape" else call  # a clip does not look at the state
        moments = [name for name in self.optimizer.moments(self.groups[i]) if name in state]
        if p.grad is None or (kind == "shape" and not moments):
            return
        if kind == "sparse" and placement_of(p).is_shared:
            kind = "freed"
        gradient, moment = p.grad, state[moments[0]] if moments else None
        with self._moves_no_weight():
            if kind == "freed":
                p.grad = gradient.clone()
                local(p.grad).untyped_storage().resize_(0)
            elif kind == "sparse":
                p.grad = torch.zeros(p.shape, dtype=p.dtype).to_sparse()
            elif kind == "shape":
                state[moments[0]] = torch.zeros(2, 2)
            handle = self.optimizer.register_step_pre_hook(_fail if kind == "hook" else _pass)
            act = functools.partial(self.optimizer.clip_grad_norm_, 1e-3)
            if planned or call == "step":
                act = functools.partial(self.optimizer.step, _fail if kind == "closure" else None)
            _raises(PlannedError if planned else (ValueError, TypeError, RuntimeError), act)
            handle.remove()
            p.grad = gradient
        if kind == "shape":
            state[moments[0]] = moment
        self.met["failed " + ("step" if planned else call)] += 1

    # The model.

    @contextmanager
    def _moves_no_weight(self) -> Iterator[None]:
        params, evidence = [_whole(p) for p in self.params], self._evidence()
        yield
        for i, (p, value) in enumerate(zip(self.params, params, strict=True)):
            assert_identical(_whole(p), value, f"weight {i}")
        for i, before in evidence.items():
            assert_identical(_whole(self.params[i].grad), before.gradient, f"gradient {i}")

    def _decide_across_ranks(self, now: dict[int, Evidence]) -> tuple[float, dict[int, Evidence]]:
        """The factor of all gradients, and what each parameter's cosine test is made of."""
        scale = getattr(self.optimizer, "grad_scale", None)
        scale = 1.0 if scale is None else scale.item()
        clip, limit = self.pending, self.optimizer.param_groups[0]["max_grad_norm"]
        if clip is None and limit is None:
            return 1 / scale, now
        if clip is None:
            norm = self._clipped(now, 2.0, scale)
            self.met["step: by option"] += bool(now) and norm > limit
            return min(1.0, limit / (norm + 1e-6)) / scale, now
        inference = any(self.params[i].grad.is_inference() for i in now)
        noticed = inference or clip.noticed(self._seen())
        same_test = clip.test_options == self._test_options()
        self.met["step: " + ("changed" if noticed else "blind" if self.blind else "held")] += 1
        self.met["step: other test"] += not same_test
        of = now if noticed else clip.evidence
        norm = self._clipped(of, clip.norm_type, scale if clip.unscaled else None)
        factor = min(1.0, clip.max_norm / (norm + 1e-6)) / scale
        self.met["step: clipped"] += bool(now) and norm > clip.max_norm
        # Shared parameters are tested while clipping.
        kept = (
            {i for i in now if placement_of(self.params[i]).is_shared} if same_test and clip.norm_type == 2 else set()
        )
        return factor, {i: of[i] if i in kept else now[i] for i in now}

    def _clipped(self, of: dict[int, Evidence], norm_type: float, scale: float | None) -> float:
        """The norm that the step has clipped, which the optimizer shows if it has the option."""
        self.precision, norm = _NORM[norm_type], _norm(of, norm_type, scale)
        if self.optimizer.param_groups[0]["max_grad_norm"] is not None:
            found = self.optimizer.grad_norm.item()
            assert abs(found - norm) <= self.precision * norm, f"grad_norm {found}, not {norm}"
        return norm

    def _compare(self, now: dict[int, Evidence], weights: list[Tensor], *, skipped: bool) -> None:
        """The step that was just taken, with one in float64; then the model goes on from the optimizer's values."""
        self.precision = 0.0
        factor, tested = self._decide_across_ranks(now)
        decisions = self.optimizer.decisions()
        for i, (p, entry, group) in enumerate(zip(self.params, self.entries, self.groups, strict=True)):
            if skipped or i not in now:
                assert_identical(_whole(p), weights[i], f"weight {i}")
                continue
            assert_identical(_whole(p.grad), now[i].gradient, f"gradient {i}")
            decision = self._decision(tested[i], factor, group, p.dtype)
            if decision is None:  # rounding may turn it
                decision = decisions[p]
            assert decisions[p] is decision, f"decision on {i}: {decisions[p]!r}, not {decision!r}"
            self.met[decision.name] += 1
            self._advance(i, now[i], factor, decision, entry, group)
            self.writes[p] += 1

    def _decision(self, of: Evidence, factor: float, group: dict[str, Any], dtype: torch.dtype) -> Decision | None:
        """None where a cosine that it hangs on is too close to its threshold."""
        p, g = (rows_first(t, group["channel_dim"], copy=True) for t in (of.weight, of.gradient * factor))
        delta, eps = group["delta"], group["eps"]
        if group["projection"] == "auto" and near_threshold(g, p, delta, eps, dtype):
            return None
        return decide(g, p, delta, eps, group["projection"])

    def _advance(
        self, i: int, of: Evidence, factor: float, decision: Decision, entry: Entry, group: dict[str, Any]
    ) -> None:
        p, state = self.params[i], self.optimizer.state.get(self.params[i], {})
        results = []
        for projection in (decision.name.lower(), "none"):
            hand = Hand(self.rule, of.weight)
            hand.steps = entry.step
            hand.moments = {name: moment.clone() for name, moment in entry.moments.items()}
            hand.step(of.gradient * factor, group | {"projection": projection})
            results.append({"weight": hand.p} | hand.moments)
        actual = {"weight": p} | {name: state[name] for name in results[0] if name != "weight"}
        for name, value in results[0].items():
            # A projection rounds at the size of what it takes away.
            size = max(x.abs().max().item() for x in (value, results[1][name], entry.moments.get(name, value)))
            tolerance = max(TOLERANCE[p.dtype], self.precision)
            self._assert_within(actual[name], value, size * tolerance, f"{name} of {i}")
        entry.step += self.rule == "AdamP"
        entry.moments = {name: _whole(t) for name, t in actual.items() if name != "weight"}

    @staticmethod
    def _assert_within(actual: Tensor, expected: Tensor, allowed: float, what: str) -> None:
        error = (_whole(actual) - expected).abs().max().item()
        assert error <= allowed, f"{what}: off by {error:.3g}, allowed {allowed:.3g}"

    def check(self) -> None:
        """The optimizer's state is the model's."""
        for i, (p, entry) in enumerate(zip(self.params, self.entries, strict=True)):
            state = self.optimizer.state.get(p, {})
            if "step" in state or entry.step:
                assert float(state["step"]) == entry.step, f"step of {i}: {state['step']}, not {entry.step}"
            names = {*entry.moments, *(state.keys() - {"step"})}
            for name in sorted(names):
                moment = entry.moments.get(name, torch.zeros(p.shape, dtype=F64))
                allowed = TOLERANCE[F32] * moment.abs().max().item()  # a change of dtype rounds
                self._assert_within(state[name], moment, allowed, f"{name} of {i}")


def _fail(*_: Any) -> Any:
    raise PlannedError


def _pass(*_: Any) -> None:
    pass


def _raises(errors: Any, act: Any) -> None:
    try:
        act()
    except errors:
        return
    raise AssertionError(f"nothing was raised, not {errors}")


def _whole(t: Any) -> Tensor:
    """A copy in float64 of all that the ranks have of a tensor."""
    whole: Tensor = full(t.detach()).to(F64, copy=True, memory_format=torch.contiguous_format)
    return whole


def _norm(evidence: dict[int, Evidence], norm_type: float, scale: float | None) -> float:
    grads = [of.gradient.flatten() for of in evidence.values()]
    norm = torch.linalg.vector_norm(torch.cat(grads), norm_type).item() if grads else 0.0
    return norm if scale is None else norm / scale


# On the ranks of distributed.py: one machine in each process.

_machines: list[Machine] = []


def begin(rule: str, backend: str) -> None:
    _machines[:] = [Machine(rule, backend, sharded=True)]


def do(op: Op) -> Counter[str]:
    """Returns what was met so far."""
    _machines[0].do(op)
    return _machines[0].met
