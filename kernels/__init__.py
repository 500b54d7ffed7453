"""The Triton kernels, installed as ``fused_adamp.kernels``."""
