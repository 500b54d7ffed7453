"""AdamP and SGDP for PyTorch: momentum, cosine test and projection in one fused step.

Heo et al., *AdamP: Slowing Down the Slowdown for Momentum Optimizers on Scale-invariant Weights*, ICLR 2021,
arXiv:2006.08217.
"""

from fused_adamp.adamp import AdamP
from fused_adamp.reference import Decision, adamp_ref, sgdp_ref
from fused_adamp.sgdp import SGDP
from fused_adamp.sharded.flat_slice import mark_slice

__all__ = ["SGDP", "AdamP", "Decision", "__version__", "adamp_ref", "mark_slice", "sgdp_ref"]

__version__ = "0.2.0"
