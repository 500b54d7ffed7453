"""The cosine test."""

import triton
import triton.language as tl


@triton.jit
def compare(pg, gg, pp, delta, eps, dim):
    """The test of one view, from its sums; delta, eps and dim are float64 scalars, the sums of any floating dtype.

    The test is of s g, where s is not known yet. With A = delta/sqrt(dim) max(|p|, eps)::

        s |p.g| / (max(|p|, eps) max(s |g|, eps)) < delta / sqrt(dim)
        <=>  s |p.g| < A max(s |g|, eps)  <=>  |p.g| < A |g|  or  s |p.g| < A eps

    Returns the limit below which s passes, infinite in the first case, else A eps / |p.g|; and the cosine over its
    threshold, |p.g| / (A max(|g|, eps)), as it is at s = 1. Written with `where` and `<`: a NaN, which every broken
    gradient leaves in p.g, passes at no scale, and its cosine counts as infinite. Norms are compared, not squares:
    products of sums could leave the dtype's range.
    """
    threshold = (delta / tl.sqrt(dim.to(tl.float64))).to(pg.dtype)
    least = eps.to(pg.dtype)
    p = tl.sqrt(pp)
    g = tl.sqrt(gg)
    pg = tl.abs(pg)
    a = threshold * tl.where(p > least, p, least)
    limit = tl.where(pg < a * g, float("inf"), a * least / pg)
    cosine = pg / (a * tl.where(g > least, g, least))
    return tl.where(limit >= 0, limit, 0.0), tl.where(cosine >= 0, cosine, float("inf"))


@triton.jit
def below(scale, limit, eps):
    """Whether s g passes. With eps = 0 the cosine of nothing is 0/0, which is below nothing."""
    return (scale < limit) & ((scale > 0) | (eps > 0))
