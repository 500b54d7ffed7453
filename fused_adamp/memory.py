"""Everything that an optimizer remembers from one call to the next. Each result names its inputs.

:class:`Owner` is the optimizer as the modules see it that do a part of its work: ``gather.py``, ``clipping.py`` and
``sharded/``.
"""

from __future__ import annotations

from itertools import chain
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, Protocol
from weakref import ref

from torch import Tensor

from fused_adamp.batch import Rule
from fused_adamp.host import are_same

if TYPE_CHECKING:
    from collections.abc import Sequence

    from fused_adamp.bucket import Bucket
    from fused_adamp.host import Marks
    from fused_adamp.options import Option
    from fused_adamp.sharded.exchange import Exchange, Outcome

__all__ = ["Clipping", "Memory", "Owner", "Seen"]


class Seen(NamedTuple):
    """Gradients and their weights, as they were: which gradients, all versions, where all lay."""

    gradients: list[ref[Tensor]]
    versions: list[int] | None
    """None where a tensor keeps no version, as those of inference mode."""
    places: list[Marks]

    @classmethod
    def of(cls, params: list[Tensor], grads: list[Tensor], places: list[Marks]) -> Seen:
        return cls(list(map(ref, grads)), cls._versions(params, grads), places)

    @staticmethod
    def _versions(params: list[Tensor], grads: list[Tensor]) -> list[int] | None:
        try:
            return [t._version for t in chain(params, grads)]
        except RuntimeError:
            return None

    def still_holds(self, params: list[Tensor], grads: list[Tensor], places: list[Marks]) -> bool:
        """Whether these are the same gradients, and none of them and no weight has changed."""
        return (
            are_same(self.places, places)
            and are_same([its() for its in self.gradients], grads)
            and self.versions is not None
            and self.versions == self._versions(params, grads)
        )


class Clipping(NamedTuple):
    """The result that :meth:`ProjectedOptimizer.clip_grad_norm_` keeps for the next step, and its inputs.

    A step uses no other result of an earlier call. It may use the norm if ``seen`` still holds, and the sums of the
    test if :meth:`test_of` returns them.
    """

    max_norm: Any
    norm_type: float
    norm: Tensor
    """Norm of the gradients as they are, 0-dim float64."""
    unscaled: bool
    """Whether GradScaler's scale was known, so that the norm over the scale is clipped: over the step's scale."""
    seen: Seen | None
    """The gradients that the norm was computed from, and their weights; None if the step itself asked for it."""
    outcome: Outcome | None
    """The sums of the cosine test that the ranks exchanged on the way."""
    test_options: list[tuple[float, float, float]]
    """The options of the test that the outcome was computed for."""

    def norm_over(self, unscale: Tensor | None) -> Tensor:
        """The norm that is clipped; ``unscale`` is the inverse of GradScaler's scale as it is now."""
        if unscale is None or not self.unscaled or self.norm_type == 0:  # the order 0 counts
            return self.norm
        return self.norm * unscale.to(self.norm.device, non_blocking=True)

    def coefficient(self, unscale: Tensor | None) -> Tensor:
        """``min(1, max_norm / (norm + 1e-6))``, without the factor ``unscale``: 0-dim float64."""
        norm, limit = self.norm_over(unscale), self.max_norm
        if isinstance(limit, Tensor):
            limit = limit.double().to(norm.device, non_blocking=True)
        coefficient: Tensor = (limit / (norm + 1e-6)).clamp(max=1.0).reshape(())
        return coefficient

    def test_of(self, options: list[tuple[float, float, float]], measured: Outcome | None) -> Outcome | None:
        """The outcome, if ``options`` are the test's options and ``measured`` is this outcome; else None."""
        return self.outcome if self.test_options == options and self.outcome is measured else None


class Memory:
    """Everything that an optimizer remembers from one call to the next.

    It is created once and then only mutated. Frameworks wrap an optimizer in an object that subclasses its class and
    copies its ``__dict__``: both share this object, so that a call through either is seen by both.

    Attributes:
        buckets: the parameters as the backends see them.
        unbucketed: parameters that are in no bucket, as they neither train nor have state.
        has_fakes: whether others are in no bucket, as they hold no numbers: :mod:`fused_adamp.fake`.
        seen_params, seen_groups, seen_generation: the inputs that the buckets were made from: the parameters, the
            options that choose a bucket, and :func:`fused_adamp.sharded.placement.generation`.
        seen_weights, rounds: the weights' marks, bucket by bucket, and the result of
            :func:`fused_adamp.gather.rounds_of` for them.
        clipping: the result of :meth:`ProjectedOptimizer.clip_grad_norm_` for the next step; None if there is none.
        grad_norm: :attr:`ProjectedOptimizer.grad_norm`.
        exchange: the collectives of parameters that lie on several ranks; None if none does.
        agreed: the last exchange that all ranks have agreed on.
        filled: stand-ins for gradients that other ranks have and this one does not, during a step.
    """

    def __init__(self) -> None:
        self.forget()

    def forget(self) -> None:
        """Resets everything to the values of a new optimizer."""
        self.buckets: list[Bucket] = []
        self.unbucketed: list[Tensor] = []
        self.has_fakes = False
        self.seen_params: list[Tensor] = []
        self.seen_groups: list[tuple[Any, ...]] = []
        self.seen_generation = 0
        self.seen_weights: list[Marks] = []
        self.rounds: list[list[set[int]]] | None = None
        self.clipping: Clipping | None = None
        self.grad_norm: Tensor | None = None
        self.exchange: Exchange | None = None
        self.agreed: Exchange | None = None
        self.filled: dict[Tensor, Tensor] = {}


class Owner(Rule, Protocol):
    """The optimizer as the modules see it that do a part of its work."""

    options: ClassVar[dict[str, Option]]
    defaults: dict[str, Any]
    param_groups: list[dict[str, Any]]
    state: Any  # torch's: a defaultdict by parameter
    _memory: Memory

    def moments(self, group: dict[str, Any]) -> tuple[str, ...]:
        """The state keys that have the parameter's shape."""

    def direction(
        self, moments: Sequence[Tensor], step: Tensor | None, group: dict[str, Any]
    ) -> tuple[Tensor, Tensor | float]:
        """The update u that follows from float64 moments, and the step size: :class:`ProjectedOptimizer`."""

    def _step(self) -> None:
        """One step on the gradients that are there, without the hooks of torch.optim."""
