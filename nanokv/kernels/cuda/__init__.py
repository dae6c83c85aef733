"""The Triton twins: the ops of reference/, tiled for the GPU. Importing them needs triton, running them a GPU. Two ops
are torch's own."""

# ruff: noqa: F401  the ops are imported for others

from nanokv.kernels.cuda.attention import paged_attention
from nanokv.kernels.cuda.code_attention import code_attention
from nanokv.kernels.cuda.codes import store_codes
from nanokv.kernels.cuda.delta_rule import delta_rule_chunk, delta_rule_step
from nanokv.kernels.cuda.elementwise import add_rms_norm, gated_rms_norm, rms_norm, sigmoid_mul, silu_mul
from nanokv.kernels.cuda.group_attention import group_attention
from nanokv.kernels.cuda.moe import add_experts
from nanokv.kernels.cuda.short_conv import short_conv
from nanokv.kernels.cuda.store import rope, rope_and_store, store_latent
from nanokv.kernels.reference.codes import refuse_unwritable
from nanokv.kernels.reference.elementwise import cast
