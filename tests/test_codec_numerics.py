"""The arithmetic of codecs: tables, rotations, errors against theory, packing, and extreme vectors."""

import math

import numpy as np
import pytest
import torch
from helpers import noise

from nanokv.codecs import _QUANTIZERS, tables
from nanokv.codecs.basis import Basis, haar, sketch
from nanokv.codecs.kivi import Groups
from nanokv.codecs.papers import polarquant
from nanokv.codecs.papers.turboquant_prod import ProdQuantizer
from nanokv.codecs.quantizer import TableQuantizer
from nanokv.kernels import reference
from nanokv.kernels.ops import AUTO
from nanokv.kernels.planes import CodePlane
from nanokv.kernels.reference import pack_codes, unpack_codes

CPU = torch.device("cpu")


def unit(x: torch.Tensor) -> torch.Tensor:
    return x / x.norm(dim=-1, keepdim=True)


def code_of(bits: int, dim: int, scaling: str) -> CodePlane:
    return CodePlane(0, 0, 0, bits, dim, tables.lloyd_max(bits, dim), scaling)


def turboquant(x: torch.Tensor, bits: int, scaling: str) -> torch.Tensor:
    """Encodes and decodes `x`, which is in rotated space."""
    code = code_of(bits, x.shape[-1], scaling)
    return reference.decode(*reference.encode(x, code), code)


# ---- tables and rotations -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dim", "bits", "half"),
    [
        (64, 1, [0.801007]),
        (64, 2, [0.452119, 1.499975]),
        (64, 3, [0.243753, 0.750658, 1.329343, 2.111311]),
        (64, 4, [0.127352, 0.384718, 0.650494, 0.931894, 1.239404, 1.590849, 2.023310, 2.646370]),
        (128, 2, [0.452453, 1.505193]),
        (128, 4, [0.127873, 0.386381, 0.653619, 0.937097, 1.247770, 1.604343, 2.045925, 2.688859]),
    ],
)
def test_tables_are_those_of_the_lloyd_max_quantizer(dim, bits, half):
    table = tables.lloyd_max(bits, dim)
    assert torch.allclose(table, torch.tensor([-c for c in reversed(half)] + half), atol=1e-6)
    assert torch.equal(table, -table.flip(0))
    _, means = tables.cells(((table[1:] + table[:-1]) / 2).double().numpy(), dim)
    assert np.allclose(means, table, atol=1e-6)  # each value is the mean of its cell


def test_one_bit_of_a_wide_vector_is_the_mean_of_a_half_normal_distribution():
    assert tables.lloyd_max(1, 4096)[1] == pytest.approx(math.sqrt(2 / math.pi), abs=1e-4)


def test_rotations_are_orthogonal_and_uniformly_distributed():
    matrix = haar(64)
    assert torch.allclose(matrix @ matrix.T, torch.eye(64, dtype=torch.float64), atol=1e-12)
    # The first coordinate of R e_1 over many R: its distribution function against that of the Beta density.
    found = np.sort([float(haar(64, seed)[0, 0]) * 8 for seed in range(1000, 1400)])
    grid = np.linspace(-2.5, 2.5, 21)
    mass, _ = tables.cells(grid, 64)
    empirical = np.searchsorted(found, grid) / len(found)
    assert np.abs(empirical - np.cumsum(mass)[:-1]).max() < 1.63 / math.sqrt(len(found))  # Kolmogorov, 1 %


def test_the_back_transform_of_a_basis_inverts_its_solution():
    x = noise(5, 3, 64)
    for matrix in (haar(64), torch.cat((haar(64), sketch(64, 64, False) @ haar(64))), sketch(128, 64, True)):
        basis = Basis(matrix, CPU, AUTO)
        assert torch.allclose(basis.back(basis.solve(x)), x, atol=1e-4)
    assert torch.allclose(Basis(haar(64), CPU, AUTO).to(x).norm(dim=-1), x.norm(dim=-1), rtol=1e-5)


def test_the_e4m3_table_is_sorted_and_rounds_as_float8_e4m3fn():
    table = tables.e4m3()
    assert (table.diff() >= 0).all() and table[-1] == 448 and table[0] == -448
    x = noise(1000) * 100
    code = CodePlane(0, 0, 0, 8, 1000, table, "absmax")
    codes, scale = reference.encode(x, code)
    assert torch.equal(scale, (x.abs().max() / 448).half())
    expected = (x / scale.float()).clamp(-448, 448).to(torch.float8_e4m3fn).float()
    assert (table[codes.int()] == expected).float().mean() > 0.999  # except for ties


# ---- errors against theory ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dim", [64, 128, 256])
@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_the_error_of_plain_turboquant_matches_theory(dim, bits):
    y = unit(noise(20_000, dim, seed=bits))  # random unit vectors are distributed as rotated ones
    error = (turboquant(y, bits, "plain") - y).square().sum(-1).mean().item()
    assert error == pytest.approx(tables.distortion(bits, dim), rel=0.01)
    assert 4.0**-bits <= error <= math.sqrt(3) * math.pi / 2 * 4.0**-bits


@pytest.mark.parametrize("dim", [64, 128])
def test_the_mean_error_over_rotations_is_bounded_for_every_vector(dim):
    vectors = torch.eye(dim)[:1].repeat(6, 1)
    vectors[1, :2] = torch.tensor([1.0, -1.0])
    vectors[2, :4] = 1
    vectors[3] = 1
    vectors[4:] = noise(2, dim)
    vectors[5, 7] *= 50 / vectors[5, 7].abs()
    rotations = torch.stack([haar(dim, seed).float() for seed in range(300)])
    y = torch.einsum("rij,vj->rvi", rotations, unit(vectors))
    for bits in (1, 2, 3, 4):
        error = (turboquant(y, bits, "plain") - y).square().sum(-1).mean(0)
        assert (error >= 4.0**-bits).all() and (error <= 2.7207 * 4.0**-bits).all(), (bits, error)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_an_unbiased_scale_corrects_products_and_a_length_scale_lengths(bits):
    dim, distortion = 128, tables.distortion(bits, 128)
    x = unit(noise(20_000, dim))
    y = unit(0.7 * x + math.sqrt(1 - 0.49) * unit(noise(20_000, dim, seed=1)))
    slope = {
        name: ((turboquant(x, bits, name) * y).sum(-1).mean() / (x * y).sum(-1).mean()).item()
        for name in ("plain", "unbiased")
    }
    assert slope["plain"] == pytest.approx(1 - distortion, abs=0.005)  # codes alone shrink products
    assert slope["unbiased"] == pytest.approx(1, abs=0.005)
    lengths = turboquant(x, bits, "length").norm(dim=-1)
    assert torch.allclose(lengths, torch.ones_like(lengths), rtol=2e-3)  # a scale has 11 bits


@pytest.mark.parametrize("orthogonal", [False, True])
@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_products_of_turboquant_prod_are_unbiased_with_the_variance_of_theory(bits, orthogonal, monkeypatch):
    dim, draws, pairs = 64, 60, 400
    truth, estimates, errors = 0.0, 0.0, []
    for draw in range(draws):
        monkeypatch.setattr("nanokv.codecs.papers.turboquant_prod.haar", lambda d, s=draw: haar(d, 5000 + s))
        matrix = sketch(dim, dim, orthogonal, seed=9000 + draw)
        monkeypatch.setattr("nanokv.codecs.papers.turboquant_prod.sketch", lambda *_, m=matrix: m)
        rotation = Basis(haar(dim, 5000 + draw), CPU, AUTO)
        monkeypatch.setattr("nanokv.codecs.papers.turboquant_prod.rotation", lambda *_, r=rotation: r)
        monkeypatch.setattr("nanokv.codecs.papers.turboquant_prod._basis", _fresh_basis)
        encoder = ProdQuantizer("prod", bits, orthogonal).encoder(dim, CPU)
        x = unit(noise(pairs, dim, seed=draw))
        across = noise(pairs, dim, seed=700 + draw)
        across = unit(across - (across * x).sum(-1, keepdim=True) * x)
        s = encoder.decode(*encoder.encode(x))
        errors.append((encoder.basis.to(across) * s).sum(-1))  # the exact products are 0
        for cos in (0.3, 0.7):
            y = cos * x + math.sqrt(1 - cos * cos) * across
            estimates += (encoder.basis.to(y) * s).sum().item()
            truth += cos * pairs
    assert estimates / truth == pytest.approx(1, abs=0.01)
    rest = tables.distortion(bits - 1, dim) if bits > 1 else 1.0
    factor = (math.pi / 2 - 1 if orthogonal else math.pi / 2) * rest
    assert dim * torch.cat(errors).square().mean().item() == pytest.approx(factor, rel=0.05)


def _fresh_basis(dim, orthogonal, device, ops):
    from nanokv.codecs.papers import turboquant_prod as prod

    rotation = prod.haar(dim)
    return Basis(torch.cat((rotation, prod.sketch(dim, dim, orthogonal) @ rotation)), device, ops)


def test_turboquant_prod_with_one_bit_is_only_a_sketch():
    planes = ProdQuantizer("prod", 1, False).planes("k", 1, 64, 16)
    assert [plane.name for plane in planes] == ["k_signs", "k_scale", "k_rest"]


def test_polar_coordinates_are_lossless_before_quantization():
    y = noise(100, 4, 16)
    radius, levels = polarquant.pairs(y)
    directions = [(a / (a * a + b * b).sqrt(), b / (a * a + b * b).sqrt()) for a, b in levels]
    assert torch.allclose(polarquant.unite(radius, directions), y, atol=1e-5)


def test_the_angles_and_the_error_of_polarquant_have_their_known_values():
    degrees = [torch.rad2deg(polarquant.angles(level)) for level in (2, 3, 4)]
    expected = [[17.75, 36.32, 53.68, 72.25], [24.42, 38.64, 51.36, 65.58], [30.04, 40.45, 49.55, 59.96]]
    assert torch.allclose(torch.stack(degrees), torch.tensor(expected).double(), atol=0.02)
    x = unit(noise(20_000, 64))
    encoder = _QUANTIZERS["polar"].encoder(64, CPU)
    decoded = encoder.basis.back(encoder.decode(*encoder.encode(x)))
    assert (decoded - x).square().sum(-1).mean().item() == pytest.approx(0.0321, rel=0.02)


@pytest.mark.parametrize("bits", [2, 4])
def test_kivi_errors_are_at_most_half_a_step_and_constant_groups_are_exact(bits):
    x = noise(3, 32, 8)
    groups = Groups(bits, -2)
    decoded = groups.decode(*groups.encode(x))
    step = (x.amax(-2) - x.amin(-2)) / (2**bits - 1)
    assert ((decoded - x).abs() <= step[:, None] * 0.505 + 4e-3).all()
    flat = torch.full((1, 32, 8), 3.0)
    assert torch.equal(groups.decode(*groups.encode(flat)), flat)


# ---- packing ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_unpacked_bytes_pack_to_the_same_bytes(bits):
    packed = torch.arange(256, dtype=torch.uint8).view(16, 16)
    codes = unpack_codes(packed, bits)
    assert codes.shape == (16, 16 * 8 // bits) and codes.max() == 2**bits - 1
    assert torch.equal(pack_codes(codes, bits), packed)


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 8])
def test_split_codes_join_to_the_same_codes_and_take_only_their_bits(bits):
    generator = torch.Generator().manual_seed(bits)
    codes = torch.randint(2**bits, (7, 3, 64), generator=generator).byte()
    codes[0], codes[1] = 0, 2**bits - 1
    assert torch.equal(reference.join_codes(reference.split_codes(codes, bits), bits), codes)
    assert sum(part.nbytes for part in reference.split_codes(codes, bits)) == codes.numel() * bits // 8


def test_a_byte_holds_one_code_of_each_half_or_quarter_the_first_in_its_low_bits():
    codes = torch.arange(16, dtype=torch.uint8)
    assert pack_codes(codes, 4)[3] == 3 + 16 * 11
    assert pack_codes(codes % 4, 2)[1] == 1 + 4 * 1 + 16 * 1 + 64 * 1 and pack_codes(codes // 4, 2)[0] == 0b11100100


# ---- extreme vectors ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", _QUANTIZERS)
def test_zero_small_and_large_vectors_are_decoded_with_bounded_errors(name):
    dim = 64
    quantizer = _QUANTIZERS[name]
    encoder = quantizer.encoder(dim, CPU)
    x = torch.stack(
        [torch.zeros(dim), unit(noise(dim)) * 1e-3, noise(dim), unit(noise(dim)) * 6e4, torch.full((dim,), 6e4)]
    )
    q = unit(noise(200, dim, seed=5))
    back = (lambda s: s) if encoder.basis is None else encoder.basis.back
    decoded = back(encoder.decode(*encoder.encode(x)))
    assert decoded.isfinite().all() and (decoded[0] == 0).all()
    if quantizer.is_sketch or isinstance(quantizer, ProdQuantizer):  # accurate only in the average of products
        queries = q if encoder.basis is None else encoder.basis.to(q)
        error = (queries @ encoder.decode(*encoder.encode(x)).T - q @ x.T).square().mean(0).sqrt()
        assert (error <= 0.3 * x.norm(dim=-1)).all()
    else:
        assert ((decoded - x).norm(dim=-1) <= 0.45 * x.norm(dim=-1)).all()


@pytest.mark.parametrize("dim", [48, 80, 96])
def test_dimensions_that_are_no_power_of_two_have_the_error_of_theory(dim):
    x = unit(noise(8000, dim))
    for bits in (2, 3, 4):
        encoder = _QUANTIZERS[f"tq{bits}"].encoder(dim, CPU)
        error = (encoder.basis.back(encoder.decode(*encoder.encode(x))) - x).square().sum(-1).mean().item()
        # A scale that keeps the length of each vector changes the error a little.
        assert 0.93 < error / tables.distortion(bits, dim) < 1.03


@pytest.mark.parametrize("name", [name for name, one in _QUANTIZERS.items() if isinstance(one, TableQuantizer)])
def test_the_error_of_each_table_codec_is_within_its_bounds(name):
    limit = {"fp8": 9e-4, "int8": 6e-5, "int4": 0.016, "rot4": 0.0125, "tq4": 0.0095, "tq3": 0.0345, "tq2": 0.121}
    x = unit(noise(4000, 64))
    encoder = _QUANTIZERS[name].encoder(64, CPU)
    s = encoder.decode(*encoder.encode(x))
    decoded = s if encoder.basis is None else encoder.basis.back(s)
    error = (decoded - x).square().sum(-1).mean().item()
    assert 0.5 * limit[name] < error < limit[name]
