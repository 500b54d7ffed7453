"""The front end that AdamP and SGDP share: parameter groups, state, and one step from start to end."""

from __future__ import annotations

import hashlib
from collections import Counter, defaultdict
from contextlib import suppress
from copy import deepcopy
from itertools import chain, repeat
from operator import is_, is_not
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer

from fused_adamp.backends import BACKENDS, choose
from fused_adamp.backends.cpu import empty_like
from fused_adamp.bucket import (
    ABSENT,
    FLOATING,
    PROJECTIONS,
    UNDECIDED,
    Batch,
    Bucket,
    BucketKey,
    Need,
    Scalars,
    place_of,
    span_of,
)
from fused_adamp.checkpoint import check, to_ours
from fused_adamp.clipping import Clipping, Seen
from fused_adamp.compiled import register
from fused_adamp.exchange import Exchange, Header, compare_headers
from fused_adamp.fake import has_numbers, new_state, touch, traces_fakes
from fused_adamp.options import MAX_NORM, Range, check_options
from fused_adamp.reference import Decision
from fused_adamp.report import ProjectionReport, projection_report
from fused_adamp.sharding import (
    copy,
    is_distributed,
    is_shared,
    layouts_of,
    local,
    local_gradient,
    marks,
)
from fused_adamp.validate import (
    check_channel_dim,
    check_gradient,
    check_parameter,
    check_storage,
    refuse_flat_buffers,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Sequence

    from torch.optim.optimizer import ParamsT
    from typing_extensions import Self

    from fused_adamp.backends import Backend
    from fused_adamp.exchange import Outcome
    from fused_adamp.options import Option

__all__ = ["ProjectedOptimizer", "number"]


class _Label(NamedTuple):
    """A parameter's name in messages. The parameter groups are searched when the message is written, not before."""

    optimizer: ProjectedOptimizer
    p: Tensor

    def __str__(self) -> str:
        return self.optimizer._labels().get(self.p, "a parameter that is in no group")

    def __format__(self, spec: str) -> str:
        return format(str(self), spec)


class _Memory:
    """Everything that an optimizer remembers from one call to the next.

    It is created once and then only mutated. Frameworks wrap an optimizer in an object that subclasses its class and
    copies its ``__dict__``: both share this object, so that a call through either is seen by both.

    Attributes:
        buckets: the parameters as the backends see them.
        unbucketed: parameters that are in no bucket, as they neither train nor have state.
        has_fakes: whether others are in no bucket, as they hold no numbers: :mod:`fused_adamp.fake`.
        seen_params, seen_groups, seen_marks: what the buckets were made from.
        addresses, rounds: the weights' addresses, bucket by bucket, and the order that follows from them:
            :meth:`ProjectedOptimizer._in_rounds`.
        clipping: what :meth:`ProjectedOptimizer.clip_grad_norm_` has left for the next step.
        exchange: the collectives of parameters that lie on several ranks; None if none does.
        agreed: the exchange that all ranks have agreed on last.
        filled: stand-ins for gradients that other ranks have and this one does not, during a step.
    """

    def __init__(self) -> None:
        self.forget()

    def forget(self) -> None:
        """Back to what a new optimizer remembers."""
        self.buckets: list[Bucket] = []
        self.unbucketed: list[Tensor] = []
        self.has_fakes = False
        self.seen_params: list[Tensor] = []
        self.seen_groups: list[tuple[Any, ...]] = []
        self.seen_marks = 0
        self.addresses: list[list[int]] = []
        self.rounds: list[list[set[int]]] | None = None
        self.clipping: Clipping | None = None
        self.exchange: Exchange | None = None
        self.agreed: Exchange | None = None
        self.filled: dict[Tensor, Tensor] = {}


class ProjectedOptimizer(Optimizer):
    """Base of :class:`fused_adamp.AdamP` and :class:`fused_adamp.SGDP`, which supply the momentum rule."""

    adaptive: ClassVar[bool]
    """Whether the rule divides by a second moment, counts steps and corrects biases."""

    options: ClassVar[dict[str, Option]]
    """The entries of :data:`fused_adamp.options.OPTIONS` that the rule has."""

    _numbers: ClassVar[list[str]]
    """The options that are numbers. Every step reads them."""

    _handle: str
    _memory: _Memory

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        cls._numbers = [name for name, option in cls.options.items() if isinstance(option.allowed, Range)]

    def __new__(cls, *args: Any, **kwargs: Any) -> Self:
        # Not in __init__, which copied and unpickled optimizers skip.
        self = super().__new__(cls)
        self._handle = register(self)
        self._memory = _Memory()
        return self

    def __init__(self, params: ParamsT, defaults: dict[str, Any]) -> None:
        check_options(defaults, self.options)
        self._step_supports_amp_scaling = _supports_amp_scaling(defaults)
        super().__init__(params, defaults)

    # AdamP and SGDP supply these.

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

    def direction(
        self, moments: Sequence[Tensor], step: Tensor | None, group: dict[str, Any]
    ) -> tuple[Tensor, Tensor | float]:
        """The update u that moments in float64 stand for, and the step size. Waits for no device.

        If the rule keeps no moments, ``moments[0]`` is the gradient. Nesterov momentum is left out.
        """
        raise NotImplementedError

    def numbers(self, group: dict[str, Any]) -> dict[str, Any]:
        """The group's options that are numbers, by :func:`number`."""
        return {name: number(group[name]) for name in self._numbers}

    def reference_options(self, group: dict[str, Any], *flags: str) -> dict[str, Any]:
        """The group's options that are numbers as floats, the named ones as they are."""
        return {name: float(group[name]) for name in self._numbers} | {name: group[name] for name in flags}

    # Users call these.

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Performs one optimization step on every parameter that has a gradient.

        Args:
            closure: re-evaluates the model and returns the loss; called with gradients enabled.

        Returns:
            The result of the closure, or None without one.

        Raises:
            ValueError, TypeError: a parameter, gradient or state that cannot be stepped. Nothing has moved then.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if torch.compiler.is_dynamo_compiling():
            self._traced_step()
        else:
            self._step()
        return loss

    def _traced_step(self) -> None:
        """The step as Dynamo traces it: one operator that runs :meth:`_step` when the compiled code runs."""
        from fused_adamp.tracing import eager_step, needs_eager, tensor_options

        # Where Dynamo gives up on this function, it calls it, as Python.
        if not torch.compiler.is_dynamo_compiling() or needs_eager(self._handle):
            eager_step(self)
            return
        # Not self.param_groups: Dynamo guards every value in it, so that each new lr would compile anew.
        groups = super().__getattribute__("param_groups")
        params = [p for group in groups for p in group["params"]]
        members = [i for i, p in enumerate(params) if p.grad is not None]
        options = tensor_options(self._handle)
        if members:
            torch.ops.fused_adamp.optimizer_step.default(
                [params[i] for i in members],
                [params[i].grad for i in members],
                [groups[i][name] for i, name in options],
                members,
                [f"{i} {name}" for i, name in options],
                self._handle,
            )

    def _step(self) -> None:
        batches = [] if traces_fakes() else self._gathered()
        if traces_fakes() or self._memory.has_fakes:
            self._step_fakes()
        if self._memory.exchange is None:
            batches = self._scaled(batches)
            # A step checks its own batch before it moves anything; several are checked before the first moves.
            alone = len(batches) == 1 and not self._rounds(batches)
            moved = alone and batches[0].bucket.key.backend.step(batches[0]) < 0
            batches = batches if moved else self._scaled(self._refit(batches))
        else:
            batches, moved = self._decide_across_ranks(self._memory.exchange, batches), False
        for batch in () if moved else self._in_order(batches):
            stale = batch.bucket.key.backend.step(batch)
            assert stale < 0, "a bucket that was checked a moment ago does not fit its tensors"
        self._memory.clipping = None
        for batch in batches:
            stepped = [p for p, g in zip(batch.bucket.params, batch.grads, strict=True) if g is not ABSENT]
            torch.autograd.graph.increment_version(stepped)

    def _fakes(self) -> list[tuple[Tensor, dict[str, Any]]]:
        """The parameters whose step computes nothing, with their groups: in FakeTensorMode all that have a gradient."""
        owners = [(p, group) for group in self.param_groups for p in group["params"] if p.grad is not None]
        return owners if traces_fakes() else [(p, group) for p, group in owners if not has_numbers(p)]

    def _step_fakes(self) -> None:
        """All that a step does but for the numbers: errors, state, versions. No backend is asked whether it could."""
        for group in self.param_groups:
            check_options(group, self.options)
        keys = {p: self._bucket_key(p, group, BACKENDS[-1]) for p, group in self._fakes()}
        for p, key in keys.items():
            self._check_member(p, key.channel_dim)
            self._check_state(p, key)
        for p, key in keys.items():
            state = self.state[p]
            if any(name not in state for name in (*key.storage, *key.counters)):
                self.state[p] = state = new_state(p, key) | state
            touch([p, *(state[name] for name in (*key.storage, *key.counters))])

    def _in_order(self, batches: list[Batch]) -> list[Batch]:
        """The batches to step one after the other: parameters that share memory are never in one batch."""
        rounds = self._rounds(batches)
        if not rounds:
            return batches
        parts = [batch.only(members) for of in rounds for batch, members in zip(batches, of, strict=True)]
        return [part for part in parts if any(g is not ABSENT for g in part.grads)]

    def _rounds(self, batches: list[Batch]) -> list[list[set[int]]]:
        """Rounds of members, batch by batch, in which nobody shares memory; empty if nobody does at all.

        Parameters that share memory take the order of the parameter groups, as in torch.optim. A step whose addresses
        have not changed searches for nothing.
        """
        memory = self._memory
        addresses = [list(map(Tensor.data_ptr, batch.params)) for batch in batches]
        if memory.rounds is None or addresses != memory.addresses:
            place = {p: i for i, p in enumerate(chain.from_iterable(g["params"] for g in self.param_groups))}
            places = [[place[p] for p in batch.bucket.params] for batch in batches]
            memory.rounds = _rounds_of([batch.params for batch in batches], places)
            memory.addresses = addresses
        return memory.rounds

    @torch.no_grad()
    def clip_grad_norm_(
        self, max_norm: float | Tensor, norm_type: float = 2.0, error_if_nonfinite: bool = False
    ) -> Tensor:
        """Clips the norm of all gradients taken together, as torch.nn.utils.clip_grad_norm_ does, within the next step.

        The gradients stay as they are; the next :meth:`step`, and only that one, multiplies them by
        ``max_norm / (norm + 1e-6)`` as it reads them, if that is below 1. If a gradient or a weight has changed until
        then (in-place operations and replaced gradients are noticed, writes through ``.data`` are not), the step
        measures the norm again, so that what it uses has no larger norm than ``max_norm`` in any case.

        Args:
            max_norm: at least 0.
            norm_type: of the norm, ``inf`` for the largest magnitude.
            error_if_nonfinite: raise if the norm is NaN or infinite. Waits for the device.

        Returns:
            The norm before clipping, over all groups and devices: 0-dim, on the first gradient's device.

        Raises:
            ValueError, TypeError: a bad argument; a gradient that cannot be stepped.
            RuntimeError: the norm is not finite and ``error_if_nonfinite`` is set. Nothing has changed then.
        """
        if torch.compiler.is_dynamo_compiling():
            from fused_adamp.tracing import eager_clip

            total: Tensor = eager_clip(self, max_norm, norm_type, error_if_nonfinite)
            return total
        MAX_NORM.check("max_norm", max_norm)
        max_norm = max_norm.clone() if isinstance(max_norm, Tensor) else float(max_norm)
        batches = [] if traces_fakes() else self._gathered(make_state=False, check=norm_type != 2.0)
        if traces_fakes() or self._memory.has_fakes:
            return self._norm_of_fakes(float(norm_type), error_if_nonfinite)
        unscale = self._unscale()
        clipping = self._clipped(batches, max_norm, float(norm_type), unscaled=unscale is not None)
        norm = clipping.norm_over(unscale)
        if error_if_nonfinite and not norm.isfinite():
            raise RuntimeError(
                f"the total norm of order {float(norm_type)} of the gradients is {norm.item()}, so they cannot be "
                "clipped: look for the gradient that is not finite, or pass error_if_nonfinite=False to go on"
            )
        self._memory.clipping = clipping
        dtypes = dict.fromkeys(g.dtype for batch in batches for g in batch.grads if g is not ABSENT)
        return norm.to(_promoted([*dtypes]), copy=True)

    @torch._disable_dynamo  # type: ignore[attr-defined]
    def decisions(self) -> dict[Tensor, Decision]:
        """The last step's decision for every parameter that has been stepped. Waits for the device."""
        return {
            p: Decision(d)
            for bucket in self._memory.buckets
            for p, d in zip(bucket.params, bucket.decisions.tolist(), strict=True)
            if d != UNDECIDED
        }

    @torch._disable_dynamo  # type: ignore[attr-defined]
    def projection_report(self, model: torch.nn.Module | None = None) -> ProjectionReport:
        """How the last step was projected and what it did to the norms, parameter by parameter. Waits for the device.

        Args:
            model: whose parameter names the records bear; without, those of the groups' ``param_names``, or numbers.

        Returns:
            A list of :class:`~fused_adamp.report.ProjectionRecord`, which prints as a table.
        """
        names = self._labels()
        names |= {p: name for name, p in model.named_parameters()} if model is not None else {}
        return projection_report(self, names)

    @property
    def buckets(self) -> list[Bucket]:
        """The parameters as the backends see them: those that have been in a step, bucket by bucket."""
        return self._memory.buckets

    @property
    def exchange(self) -> Exchange | None:
        """The collectives of parameters that lie on several ranks."""
        return self._memory.exchange

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a parameter group as in torch.optim, after checking its values and parameters.

        Raises:
            ValueError, TypeError: a hyperparameter or a parameter outside what is allowed; the optimizer is unchanged.
        """
        before = len(self.param_groups)
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        try:
            check_options(group, self.options)
            for p in filter(self._takes_part, group["params"]):
                check_parameter(p, self._label(p), fused=group["fused"])
                check_channel_dim(p, group["channel_dim"], self._label(p))
        except Exception:
            del self.param_groups[before:]
            raise

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for group in self.param_groups:
            for name, default in self.defaults.items():
                group.setdefault(name, default)
        self._step_supports_amp_scaling = _supports_amp_scaling(self.defaults)
        self._memory.forget()

    @torch._disable_dynamo  # type: ignore[attr-defined]
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads a state_dict of this optimizer, or of the same rule from another package, as torch.optim does.

        What torch.optim.Adam, AdamW or SGD, clovaai's adamp, timm or pytorch_optimizer saved is recognised and
        converted: see :mod:`fused_adamp.checkpoint`, which also converts the other way. Unlike in torch.optim, state
        keeps the dtype that it was saved in: where that is not the weight's, ``state_dtype`` of the group says so from
        then on.

        Raises:
            ValueError: the state_dict does not fit; the message names the parameter. The optimizer is unchanged.
        """
        state_dict = state_dict.copy()
        for pre_hook in self._optimizer_load_state_dict_pre_hooks.values():
            state_dict = pre_hook(self, state_dict) or state_dict
        members = [group["params"] for group in self.param_groups]
        params = list(chain.from_iterable(members))
        options = [{name: group[name] for name in group if name != "params"} for group in self.param_groups]
        state_dict = to_ours(state_dict, adaptive=self.adaptive, options=options)
        check(state_dict, members, list(self._labels().values()))
        groups = deepcopy(state_dict["param_groups"])
        owners = dict(zip(chain.from_iterable(group["params"] for group in groups), params, strict=True))
        state: dict[Any, Any] = defaultdict(dict)
        for key, entries in state_dict["state"].items():
            if key in owners:
                device = owners[key].device
                state[owners[key]] = {
                    name: _copied(t, device if t.ndim else t.device) if isinstance(t, Tensor) else t
                    for name, t in entries.items()
                }
            else:
                state[key] = entries
        for group, own in zip(groups, self.param_groups, strict=True):
            group["params"] = own["params"]
            if "param_names" in own:
                group.setdefault("param_names", own["param_names"])
            group["state_dtype"] = group["state_dtype"] or self._dtype_of(group, state)
            check_options(self.defaults | group, self.options)
        clipping, agreed = self._memory.clipping, self._memory.agreed
        self.__setstate__({"state": state, "param_groups": groups})
        self._memory.clipping, self._memory.agreed = clipping, agreed
        for post_hook in self._optimizer_load_state_dict_post_hooks.values():
            post_hook(self)

    # One step's tensors, from parameter groups to batches.

    def _gathered(self, *, make_state: bool = True, check: bool = False) -> list[Batch]:
        """As :meth:`_gather`, and of sharded parameters checked: an error that one rank has is told to the others."""
        try:
            batches = self._gather(make_state=make_state)
            return self._refit(batches) if check or self._memory.exchange is not None else batches
        except Exception:
            # An error of another rank or of the network must not hide this rank's own.
            with suppress(Exception):
                self._withdraw()
            raise

    def _gather(self, *, make_state: bool = True) -> list[Batch]:
        """This step's tensors by bucket, with buckets and state made where they are missing. Moves no weight.

        Without ``make_state``, a bucket that lacks state is gathered without any.
        """
        params = list(chain.from_iterable(group["params"] for group in self.param_groups))
        groups = [(len(group["params"]), *self._storage(group)) for group in self.param_groups]
        if not (
            groups == self._memory.seen_groups
            and marks() == self._memory.seen_marks
            and all(map(is_, params, self._memory.seen_params))
            and all(p.grad is None for p in self._memory.unbucketed)
        ):
            self._fill_buckets()
            self._memory.seen_params, self._memory.seen_groups, self._memory.seen_marks = params, groups, marks()
        try:
            batches = [self._batch(bucket, make_state) for bucket in self._memory.buckets]
        except (RuntimeError, IndexError):  # a tensor that has no such rows: say which
            for bucket in self._memory.buckets:
                self._check_tensors(bucket)
            raise
        return [batch for batch in batches if batch is not None]

    def _batch(self, bucket: Bucket, make_state: bool) -> Batch | None:
        params, key, state = bucket.params, bucket.key, self.state
        grads: list[Any] = [p.grad for p in params]
        if bucket.distributed or bucket.shared is not None:
            grads = [self._memory.filled[p] if p in self._memory.filled else local_gradient(p) for p in params]
        names, none = [*key.storage, *key.counters], dict[str, Tensor]()
        if all(map(is_not, grads, repeat(None))):
            in_order = len(state) == len(params) and all(map(is_, state, params))  # no key is hashed
            states = list(state.values() if in_order else map(state.get, params, repeat(none)))
        elif all(map(is_, grads, repeat(None))):
            return None
        else:
            absent = dict.fromkeys(names, ABSENT)
            states = [absent if g is None else state.get(p, none) for p, g in zip(params, grads, strict=True)]
            grads = [ABSENT if g is None else g for g in grads]
        try:
            tensors = {name: [of[name] for of in states] for name in names}
        except KeyError:
            if make_state:
                self._make_state()
                return self._batch(bucket, make_state)
            for p in params:
                self._check_state(p, key)
            tensors = {}
        for name in key.counters.keys() & tensors:
            if not all(map(isinstance, tensors[name], repeat(Tensor))):  # a number, as in old checkpoints
                for of in states:
                    if not isinstance(of[name], Tensor):
                        of[name] = torch.tensor(of[name], dtype=key.counters[name], device="cpu")
                return self._batch(bucket, make_state)
        if bucket.distributed:
            params = list(map(local, params))
            tensors |= {name: [local(t) for t in tensors[name]] for name in key.storage.keys() & tensors}
        if bucket.sliced or key.channel_dim != 0:
            params, grads = bucket.all_rows(params), bucket.all_rows(grads, copy=True)
            tensors |= {name: bucket.all_rows(tensors[name]) for name in key.storage.keys() & tensors}
        if bucket.sliced:
            # Where a step is told that gradients are missing, it may have counted for the others already.
            uncounted = self._memory.filled or bucket.index
            tensors |= {name: bucket.counts(name, tensors[name], uncounted) for name in key.counters.keys() & tensors}
        return Batch(
            bucket,
            params,
            grads,
            [tensors[name] for name in key.moments if tensors],
            tensors.get("step", []),
            tensors.get("rounding_seed", []),
            tensors.get("remainder", []),
            self.param_groups,
            self,
            notes={},
        )

    @torch.inference_mode(False)  # what is made here lasts longer
    @torch.no_grad()
    def _make_state(self) -> None:
        """Gives every parameter with a gradient the state that it lacks: all of them, or on an error none."""
        stepped = [
            (bucket, p)
            for bucket in self._memory.buckets
            for p in bucket.index
            if p.grad is not None or p in self._memory.filled
        ]
        for bucket, p in stepped:
            self._check_state(p, bucket.key)
        groups = [self.param_groups[bucket.groups[bucket.index[p]]] for bucket, p in stepped]
        made = [self._fitted_state(bucket, p, group) for (bucket, p), group in zip(stepped, groups, strict=True)]
        for (_, p), new in zip(stepped, made, strict=True):
            self.state[p].update(new)

    # Clipping and loss scaling.

    def _scaled(self, batches: list[Batch]) -> list[Batch]:
        """The batches with what GradScaler has set and clip_grad_norm_ has left for this step."""
        if batches and not self._clipping_holds(batches):
            self._renew_clipping(self._refit(batches))
        return self._with_scale(batches, self._factor())

    def _factor(self) -> Tensor | None:
        """The factor of the gradients in the step: 0-dim float64; None is 1."""
        unscale = self._unscale()
        factor = None if self._memory.clipping is None else self._memory.clipping.coefficient(unscale)
        if unscale is not None:
            factor = unscale if factor is None else factor.to(unscale.device, non_blocking=True) * unscale
        return factor

    def _with_scale(self, batches: list[Batch], factor: Tensor | None, *, final: bool = False) -> list[Batch]:
        found_inf = getattr(self, "found_inf", None)
        if factor is None and found_inf is None and not final:
            return batches
        return [
            batch._replace(
                scale=_on(batch.bucket.key.device, factor),
                found_inf=_on(batch.bucket.key.device, found_inf),
                final=final,
            )
            for batch in batches
        ]

    def _clipping_holds(self, batches: list[Batch]) -> bool:
        """Whether what it was computed from is as it was."""
        clipping = self._memory.clipping
        return clipping is None or clipping.seen.still_holds(*_gradients(batches))

    def _renew_clipping(self, batches: list[Batch]) -> None:
        old = self._memory.clipping
        assert old is not None, "nothing was clipped"
        self._memory.clipping = self._clipped(batches, old.max_norm, old.norm_type, unscaled=old.unscaled)

    def _unscale(self) -> Tensor | None:
        """The factor that GradScaler leaves to the step, the inverse of its scale: 0-dim float64. None is 1."""
        grad_scale = getattr(self, "grad_scale", None)
        return None if grad_scale is None else grad_scale.double().reciprocal().reshape(())

    def _total_norm(self, batches: list[Batch], norm_type: float) -> tuple[Tensor, Outcome | None]:
        """The norm of all gradients taken together, 0-dim float64 on the first one's device.

        And what the ranks that share parameters have found out of the cosine test on the way.
        """
        if norm_type != 2.0:
            found = [(p, local_gradient(p)) for batch in batches for p in batch.bucket.index]
            grads = {p: g for p, g in found if g is not None}
            if self._memory.exchange is None:
                return torch.nn.utils.get_total_norm(grads.values(), norm_type).double(), None
            self._agree(self._memory.exchange)
            return torch.linalg.vector_norm(torch.stack(self._memory.exchange.norms(grads, norm_type)), norm_type), None
        squares, outcome = [], None
        for batch in batches:
            if batch.bucket.shared is None:
                square = batch.bucket.key.backend.square_norm(batch)
                if square is None:
                    return self._total_norm(self._refit(batches), norm_type)
                squares.append(square)
        if self._memory.exchange is not None:
            outcome = self._measured(self._memory.exchange, batches)
            squares.append(self._memory.exchange.square_norm(outcome))
        if not squares:
            return torch.zeros((), dtype=torch.float64, device="cpu"), None
        square = torch.stack([square.to(squares[0].device, non_blocking=True) for square in squares]).sum()
        return square.sqrt(), outcome

    def _clipped(self, batches: list[Batch], max_norm: Any, norm_type: float, *, unscaled: bool) -> Clipping:
        """Takes the norm, and returns the result to keep for the next step."""
        norm, outcome = self._total_norm(batches, norm_type)
        seen = Seen.of(*_gradients(batches))
        options = [] if outcome is None else self._test_options()
        return Clipping(max_norm, norm_type, norm, unscaled, seen, outcome, options)

    def _norm_of_fakes(self, norm_type: float, error_if_nonfinite: bool) -> Tensor:
        """A norm without a number, of what is here. The next step needs none."""
        self._memory.clipping = None
        params = chain.from_iterable(group["params"] for group in self.param_groups)
        grads = [g for p in params if (g := local_gradient(p)) is not None]
        return torch.nn.utils.get_total_norm(grads, norm_type, error_if_nonfinite).to(
            _promoted([g.dtype for g in grads])
        )

    # Parameters on several ranks: fused_adamp/exchange.py.

    def _agree(self, exchange: Exchange) -> None:
        """Makes sure that all ranks share the same parameters, in the first step and whenever they changed.

        Raises:
            ValueError: they do not; on every rank.
            RuntimeError: another rank has failed; or the step is captured in a CUDA graph.
        """
        if exchange.device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            raise RuntimeError(
                "the step of parameters that lie on several ranks cannot be captured in a CUDA graph: what the ranks "
                "tell each other is new in every step. Capture forward and backward, and step outside"
            )
        exchange.set_options(self._test_options())
        if exchange is self._memory.agreed:
            return
        lines = self._options_in_words(exchange)
        if self._memory.agreed is not None and self._memory.agreed.lines != exchange.lines:
            header = self._memory.agreed.tell(exchange.header(lines, moved=True))
            header.check_failure()
            if header.moved < header.ranks:
                raise ValueError(self._memory.agreed.disagreement([*exchange.lines, *lines]))
            self._memory.agreed = None
        if self._memory.agreed is None:
            header = compare_headers(exchange.layouts, exchange.header(lines))
            header.check_failure()
            if not header.agreed:
                raise ValueError(exchange.disagreement([*exchange.lines, *lines], replicas=True))
        self._memory.agreed = exchange

    def _measured(self, exchange: Exchange, batches: list[Batch]) -> Outcome:
        """Sums over the ranks for clipping: squares, and sums of the cosine test, of gradients as they are."""
        self._agree(exchange)
        exchange.ask_afresh(Need.TEST | Need.SQUARE)
        lines = [*self._options_in_words(exchange), "clip_grad_norm_"]
        exchange.measured = self._reduce_shares(exchange, batches, lines, scale=None)
        return exchange.measured

    def _decide_across_ranks(self, exchange: Exchange, batches: list[Batch]) -> list[Batch]:
        """The batches of a step, with everything decided that the ranks have to decide together."""
        self._agree(exchange)
        found_inf = getattr(self, "found_inf", None)
        renewed = False  # what was measured in this step is not asked whether it holds: gradients may keep no version
        while True:
            clipping, factor = self._memory.clipping, self._factor()
            clipped_to = None if clipping is None else _in_words(clipping.max_norm)
            known = None if clipping is None else clipping.test_of(self._test_options(), exchange.measured)
            lines = [*self._options_in_words(exchange), f"a step clipped to {clipped_to}"]
            lines += ["gradients are tested in this step"] if known is None else []  # what is sent depends on it
            if known is None:
                exchange.ask_afresh(Need.TEST | Need.DOT)
                scale: Any = 1.0
            else:  # the test has been made, of gradients as they are
                assert factor is not None, "a clipping gives a factor"
                scale = factor.to(exchange.device)
                exchange.ask(Need.DOT, only=exchange.undecided(known, scale))
            outcome = self._reduce_shares(
                exchange,
                self._with_scale(batches, factor, final=clipping is None and found_inf is None),
                lines,
                scale=scale,
                found_inf=found_inf,
                stale=not (renewed or self._clipping_holds(batches)),
            )
            if not exchange.is_stale(outcome):
                break
            self._renew_clipping(batches)
            renewed = True
        if missing := exchange.missing(outcome):  # on some ranks: there it counts as zero
            own = [p for p in missing if p.grad is None]
            try:
                self._memory.filled = {
                    p: torch.zeros((), dtype=p.dtype, device=p.device).expand(local(p).shape) for p in own
                }
                batches = self._gathered() if own else batches
                exchange.ask(Need.TEST | Need.DOT, only=exchange.mask(own))
                outcome = self._reduce_shares(
                    exchange, self._with_scale(batches, factor), lines, scale=scale, found_inf=found_inf
                )
            finally:
                self._memory.filled = {}
        exchange.judge(outcome)
        if found_inf is not None or exchange.asynchronous:
            found_inf = exchange.found_inf(outcome)
        return [
            batch._replace(found_inf=_on(batch.bucket.key.device, found_inf))
            for batch in self._with_scale(batches, factor)
        ]

    def _test_options(self) -> list[tuple[float, float, float]]:
        projections = [PROJECTIONS.index(group["projection"]) for group in self.param_groups]
        return [
            (float(group["eps"]), float(group["delta"]), projection)
            for group, projection in zip(self.param_groups, projections, strict=True)
        ]

    def _reduce_shares(
        self,
        exchange: Exchange,
        batches: list[Batch],
        lines: list[str],
        *,
        scale: Any,
        found_inf: Tensor | None = None,
        stale: bool = False,
    ) -> Outcome:
        """Measures what the backends are asked and adds it up over the ranks.

        Raises:
            ValueError: the ranks have not all of ``lines`` in common; on every rank, and names the first.
            RuntimeError: another rank has failed.
        """
        for batch in batches:
            if batch.bucket.shared is not None:
                batch.bucket.key.backend.measure(batch)
        present = [
            layout.holds and (p.grad is not None or p in self._memory.filled)
            for p, layout in zip(exchange.members, exchange.layouts, strict=True)
        ]
        try:
            outcome = exchange.reduce(exchange.header(lines, stale=stale), found_inf, present, scale)
            exchange.check(outcome, lines)
        except Exception:
            for batch in batches:  # what was measured, and perhaps moved by a guess, is part of no step
                batch.bucket.scratch = batch.bucket.key.backend.scratch(batch.bucket)
            raise
        return outcome

    def _withdraw(self) -> None:
        """Tells the ranks that wait for this one, if any, that it cannot take the step."""
        failed = Header.of((), failed=True)
        if self._memory.agreed is not None:
            self._memory.agreed.tell(failed)
        else:
            owners = [(p, group["channel_dim"]) for group in self.param_groups for p in group["params"]]
            shared = [(p, channel_dim) for p, channel_dim in owners if is_shared(p) and self._takes_part(p)]
            compare_headers([layout for of in shared for layout in layouts_of(*of)], failed)

    def _options_in_words(self, exchange: Exchange) -> list[str]:
        """The hyperparameters that are to be the same on all ranks."""
        return [
            f"group {number}: {name}={_in_words(value)}"
            for number in exchange.groups
            for name, value in self.param_groups[number].items()
            if name in self.defaults
        ]

    def _refit(self, batches: list[Batch]) -> list[Batch]:
        """The same batches, with new buckets where a tensor no longer fits the table of its bucket.

        Raises:
            ValueError, TypeError: a tensor that fits no table.
        """
        stale = [batch for batch in batches if batch.bucket.key.backend.first_stale(batch) >= 0]
        if not stale:
            return batches
        for batch in stale:
            self._check_tensors(batch.bucket)
        self._fill_buckets(without=[batch.bucket for batch in stale])
        return self._gather(make_state=all(batch.has_state for batch in batches))

    # From parameters to buckets.

    @torch.inference_mode(False)  # what is made here lasts longer
    @torch.no_grad()
    def _fill_buckets(self, without: Collection[Bucket] = ()) -> None:
        """Puts every parameter that trains into a bucket: its old one if that still fits, else a new one.

        State stays where it lies if it fits. Either all of this happens or, on any error, nothing.
        """
        keys = self._bucket_keys(without)
        group_of = {p: i for i, group in enumerate(self.param_groups) for p in group["params"]}
        kept, places = self._kept_buckets(keys, without)
        bucketed = {p for bucket in kept for p in bucket.params} | {p for _, _, p in places}
        members: dict[BucketKey, list[Tensor]] = {}
        for p, key in keys.items():
            if p not in bucketed:
                members.setdefault(key, []).append(p)
        made = [Bucket(key, params) for key, params in members.items()]
        for bucket in made:
            for p, layout in zip(bucket.params, bucket.layouts, strict=True):
                if bucket.key.rounding == "stochastic" and layout.numbers is None:
                    raise TypeError(
                        f'{self._label(p)} is sharded so that rounding="stochastic" cannot number its elements: shard '
                        'it by its first or second dimension, or take rounding="remainder"'
                    )
        fitted = [
            (p, bucket.key, self._fitted_state(bucket, p, self.param_groups[group_of[p]]))
            for bucket, p in [*((bucket, p) for bucket in made for p in bucket.index), *((b, p) for b, _, p in places)]
            if self.state.get(p)
        ]
        for bucket, index, p in places:
            bucket.replace(index, p)
        for p, key, new in fitted:
            self.state[p].update(new)
            if key.rounding != "remainder":  # it belongs to a weight that moves without it from now on
                self.state[p].pop("remainder", None)
        self._memory.buckets = kept + made
        self._memory.rounds = None
        self._memory.has_fakes = not all(map(has_numbers, group_of))
        self._memory.unbucketed = [p for p in group_of if p not in keys and has_numbers(p)]
        for bucket in self._memory.buckets:
            bucket.set_groups([group_of[p] for p in bucket.params])
        shared = any(bucket.shared is not None for bucket in self._memory.buckets)
        self._memory.exchange = Exchange(self._memory.buckets, self._labels()) if shared else None

    def _kept_buckets(
        self, keys: dict[Tensor, BucketKey], without: Collection[Bucket]
    ) -> tuple[list[Bucket], list[tuple[Bucket, int, Tensor]]]:
        """The buckets that may stay, and which new parameters take the places of members that are gone."""
        old = [bucket for bucket in self._memory.buckets if bucket not in without and bucket.fits_marks]
        members = {p for bucket in old for p in bucket.params if keys.get(p) == bucket.key}
        new: dict[Any, list[Tensor]] = {}
        for p, key in keys.items():
            if p not in members:
                self._check_state(p, key)
                if (place := place_of(p, key)) is not None:
                    new.setdefault((key, place), []).append(p)
        kept, places = [], []
        for bucket in old:
            gone = [i for i, p in enumerate(bucket.params) if keys.get(p) != bucket.key]
            of = bucket.places if gone else []
            wanted = [(bucket.key, of[i]) for i in gone]
            if all(len(new.get(place, ())) >= count for place, count in Counter(wanted).items()):
                kept.append(bucket)
                places += [(bucket, i, new[place].pop()) for i, place in zip(gone, wanted, strict=True)]
        return kept, places

    def _bucket_keys(self, without: Collection[Bucket]) -> dict[Tensor, BucketKey]:
        """The bucket key of every parameter that trains or has state; checked, but for members of other buckets."""
        keys: dict[Tensor, BucketKey] = {}
        known = {p for bucket in self._memory.buckets if bucket not in without for p in bucket.index}
        for group in self.param_groups:
            check_options(group, self.options)
            members = [p for p in group["params"] if self._takes_part(p) and has_numbers(p)]
            for p in members:
                if p not in known:
                    check_parameter(p, self._label(p))
                check_channel_dim(p, group["channel_dim"], self._label(p))
            backends = {
                device: choose(device, backend=group["backend"], fused=group["fused"], foreach=group["foreach"])
                for device in {p.device for p in members}
            }
            keys |= {p: self._bucket_key(p, group, backends[p.device]) for p in members}
        refuse_flat_buffers(keys, self._memory.buckets, self._label)
        return keys

    def _takes_part(self, p: Tensor) -> bool:
        """Whether a step may concern the parameter. A frozen one, or a lazy one without its shape, is left alone."""
        return (p.requires_grad or p.grad is not None or bool(self.state.get(p))) and not is_lazy(p)

    def _bucket_key(self, p: Tensor, group: dict[str, Any], backend: Backend) -> BucketKey:
        moments, channel_dim, state_dtype, rounding, _ = self._storage(group)
        if rounding == "remainder" and p.dtype != torch.bfloat16:
            rounding = "nearest"
        if state_dtype is None:
            state_dtype = self._dtype_there(p, moments) or _default_state_dtype(p, rounding)
        if rounding == "stochastic" and torch.bfloat16 not in (p.dtype, state_dtype):
            rounding = "nearest"
        channel_dim = 0 if p.ndim < 2 else channel_dim
        return BucketKey(backend, p.device, p.dtype, moments, state_dtype, rounding, channel_dim, self.adaptive)

    def _dtype_there(self, p: Tensor, moments: tuple[str, ...]) -> torch.dtype | None:
        """The dtype of moments that a parameter has already."""
        there = (self.state[p].get(name) for name in moments if p in self.state)
        return next((t.dtype for t in there if isinstance(t, Tensor) and t.dtype in FLOATING), None)

    def _dtype_of(self, group: dict[str, Any], state: dict[Any, Any]) -> torch.dtype | None:
        """A dtype for the moments of a group that names none, if they have not those they would take by default."""
        moments = [
            (p, state[p][name]) for p in group["params"] for name in self.moments(group) if name in state.get(p, {})
        ]
        usual = all(moment.dtype == _default_state_dtype(p, group["rounding"]) for p, moment in moments)
        return None if usual else _promoted([moment.dtype for _, moment in moments])

    def _storage(self, group: dict[str, Any]) -> tuple[Any, ...]:
        """The options of a group that choose a parameter's bucket; and the projection, to notice its change."""
        return self.moments(group), *(group[n] for n in ("channel_dim", "state_dtype", "rounding", "projection"))

    def _fitted_state(self, bucket: Bucket, p: Tensor, group: dict[str, Any]) -> dict[str, Tensor]:
        """The entries that a parameter's state lacks, and copies of entries that cannot be used where they lie.

        That is what no backend takes, and moments of another dtype than the group's ``state_dtype``, if it names one.
        """
        state, fitted = self.state.get(p, {}), {}
        for name in (*bucket.key.counters, *bucket.key.storage):
            wanted = group["state_dtype"] if name in bucket.key.moments else None
            old = state.get(name)
            if old is not None and bucket.fits(name, old, p) and wanted in (None, old.dtype):
                continue
            new = fitted[name] = bucket.new_state(name, p)
            if old is not None:
                old = old if isinstance(old, Tensor) else torch.full((), old, dtype=new.dtype, device="cpu")
                copy(old.reshape(new.shape), new)
            elif name == "rounding_seed":
                new.fill_(self._new_seed(p))
        return fitted

    def _new_seed(self, p: Tensor) -> int:
        """From torch's default generator; of a parameter that ranks share, from its name."""
        if is_shared(p):
            name = str(self._label(p)).encode()
            return int.from_bytes(hashlib.blake2b(name, digest_size=8).digest(), "little") >> 2
        return int(torch.randint(1 << 62, (), device="cpu"))

    # Checks. Every message names what was received and what would do.

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
        for name in key.storage:
            if name in state and state[name].shape != p.shape:
                raise ValueError(
                    f"state {name!r} of {self._label(p)} has shape {tuple(state[name].shape)}, the parameter "
                    f"{tuple(p.shape)}: load this model's state, or clear this parameter's state to start it afresh"
                )

    def _check_tensors(self, bucket: Bucket) -> None:
        for p in bucket.params:
            if p.grad is not None:
                self._check_member(p, bucket.key.channel_dim)
                for name, t in self.state.get(p, {}).items():
                    if name in bucket.key.storage and isinstance(t, Tensor):
                        check_storage(local(t), f"state {name!r} of ", self._label(p))

    def _check_member(self, p: Tensor, channel_dim: int | tuple[int, ...]) -> None:
        check_parameter(p, self._label(p))
        check_channel_dim(p, channel_dim, self._label(p))
        if p.grad is not None:
            check_gradient(p, p.grad, self._label(p))

    def _label(self, p: Tensor) -> _Label:
        return _Label(self, p)

    def _labels(self) -> dict[Tensor, str]:
        """Each parameter's name in messages and reports, in the order of the parameter groups."""
        labels = {}
        for number, group in enumerate(self.param_groups):
            names = group.get("param_names")
            for index, p in enumerate(group["params"]):
                labels[p] = f"parameter {names[index]!r}" if names else f"parameter {index} of group {number}"
        return labels


def _supports_amp_scaling(defaults: dict[str, Any]) -> bool:
    """Whether GradScaler may leave unscaling to the step: as in torch.optim where ``fused=True``, or as asked for."""
    wish = defaults.get("amp_scaling")
    return bool(defaults.get("fused") if wish is None else wish)


def number(value: Any) -> Any:
    """A hyperparameter as a float; a tensor that is not on the CPU as a 0-dim float64 tensor, not waited for."""
    if isinstance(value, Tensor) and value.device.type != "cpu":
        return value.detach().double().reshape(())
    return float(value)


def _default_state_dtype(p: Tensor, rounding: str) -> torch.dtype:
    return torch.float32 if rounding == "remainder" and p.dtype == torch.bfloat16 else p.dtype


def _rounds_of(params: list[list[Tensor]], places: list[list[int]]) -> list[list[set[int]]]:
    """See :meth:`ProjectedOptimizer._rounds`; ``places`` are the parameters' places in their order.

    Address ranges that meet form a cluster. The parameters of a cluster take a round each.
    """
    spans = sorted(
        (*span_of(p), place, batch, i)
        for batch, (of, where) in enumerate(zip(params, places, strict=True))
        for i, (p, place) in enumerate(zip(of, where, strict=True))
        if p.numel()
    )
    clusters: list[list[tuple[int, int, int]]] = []
    reach = -1
    for begin, end, place, batch, i in spans:
        if begin >= reach:
            clusters.append([])
        clusters[-1].append((place, batch, i))
        reach = max(reach, end)
    if len({place for cluster in clusters for place, *_ in cluster}) == len(clusters):
        return []
    first = [set(range(len(of))) for of in params]
    rounds = [first]
    for cluster in clusters:
        order = sorted({place for place, *_ in cluster})
        for place, batch, i in cluster:
            turn = order.index(place)
            while len(rounds) <= turn:
                rounds.append([set() for _ in params])
            if turn:
                first[batch].remove(i)
                rounds[turn][batch].add(i)
    return rounds


@torch.inference_mode(False)  # what is made here lasts longer
@torch.no_grad()
def _copied(t: Tensor, device: torch.device) -> Tensor:
    """A tensor of the optimizer's own: two optimizers that load one state_dict must not share their state."""
    if device.type != "cpu" or is_distributed(t):
        return t.to(device, copy=True)
    return empty_like(t, t.dtype).copy_(t)


def _gradients(batches: list[Batch]) -> tuple[list[Tensor], list[Tensor]]:
    """The weights that have a gradient, and their gradients; of DTensors also the parts that lie here.

    A DTensor and its local tensor count apart what was written through either.
    """
    params, grads = [], []
    for batch in batches:
        of = [p for p in batch.bucket.params if p.grad is not None]
        gradients = [p.grad for p in of if p.grad is not None]
        params += of
        grads += gradients
        if batch.bucket.distributed:
            params += map(local, of)
            grads += map(local, gradients)
    return params, grads


def _on(device: torch.device, tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.to(device, non_blocking=True).reshape(1)


def _in_words(value: Any) -> str:
    """``repr()`` of a hyperparameter, without a device sync."""
    if not isinstance(value, Tensor):
        return repr(value)
    return repr(value.tolist()) if value.device.type == "cpu" else f"a tensor on {value.device.type}"


def _promoted(dtypes: Sequence[torch.dtype]) -> torch.dtype:
    dtype = dtypes[0] if dtypes else torch.get_default_dtype()
    for other in dtypes:
        dtype = torch.promote_types(dtype, other)
    return dtype
