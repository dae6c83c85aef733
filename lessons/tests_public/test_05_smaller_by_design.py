"""Public checks of lesson 05."""

import math

import torch

from nanokv.codecs.raw import RawCodec
from nanokv.core.spec import Plane
from nanokv.kernels.reference.store import _rotate
from nanokv.layers.mla import MLA, MLAConfig, expands
from nanokv.layers.moe import Router
from nanokv.layers.rotary import RopeConfig, frequencies
from nanokv.learn.expect import close, equal, tensor_of


def test_05_1_a_key_and_a_value_for_each_kv_head():
    planes = RawCodec(torch.bfloat16).planes(kv_heads=3, head_dim=64, page_size=16)
    expected = tuple(Plane(name, (3, 16, 64), torch.bfloat16, 1) for name in "kv")
    equal(planes, expected, "planes of 3 KV heads of 64, pages of 16")


def test_05_1_bytes_follow_the_kv_heads():
    codec = RawCodec(torch.float16)
    got = [sum(plane.num_bytes for plane in codec.planes(heads, 128, 16)) // 16 for heads in (1, 8, 32)]
    equal(got, [512, 4096, 16384], "bytes per token and layer of MQA, GQA and MHA with 32 heads of 128")


def test_05_2_one_latent_and_one_key_for_all_heads():
    spec = MLA.spec(RawCodec(torch.bfloat16), kv_rank=512, rope_dim=64, page_size=16)
    names = {plane.name: (plane.shape, plane.token_axis, plane.dtype) for plane in spec.paged}
    expected = {"latent": ((16, 512), 0, torch.bfloat16), "k_rope": ((16, 64), 0, torch.bfloat16)}
    equal(names, expected, "planes of a page")
    equal(spec.state, (), "planes of a state")


def test_05_2_deepseek_v3_keeps_1152_bytes_a_layer():
    spec = MLA.spec(RawCodec(torch.bfloat16), 512, 64, 16)
    equal(spec.bytes_per_token, 1152, "bytes per token and layer with rank 512 and a rope key of 64 in bfloat16")


V3 = MLAConfig(q_rank=1536, kv_rank=512, nope_dim=128, rope_dim=64, value_dim=128, interleaved=True)


def test_05_3_a_fresh_prompt_is_expanded():
    equal([bool(expands(V3, 0, rows)) for rows in (1, 16, 4096)], [True] * 3, "expands with nothing cached")


def test_05_3_one_row_over_a_long_prefix_is_absorbed():
    equal([bool(expands(V3, cached, 1)) for cached in (1, 100, 100_000)], [False] * 3, "expands for a decode")


def test_05_3_deepseek_v3_expands_from_171_rows_on():
    equal(bool(expands(V3, 10**6, 170)), False, "expands for 170 rows over a million tokens")
    equal(bool(expands(V3, 10**6, 171)), True, "expands for 171 rows over a million tokens")


def test_05_3_a_shape_counted_by_hand():
    shape = MLAConfig(q_rank=None, kv_rank=8, nope_dim=4, rope_dim=2, value_dim=4, interleaved=False)
    for cached, rows in ((3, 2), (10, 3), (10, 9), (30, 20)):
        pairs = rows * (cached + rows / 2)
        expanded = (cached + rows) * 8 * 8 + pairs * (4 + 2 + 4)
        absorbed = rows * 8 * 8 + pairs * (8 + 2 + 8)
        equal(bool(expands(shape, cached, rows)), expanded < absorbed, f"expands for {rows} rows over {cached} tokens")


def test_05_4_a_geometric_series():
    expected = torch.tensor([1.0, 0.1, 0.01, 0.001])
    close(frequencies(RopeConfig(dim=8, theta=1e4)), expected, "frequencies of 8 dims, theta 10,000", ("pair",))


def test_05_4_linear_divides_every_frequency():
    expected = torch.tensor([0.25, 0.0025])
    close(frequencies(RopeConfig(4, 1e4, "linear", factor=4.0)), expected, "linear, factor 4", ("pair",))


def test_05_4_llama3_keeps_fast_frequencies_and_divides_slow_ones():
    # Waves of 2 pi, 2 pi 100 and 2 pi 10,000 tokens turn 163, 1.63 and 0.016 times within 1,024 tokens.
    rope = RopeConfig(6, 1e6, "llama3", 8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_positions=1024)
    plain = [1.0, 0.01, 0.0001]
    ramp = (1024 * 0.01 / (2 * math.pi) - 1.0) / 3.0
    expected = torch.tensor([1.0, (1 - ramp) * plain[1] / 8 + ramp * plain[1], plain[2] / 8])
    close(frequencies(rope), expected, "llama3 frequencies", ("pair",))


def test_05_4_yarn_interpolates_over_the_pairs():
    rope = RopeConfig(64, 1e4, "yarn", 4.0, low_freq_factor=1.0, high_freq_factor=32.0, original_max_positions=4096)
    plain, got = frequencies(RopeConfig(64, 1e4)), frequencies(rope)
    close(got[:8], plain[:8], "the fast pairs of yarn stay", ("pair",))
    close(got[-4:], plain[-4:] / 4, "the slow pairs of yarn are divided by the factor", ("pair",))


def angles(*values: float) -> torch.Tensor:
    """A table with one row a position: cosines, then sines."""
    angle = torch.tensor(values)[:, None]
    return torch.cat((angle.cos(), angle.sin()), dim=1)


def test_05_5_a_quarter_turn():
    heads = torch.tensor([[[1.0, 2.0]]])
    _rotate(heads, angles(0.0, math.pi / 2), torch.tensor([1]))
    close(heads, torch.tensor([[[-2.0, 1.0]]]), "(1, 2) turned by 90 degrees", ("row", "head", "dim"))


def test_05_5_dim_i_rotates_with_dim_i_plus_half():
    heads = torch.tensor([[[1.0, 2.0, 3.0, 4.0]]])
    table = torch.tensor([[0.0, 1.0, 1.0, 0.0]])  # the first pair by 90 degrees, the second not at all
    _rotate(heads, table, torch.tensor([0]))
    close(heads, torch.tensor([[[-3.0, 2.0, 1.0, 4.0]]]), "pairs (1, 3) and (2, 4)", ("row", "head", "dim"))


def test_05_5_dims_past_the_table_do_not_change():
    heads = tensor_of("past", 2, 3, 6)
    before = heads.clone()
    _rotate(heads, angles(0.3, 0.7), torch.tensor([1, 0]))
    close(heads[..., 2:], before[..., 2:], "dims 2 to 5, past a table of one pair", ("row", "head", "dim"))


def test_05_5_each_row_rotates_by_its_own_position():
    heads = torch.ones(2, 1, 2)
    _rotate(heads, angles(0.0, 1.0, 2.0), torch.tensor([2, 0]))
    expected = torch.tensor([[[math.cos(2) - math.sin(2), math.cos(2) + math.sin(2)]], [[1.0, 1.0]]])
    close(heads, expected, "rows at positions 2 and 0", ("row", "head", "dim"))


def router(scoring: str, num_groups: int, top_groups: int) -> Router:
    return Router(None, None, 2, scoring, True, 1.0, num_groups, top_groups)


RANKED = [[0.9, 0.1, 0.5, 0.6, 0.2, 0.3], [0.1, 0.2, 0.3, 0.4, 0.8, 0.0]]
SHUT = float("-inf")


def test_05_6_softmax_scores_a_group_by_its_best_expert():
    got = router("softmax", 3, 1)._close_groups(torch.tensor(RANKED))
    expected = [[0.9, 0.1, SHUT, SHUT, SHUT, SHUT], [SHUT, SHUT, SHUT, SHUT, 0.8, 0.0]]
    close(got, torch.tensor(expected), "scores with one of three groups open", ("row", "expert"))


def test_05_6_sigmoid_scores_a_group_by_its_best_two_experts():
    got = router("sigmoid", 3, 1)._close_groups(torch.tensor([[0.9, 0.1, 0.5, 0.6, 0.2, 0.3]]))
    expected = [[SHUT, SHUT, 0.5, 0.6, SHUT, SHUT]]
    close(got, torch.tensor(expected), "scores with one of three groups open", ("row", "expert"))


def test_05_6_open_groups_keep_their_scores():
    got = router("softmax", 3, 2)._close_groups(torch.tensor(RANKED))
    expected = [[0.9, 0.1, 0.5, 0.6, SHUT, SHUT], [SHUT, SHUT, 0.3, 0.4, 0.8, 0.0]]
    close(got, torch.tensor(expected), "scores with two of three groups open", ("row", "expert"))
