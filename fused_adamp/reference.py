"""AdamP and SGDP in plain PyTorch, one tensor at a time: what every backend is checked against.

The lines follow algorithm 1 (SGDP) and algorithm 2 (AdamP) of Heo et al., *AdamP: Slowing Down the Slowdown for
Momentum Optimizers on Scale-invariant Weights*, ICLR 2021, arXiv:2006.08217, with the paper's equation beside each
line: w the weight, grad f the gradient, p_t the momentum update, q_t the projected one, eta the learning rate. They
run in the weight's own precision, in float32 for 16-bit weights, with norms and products of vectors in float64; hand
over float64 tensors to get the reference values of a test. Nothing here is fast, fused or clever, and nothing else of
this package is imported.
"""

from __future__ import annotations

import enum
import math
from collections.abc import Callable

import torch
from torch import Tensor

__all__ = [
    "Decision",
    "Projection",
    "adamp_ref",
    "cosine",
    "cosine_ratio",
    "decide",
    "project",
    "rows_first",
    "sgdp_ref",
]


class Decision(enum.IntEnum):
    """The view in which one parameter is projected in one step."""

    NONE = 0
    CHANNEL = 1
    LAYER = 2


Projection = Callable[[Tensor, Tensor, Tensor], tuple[Decision, Tensor]]
"""Gradient, weight and update, with rows first, to the decision and the projected update."""


def adamp_ref(
    p: Tensor,
    g: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    step: float,
    *,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    delta: float,
    wd_ratio: float,
    nesterov: bool = False,
    maximize: bool = False,
    projection: str | Projection = "auto",
    channel_dim: int | tuple[int, ...] = 0,
) -> Decision:
    """One AdamP step on one tensor, in place on ``p``, ``exp_avg`` and ``exp_avg_sq`` (algorithm 2).

    Args:
        p, g, exp_avg, exp_avg_sq: weight, gradient and both moments, of one shape.
        step: t, counted from 1.
        lr, betas, eps, weight_decay, delta, wd_ratio, nesterov, maximize, projection, channel_dim: as in
            :class:`fused_adamp.AdamP`; or ``projection`` is a function that decides and projects.

    Returns:
        The decision: of the cosine test, or the one that ``projection`` fixes.
    """
    p, exp_avg, exp_avg_sq = (rows_first(x, channel_dim) for x in (p, exp_avg, exp_avg_sq))
    g = rows_first(g, channel_dim, copy=True)
    beta1, beta2 = betas
    w, grad, m, v = (x.to(_math_dtype(p)) for x in (p, g, exp_avg, exp_avg_sq))
    if maximize:
        grad = -grad
    m = beta1 * m + (1 - beta1) * grad  # m_t = beta1 m_{t-1} + (1 - beta1) grad f
    v = beta2 * v + (1 - beta2) * grad * grad  # v_t = beta2 v_{t-1} + (1 - beta2) (grad f)^2
    d = v.sqrt() / math.sqrt(1 - beta2**step) + eps
    u = (beta1 * m + (1 - beta1) * grad if nesterov else m) / d  # p_t = m_t / (sqrt(v_t) + eps)
    if callable(projection):
        decision, u = projection(grad, w, u)
    else:
        decision = decide(grad, w, delta, eps, projection)  # cos(w_t, grad f) < delta / sqrt(dim(w)) ?
        u = project(u, w, decision, eps)  # q_t = Pi_w(p_t) if so, else p_t
    decay = lr * weight_decay * (wd_ratio if decision else 1)
    w = w * (1 - decay)  # decoupled weight decay, scaled down where the weight was projected
    w = w - lr / (1 - beta1**step) * u  # w_{t+1} = w_t - eta q_t
    p.copy_(w)
    exp_avg.copy_(m)
    exp_avg_sq.copy_(v)
    return decision


def sgdp_ref(
    p: Tensor,
    g: Tensor,
    momentum_buffer: Tensor | None,
    *,
    lr: float,
    momentum: float,
    dampening: float,
    weight_decay: float,
    eps: float,
    delta: float,
    wd_ratio: float,
    nesterov: bool = False,
    maximize: bool = False,
    project_buffer: bool = False,
    projection: str | Projection = "auto",
    channel_dim: int | tuple[int, ...] = 0,
) -> Decision:
    """One SGDP step on one tensor, in place on ``p`` and ``momentum_buffer`` (algorithm 1).

    Args:
        p, g, momentum_buffer: weight, gradient and momentum, of one shape; ``None`` for ``momentum=0``.
        lr, momentum, dampening, weight_decay, eps, delta, wd_ratio: as in :class:`fused_adamp.SGDP`.
        nesterov, maximize, project_buffer, projection, channel_dim: as there; or ``projection`` is a function that
            decides and projects.

    Returns:
        The decision: of the cosine test, or the one that ``projection`` fixes.
    """
    p, g = rows_first(p, channel_dim), rows_first(g, channel_dim, copy=True)
    w, grad = (x.to(_math_dtype(p)) for x in (p, g))
    if maximize:
        grad = -grad
    b = (1 - dampening) * grad
    if momentum_buffer is not None:
        momentum_buffer = rows_first(momentum_buffer, channel_dim)
        b = momentum * momentum_buffer.to(_math_dtype(p)) + b  # p_t = beta p_{t-1} + grad f
    u = grad + momentum * b if nesterov else b
    if callable(projection):
        decision, u = projection(grad, w, u)
    else:
        decision = decide(grad, w, delta, eps, projection)  # cos(w_t, grad f) < delta / sqrt(dim(w)) ?
        u = project(u, w, decision, eps)  # q_t = Pi_w(p_t) if so, else p_t
    decay = lr * weight_decay / (1 - momentum) * (wd_ratio if decision else 1)
    w = w * (1 - decay)
    w = w - lr * u  # w_{t+1} = w_t - eta q_t
    p.copy_(w)
    if momentum_buffer is not None:
        momentum_buffer.copy_(u if project_buffer and not nesterov else b)
    return decision


def decide(g: Tensor, p: Tensor, delta: float, eps: float, projection: str = "auto") -> Decision:
    """The cosine test, cos(w, grad f) < delta / sqrt(dim(w)): for every row (dim 0) first, then for the whole tensor.

    A NaN fails both tests, so that a broken gradient is never projected. Vectors and scalars are never projected,
    others in the view that ``projection`` names, unless it is "auto".
    """
    if p.ndim < 2 or p.numel() == 0:
        return Decision.NONE
    if projection != "auto":
        return Decision[projection.upper()]
    for decision in (Decision.CHANNEL, Decision.LAYER):
        x, y = _view(g, decision), _view(p, decision)
        if cosine(x, y, eps).max() < delta / math.sqrt(x.size(1)):
            return decision
    return Decision.NONE


def cosine_ratio(g: Tensor, p: Tensor, delta: float, eps: float) -> Tensor:
    """The largest cosine of a row over the threshold that it is compared with, 0-dim: below 1 if channels pass."""
    x, y = _view(g, Decision.CHANNEL), _view(p, Decision.CHANNEL)
    return cosine(x, y, eps).max() / (delta / math.sqrt(x.size(1)))


def cosine(x: Tensor, y: Tensor, eps: float) -> Tensor:
    """``|x.y| / (max(|x|, eps) max(|y|, eps))`` for every row of two ``(rows, cols)``: ``(rows,)``, float64."""
    x, y = x.double(), y.double()  # squares of 1e20 leave float32
    return (x * y).sum(dim=1).abs() / (_norm(x).clamp(min=eps) * _norm(y).clamp(min=eps))


def project(u: Tensor, p: Tensor, decision: Decision, eps: float) -> Tensor:
    """``Pi_w(u) = u - n (n.u)`` with ``n = p / (|p| + eps)``, for every vector of the chosen view."""
    if decision is Decision.NONE or u.numel() == 0:
        return u
    rows, weight = _view(u, decision).double(), _view(p, decision).double()
    n = weight / (_norm(weight)[:, None] + eps)
    return (rows - n * (n * rows).sum(dim=1, keepdim=True)).reshape(u.shape).to(u.dtype)


def rows_first(x: Tensor, channel_dim: int | tuple[int, ...], *, copy: bool = False) -> Tensor:
    """A view of ``x`` whose dim 0 is the output channel: ``channel_dim`` moved to the front, several of them merged.

    If they cannot be merged without a copy, the result is a copy with ``copy``, else it is an error.
    """
    if x.ndim < 2 or channel_dim == 0:
        return x
    if isinstance(channel_dim, int):
        return x.movedim(channel_dim, 0)
    moved = x.movedim(channel_dim, tuple(range(len(channel_dim))))
    shape = math.prod(moved.shape[: len(channel_dim)]), *(moved.shape[len(channel_dim) :] or (1,))
    return moved.reshape(shape) if copy else moved.view(shape)


def _view(x: Tensor, decision: Decision) -> Tensor:
    return x.reshape(x.size(0) if decision is Decision.CHANNEL else 1, -1)


def _norm(x: Tensor) -> Tensor:
    return x.square().sum(dim=1).sqrt()


def _math_dtype(p: Tensor) -> torch.dtype:
    return torch.promote_types(p.dtype, torch.float32)
