"""AdamP: Adam whose update is projected onto the tangent space of scale-invariant weights."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from fused_adamp.batch import PROJECTIONS, Scalars
from fused_adamp.optimizer import ProjectedOptimizer, number
from fused_adamp.options import chosen, documented, options_of
from fused_adamp.reference import Decision, adamp_ref

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor
    from torch.optim.optimizer import ParamsT

__all__ = ["AdamP"]


class AdamP(ProjectedOptimizer):
    r"""AdamP (Heo et al., ICLR 2021, arXiv:2006.08217, algorithm 2), in one fused pass.

    ======================== ==================== ==================== ===========================================
    paper                    argument             state key            shape, dtype, meaning
    ======================== ==================== ==================== ===========================================
    :math:`w_t`              ``params``                                weight, any shape and strides
    :math:`\eta`             ``lr``                                    step size
    :math:`\beta_1,\beta_2`  ``betas``                                 decay rates of the moments per step
    :math:`\epsilon`         ``eps``                                   in the denominator; least norm in the test
    :math:`\lambda`          ``weight_decay``                          decoupled: w shrinks by ``lr * weight_decay``
    :math:`\delta`           ``delta``                                 threshold of the cosine test; 0 is AdamW
    (code only)              ``wd_ratio``                              factor on the decay of projected weights
    (code only)              ``nesterov``                              Nesterov momentum
    :math:`t`                                     ``step``             0-dim float32 on the CPU
    :math:`m_t`              ``betas[0]``         ``exp_avg``          shape and dtype of the weight
    :math:`v_t`              ``betas[1]``         ``exp_avg_sq``       shape and dtype of the weight
    ======================== ==================== ==================== ===========================================

    One step, for a gradient :math:`g_t` that is unscaled, clipped and, with ``maximize``, negated:

    .. math::
        \begin{aligned}
        m_t &= \beta_1 m_{t-1} + (1 - \beta_1) g_t, \qquad v_t = \beta_2 v_{t-1} + (1 - \beta_2) g_t^2 \\
        p_t &= m_t \,/\, \bigl(\sqrt{v_t} / \sqrt{1 - \beta_2^t} + \epsilon\bigr) \\
        q_t &= p_t - \hat w\, (\hat w \cdot p_t) \ \text{ if } \cos(w_t, g_t) < \delta / \sqrt{\dim w},
               \ \text{ else } p_t, \qquad \hat w = w_t / (\lVert w_t \rVert + \epsilon) \\
        w_{t+1} &= (1 - \eta \lambda)\, w_t - \eta / (1 - \beta_1^t)\; q_t
        \end{aligned}

    A weight of two or more dimensions is tested in every step. If the test holds for every output channel (dim 0), each
    channel is projected by itself. Else, if it holds for the whole tensor, the whole tensor is. A projected weight
    decays by ``wd_ratio`` times as much. Vectors and scalars are stepped as by AdamW.

    Args:
        params: parameters or dicts of groups, as for every torch.optim optimizer.
        {options}

    Raises:
        ValueError, TypeError: a value, parameter or gradient outside what is allowed; nothing has changed then.
        RuntimeError: the backend asked for cannot run here.

    Example:
        >>> import torch, fused_adamp
        >>> model = torch.nn.Linear(4, 2)
        >>> optimizer = fused_adamp.AdamP(model.parameters(), lr=1e-3, weight_decay=1e-2)
        >>> model(torch.randn(8, 4)).square().mean().backward()
        >>> optimizer.step()
    """

    adaptive = True
    options = options_of("AdamP")

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0,
        delta: float = 0.1,
        wd_ratio: float = 0.1,
        nesterov: bool = False,
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
        backend: str | None = None,
    ) -> None:
        super().__init__(params, chosen(locals()))

    def moments(self, group: dict[str, Any]) -> tuple[str, ...]:
        return ("exp_avg", "exp_avg_sq")

    def scalars(self, group: dict[str, Any]) -> Scalars:
        numbers = self.numbers(group)
        beta1, beta2 = map(number, group["betas"])
        return Scalars(
            lr=numbers["lr"],
            momentum=beta1,
            gain=1 - beta1,
            nesterov_gain=1 - beta1,
            beta2=beta2,
            gain2=1 - beta2,
            eps=numbers["eps"],
            decay=numbers["weight_decay"],
            delta=numbers["delta"],
            wd_ratio=numbers["wd_ratio"],
            sign=-1.0 if group["maximize"] else 1.0,
            nesterov=float(group["nesterov"]),
            project_buffer=0.0,
            projection=PROJECTIONS.index(group["projection"]),
        )

    def reference_step(
        self, p: Tensor, g: Tensor, moments: Sequence[Tensor], step: Tensor | None, group: dict[str, Any]
    ) -> Decision:
        assert step is not None, "AdamP counts steps"
        beta1, beta2 = map(float, group["betas"])
        exp_avg, exp_avg_sq = moments
        options = self.reference_options(group, "nesterov", "maximize", "projection")
        return adamp_ref(p, g, exp_avg, exp_avg_sq, step.item(), betas=(beta1, beta2), **options)

    def direction(
        self, moments: Sequence[Tensor], step: Tensor | None, group: dict[str, Any]
    ) -> tuple[Tensor, Tensor | float]:
        assert step is not None, "AdamP counts steps"
        m, v = moments
        t = step.to(m.device, torch.float64, non_blocking=True)
        beta1, beta2 = map(number, group["betas"])
        u = m / (v.sqrt() / (1 - beta2**t).sqrt() + number(group["eps"]))
        return u, number(group["lr"]) / (1 - beta1**t)


AdamP.__doc__ = documented(AdamP.__doc__, "AdamP")
