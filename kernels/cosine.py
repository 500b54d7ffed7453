"""The cosine test."""

import triton
import triton.language as tl


@triton.jit
def compare(pg, gg, pp, delta, eps, dim):
    """The test of one view, from its sums; delta, eps and dim are float64 scalars, the sums of any floating dtype.

    Returns the limit of the scale of g below which the view passes (docs/architecture.md, "The limit of a view"), and
    the cosine over its threshold at the scale 1. With `where` and `<`, a NaN, which every broken gradient leaves in
    p.g, passes at no scale, and its cosine counts as infinite. Norms are compared, not squares: products of sums could
    leave the dtype's range.
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
