"""The momentum rules. m, v, g and u are blocks of numbers of one floating type, the rest scalars of the same.

Nothing is fused but what says so: the same numbers come out of every copy of these formulas (csrc/algorithm.h).
"""

import triton
import triton.language as tl


@triton.jit
def advance(g, m, v, momentum, gain, beta2, gain2, ADAPTIVE: tl.constexpr, BUFFER: tl.constexpr):
    """The momentum, and for AdamP the second moment::

    AdamP  m = b1 m + (1-b1) g;  v = b2 v + (1-b2) g^2
    SGDP   m = mu m + (1-dampening) g          without a buffer: m = (1-dampening) g
    """
    m = tl.fma(momentum, m, gain * g) if BUFFER else gain * g
    if ADAPTIVE:
        v = tl.fma(beta2, v, (gain2 * g) * g)
    return m, v


@triton.jit
def direction(g, m, v, momentum, nesterov_gain, nesterov, inverse_bias2, eps, ADAPTIVE: tl.constexpr):
    """The update u, from the momentum just advanced::

    AdamP  u = m / (sqrt(v)/sqrt(1-b2^t) + eps)
    SGDP   u = m
    nesterov takes b1 m + (1-b1) g, or mu m + g, in place of m
    """
    # A choice, not a product with 0 or 1: 0 times an infinite gradient would be NaN.
    u = tl.where(nesterov, tl.fma(momentum, m, nesterov_gain * g), m)
    if ADAPTIVE:
        if v.dtype == tl.float32:
            u = tl.div_rn(u, tl.fma(inverse_bias2, tl.sqrt_rn(v), eps))
        else:  # exactly rounded as it is
            u = u / tl.fma(inverse_bias2, tl.sqrt(v), eps)
    return u


@triton.jit
def bias_correction(beta, t):
    """``1 - beta^t`` for float64 scalars or blocks; beta in [0, 1), t at least 1."""
    return 1.0 - tl.exp(t * tl.log(tl.maximum(beta, 1e-300)))  # the logarithm of 0 is none
