"""The numba twins: the same ops as in reference/, compiled for the CPU at hand."""

from nanokv.kernels.cpu.attention import paged_attention
from nanokv.kernels.cpu.elementwise import add_rms_norm, rms_norm, rope_and_store, silu_mul

__all__ = ["add_rms_norm", "paged_attention", "rms_norm", "rope_and_store", "silu_mul"]
