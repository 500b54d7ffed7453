"""The radial projection and the step of the weight."""

import triton
import triton.language as tl


@triton.jit
def projection(pu, pp, eps):
    """The factor c of p in ``n (n.u) = c p`` with ``n = p/(|p|+eps)``, from p.u and p.p."""
    norm = tl.sqrt(pp) + eps
    return pu / norm / norm


@triton.jit
def weight_update(p, u, c, step_size, decay):
    """Moves the weight. Textbook form, s the step size, w the decay::

        u -= n (n.u) = c p;   p *= 1 - w;   p -= s u      =>      p - (s u + (w - s c) p)

    One rounding at the size of p instead of two: 1 - w is never rounded.
    """
    return p - tl.fma(step_size, u, (decay - step_size * c) * p)
