"""Public checks of lesson 07."""

import torch

from nanokv.codecs import tables
from nanokv.codecs.basis import haar
from nanokv.codecs.kivi import Groups
from nanokv.kernels.planes import CodePlane
from nanokv.kernels.reference.codes import decode, encode, pack_codes
from nanokv.learn.expect import close, equal, near, tensor_of


def packed(codes: list[int], bits: int) -> list[int]:
    return pack_codes(torch.tensor(codes, dtype=torch.uint8), bits).tolist()


def test_07_1_a_byte_holds_two_codes_from_the_two_halves():
    equal(packed([1, 2, 3, 4], 4), [0x31, 0x42], "4-bit codes 1 2 3 4: byte 0 holds codes 0 and 2")


def test_07_1_a_byte_holds_four_codes_from_the_four_quarters():
    equal(packed([1, 0, 2, 3, 3, 0, 1, 2], 2), [0b01_11_10_01, 0b10_00_11_00], "2-bit codes 1 0 2 3 3 0 1 2")


def test_07_1_single_bits_and_whole_bytes_are_packed():
    equal(packed([1, 0, 0, 1, 0, 0, 0, 1], 1), [0b10001001], "bits 1 0 0 1 0 0 0 1: the first is the lowest")
    equal(packed([7, 200], 8), [7, 200], "8-bit codes")


def test_07_1_each_row_is_packed_alone():
    codes = torch.tensor([[1, 2], [3, 4]], dtype=torch.uint8)
    equal(pack_codes(codes, 4).tolist(), [[0x21], [0x43]], "two rows of two 4-bit codes")


def test_07_2_the_ends_are_exact_and_codes_fill_the_range():
    codes, step, low = Groups(2, -1).encode(torch.tensor([[-1.0, 0.0, 1.0, 2.0]]))
    equal(codes.tolist(), [[0, 1, 2, 3]], "2-bit codes of -1 0 1 2")
    equal((step.item(), low.item()), (1.0, -1.0), "step and minimum")
    equal((codes.dtype, step.dtype, low.dtype), (torch.uint8, torch.float16, torch.float16), "dtypes")


def test_07_2_each_channel_of_keys_is_a_group():
    x = torch.tensor([[0.0, 100.0], [3.0, 400.0]])
    codes, step, low = Groups(2, -2).encode(x)
    equal(list(step.shape), [1, 2], "shape of the steps over axis -2")
    close(Groups.decode(codes, step, low), x, "decoded", ("token", "channel"))


def test_07_2_equal_numbers_have_no_step():
    codes, step, low = Groups(4, -1).encode(torch.full((2, 8), 0.5))
    equal((codes.sum().item(), step.sum().item()), (0, 0.0), "sum of the codes and of the steps")
    close(Groups.decode(codes, step, low), torch.full((2, 8), 0.5), "decoded", ("token", "channel"))


def test_07_2_codes_fit_the_rounded_step():
    x = tensor_of("kivi", 64, 32) * 3 + 1
    codes, step, low = Groups(4, -1).encode(x)
    off = (Groups.decode(codes, step, low) - x).abs() / step.float()
    # Rounding the minimum to float16 may add a little to half a step, at the ends.
    equal(bool((off < 0.52).all()), True, "every decoded number is within half a step")


def test_07_3_lengths_and_products_are_kept():
    for dim in (2, 16, 64):
        q = haar(dim)
        close(q @ q.T, torch.eye(dim, dtype=torch.float64), f"Q Q^T for {dim} dims", ("row", "column"), 1e-10)


def test_07_3_the_signs_do_not_depend_on_the_routine():
    noise = torch.randn(8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    upper = haar(8, 5).T @ noise
    equal(bool((upper.diagonal() > 0).all()), True, "the diagonal of Q^T noise is positive")


def test_07_3_a_seed_gives_one_rotation():
    close(haar(16, 3), haar(16, 3), "the same seed twice", ("row", "column"), 0)
    equal(bool(torch.equal(haar(16, 3), haar(16, 4))), False, "another seed gives the same rotation")


def test_07_4_one_bit_gives_the_mean_of_each_half():
    table = tables.lloyd_max(1, 256)
    equal(list(table.shape), [2], "shape of the table of one bit")
    near(float(table[1]), 0.7979, "its upper value at 256 dims: nearly sqrt(2 / pi)", 2e-3)


def test_07_4_two_bits_give_the_known_table():
    table = tables.lloyd_max(2, 4096)
    expected = torch.tensor([-1.510, -0.4528, 0.4528, 1.510])
    close(table, expected, "the table of two bits, nearly that of the normal density", ("code",), 2e-3)


def test_07_4_each_value_is_the_mean_of_its_cell():
    table = tables.lloyd_max(4, 64).double()
    _, means = tables.cells(((table[1:] + table[:-1]) / 2).numpy(), 64)
    close(torch.from_numpy(means), table, "means of the cells against the table", ("code",), 1e-5)
    equal(bool((table[1:] > table[:-1]).all()), True, "the table ascends")


def side(scaling: str, bits: int = 4, dim: int = 32) -> CodePlane:
    table = tables.uniform(bits) if scaling == "absmax" else torch.linspace(-2.0, 2.0, 2**bits)
    return CodePlane(0, 0, 0, bits, dim, table, scaling)


def test_07_5_the_largest_number_gets_the_end_of_the_table():
    x = torch.zeros(1, 32)
    x[0, 3], x[0, 9] = 15.0, -7.5
    codes, scale = encode(x, side("absmax"))
    equal(scale.tolist(), [2.0], "the scale of a vector whose largest number is 15, table to 7.5")
    equal((codes[0, 3].item(), codes[0, 9].item()), (15, 4), "codes of 15 and of -7.5")
    equal((str(codes.dtype), str(scale.dtype)), ("torch.uint8", "torch.float16"), "dtypes")


def test_07_5_codes_are_nearest_for_the_rounded_scale():
    plane, x = side("absmax"), tensor_of("x", 50, 32)
    codes, scale = encode(x, plane)
    ideal = (x[..., None] / scale.float()[:, None, None] - plane.table).abs().argmin(-1)
    close(codes.long(), ideal, "codes against the nearest values of the table", ("row", "dim"), 0)


def test_07_5_scaling_length_keeps_the_length():
    x = tensor_of("length", 20, 32)
    decoded = decode(*encode(x, side("length")), side("length"))
    close(decoded.norm(dim=-1), x.norm(dim=-1), "lengths of decoded vectors", ("row",), 2e-3)


def test_07_5_scaling_unbiased_keeps_the_product_with_the_vector():
    x = tensor_of("unbiased", 20, 32)
    decoded = decode(*encode(x, side("unbiased")), side("unbiased"))
    close((decoded * x).sum(-1), (x * x).sum(-1), "products of decoded vectors with the vectors", ("row",), 2e-3)


def test_07_5_scaling_plain_is_the_root_mean_square():
    x = tensor_of("plain", 20, 32)
    _, scale = encode(x, side("plain"))
    close(scale.float(), x.square().mean(-1).sqrt(), "scales", ("row",), 2e-3)


def test_07_5_a_zero_vector_has_scale_zero():
    for scaling in ("absmax", "plain", "length", "unbiased"):
        _, scale = encode(torch.zeros(2, 32), side(scaling))
        equal(scale.tolist(), [0.0, 0.0], f"scales of zero vectors, {scaling}")
