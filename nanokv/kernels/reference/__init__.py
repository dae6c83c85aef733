"""The torch twins, written to be read: the specification of every op and the oracle of the others. Any device."""

from nanokv.kernels.reference.attention import paged_attention, plane_view, rope_and_store
from nanokv.kernels.reference.elementwise import add_rms_norm, rms_norm, silu_mul

__all__ = ["add_rms_norm", "paged_attention", "plane_view", "rms_norm", "rope_and_store", "silu_mul"]
