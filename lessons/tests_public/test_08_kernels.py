"""Public checks of lesson 08."""

import math

import torch

from nanokv.core.batch import Batch
from nanokv.kernels.planes import HeadNorms, KVPlanes
from nanokv.kernels.reference import attention, elementwise, store
from nanokv.learn.expect import close, equal, tensor_of

BF16 = torch.bfloat16


def test_08_1_rows_have_mean_square_one():
    got = elementwise.rms_norm(torch.tensor([[3.0, 4.0]]), torch.ones(2), 0.0)
    root = math.sqrt(12.5)
    close(got, torch.tensor([[3 / root, 4 / root]]), "the norm of (3, 4)", ("row", "dim"))


def test_08_1_eps_is_added_under_the_root():
    got = elementwise.rms_norm(torch.zeros(1, 4), torch.ones(4), 1e-6)
    close(got, torch.zeros(1, 4), "the norm of zeros", ("row", "dim"))
    got = elementwise.rms_norm(torch.full((1, 4), 1e-3), torch.ones(4), 1e-6)
    close(got, torch.full((1, 4), math.sqrt(0.5)), "the norm of 0.001 with eps 1e-6", ("row", "dim"))


def test_08_1_the_weight_multiplies_every_row():
    x, weight = tensor_of("x", 3, 2, 8), tensor_of("w", 8)
    got = elementwise.rms_norm(x, weight, 1e-5)
    expected = x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight
    close(got, expected, "the norm of three rows of two heads", ("row", "head", "dim"))


def test_08_1_a_narrow_weight_rounds_first_and_a_wide_one_last():
    x, weight = tensor_of("x", 4, 64).to(BF16), tensor_of("w", 64)
    normed = x.float() / (x.float().square().mean(-1, keepdim=True) + 1e-6).sqrt()
    got = elementwise.rms_norm(x, weight.to(BF16), 1e-6)
    close(got, normed.to(BF16) * weight.to(BF16), "bfloat16 rows, bfloat16 weight", ("row", "dim"), 0)
    got = elementwise.rms_norm(x, weight, 1e-6)
    close(got, (normed * weight).to(BF16), "bfloat16 rows, float32 weight", ("row", "dim"), 0)


def test_08_2_the_gate_comes_first_then_up():
    got = elementwise.silu_mul(torch.tensor([[0.0, 1.0, 5.0, 7.0]]))
    close(got, torch.tensor([[0.0, 7 / (1 + math.exp(-1))]]), "gate (0, 1), up (5, 7)", ("row", "dim"))


def test_08_2_the_product_is_rounded_once():
    x = tensor_of("x", 8, 64).to(BF16)
    gate, up = x.float().chunk(2, dim=-1)
    close(elementwise.silu_mul(x), (gate * gate.sigmoid() * up).to(BF16), "bfloat16 rows", ("row", "dim"), 0)


def planes_of(kv_heads=2, dim=4, size=4, dtype=torch.float32, gap: int = 0) -> KVPlanes:
    """Planes of k, then of v, each [kv_heads, page_size, dim], after `gap` bytes of another layer."""
    plane = kv_heads * size * dim * dtype.itemsize
    width = dim * dtype.itemsize
    return KVPlanes(
        k_offset=gap, v_offset=gap + plane, rope_offset=0, page_bytes=gap + 2 * plane, page_size=size,
        token_stride=width, head_stride=size * width, rope_stride=0, kv_heads=kv_heads, head_dim=dim, value_dim=dim,
        rope_dim=0, dtype=dtype,
    )  # fmt: skip


def pool_of(planes: KVPlanes, pages: int = 6) -> torch.Tensor:
    return torch.full((pages, planes.page_bytes), 0x3F, dtype=torch.uint8)


def keys_by_hand(pool: torch.Tensor, planes: KVPlanes, offset: int, page: int, head: int, slot: int) -> torch.Tensor:
    """The numbers of one token and head, cut out of the bytes of its page."""
    start = offset + head * planes.head_stride + slot * planes.token_stride
    return pool[page, start : start + planes.head_dim * planes.dtype.itemsize].clone().view(planes.dtype)


def test_08_3_the_view_shows_the_bytes_of_each_page():
    for dtype in (torch.float32, BF16):
        planes = planes_of(dtype=dtype, gap=32)
        pool = pool_of(planes)
        pool.view(dtype).copy_(tensor_of("pool", 6, planes.page_bytes // dtype.itemsize))
        view = attention.plane_view(pool, planes, planes.v_offset, 4)
        equal(list(view.shape), [6, 2, 4, 4], "shape of the view: pages, KV heads, tokens, dims")
        for page, head, slot in ((0, 0, 0), (1, 0, 0), (2, 1, 3), (5, 1, 0)):
            expected = keys_by_hand(pool, planes, planes.v_offset, page, head, slot)
            close(view[page, head, slot], expected, f"page {page}, head {head}, slot {slot} in {dtype}", ("dim",))


def test_08_3_writes_to_the_view_reach_the_pool():
    planes = planes_of()
    pool = pool_of(planes)
    attention.plane_view(pool, planes, planes.k_offset, 4)[3, 1, 2] = torch.tensor([1.0, 2.0, 3.0, 4.0])
    got = keys_by_hand(pool, planes, planes.k_offset, 3, 1, 2)
    close(got, torch.tensor([1.0, 2.0, 3.0, 4.0]), "page 3, head 1, slot 2 of the pool", ("dim",))


def test_08_3_the_pool_may_be_a_part_of_a_larger_buffer():
    planes = planes_of()
    buffer = torch.zeros(8, planes.page_bytes, dtype=torch.uint8)
    attention.plane_view(buffer[2:], planes, 0, 4)[0, 0, 0] = 1.0
    equal(bool(buffer[:2].any()), False, "bytes before the part are touched")
    equal(bool(buffer[2].any()), True, "bytes of the first page of the part are touched")


def step_of(positions: list[list[int]], tables: list[list[int]], size: int) -> Batch:
    """A step with these positions of each request; its pages are a row of `tables`."""
    flat = [p for own in positions for p in own]
    starts = [0]
    for own in positions:
        starts.append(starts[-1] + len(own))
    owners = [r for r, own in enumerate(positions) for _ in own]
    ints = {"dtype": torch.int32}
    return Batch(
        token_ids=torch.zeros(len(flat), dtype=torch.int64), positions=torch.tensor(flat, **ints),
        write_pages=torch.tensor([tables[r][p // size] for r, p in zip(owners, flat, strict=True)], **ints),
        write_slots=torch.tensor([p % size for p in flat], **ints), request_starts=torch.tensor(starts, **ints),
        page_tables=torch.tensor(tables, **ints), logit_rows=torch.zeros(0, dtype=torch.int64),
        state_ids=torch.zeros(0, **ints), page_size=size,
    )  # fmt: skip


class Filled:
    """A pool with random K and V, and the same numbers as tensors."""

    def __init__(self, planes: KVPlanes, pages: int = 6) -> None:
        self.planes, self.pool = planes, pool_of(planes, pages)
        shape = pages, planes.kv_heads, planes.page_size, planes.head_dim
        self.k, self.v = tensor_of("k", *shape), tensor_of("v", *shape)
        attention.plane_view(self.pool, planes, planes.k_offset, planes.head_dim)[:] = self.k
        attention.plane_view(self.pool, planes, planes.v_offset, planes.head_dim)[:] = self.v

    def attend(self, q: torch.Tensor, table: list[int], position: int, scale: float) -> torch.Tensor:
        """One row, computed token by token: [heads, dim] -> [heads, dim]."""
        group, out = len(q) // self.planes.kv_heads, []
        places = [(table[p // self.planes.page_size], p % self.planes.page_size) for p in range(position + 1)]
        for head in range(len(q)):
            keys = torch.stack([self.k[page, head // group, slot] for page, slot in places])
            values = torch.stack([self.v[page, head // group, slot] for page, slot in places])
            out.append((keys @ q[head] * scale).softmax(0) @ values)
        return torch.stack(out)


def test_08_4_a_decode_reads_one_page():
    filled = Filled(planes_of())
    q = tensor_of("q", 1, 2, 4)
    got = attention.paged_attention(q, filled.pool, filled.planes, step_of([[3]], [[2]], 4), 0.5)
    close(got, filled.attend(q[0], [2], 3, 0.5).reshape(1, -1), "a decode at position 3", ("row", "head x dim"))


def test_08_4_pages_are_read_in_the_order_of_the_table():
    filled = Filled(planes_of())
    q = tensor_of("q", 1, 2, 4)
    got = attention.paged_attention(q, filled.pool, filled.planes, step_of([[9]], [[5, 0, 3]], 4), 0.5)
    close(got, filled.attend(q[0], [5, 0, 3], 9, 0.5).reshape(1, -1), "a decode over pages 5, 0, 3", ("row", "number"))


def test_08_4_a_row_sees_nothing_after_itself():
    filled = Filled(planes_of())
    q = tensor_of("q", 5, 2, 4)
    got = attention.paged_attention(q, filled.pool, filled.planes, step_of([[2, 3, 4, 5, 6]], [[1, 4]], 4), 0.5)
    expected = torch.stack([filled.attend(q[row], [1, 4], 2 + row, 0.5) for row in range(5)])
    close(got, expected.flatten(1), "five rows at positions 2 to 6", ("row", "head x dim"))


def test_08_4_groups_of_query_heads_share_a_kv_head():
    filled = Filled(planes_of(kv_heads=2))
    q = tensor_of("q", 1, 6, 4)
    got = attention.paged_attention(q, filled.pool, filled.planes, step_of([[5]], [[0, 1]], 4), 0.5)
    close(got, filled.attend(q[0], [0, 1], 5, 0.5).reshape(1, -1), "6 heads over 2 KV heads", ("row", "head x dim"))


def test_08_4_each_request_reads_its_own_pages():
    filled = Filled(planes_of())
    q = tensor_of("q", 4, 2, 4)
    step = step_of([[0, 1], [6], [3]], [[2, 0], [1, 3], [5, 0]], 4)
    got = attention.paged_attention(q, filled.pool, filled.planes, step, 0.5)
    rows = [([2, 0], 0), ([2, 0], 1), ([1, 3], 6), ([5, 0], 3)]
    expected = torch.stack([filled.attend(q[row], table, position, 0.5) for row, (table, position) in enumerate(rows)])
    close(got, expected.flatten(1), "three requests in one step", ("row", "head x dim"))


def table_of(rotary: int) -> torch.Tensor:
    angle = torch.arange(20)[:, None] / torch.arange(1, rotary // 2 + 1)
    return torch.cat((angle.cos(), angle.sin()), dim=1)


def test_08_5_values_are_written_unchanged():
    planes = planes_of(kv_heads=1)
    pool, qkv, step = pool_of(planes), tensor_of("qkv", 3, 12), step_of([[3, 4], [0]], [[2, 5], [1, 0]], 4)
    values = qkv[:, 8:].clone()
    store.rope_and_store(qkv, table_of(4), pool, planes, step, 1)
    view = attention.plane_view(pool, planes, planes.v_offset, 4)
    for row, (page, slot) in enumerate([(2, 3), (5, 0), (1, 0)]):
        close(view[page, 0, slot], values[row], f"v of row {row}: page {page}, slot {slot}", ("dim",))


def test_08_5_keys_are_rotated_by_their_positions():
    planes = planes_of(kv_heads=2)
    pool, qkv, step = pool_of(planes), tensor_of("qkv", 2, 24), step_of([[6, 7]], [[3, 1]], 4)
    keys = qkv[:, 8:16].reshape(2, 2, 4).clone()
    store._rotate(keys, table_of(4), step.positions)
    store.rope_and_store(qkv, table_of(4), pool, planes, step, 2)
    view = attention.plane_view(pool, planes, planes.k_offset, 4)
    for row in range(2):
        close(view[1, :, 2 + row], keys[row], f"k of row {row}: page 1, slot {2 + row}", ("head", "dim"))


def test_08_5_queries_are_rotated_in_place():
    planes = planes_of(kv_heads=1)
    qkv, step = tensor_of("qkv", 2, 16), step_of([[1, 2]], [[0]], 4)
    queries = qkv[:, :8].reshape(2, 2, 4).clone()
    store._rotate(queries, table_of(4), step.positions)
    store.rope_and_store(qkv, table_of(4), pool_of(planes), planes, step, 2)
    close(qkv[:, :8], queries.flatten(1), "q after the call", ("row", "head x dim"))


def test_08_5_norms_come_before_the_rotation():
    planes = planes_of(kv_heads=1)
    pool, qkv, step = pool_of(planes), tensor_of("qkv", 1, 12), step_of([[5]], [[0, 2]], 4)
    norms = HeadNorms(tensor_of("nq", 4), tensor_of("nk", 4), 1e-6)
    q, k = qkv[:, :4].clone(), qkv[:, 4:8].clone()
    expected = [elementwise.rms_norm(q, norms.q, 1e-6)[:, None], elementwise.rms_norm(k, norms.k, 1e-6)[:, None]]
    for heads in expected:
        store._rotate(heads, table_of(4), step.positions)
    store.rope_and_store(qkv, table_of(4), pool, planes, step, 1, norms)
    close(qkv[:, :4], expected[0][:, 0], "q after norm and rotation", ("row", "dim"))
    got = attention.plane_view(pool, planes, planes.k_offset, 4)[2, 0, 1]
    close(got, expected[1][0, 0], "k after norm and rotation, page 2, slot 1", ("dim",))
