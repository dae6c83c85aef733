"""The reference kernels in torch, for any device: the specification of every op, and the oracle of other kernels."""

# ruff: noqa: F401  the ops are imported for others

from nanokv.kernels.reference.attention import paged_attention, plane_view, read_latents, rope_view
from nanokv.kernels.reference.codes import (
    code_attention,
    decode,
    decode_batch,
    decode_pages,
    decoded_batch,
    encode,
    join_codes,
    pack_codes,
    page_array,
    refuse_unwritable,
    row_sum,
    split_codes,
    store_codes,
    unpack_codes,
)
from nanokv.kernels.reference.delta_rule import delta_rule_chunk, delta_rule_step, short_conv
from nanokv.kernels.reference.elementwise import add_rms_norm, cast, gated_rms_norm, rms_norm, sigmoid_mul, silu_mul
from nanokv.kernels.reference.groups import decode_group_pages, decode_groups, group_attention, group_batch
from nanokv.kernels.reference.store import rope, rope_and_store, store_latent
