"""Hidden checks of lesson 08: random shapes against the engine's own functions."""

import torch

from nanokv.core.batch import Batch
from nanokv.kernels.planes import HeadNorms, KVPlanes
from nanokv.kernels.reference import attention, elementwise, store
from nanokv.learn.expect import close, random_of, tensor_of
from nanokv.learn.patching import reference

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def test_08_1_random_rows():
    random = random_of("norms")
    for case in range(40):
        dtype, wide = random.choice(DTYPES), random.choice(DTYPES)
        x = tensor_of(f"x {case}", random.randint(1, 4), random.randint(1, 70)).to(dtype)
        weight = tensor_of(f"w {case}", x.shape[1]).to(wide)
        expected = reference(elementwise.rms_norm)(x, weight, 1e-5)
        close(elementwise.rms_norm(x, weight, 1e-5), expected, f"{dtype} rows, {wide} weight", ("row", "dim"), 1e-6)


def test_08_2_random_rows():
    random = random_of("gates")
    for case in range(40):
        x = tensor_of(f"x {case}", random.randint(1, 4), 2 * random.randint(1, 40)).to(random.choice(DTYPES))
        close(elementwise.silu_mul(x), reference(elementwise.silu_mul)(x), f"{x.dtype}", ("row", "dim"), 1e-6)


def random_case(random, rope: bool = True) -> tuple[KVPlanes, Batch, int]:
    """Planes at a random offset in a page, a step over shuffled pages, and the number of query heads."""
    kv_heads, dim, size = random.randint(1, 3), random.choice([4, 8]), random.choice([2, 4, 16])
    dtype, gap = random.choice(DTYPES), 16 * random.randint(0, 3)
    rope_dim = random.choice([0, 4]) if rope else 0
    plane, width = kv_heads * size * dim * dtype.itemsize, dim * dtype.itemsize
    planes = KVPlanes(
        k_offset=gap, v_offset=gap + plane, rope_offset=gap + 2 * plane,
        page_bytes=gap + 2 * plane + size * rope_dim * dtype.itemsize, page_size=size, token_stride=width,
        head_stride=size * width, rope_stride=rope_dim * dtype.itemsize, kv_heads=kv_heads, head_dim=dim,
        value_dim=dim, rope_dim=rope_dim, dtype=dtype,
    )  # fmt: skip
    pages, tables, positions, starts, owners = list(range(20)), [], [], [0], []
    random.shuffle(pages)
    for request in range(random.randint(1, 4)):
        end = random.randint(1, 4 * size)
        rows = random.choice([1, random.randint(1, end)])
        tables.append([pages.pop() for _ in range(4)])
        positions += range(end - rows, end)
        starts.append(len(positions))
        owners += [request] * rows
    ints = {"dtype": torch.int32}
    batch = Batch(
        token_ids=torch.zeros(len(positions), dtype=torch.int64), positions=torch.tensor(positions, **ints),
        write_pages=torch.tensor([tables[r][p // size] for r, p in zip(owners, positions, strict=True)], **ints),
        write_slots=torch.tensor([p % size for p in positions], **ints), request_starts=torch.tensor(starts, **ints),
        page_tables=torch.tensor(tables, **ints), logit_rows=torch.zeros(0, dtype=torch.int64),
        state_ids=torch.zeros(0, **ints), page_size=size,
    )  # fmt: skip
    return planes, batch, kv_heads * random.randint(1, 3)


def pool_of(planes: KVPlanes, label: str) -> torch.Tensor:
    return tensor_of(label, 20, planes.page_bytes // planes.dtype.itemsize).to(planes.dtype).view(torch.uint8)


def test_08_3_random_pools():
    random = random_of("views")
    for case in range(40):
        planes, _, _ = random_case(random)
        pool = pool_of(planes, f"pool {case}")[random.randint(0, 3) :]
        for offset in (planes.k_offset, planes.v_offset):
            got, expected = (
                view(pool, planes, offset, planes.head_dim)
                for view in (attention.plane_view, reference(attention.plane_view))
            )
            close(got, expected, f"a view of {planes.dtype}", ("page", "head", "slot", "dim"), 0)


def test_08_4_random_steps():
    random = random_of("attention")
    for case in range(40):
        planes, batch, heads = random_case(random)
        pool = pool_of(planes, f"pool {case}")
        q = tensor_of(f"q {case}", batch.num_rows, heads, planes.head_dim + planes.rope_dim)
        got, expected = (
            run(q, pool, planes, batch, 0.3)
            for run in (attention.paged_attention, reference(attention.paged_attention))
        )
        close(
            got,
            expected,
            f"{heads} heads over {planes.kv_heads} KV heads, rotated part {planes.rope_dim}",
            ("row", "number"),
            1e-4,
        )


def test_08_5_random_steps():
    random = random_of("store")
    for case in range(40):
        planes, batch, heads = random_case(random, rope=False)
        rotary = random.choice([2, planes.head_dim])
        angle = tensor_of(f"angle {case}", 80, rotary // 2)
        table = torch.cat((angle.cos(), angle.sin()), dim=1)
        width = (heads + 2 * planes.kv_heads) * planes.head_dim
        qkv = tensor_of(f"qkv {case}", batch.num_rows, width + 3)
        norms = random.choice(
            [None, HeadNorms(tensor_of("nq", planes.head_dim), tensor_of("nk", planes.head_dim), 1e-6)]
        )
        runs = []
        for run in (store.rope_and_store, reference(store.rope_and_store)):
            pool, mine = pool_of(planes, f"pool {case}"), qkv.clone()
            run(mine[:, :width], table, pool, planes, batch, heads, norms)
            runs.append((mine, pool.view(planes.dtype).float()))
        close(runs[0][0], runs[1][0], "q, k and v after the call", ("row", "number"))
        close(runs[0][1], runs[1][1], "the numbers of the pool", ("page", "number"), 1e-4)
