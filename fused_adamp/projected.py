"""The front end that AdamP and SGDP share: parameter groups, state, and one step from start to end."""

from __future__ import annotations

import math
from itertools import repeat
from numbers import Real
from operator import is_, is_not
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import torch
from torch import Tensor
from torch.optim import Optimizer

from fused_adamp.backends import check_name, choose
from fused_adamp.bucket import ABSENT, FLOATING, Batch, Bucket, BucketKey, Scalars, overlaps
from fused_adamp.reference import Decision

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable, Sequence

    from torch.optim.optimizer import ParamsT

__all__ = ["ProjectedOptimizer", "Range"]


class Range(NamedTuple):
    """The allowed values of a hyperparameter: from ``low`` up to ``high``, itself allowed if ``closed``."""

    low: float
    high: float
    closed: bool
    remedy: str

    def check(self, name: str, value: Any) -> None:
        """Raises TypeError for what is no number, ValueError for what is outside. Reads no tensor off the CPU."""
        if isinstance(value, Tensor):
            if value.numel() != 1:
                raise ValueError(f"{name} is a tensor of {value.numel()} elements; pass a number or a 1-element tensor")
            if value.device.type != "cpu":
                return
            value = value.item()
        if isinstance(value, bool) or not isinstance(value, Real):
            raise TypeError(f"{name}={value!r} is a {type(value).__name__}; pass a number or a 1-element tensor")
        # Written so that NaN fails.
        if not (self.low <= float(value) < self.high or (self.closed and value == self.high)):
            end = "]" if self.closed else ")"
            raise ValueError(f"{name}={value!r} is outside [{self.low:g}, {self.high:g}{end}: {self.remedy}")


class ProjectedOptimizer(Optimizer):
    """Base of :class:`fused_adamp.AdamP` and :class:`fused_adamp.SGDP`, which supply the momentum rule."""

    adaptive: ClassVar[bool]
    """Whether the rule divides by a second moment, counts steps and corrects biases."""

    ranges: ClassVar[dict[str, Range]] = {
        "lr": Range(0, math.inf, False, "pass a finite learning rate of at least 0"),
        "eps": Range(0, math.inf, False, "pass a small number of at least 0, such as 1e-8"),
        "weight_decay": Range(0, math.inf, False, "pass a finite coefficient of at least 0"),
        "delta": Range(0, math.inf, False, "pass a threshold of at least 0, such as 0.1; 0 never projects"),
        "wd_ratio": Range(0, 1, True, "pass the part of the weight decay that projected weights keep"),
    }

    _buckets: list[Bucket]
    _unbucketed: list[Tensor]
    _seen_params: list[Tensor]
    _seen_groups: list[tuple[int, tuple[str, ...]]]

    def __init__(self, params: ParamsT, defaults: dict[str, Any]) -> None:
        self._forget_buckets()
        super().__init__(params, defaults)

    # What AdamP and SGDP supply.

    def moments(self, group: dict[str, Any]) -> tuple[str, ...]:
        """The state keys that have the parameter's shape."""
        raise NotImplementedError

    def scalars(self, group: dict[str, Any]) -> Scalars:
        """The group's hyperparameters, ready for a kernel."""
        raise NotImplementedError

    def reference_step(
        self, p: Tensor, g: Tensor, moments: Sequence[Tensor], step: Tensor | None, group: dict[str, Any]
    ) -> Decision:
        """One step of the reference on one tensor."""
        raise NotImplementedError

    def numbers(self, group: dict[str, Any]) -> dict[str, Any]:
        """The group's hyperparameters of :attr:`ranges` as Python floats."""
        return {name: float(group[name]) for name in self.ranges}

    # What users call.

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Performs one optimization step on every parameter that has a gradient.

        Args:
            closure: re-evaluates the model and returns the loss; called with gradients enabled.

        Returns:
            What the closure returned, or None without one.

        Raises:
            ValueError, TypeError: a parameter, gradient or state that cannot be stepped. Nothing has moved then.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        batches = self._gather()
        # A step checks its own batch before it moves anything; several have to be checked before the first moves.
        if len(batches) != 1 or batches[0].bucket.key.backend.step(batches[0]) >= 0:
            batches = self._refit(batches)
            for batch in batches:
                stale = batch.bucket.key.backend.step(batch)
                assert stale < 0, "a bucket that was checked a moment ago does not fit its tensors"
        for batch in batches:
            moved = [p for p, g in zip(batch.bucket.params, batch.grads, strict=True) if g is not ABSENT]
            torch.autograd.graph.increment_version(moved)
        return loss

    def decisions(self) -> dict[Tensor, Decision]:
        """The last step's decision for every parameter that has been stepped. Waits for the device."""
        return {
            p: Decision(d)
            for bucket in self._buckets
            for p, d in zip(bucket.params, bucket.decisions.tolist(), strict=True)
            if p in self.state
        }

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a parameter group as in torch.optim, after checking its values and parameters.

        Raises:
            ValueError, TypeError: a hyperparameter or a parameter outside what is allowed; the optimizer is unchanged.
        """
        before = len(self.param_groups)
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        try:
            self._check_hyperparameters(group)
            for p in group["params"]:
                _check_parameter(p, self._label(p))
        except Exception:
            del self.param_groups[before:]
            raise

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for group in self.param_groups:
            for name, default in self.defaults.items():
                group.setdefault(name, default)
        self._forget_buckets()

    # One step's tensors, from parameter groups to batches.

    def _gather(self) -> list[Batch]:
        """This step's tensors by bucket, with buckets and state made where they are missing. Moves no weight."""
        params = [p for group in self.param_groups for p in group["params"]]
        groups = [(len(group["params"]), self.moments(group)) for group in self.param_groups]
        if not (
            groups == self._seen_groups
            and all(map(is_, params, self._seen_params))
            and all(p.grad is None for p in self._unbucketed)
        ):
            self._fill_buckets()
            self._seen_params, self._seen_groups = params, groups
        batches = [self._batch(bucket) for bucket in self._buckets]
        return [batch for batch in batches if batch is not None]

    def _batch(self, bucket: Bucket) -> Batch | None:
        params, names = bucket.params, bucket.key.moments
        grads = [p.grad for p in params]
        absent = dict.fromkeys((*names, "step"), ABSENT)
        try:
            if all(map(is_not, grads, repeat(None))):
                states = list(map(self.state.__getitem__, params))
            elif all(map(is_, grads, repeat(None))):
                return None
            else:
                states = [absent if g is None else self.state[p] for p, g in zip(params, grads, strict=True)]
            moments = [[state[name] for state in states] for name in names]
            steps = [state["step"] for state in states] if self.adaptive else []
            if any(not isinstance(step, Tensor) for step in steps):  # a number, as in old checkpoints
                for state in states:
                    state["step"] = torch.as_tensor(state["step"], dtype=torch.float32)
                return self._batch(bucket)
        except KeyError:
            self._make_state(bucket)
            return self._batch(bucket)
        present = [ABSENT if g is None else g for g in grads]
        return Batch(bucket, present, moments, steps, self.param_groups, self)

    def _make_state(self, bucket: Bucket) -> None:
        """Gives every member with a gradient its state where it has none."""
        members = [(i, p) for i, p in enumerate(bucket.params) if p.grad is not None]
        for _, p in members:
            self._check_state(p, bucket.key)
        for i, p in members:
            if not self.state.get(p):
                self.state[p] = bucket.state(i, self.adaptive)

    def _refit(self, batches: list[Batch]) -> list[Batch]:
        """The same batches, with new buckets where a tensor no longer fits the table of its bucket.

        Raises:
            ValueError, TypeError: a tensor that fits no table.
        """
        stale = [batch for batch in batches if batch.bucket.key.backend.first_stale(batch) >= 0]
        if not stale:
            return batches
        for batch in stale:
            for p, g in zip(batch.bucket.params, batch.grads, strict=True):
                if g is not ABSENT:
                    _check_parameter(p, self._label(p))
                    _check_gradient(p, g, self._label(p))
        self._fill_buckets(without=[batch.bucket for batch in stale])
        return self._gather()

    # From parameters to buckets.

    def _fill_buckets(self, without: Collection[Bucket] = ()) -> None:
        """Puts every parameter that trains into a bucket: its old one if that still fits, else a new one.

        State that exists moves into the new storage. Either all of this happens or, on any error, nothing.
        """
        keys = self._bucket_keys()
        group_of = {p: i for i, group in enumerate(self.param_groups) for p in group["params"]}
        kept = [
            bucket
            for bucket in self._buckets
            if bucket not in without and all(keys.get(p) == bucket.key for p in bucket.params)
        ]
        bucketed = {p for bucket in kept for p in bucket.params}
        members: dict[BucketKey, list[Tensor]] = {}
        for p, key in keys.items():
            if p not in bucketed:
                self._check_state(p, key)
                members.setdefault(key, []).append(p)
        made = [Bucket(key, params) for key, params in members.items()]
        moved = {
            p: self._move_state(self.state[p], bucket.state(i, self.adaptive))
            for bucket in made
            for i, p in enumerate(bucket.params)
            if self.state.get(p)
        }
        self.state.update(moved)
        self._buckets = kept + made
        self._unbucketed = [p for p in group_of if p not in keys]
        for bucket in self._buckets:
            bucket.set_groups([group_of[p] for p in bucket.params])

    def _bucket_keys(self) -> dict[Tensor, BucketKey]:
        """The bucket key of every parameter that trains or has state."""
        keys = {}
        for group in self.param_groups:
            backends = {
                device: choose(device, backend=group["backend"], fused=group["fused"], foreach=group["foreach"])
                for device in {p.device for p in group["params"]}
            }
            for p in group["params"]:
                if p.requires_grad or p.grad is not None or self.state.get(p):
                    _check_parameter(p, self._label(p))
                    keys[p] = BucketKey(backends[p.device], p.device, p.dtype, self.moments(group))
        return keys

    def _move_state(self, old: dict[str, Any], new: dict[str, Tensor]) -> dict[str, Any]:
        for name, tensor in new.items():
            tensor.copy_(torch.as_tensor(old[name]))
        return {**old, **new}

    def _forget_buckets(self) -> None:
        self._buckets = []
        self._unbucketed = []
        self._seen_params = []
        self._seen_groups = []

    # Checks. Every message names what was received and what would do.

    def _check_hyperparameters(self, group: dict[str, Any]) -> None:
        for name, allowed in self.ranges.items():
            allowed.check(name, group[name])
        if group["differentiable"]:
            raise ValueError(
                "differentiable=True is not supported: the step writes weights and state in place, outside autograd; "
                "leave it False, or differentiate through a copy of fused_adamp.adamp_ref or sgdp_ref"
            )
        if group["fused"] and group["foreach"]:
            raise ValueError("fused=True and foreach=True exclude each other: pass at most one of them as True")
        if group["backend"] is not None:
            check_name(group["backend"], "backend")

    def _check_state(self, p: Tensor, key: BucketKey) -> None:
        state = self.state.get(p)
        if not state:
            return
        needed = (*key.moments, "step") if self.adaptive else key.moments
        missing = [name for name in needed if name not in state]
        if missing:
            raise ValueError(
                f"the state of {self._label(p)} has {sorted(state)} but lacks {missing}: load a whole state_dict, or "
                "clear this parameter's state to start it afresh"
            )
        for name in key.moments:
            if state[name].shape != p.shape:
                raise ValueError(
                    f"state {name!r} of {self._label(p)} has shape {tuple(state[name].shape)}, the parameter "
                    f"{tuple(p.shape)}: load this model's state, or clear this parameter's state to start it afresh"
                )

    def _label(self, p: Tensor) -> str:
        for number, group in enumerate(self.param_groups):
            for index, member in enumerate(group["params"]):
                if member is p:
                    names = group.get("param_names")
                    return f"parameter {names[index]!r}" if names else f"parameter {index} of group {number}"
        raise KeyError(p)


def _check_parameter(p: Tensor, label: str) -> None:
    if p.is_meta:
        raise TypeError(f"{label} is on the meta device and holds no data: materialise it first, e.g. model.to_empty()")
    if p.layout is not torch.strided:
        raise TypeError(f"{label} has layout {p.layout}: pass a dense tensor, e.g. p.to_dense()")
    if p.dtype not in FLOATING:
        remedy = "train torch.view_as_real(p)" if p.is_complex() else "pass a floating-point parameter"
        raise TypeError(f"{label} has dtype {p.dtype}, allowed are {_listed(FLOATING)}: {remedy}")
    if overlaps(p):
        raise ValueError(
            f"elements of {label} share memory (shape {tuple(p.shape)}, strides {p.stride()}): pass p.contiguous()"
        )


def _check_gradient(p: Tensor, g: Tensor, label: str) -> None:
    if g.layout is not torch.strided:
        raise TypeError(
            f"the gradient of {label} has layout {g.layout}: use sparse=False, or p.grad = p.grad.to_dense()"
        )
    if g.shape != p.shape:
        raise ValueError(f"the gradient of {label} has shape {tuple(g.shape)}, the parameter {tuple(p.shape)}")
    if g.device != p.device:
        raise ValueError(f"the gradient of {label} is on {g.device}, the parameter on {p.device}: move one of them")
    if g.dtype not in FLOATING:
        raise TypeError(f"the gradient of {label} has dtype {g.dtype}, allowed are {_listed(FLOATING)}")


def _listed(items: Iterable[Any]) -> str:
    return ", ".join(map(str, items))
