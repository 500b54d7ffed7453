"""The result that a clip keeps for the next step. It is the one thing that a step believes from an earlier call."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple
from weakref import ref

from torch import Tensor

from fused_adamp.bucket import are_same

if TYPE_CHECKING:
    from fused_adamp.exchange import Outcome

__all__ = ["Clipping", "Seen"]


class Seen(NamedTuple):
    """Gradients and their weights, as they were: which gradients, all versions, all addresses."""

    gradients: list[ref[Tensor]]
    marks: tuple[list[int], ...] | None
    """None where a tensor keeps no version, as those of inference mode."""

    @classmethod
    def of(cls, params: list[Tensor], grads: list[Tensor]) -> Seen:
        return cls(list(map(ref, grads)), cls._marks(params, grads))

    @staticmethod
    def _marks(params: list[Tensor], grads: list[Tensor]) -> tuple[list[int], ...] | None:
        tensors = [*params, *grads]
        try:
            return [t._version for t in tensors], list(map(Tensor.data_ptr, tensors))
        except RuntimeError:
            return None

    def still_holds(self, params: list[Tensor], grads: list[Tensor]) -> bool:
        """Whether these are the same gradients, and none of them and no weight has changed."""
        same = are_same(self.gradients, grads)
        return same and self.marks is not None and self.marks == self._marks(params, grads)


class Clipping(NamedTuple):
    """The result that :meth:`ProjectedOptimizer.clip_grad_norm_` keeps for the next step, and its inputs.

    It is the one thing that a step believes from an earlier call. ``seen`` says whether the step may go by the
    norm, :meth:`test_of` whether it may go by the sums of the test too.
    """

    max_norm: Any
    norm_type: float
    norm: Tensor
    """Norm of the gradients as they are, 0-dim float64."""
    unscaled: bool
    """Whether GradScaler's scale was known, so that the norm over the scale is clipped: over the step's scale."""
    seen: Seen
    """The gradients that the norm was computed from, and their weights."""
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
        """The factor of the gradients in the step, beside ``unscale``: 0-dim float64."""
        norm, limit = self.norm_over(unscale), self.max_norm
        if isinstance(limit, Tensor):
            limit = limit.double().to(norm.device, non_blocking=True)
        coefficient: Tensor = (limit / (norm + 1e-6)).clamp(max=1.0).reshape(())
        return coefficient

    def test_of(self, options: list[tuple[float, float, float]], measured: Outcome | None) -> Outcome | None:
        """The outcome, if the test is made with the same options now, and its shares are those that the ranks hold."""
        return self.outcome if self.test_options == options and self.outcome is measured else None
