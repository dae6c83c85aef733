"""The numba twins of attention and of the row-wise ops, against the torch reference and against the exactness law."""

import pytest
import torch

from nanokv.codecs.raw import RawCodec
from nanokv.core.batch import Batch
from nanokv.core.spec import LayerSpec, PageLayout
from nanokv.kernels import cpu, reference

# float32 twins sum in another order than torch, over at most 1,000 keys or 1,536 numbers of size about 1.
# 16-bit results may fall to the other side of a rounding: one unit in the last place of numbers up to 8.
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 0.04, torch.float16: 0.005}
LENGTHS = (1, 15, 16, 17, 63, 64, 65, 1000)


class Pages:
    """Requests of given lengths, their keys and values in shuffled pages among which noise stands."""

    def __init__(self, lengths, kv_heads=2, head_dim=64, page_size=16, dtype=torch.float32, seed=0):
        self.generator = torch.Generator().manual_seed(seed)
        self.lengths, self.page_size = lengths, page_size
        codec = RawCodec(dtype)
        layout = PageLayout([LayerSpec(codec.planes(kv_heads, head_dim, page_size))] * 2, page_size)
        self.planes = codec.bind(layout, 1)
        counts = [-(-length // page_size) for length in lengths]
        shuffled = torch.randperm(sum(counts) + 3, generator=self.generator).int()
        self.tables = torch.zeros(len(lengths), max(counts), dtype=torch.int32)
        for request, count in enumerate(counts):
            self.tables[request, :count], shuffled = shuffled[:count], shuffled[count:]
        noise = torch.randn((sum(counts) + 3) * layout.page_bytes // dtype.itemsize, generator=self.generator)
        self.pool = noise.to(dtype).view(torch.uint8).view(sum(counts) + 3, layout.page_bytes)

    def batch(self, positions: list[list[int]], page_tables=None) -> Batch:
        flat = torch.tensor([position for own in positions for position in own], dtype=torch.int32)
        counts = torch.tensor([0, *(len(own) for own in positions)])
        owners = torch.repeat_interleave(torch.arange(len(positions)), counts[1:])
        tables = self.tables if page_tables is None else page_tables
        return Batch(
            token_ids=torch.zeros(len(flat), dtype=torch.int64),
            positions=flat,
            write_pages=tables[owners, flat.long() // self.page_size],
            write_slots=flat % self.page_size,
            request_starts=counts.cumsum(0).int(),
            page_tables=tables,
            logit_rows=torch.zeros(0, dtype=torch.int64),
            state_ids=torch.zeros(0, dtype=torch.int32),
            page_size=self.page_size,
        )

    def queries(self, rows: int, heads: int, dtype=torch.float32) -> torch.Tensor:
        """Rows of q inside wider rows, as a fused projection leaves them."""
        width = (heads + 4) * self.planes.head_dim
        qkv = torch.randn(rows, width, generator=self.generator).to(dtype)
        return qkv[:, : heads * self.planes.head_dim].unflatten(1, (heads, self.planes.head_dim))


def attend(twin, pages, q, batch):
    return twin.paged_attention(q, pages.pool, pages.planes, batch, pages.planes.head_dim**-0.5)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(("group", "head_dim"), [(1, 64), (3, 64), (4, 80), (8, 128), (3, 32)])
def test_attention_equals_the_reference_for_prefills_and_decodes_in_one_batch(dtype, group, head_dim):
    pages = Pages(LENGTHS, head_dim=head_dim, dtype=dtype)
    ends = [length - 1 for length in LENGTHS]
    batch = pages.batch([list(range(end // 3 * (i % 2), end + 1)) if i % 3 else [end] for i, end in enumerate(ends)])
    for q_dtype in {torch.float32, dtype}:
        q = pages.queries(len(batch.positions), 2 * group, q_dtype)
        ours, theirs = attend(cpu, pages, q, batch), attend(reference, pages, q, batch)
        assert ours.dtype == q_dtype and ours.is_contiguous()
        assert torch.allclose(ours.float(), theirs.float(), atol=TOLERANCE[q_dtype])


def test_scattered_positions_see_exactly_the_keys_up_to_them():
    pages = Pages([200])
    batch = pages.batch([[199, 3, 64, 63, 0, 128]])
    q = pages.queries(6, 6)
    assert torch.allclose(attend(cpu, pages, q, batch), attend(reference, pages, q, batch), atol=2e-5)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("page_size", [1, 4, 16])
def test_bits_of_a_row_depend_on_nothing_around_it(dtype, page_size):
    """Alone, in a prefill of all rows, in other pages, beside others, on one thread or two."""
    lengths = [150, 70, 9]
    pages = Pages(lengths, page_size=16, dtype=dtype)
    whole = pages.batch([list(range(length)) for length in lengths])
    q = pages.queries(sum(lengths), 6)
    expected = attend(cpu, pages, q, whole)
    other = Pages(lengths, page_size=page_size, dtype=dtype, seed=1)
    for request, length in enumerate(lengths):
        for position in range(length):
            copy_key_and_value(pages, other, request, position)
    row = 0
    for request, length in enumerate(lengths):
        for position in range(length):
            if position % 23 == 0 or position == length - 1:
                own = [[], [], []]
                own[request] = [position]
                alone = attend(cpu, other, q[row : row + 1], other.batch(own))
                assert torch.equal(alone[0], expected[row]), (request, position)
            row += 1
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        assert torch.equal(attend(cpu, pages, q, whole), expected)
    finally:
        torch.set_num_threads(threads)


def copy_key_and_value(source: Pages, target: Pages, request: int, position: int) -> None:
    for name in ("k_offset", "v_offset"):
        views = []
        for pages in (source, target):
            view = reference.plane_view(pages.pool, pages.planes, getattr(pages.planes, name))
            views.append(view[int(pages.tables[request, position // pages.page_size]), :, position % pages.page_size])
        views[1].copy_(views[0])


def test_attention_reaches_pages_beyond_two_gibibytes():
    page_bytes = 2 * 2 * 16 * 64 * 4
    pages = Pages([40])
    count = 2**31 // page_bytes + 4
    far = torch.empty(count, page_bytes * 2, dtype=torch.uint8)  # never written but for three pages: takes no memory
    table = torch.arange(count - 3, count, dtype=torch.int32)[None]
    planes = pages.planes
    far[table[0].long(), : pages.pool.shape[1]] = pages.pool[pages.tables[0].long()]
    from dataclasses import replace

    wide = replace(planes, page_bytes=far.shape[1])
    q = pages.queries(1, 6)
    near = cpu.paged_attention(q, pages.pool, planes, pages.batch([[39]]), 0.125)
    assert torch.equal(cpu.paged_attention(q, far, wide, pages.batch([[39]], table), 0.125), near)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("rows", [0, 1, 3, 64, 300])
def test_row_wise_ops_equal_the_reference(dtype, rows):
    generator = torch.Generator().manual_seed(rows)
    for width in (576, 100):
        x, residual = (torch.randn(rows, width, generator=generator).to(dtype) for _ in range(2))
        weight = torch.randn(width, generator=generator).to(dtype)
        gate_up = 4 * torch.randn(rows, 2 * width, generator=generator).to(dtype)
        theirs_sum, ours_sum = residual.clone(), residual.clone()
        pairs = [
            (cpu.rms_norm(x, weight, 1e-5), reference.rms_norm(x, weight, 1e-5)),
            (cpu.add_rms_norm(x, ours_sum, weight, 1e-5), reference.add_rms_norm(x, theirs_sum, weight, 1e-5)),
            (cpu.silu_mul(gate_up), reference.silu_mul(gate_up)),
        ]
        assert torch.equal(ours_sum, theirs_sum)
        for ours, theirs in pairs:
            assert ours.dtype == dtype and ours.shape == theirs.shape
            assert torch.allclose(ours.float(), theirs.float(), rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


def test_silu_is_right_where_exponentials_overflow():
    gate = torch.tensor([[-1e4, -100.0, -1.0, 0.0, 1.0, 100.0, 1e4]])
    ours = cpu.silu_mul(torch.cat([gate, torch.ones_like(gate)], dim=1))
    assert torch.allclose(ours, torch.nn.functional.silu(gate), atol=1e-6)


def test_bits_of_row_wise_ops_do_not_depend_on_batch_mates():
    x = torch.randn(200, 576, generator=torch.Generator().manual_seed(1))
    weight, gate_up = torch.randn(576), torch.cat([x, x.flip(0)], dim=1)
    norm, gated = cpu.rms_norm(x, weight, 1e-5), cpu.silu_mul(gate_up)
    for row in (0, 7, 8, 199):
        assert torch.equal(cpu.rms_norm(x[row : row + 1], weight, 1e-5)[0], norm[row])
        assert torch.equal(cpu.silu_mul(gate_up[row : row + 1])[0], gated[row])


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("page_dtype", TOLERANCE)
@pytest.mark.parametrize("rotary", [64, 32])
def test_rope_and_store_equals_the_reference(dtype, page_dtype, rotary):
    lengths = (5, 40)
    ours, theirs = (Pages(lengths, dtype=page_dtype, page_size=4) for _ in range(2))
    batch = ours.batch([[4, 0], list(range(3, 40, 2))])
    generator = torch.Generator().manual_seed(2)
    qkv = torch.randn(len(batch.positions), (6 + 2 * 2) * 64, generator=generator).to(dtype)
    other, table = qkv.clone(), torch.randn(64, rotary, generator=generator)
    cpu.rope_and_store(qkv, table, ours.pool, ours.planes, batch, 6)
    reference.rope_and_store(other, table, theirs.pool, theirs.planes, batch, 6)
    assert torch.allclose(qkv.float(), other.float(), atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])
    written = [pages.pool.view(page_dtype).float() for pages in (ours, theirs)]
    atol = max(TOLERANCE[dtype], TOLERANCE[page_dtype])
    assert torch.allclose(*written, atol=atol, rtol=atol)
