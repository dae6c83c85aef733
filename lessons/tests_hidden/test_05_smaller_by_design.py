"""Hidden checks of lesson 05: random shapes against the engine's own functions."""

import torch

from nanokv.codecs.raw import RawCodec
from nanokv.kernels.reference.store import _rotate
from nanokv.layers.mla import MLA, MLAConfig, expands
from nanokv.layers.moe import Router
from nanokv.layers.rotary import RopeConfig, cos_sin_table, frequencies
from nanokv.learn.expect import close, equal, random_of, tensor_of
from nanokv.learn.patching import reference

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def test_05_1_random_shapes():
    random = random_of("gqa")
    for _ in range(30):
        dtype = random.choice(DTYPES)
        shape = [random.randint(1, 9) for _ in range(3)]
        equal(
            RawCodec(dtype).planes(*shape), reference(RawCodec)(dtype).planes(*shape), f"planes{tuple(shape)}, {dtype}"
        )


def test_05_2_random_shapes():
    random = random_of("mla")
    for _ in range(30):
        codec = RawCodec(random.choice(DTYPES))
        shape = [random.randint(1, 600) for _ in range(3)]
        got, expected = MLA.spec(codec, *shape), reference(MLA).spec(codec, *shape)
        equal(sorted(map(repr, got.paged)), sorted(map(repr, expected.paged)), f"planes of spec(codec, {shape})")
        equal(got.state, (), "planes of a state")


def test_05_3_random_shapes():
    random = random_of("costs")
    for _ in range(200):
        shape = MLAConfig(None, *(random.randint(1, 300) for _ in range(4)), False)
        cached, rows = random.randint(0, 2000), random.randint(1, 500)
        expected = reference(expands)(shape, cached, rows)
        equal(bool(expands(shape, cached, rows)), expected, f"expands({shape}, {cached}, {rows})")


def test_05_4_random_kinds():
    random = random_of("rope")
    for _ in range(60):
        rope = RopeConfig(
            2 * random.randint(2, 64), random.choice([1e4, 5e5, 1e6]),
            random.choice(["default", "linear", "llama3", "yarn"]), random.choice([2.0, 8.0, 40.0]),
            1.0, random.choice([4.0, 32.0]), random.choice([2048, 8192]),
        )  # fmt: skip
        close(frequencies(rope), reference(frequencies)(rope), f"frequencies({rope})"[:120], ("pair",), 1e-6)


def test_05_5_random_heads():
    random = random_of("heads")
    for case in range(30):
        rows, heads, half = random.randint(1, 5), random.randint(1, 4), random.randint(1, 8)
        table = cos_sin_table(RopeConfig(2 * half, 1e4), 50)
        x = tensor_of(f"x {case}", rows, heads + 1, 2 * half + random.choice([0, 4])).to(random.choice(DTYPES))
        positions = torch.tensor([random.randrange(50) for _ in range(rows)], dtype=torch.int32)
        got, expected = x.clone(), x.clone()
        _rotate(got[:, :heads], table, positions)
        reference(_rotate)(expected[:, :heads], table, positions)
        close(got, expected, "heads after the rotation, the last one unchanged", ("row", "head", "dim"))


def test_05_6_random_scores():
    random = random_of("experts")
    for case in range(60):
        groups, each, scoring = random.randint(2, 6), random.randint(2, 5), random.choice(["softmax", "sigmoid"])
        arguments = None, None, 2, scoring, True, 1.0, groups, random.randint(1, groups - 1)
        ranked = tensor_of(f"ranked {case}", random.randint(1, 5), groups * each)
        got, expected = (kind(*arguments)._close_groups(ranked.clone()) for kind in (Router, reference(Router)))
        close(got, expected, f"scores, {arguments[-1]} of {groups} groups open, {scoring}", ("row", "expert"))
