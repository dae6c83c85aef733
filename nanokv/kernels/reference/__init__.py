"""The torch twins, written to be read: the specification of every op and the oracle of the others. Any device."""

from nanokv.kernels.reference.attention import paged_attention, plane_view, read_latents, tail_view
from nanokv.kernels.reference.delta_rule import delta_rule_chunk, delta_rule_step, short_conv
from nanokv.kernels.reference.elementwise import add_rms_norm, gated_rms_norm, rms_norm, sigmoid_mul, silu_mul
from nanokv.kernels.reference.store import rope_and_store, store_latent

__all__ = [
    "add_rms_norm",
    "delta_rule_chunk",
    "delta_rule_step",
    "gated_rms_norm",
    "paged_attention",
    "plane_view",
    "read_latents",
    "rms_norm",
    "rope_and_store",
    "short_conv",
    "sigmoid_mul",
    "silu_mul",
    "store_latent",
    "tail_view",
]
