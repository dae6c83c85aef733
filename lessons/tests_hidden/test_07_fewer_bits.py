"""Hidden checks of lesson 07: random numbers against the engine's own functions."""

import torch

from nanokv.codecs import tables
from nanokv.codecs.basis import haar
from nanokv.codecs.kivi import Groups
from nanokv.kernels.planes import CodePlane
from nanokv.kernels.reference.codes import encode, pack_codes
from nanokv.learn.expect import close, equal, random_of, tensor_of
from nanokv.learn.patching import reference


def test_07_1_random_codes():
    random = random_of("codes")
    for _ in range(50):
        bits, shape = random.choice([1, 2, 4, 8]), [random.randint(1, 3), 8 * random.randint(1, 6)]
        codes = torch.tensor([[random.randrange(2**bits) for _ in range(shape[1])] for _ in range(shape[0])])
        codes = codes.to(torch.uint8)
        got = pack_codes(codes.clone(), bits)
        equal(
            (got.tolist(), got.dtype),
            (reference(pack_codes)(codes, bits).tolist(), torch.uint8),
            f"{bits}-bit codes {shape}",
        )


def test_07_2_random_groups():
    random = random_of("groups")
    for case in range(50):
        groups = random.choice([2, 4]), random.choice([-1, -2])
        x = tensor_of(f"x {case}", 2, random.randint(1, 9), random.randint(1, 9)) * random.choice([1e-3, 1.0, 50.0])
        for what, got, expected in zip(
            ("codes", "step", "minimum"), Groups(*groups).encode(x), reference(Groups)(*groups).encode(x), strict=True
        ):
            close(got, expected, f"{what} of {groups[0]} bits over axis {groups[1]}", tolerance=0)


def test_07_3_random_seeds():
    random = random_of("seeds")
    for _ in range(20):
        dim, seed = random.randint(1, 40), random.randrange(10**6)
        close(haar(dim, seed), reference(haar)(dim, seed), f"haar({dim}, {seed})", ("row", "column"), 1e-12)


def test_07_4_random_dims():
    random = random_of("dims")
    for _ in range(6):
        bits, dim = random.randint(1, 3), 16 * random.randint(1, 12)
        close(
            tables.lloyd_max(bits, dim),
            reference(tables.lloyd_max)(bits, dim),
            f"lloyd_max({bits}, {dim})",
            ("code",),
            1e-6,
        )


def test_07_4_the_table_is_exactly_symmetric():
    dim = 16 * random_of("symmetric").randint(2, 12)
    table = tables.lloyd_max(3, dim)
    close(table, -table.flip(0), f"lloyd_max(3, {dim}) against its mirror image", ("code",), 0)


def test_07_5_random_vectors():
    random = random_of("vectors")
    for case in range(60):
        bits, dim = random.choice([2, 3, 4, 8]), 16 * random.randint(1, 6)
        scaling = random.choice(["absmax", "plain", "length", "unbiased"])
        table = tables.uniform(bits) if scaling == "absmax" else torch.linspace(-2.5, 2.5, 2**bits)
        plane = CodePlane(0, 0, 0, bits, dim, table, scaling)
        x = tensor_of(f"x {case}", 3, 2, dim) * random.choice([1e-3, 1.0, 1e6])
        x[0, 0] = 0
        for what, got, expected in zip(("codes", "scales"), encode(x, plane), reference(encode)(x, plane), strict=True):
            got = got[1:] if what == "codes" else got  # a zero vector may have any codes
            expected = expected[1:] if what == "codes" else expected
            close(got, expected, f"{what}, {bits} bits, {scaling}", tolerance=1e-3 if what == "scales" else 0)
