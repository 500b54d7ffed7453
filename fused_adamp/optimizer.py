"""The torch.optim contract that AdamP and SGDP share, and one step from start to end."""

from __future__ import annotations

from collections import defaultdict
from copy import deepcopy
from itertools import chain
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor
from torch.optim import Optimizer

from fused_adamp import clipping, gather
from fused_adamp.backends import BACKENDS
from fused_adamp.backends.cpu import empty_like
from fused_adamp.batch import UNDECIDED, Scalars
from fused_adamp.checkpoint import check, to_ours
from fused_adamp.fake import has_numbers, new_state, touch, traces_fakes
from fused_adamp.host import present
from fused_adamp.memory import Memory
from fused_adamp.options import MAX_NORM, Range, check_options, max_grad_norm_of
from fused_adamp.reference import Decision
from fused_adamp.report import ProjectionReport, projection_report
from fused_adamp.sharded.agreement import gather_or_withdraw
from fused_adamp.sharded.dtensor import is_distributed
from fused_adamp.sharded.step import decide_across_ranks
from fused_adamp.torch_compile import register
from fused_adamp.validate import Label, check_channel_dim, check_member, check_parameter, check_state, labels

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch.optim.optimizer import ParamsT
    from typing_extensions import Self

    from fused_adamp.batch import Batch
    from fused_adamp.bucket import Bucket
    from fused_adamp.options import Option
    from fused_adamp.sharded.exchange import Exchange

__all__ = ["ProjectedOptimizer", "number"]


class ProjectedOptimizer(Optimizer):
    """Base of :class:`fused_adamp.AdamP` and :class:`fused_adamp.SGDP`, which supply the momentum rule."""

    adaptive: ClassVar[bool]
    """Whether the rule divides by a second moment, counts steps and corrects biases."""

    options: ClassVar[dict[str, Option]]
    """The entries of :data:`fused_adamp.options.OPTIONS` that the rule has."""

    _numbers: ClassVar[list[str]]
    """The options that are numbers. Every step reads them."""

    _handle: str
    _memory: Memory

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        cls._numbers = [name for name, option in cls.options.items() if isinstance(option.allowed, Range)]

    def __new__(cls, *args: Any, **kwargs: Any) -> Self:
        # Not in __init__, which copied and unpickled optimizers skip.
        self = super().__new__(cls)
        self._handle = register(self)
        self._memory = Memory()
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
        """The update u that follows from float64 moments, in their shape, and the step size. Waits for no device.

        If the rule keeps no moments, ``moments[0]`` is the gradient. Nesterov momentum is ignored.
        """
        raise NotImplementedError

    def numbers(self, group: dict[str, Any]) -> dict[str, Any]:
        """The group's options that are numbers, by name: floats, or 0-dim float64 tensors as of :func:`number`."""
        return {name: number(group[name]) for name in self._numbers}

    def reference_options(self, group: dict[str, Any], *flags: str) -> dict[str, Any]:
        """Keyword arguments for the reference: the group's options that are numbers, as floats, and ``flags``."""
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
            ValueError, TypeError: a parameter, gradient or state that cannot be stepped. Nothing has changed then.
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
        memory, asked = self._memory, self._memory.clipping
        try:
            batches, norm = self._move()
        except BaseException:
            memory.clipping = asked  # a call of clip_grad_norm_ still counts, what the step has measured does not
            raise
        memory.clipping, memory.grad_norm = None, norm
        for batch in batches:
            torch.autograd.graph.increment_version(present(batch.bucket.params, batch.grads))

    def _move(self) -> tuple[list[Batch], Tensor | None]:
        """Writes weights and state. Returns this step's batches and :attr:`grad_norm`."""
        memory = self._memory
        # Before the first step a backend may take the norm in another way: state is made after it, as after a call.
        unclipped = all(group["max_grad_norm"] is None for group in self.param_groups)
        batches = [] if traces_fakes() else gather_or_withdraw(self, make_state=unclipped)
        limit, norm = max_grad_norm_of(self.param_groups), None
        if traces_fakes() or memory.has_fakes:
            norm = None if limit is None else clipping.norm_of_fakes(self, 2.0, False)
            self._step_fakes()
        elif limit is not None and memory.clipping is None:
            unscaled = clipping.unscale_of(self) is not None
            memory.clipping = clipping.clip(self, batches, limit, 2.0, unscaled=unscaled, in_step=True)
        if not all(batch.has_state for batch in batches):
            batches = gather_or_withdraw(self)
        given = batches
        if memory.exchange is None:
            batches = clipping.scaled(self, batches)
            # A step checks its own batch before it moves anything; several are checked before the first moves.
            alone = len(batches) == 1 and not gather.rounds_of(self, batches)
            moved = alone and batches[0].bucket.key.backend.step(batches[0]) < 0
            batches = batches if moved else clipping.scaled(self, gather.refit(self, batches))
        else:
            batches, moved = decide_across_ranks(self, memory.exchange, batches), False
        for batch in () if moved else gather.in_order(self, batches):
            stale = batch.bucket.key.backend.step(batch)
            assert stale < 0, "a bucket that was checked a moment ago does not fit its tensors"
        if limit is not None and memory.clipping is not None:
            norm = clipping.returned(memory.clipping, clipping.unscale_of(self), given)
        return batches, norm

    def _fakes(self) -> list[tuple[Tensor, dict[str, Any]]]:
        """The parameters without data that have a gradient, with their groups: all of them in FakeTensorMode."""
        owners = [(p, group) for group in self.param_groups for p in group["params"] if p.grad is not None]
        return owners if traces_fakes() else [(p, group) for p, group in owners if not has_numbers(p)]

    def _step_fakes(self) -> None:
        """A step without numbers: it raises errors, creates state and counts versions up. It asks no backend."""
        for group in self.param_groups:
            check_options(group, self.options)
        keys = {p: gather.bucket_key(self, p, group, BACKENDS[-1]) for p, group in self._fakes()}
        for p, key in keys.items():
            label = Label(self.param_groups, p)
            check_member(p, key, {}, label)
            check_state(p, self.state.get(p), key, label)
        for p, key in keys.items():
            state = self.state[p]
            if any(name not in state for name in (*key.storage, *key.counters)):
                self.state[p] = state = new_state(p, key) | state
            touch([p, *(state[name] for name in (*key.storage, *key.counters))])

    @torch.no_grad()
    def clip_grad_norm_(
        self, max_norm: float | Tensor, norm_type: float = 2.0, error_if_nonfinite: bool = False
    ) -> Tensor:
        """Clips the norm of all gradients taken together, as torch.nn.utils.clip_grad_norm_ does, within the next step.

        It does not write to the gradients. The next :meth:`step`, and only that one, multiplies them by
        ``max_norm / (norm + 1e-6)`` as it reads them, if that is below 1. If a gradient or a weight has changed by
        then, the step measures the norm again. It notices in-place operations and replaced gradients, but not writes
        through ``.data``.

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
        return self._clip_grad_norm(max_norm, norm_type, error_if_nonfinite)

    def _clip_grad_norm(self, max_norm: float | Tensor, norm_type: float, error_if_nonfinite: bool) -> Tensor:
        MAX_NORM.check("max_norm", max_norm)
        max_norm = max_norm.clone() if isinstance(max_norm, Tensor) else max_norm
        batches = [] if traces_fakes() else gather_or_withdraw(self, make_state=False, check=norm_type != 2.0)
        if traces_fakes() or self._memory.has_fakes:
            return clipping.norm_of_fakes(self, float(norm_type), error_if_nonfinite)
        unscale = clipping.unscale_of(self)
        clipped = clipping.clip(self, batches, max_norm, float(norm_type), unscaled=unscale is not None)
        if error_if_nonfinite and not (norm := clipped.norm_over(unscale)).isfinite():
            raise RuntimeError(
                f"the total norm of order {float(norm_type)} of the gradients is {norm.item()}, so they cannot be "
                "clipped: look for the gradient that is not finite, or pass error_if_nonfinite=False to go on"
            )
        self._memory.clipping = clipped
        return clipping.returned(clipped, unscale, batches)

    @property
    @torch._disable_dynamo  # type: ignore[attr-defined]
    def grad_norm(self) -> Tensor | None:
        """The norm of all gradients before clipping in the last step, with ``max_grad_norm``: 0-dim, on their device.

        It is what :meth:`clip_grad_norm_` returns. None before the first step, after a step without ``max_grad_norm``,
        and in an optimizer that was copied, unpickled or loaded.
        """
        return self._memory.grad_norm

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
        """The decision, cosine, norm and growth of each parameter in the last step. Waits for the device.

        Args:
            model: the model whose parameter names the records have. Without it, names are the groups' ``param_names``,
                or indices.

        Returns:
            A list of :class:`~fused_adamp.report.ProjectionRecord`, which prints as a table.
        """
        names = labels(self.param_groups)
        names |= {p: name for name, p in model.named_parameters()} if model is not None else {}
        return projection_report(self, names)

    @property
    def buckets(self) -> list[Bucket]:
        """The buckets of all parameters that have been in a step."""
        return self._memory.buckets

    @property
    def exchange(self) -> Exchange | None:
        """The collectives of parameters that lie on several ranks; None if there are none."""
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
            max_grad_norm_of(self.param_groups)
            for p in group["params"]:
                if gather.takes_part(self, p):
                    label = Label(self.param_groups, p)
                    check_parameter(p, label, fused=group["fused"])
                    check_channel_dim(p, group["channel_dim"], label)
        except Exception:
            del self.param_groups[before:]
            raise

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for name, option in self.options.items():
            self.defaults.setdefault(name, option.default)  # of a pickle from before the option existed
        for group in self.param_groups:
            for name, default in self.defaults.items():
                group.setdefault(name, default)
        self._step_supports_amp_scaling = _supports_amp_scaling(self.defaults)
        self._memory.forget()

    @torch._disable_dynamo  # type: ignore[attr-defined]
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads a state_dict of this optimizer, or of the same rule from another package, as torch.optim does.

        A state_dict of torch.optim.Adam, AdamW or SGD, of clovaai's adamp, timm or pytorch_optimizer is recognised and
        converted. :mod:`fused_adamp.checkpoint` also converts the other way. Unlike in torch.optim, state keeps the
        dtype that it was saved in. If that is not the weight's dtype, the group's ``state_dtype`` is set to it.

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
        check(state_dict, members, list(labels(self.param_groups).values()))
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
            group["state_dtype"] = group["state_dtype"] or gather.state_dtype_of(self, group, state)
            check_options(self.defaults | group, self.options)
        max_grad_norm_of(groups)
        memory = self._memory
        kept = memory.clipping, memory.agreed
        self.__setstate__({"state": state, "param_groups": groups})
        memory.clipping, memory.agreed = kept
        for post_hook in self._optimizer_load_state_dict_post_hooks.values():
            post_hook(self)


def _supports_amp_scaling(defaults: dict[str, Any]) -> bool:
    """Whether GradScaler leaves unscaling to the step: ``amp_scaling``, or if that is None, whether ``fused=True``."""
    wish = defaults.get("amp_scaling")
    return bool(defaults.get("fused") if wish is None else wish)


def number(value: Any) -> Any:
    """A hyperparameter as a float; a tensor that is not on the CPU as a 0-dim float64 tensor, without a sync."""
    if type(value) is not float and isinstance(value, Tensor) and value.device.type != "cpu":  # most are floats
        return value.detach().double().reshape(())
    return float(value)


@torch.inference_mode(False)  # what is made here lasts longer
@torch.no_grad()
def _copied(t: Tensor, device: torch.device) -> Tensor:
    """A copy of ``t`` on ``device``: two optimizers that load one state_dict must not share their state."""
    if device.type != "cpu" or is_distributed(t):
        return t.to(device, copy=True)
    return empty_like(t, t.dtype).copy_(t)
