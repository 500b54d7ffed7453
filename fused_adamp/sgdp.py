"""SGDP: momentum SGD whose update is projected onto the tangent space of scale-invariant weights."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fused_adamp.batch import PROJECTIONS, Scalars
from fused_adamp.optimizer import ProjectedOptimizer, number
from fused_adamp.options import chosen, documented, options_of
from fused_adamp.reference import Decision, sgdp_ref

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch
    from torch import Tensor
    from torch.optim.optimizer import ParamsT

__all__ = ["SGDP"]


class SGDP(ProjectedOptimizer):
    r"""SGDP (Heo et al., ICLR 2021, arXiv:2006.08217, algorithm 1), in one fused pass.

    =================== ==================== ==================== =====================================================
    paper               argument             state key            shape, dtype, meaning
    =================== ==================== ==================== =====================================================
    :math:`w_t`         ``params``                                weight, any shape and strides
    :math:`\eta`        ``lr``                                    step size
    :math:`\beta`       ``momentum``                              decay rate of the momentum per step
    (code only)         ``dampening``                             the gradient enters with ``1 - dampening``
    :math:`\lambda`     ``weight_decay``                          w shrinks by ``lr * weight_decay / (1 - momentum)``
    (code only)         ``nesterov``                              Nesterov momentum
    :math:`\epsilon`    ``eps``                                   least norm in the cosine test
    :math:`\delta`      ``delta``                                 threshold of the cosine test; 0 never projects
    (code only)         ``wd_ratio``                              factor on the decay of projected weights
    :math:`p_t`         ``momentum``         ``momentum_buffer``  shape and dtype of the weight; none for ``momentum=0``
    =================== ==================== ==================== =====================================================

    One step, for a gradient :math:`g_t` that is unscaled, clipped and, with ``maximize``, negated:

    .. math::
        \begin{aligned}
        p_t &= \beta p_{t-1} + (1 - \text{dampening})\, g_t \\
        q_t &= p_t - \hat w\, (\hat w \cdot p_t) \ \text{ if } \cos(w_t, g_t) < \delta / \sqrt{\dim w},
               \ \text{ else } p_t, \qquad \hat w = w_t / (\lVert w_t \rVert + \epsilon) \\
        w_{t+1} &= \bigl(1 - \eta \lambda / (1 - \beta)\bigr)\, w_t - \eta\, q_t
        \end{aligned}

    With Nesterov momentum, :math:`g_t + \beta p_t` is projected in place of :math:`p_t`. The test, the projection and
    ``wd_ratio`` are those of :class:`fused_adamp.AdamP`. The buffer starts at zero, so that, unlike in torch.optim.SGD,
    the first step is dampened too. Weight decay is decoupled, unlike in torch.optim.SGD.

    Args:
        params: parameters or dicts of groups, as for every torch.optim optimizer.
        {options}

    Raises:
        ValueError, TypeError: a value, parameter or gradient outside what is allowed; nothing has changed then.
        RuntimeError: the backend asked for cannot run here.

    Example:
        >>> import torch, fused_adamp
        >>> model = torch.nn.Linear(4, 2)
        >>> optimizer = fused_adamp.SGDP(model.parameters(), lr=0.1, momentum=0.9, nesterov=True)
        >>> model(torch.randn(8, 4)).square().mean().backward()
        >>> optimizer.step()
    """

    adaptive = False
    options = options_of("SGDP")

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        momentum: float = 0,
        dampening: float = 0,
        weight_decay: float = 0,
        nesterov: bool = False,
        eps: float = 1e-8,
        delta: float = 0.1,
        wd_ratio: float = 0.1,
        *,
        foreach: bool | None = None,
        maximize: bool = False,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        projection: str = "auto",
        channel_dim: int | tuple[int, ...] = 0,
        state_dtype: torch.dtype | None = None,
        rounding: str = "nearest",
        amp_scaling: bool | None = None,
        max_grad_norm: float | Tensor | None = None,
        project_buffer: bool = False,
        backend: str | None = None,
    ) -> None:
        super().__init__(params, chosen(locals()))

    def moments(self, group: dict[str, Any]) -> tuple[str, ...]:
        return ("momentum_buffer",) if group["momentum"] else ()

    def scalars(self, group: dict[str, Any]) -> Scalars:
        numbers = self.numbers(group)
        momentum = numbers["momentum"]
        # Without momentum no buffer is kept, and nesterov's g + 0 b is the gradient itself, undampened.
        undampened = group["nesterov"] and not momentum
        return Scalars(
            lr=numbers["lr"],
            momentum=momentum,
            gain=1.0 if undampened else 1 - numbers["dampening"],
            nesterov_gain=1.0,
            beta2=0.0,
            gain2=0.0,
            eps=numbers["eps"],
            decay=numbers["weight_decay"] / (1 - momentum),
            delta=numbers["delta"],
            wd_ratio=numbers["wd_ratio"],
            sign=-1.0 if group["maximize"] else 1.0,
            nesterov=float(group["nesterov"]),
            project_buffer=float(group["project_buffer"]),
            projection=PROJECTIONS.index(group["projection"]),
        )

    def reference_step(
        self, p: Tensor, g: Tensor, moments: Sequence[Tensor], step: Tensor | None, group: dict[str, Any]
    ) -> Decision:
        options = self.reference_options(group, "nesterov", "maximize", "project_buffer", "projection")
        return sgdp_ref(p, g, moments[0] if moments else None, **options)

    def direction(
        self, moments: Sequence[Tensor], step: Tensor | None, group: dict[str, Any]
    ) -> tuple[Tensor, Tensor | float]:
        return moments[0], number(group["lr"])


SGDP.__doc__ = documented(SGDP.__doc__, "SGDP")
