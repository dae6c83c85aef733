"""Hidden checks of lesson 06: random steps against the engine's own functions."""

import torch

from nanokv.cache.radix import Node, RadixTree
from nanokv.cache.states import Recurrence, States
from nanokv.core.batch import Batch
from nanokv.core.request import Request
from nanokv.kernels.planes import StatePlanes
from nanokv.kernels.reference import delta_rule as rule
from nanokv.layers.deltanet import DeltaConfig, GatedDeltaNet
from nanokv.learn.expect import close, equal, random_of, tensor_of
from nanokv.learn.patching import reference


def random_step(random, most_rows: int) -> tuple[StatePlanes, Batch]:
    """Planes of a pool, and a step of some requests; some are at their first position."""
    key_heads, shared, dim = random.randint(1, 2), random.randint(1, 3), random.choice([4, 8])
    kernel, dtype = random.randint(2, 4), random.choice([torch.float32, torch.bfloat16])
    channels = 2 * key_heads * dim + key_heads * shared * dim
    at = -(-channels * (kernel - 1) * dtype.itemsize // 16) * 16
    size = at + key_heads * shared * dim * dim * 4
    planes = StatePlanes(0, at, size, key_heads, key_heads * shared, dim, dim, kernel, dtype)
    rows = [random.randint(1, most_rows) for _ in range(random.randint(1, 4))]
    firsts = [random.choice([0, 1, random.randrange(200)]) for _ in rows]
    positions = [first + row for first, count in zip(firsts, rows, strict=True) for row in range(count)]
    unused = torch.zeros(len(positions), dtype=torch.int32)
    return planes, Batch(
        token_ids=unused.long(), positions=torch.tensor(positions, dtype=torch.int32), write_pages=unused,
        write_slots=unused, request_starts=torch.tensor([0, *rows]).cumsum(0).int(), page_tables=unused[:, None],
        logit_rows=unused.long(), state_ids=torch.tensor(random.sample(range(6), len(rows)), dtype=torch.int32),
        page_size=16,
    )  # fmt: skip


def pool_of(planes: StatePlanes, label: str) -> torch.Tensor:
    pool = torch.zeros(6, planes.state_bytes, dtype=torch.uint8)
    rule.conv_view(pool, planes)[:] = tensor_of(f"{label} conv", 6, planes.channels, planes.kernel - 1)
    view = rule.state_view(pool, planes)
    view[:] = tensor_of(f"{label} state", *view.shape)
    return pool


def numbers(pool: torch.Tensor, planes: StatePlanes) -> tuple[torch.Tensor, torch.Tensor]:
    return rule.conv_view(pool, planes).float(), rule.state_view(pool, planes)


def test_06_1_random_shapes():
    random = random_of("shapes")
    for _ in range(30):
        shape, dtype = (
            DeltaConfig(*(random.randint(1, 9) for _ in range(5))),
            random.choice([torch.float16, torch.float32]),
        )
        got, expected = GatedDeltaNet.spec(shape, dtype), reference(GatedDeltaNet).spec(shape, dtype)
        equal(sorted(map(repr, got.state)), sorted(map(repr, expected.state)), f"planes of {shape}")
        equal(got.paged, (), "planes of a page")


def test_06_2_random_steps():
    random = random_of("conv")
    for case in range(30):
        planes, batch = random_step(random, 6)
        x, weight = (
            tensor_of(f"x {case}", batch.num_rows, planes.channels),
            tensor_of(f"w {case}", planes.channels, planes.kernel),
        )
        runs = []
        for run in (rule.short_conv, reference(rule.short_conv)):
            pool = pool_of(planes, f"{case}")
            runs.append((run(x.clone(), weight, pool, planes, batch), *numbers(pool, planes)))
        for what, got, expected in zip(("results", "inputs kept", "matrices"), *runs, strict=True):
            close(got, expected, f"{what} of a step with {batch.num_requests} requests")


def test_06_3_random_steps():
    random = random_of("delta")
    for case in range(30):
        planes, batch = random_step(random, 1)
        heads = planes.value_heads
        inputs = (
            tensor_of(f"qkv {case}", batch.num_rows, planes.channels),
            tensor_of(f"g {case}", batch.num_rows, 2 * heads),
            tensor_of(f"a {case}", heads) - 2,
            tensor_of(f"dt {case}", heads) - 2,
        )
        runs = []
        for run in (rule.delta_rule_step, reference(rule.delta_rule_step)):
            pool = pool_of(planes, f"{case}")
            runs.append((run(*inputs, pool, planes, batch), *numbers(pool, planes)))
        for what, got, expected in zip(("results", "inputs kept", "matrices"), *runs, strict=True):
            close(got, expected, f"{what} of a step with {batch.num_requests} requests", tolerance=1e-4)


def test_06_4_random_chunks():
    random = random_of("chunks")
    for case in range(30):
        heads, tokens, dims = random.randint(1, 3), random.randint(1, 64), (random.randint(1, 8), random.randint(1, 8))
        k = torch.nn.functional.normalize(tensor_of(f"k {case}", heads, tokens, dims[0]), dim=-1)
        q, v = tensor_of(f"q {case}", heads, tokens, dims[0]), tensor_of(f"v {case}", heads, tokens, dims[1])
        log_decay = -tensor_of(f"d {case}", heads, tokens).abs() / 4
        arguments = (
            tensor_of(f"s {case}", heads, *dims),
            q,
            k,
            v,
            log_decay,
            tensor_of(f"b {case}", heads, tokens).sigmoid(),
        )
        for what, got, expected in zip(
            ("results", "state"), rule._chunk(*arguments), reference(rule._chunk)(*arguments), strict=True
        ):
            close(got, expected, f"{what} of {tokens} tokens", tolerance=1e-3)


def test_06_5_random_chains():
    random = random_of("nodes")
    for _ in range(50):
        node = Node(None, b"", [])
        for _ in range(random.randint(0, 6)):
            node = Node(node, b"", [])
            node.state = random.choice([None, None, 0, 3])
        tree = RadixTree(4)
        got = States(4, 4, None, tree).reachable(node)
        equal(got is reference(States)(4, 4, None, tree).reachable(node), True, "the deepest node with a state")


def test_06_6_random_requests():
    random = random_of("stops")
    for _ in range(300):
        size = random.choice([1, 4, 16])
        interval = random.choice([None, size, 4 * size])
        request = Request([1])
        request.tokens = [1] * random.randint(1, 120)
        request.num_computed = random.randrange(len(request.tokens))
        request.held.recurrence = Recurrence(
            0, wanted={size * random.randint(0, 8) for _ in range(random.randint(0, 3))}
        )
        asked = random.randint(1, 80)
        got, expected = (
            kind(8, size, interval, RadixTree(size)).limit_chunk(request, asked) for kind in (States, reference(States))
        )
        what = f"tokens of {len(request.tokens)} from {request.num_computed}, wanted {request.held.recurrence.wanted}"
        equal(got, expected, f"{what}, interval {interval}, pages of {size}, {asked} asked")
