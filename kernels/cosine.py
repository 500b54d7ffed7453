"""The cosine test."""

import triton
import triton.language as tl


@triton.jit
def below_threshold(pg, gg, pp, delta, eps, dim):
    """Whether ``|p.g| / (max(|p|, eps) max(|g|, eps)) < delta / sqrt(dim)``; delta, eps, dim are float64 scalars.

    The sums are of any floating dtype; products of them could leave its range, products of their roots do not. Written
    with `where` and `<`: a NaN, which every broken gradient leaves in p.g, must give False.
    """
    threshold = (delta / tl.sqrt(dim.to(tl.float64))).to(pg.dtype)
    least = eps.to(pg.dtype)
    p = tl.sqrt(pp)
    g = tl.sqrt(gg)
    return tl.abs(pg) < threshold * tl.where(p > least, p, least) * tl.where(g > least, g, least)
