"""Paged attention: the compiled twin against the torch one, and the law that a row's bits depend on that row alone."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from harness import step_of
from helpers import last, same_bits

from nanokv.codecs import resolve_codec
from nanokv.core.batch import Batch
from nanokv.core.spec import LayerSpec, PageLayout
from nanokv.kernels import cpu, reference
from nanokv.kernels.cpu import amx
from nanokv.kernels.ops import AUTO
from nanokv.kernels.planes import KVPlanes
from nanokv.kernels.reference.attention import plane_view

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
HALF = pytest.param(F16, F32, marks=pytest.mark.slow)  # a further compilation of what bfloat16 shows


class Requests:
    """Requests with random keys and values in shuffled pages; every byte that no token owns reads as NaN."""

    def __init__(self, lengths, heads=6, kv_heads=2, head_dim=64, page_size=16, dtype=F32, q_dtype=F32, layer=1):
        noise = torch.Generator().manual_seed(sum(lengths) + 7 * head_dim)
        codec = resolve_codec("raw", dtype)
        layout = PageLayout([LayerSpec(paged=codec.planes(kv_heads, head_dim, page_size))] * 3, page_size)
        self.lengths, self.planes, self.scale = lengths, codec.bind(layout, layer), head_dim**-0.5
        counts = [layout.pages_for(length) for length in lengths]
        shuffled = torch.randperm(sum(counts), generator=torch.Generator().manual_seed(page_size)).int()
        self.pool = torch.full((sum(counts), layout.page_bytes), 255, dtype=torch.uint8)
        self.tables = torch.zeros(len(lengths), max(counts), dtype=torch.int32)
        self.q = []
        k_plane, v_plane = (
            plane_view(self.pool, self.planes, offset, head_dim)
            for offset in (self.planes.k_offset, self.planes.v_offset)
        )
        for request, pages in enumerate(shuffled.split(counts)):
            self.tables[request, : len(pages)] = pages
            positions = torch.arange(lengths[request])
            where = pages[positions // page_size].long(), slice(None), positions % page_size
            # The same numbers for every page size, so that results can be compared across them.
            k_plane[where] = torch.randn(lengths[request], kv_heads, head_dim, generator=noise).to(dtype)
            v_plane[where] = torch.randn(lengths[request], kv_heads, head_dim, generator=noise).to(dtype)
            self.q.append(torch.randn(lengths[request], heads, head_dim, generator=noise).to(q_dtype))

    def batch(self, rows: dict[int, list[int]]) -> tuple[Batch, torch.Tensor]:
        """The step that computes the given positions of some requests, and its q: a view with a long row stride."""
        batch = step_of(rows, self.tables, self.planes.page_size)
        q = torch.cat([self.q[request][positions] for request, positions in rows.items()])
        return batch, torch.cat([q, q[:, :1]], dim=1)[:, :-1]

    def attend(self, rows: dict[int, list[int]], twin=cpu) -> torch.Tensor:
        batch, q = self.batch(rows)
        return twin.paged_attention(q, self.pool, self.planes, batch, self.scale)


def assert_close(mine: torch.Tensor, truth: torch.Tensor) -> None:
    """float32: a score near 10 that is off by two ulp moves a weight by 1e-6, and values are below 5. 16-bit results
    are float32 results rounded once: two that nearly agree land at most one ulp (2**-8 or 2**-11) apart."""
    assert mine.dtype == truth.dtype
    assert mine.shape == truth.shape
    step = {F32: 0.0, BF16: 2**-7, F16: 2**-10}[truth.dtype]
    torch.testing.assert_close(mine.float(), truth.float(), atol=1e-5, rtol=step)


MIXED = [1, 15, 16, 17, 63, 64, 65, 1000, 130, 300]
MIXED_ROWS = {0: [0], 3: last(17, 17), 1: last(15, 1), 4: last(63, 2), 7: last(1000, 70), 5: last(64, 1),
              6: last(65, 65), 2: last(16, 1), 8: last(130, 5), 9: last(300, 1)}  # fmt: skip


@pytest.mark.parametrize("dtype, q_dtype", [(F32, F32), (BF16, F32), (BF16, BF16), HALF], ids=str)
def test_a_batch_of_prefills_and_decodes_agrees_with_the_reference(dtype, q_dtype, monkeypatch):
    monkeypatch.setattr(amx, "has_tiles", lambda: False)  # test_tile_attention.py tests pages in bfloat16
    requests = Requests(MIXED, dtype=dtype, q_dtype=q_dtype)
    assert_close(requests.attend(MIXED_ROWS), requests.attend(MIXED_ROWS, reference))


@pytest.mark.parametrize("heads, kv_heads", [(2, 2), (3, 3), (6, 2), (9, 3), (4, 1), (16, 2), (5, 1)])
def test_every_group_size_agrees_with_the_reference(heads, kv_heads):
    requests = Requests([65, 130, 20], heads=heads, kv_heads=kv_heads, head_dim=32, dtype=BF16)
    rows = {0: last(65, 65), 1: last(130, 1), 2: last(20, 3)}
    assert_close(requests.attend(rows), requests.attend(rows, reference))


@pytest.mark.parametrize("head_dim", [8, 24, 32, 64, 80, 96, 128, 256])
@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_every_head_dim_agrees_with_the_reference(head_dim, dtype):
    requests = Requests([70, 33], head_dim=head_dim, dtype=dtype)
    rows = {0: last(70, 9), 1: last(33, 33)}
    assert_close(requests.attend(rows), requests.attend(rows, reference))


@pytest.mark.parametrize("page_size", [1, 2, 4, 8, 16, 32, 48, 64, 130])
@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_every_page_size_gives_the_same_bits(page_size, dtype):
    rows = {0: last(200, 200), 1: [46]}
    ours = Requests([200, 47], page_size=page_size, dtype=dtype).attend(rows)
    assert same_bits(ours, Requests([200, 47], page_size=16, dtype=dtype).attend(rows))


@pytest.mark.parametrize("dtype, q_dtype", [(F32, F32), (BF16, F32), (BF16, BF16)], ids=str)
def test_a_row_has_the_same_bits_in_a_prefill_in_chunks_and_alone(dtype, q_dtype):
    requests = Requests([500], heads=9, kv_heads=3, dtype=dtype, q_dtype=q_dtype)
    whole = requests.attend({0: list(range(500))})
    for size in (7, 64, 113):
        chunks = [requests.attend({0: list(range(a, min(a + size, 500)))}) for a in range(0, 500, size)]
        assert same_bits(torch.cat(chunks), whole)
    for position in (0, 1, 15, 62, 63, 64, 65, 127, 128, 300, 499):
        assert same_bits(requests.attend({0: [position]}), whole[position : position + 1])


def test_a_row_has_the_same_bits_with_any_batch_mates():
    requests = Requests(MIXED, heads=4, kv_heads=1)
    mixed = requests.attend(MIXED_ROWS)
    start = 0
    for request, rows in MIXED_ROWS.items():
        alone = requests.attend({request: rows})
        assert same_bits(alone, mixed[start : start + len(rows)])
        start += len(rows)


def test_many_decodes_have_the_bits_of_each_alone():
    lengths = [10 * n + 1 for n in range(1, 25)]
    requests = Requests(lengths, dtype=BF16)
    together = requests.attend({n: [length - 1] for n, length in enumerate(lengths)})
    for n, length in enumerate(lengths):
        assert same_bits(requests.attend({n: [length - 1]}), together[n : n + 1])


def test_the_number_of_threads_changes_no_bit():
    requests = Requests([900, 40, 300])
    rows = {0: last(900, 300), 1: [39], 2: last(300, 1)}
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(requests.attend(rows))
    finally:
        torch.set_num_threads(before)
    assert same_bits(results[0], results[1])
    assert same_bits(results[0], results[2])


def test_scattered_positions_see_the_keys_before_each():
    requests = Requests([400], heads=3, kv_heads=1)
    whole = requests.attend({0: list(range(400))})
    noise = torch.Generator().manual_seed(3)
    scattered = torch.randperm(400, generator=noise)[:150].tolist()
    for rows in (sorted(scattered), scattered, [399, 0, 64]):
        assert_close(requests.attend({0: rows}), requests.attend({0: rows}, reference))
        assert same_bits(requests.attend({0: rows}), whole[rows])


def test_pages_past_four_gibibytes_are_reached():
    page_bytes = 1 << 20
    pool = torch.from_numpy(np.zeros((4200, page_bytes), np.uint8))  # only touched pages take memory
    planes = KVPlanes(
        k_offset=page_bytes - 4096, v_offset=page_bytes - 2048, rope_offset=0, page_bytes=page_bytes, page_size=8,
        token_stride=256, head_stride=2048, rope_stride=0, kv_heads=1, head_dim=64, value_dim=64, rope_dim=0, dtype=F32,
    )  # fmt: skip
    noise = torch.Generator().manual_seed(0)
    tables = torch.tensor([[4199, 4100]], dtype=torch.int32)
    for offset in (planes.k_offset, planes.v_offset):
        for page in (4199, 4100):
            pool[page, offset : offset + 2048] = torch.randn(512, generator=noise).view(torch.uint8)
    positions = torch.arange(16, dtype=torch.int32)
    starts = torch.tensor([0, 16], dtype=torch.int32)
    batch = Batch(positions.long(), positions, positions, positions, starts, tables, starts[:1].long(), starts[:0], 8)
    q = torch.randn(16, 2, 64, generator=noise)
    mine, truth = (twin.paged_attention(q, pool, planes, batch, 0.125) for twin in (cpu, reference))
    assert_close(mine, truth)
    assert truth.abs().max() > 0.1


def test_scores_far_apart_neither_overflow_nor_vanish():
    requests = Requests([200], head_dim=32)
    for scale in (30.0, 1e-6):
        requests.scale = scale
        mine, truth = requests.attend({0: list(range(200))}), requests.attend({0: list(range(200))}, reference)
        # Scores reach 1,000 at the first scale, where their own rounding (6e-5) is what moves weights.
        torch.testing.assert_close(mine, truth, atol=2e-3, rtol=0.0)


def test_no_rows_give_no_rows_and_a_q_of_the_wrong_shape_is_refused():
    requests = Requests([20, 5])
    assert requests.attend({0: []}).shape == (0, 6 * 64)
    rows = {0: [], 1: [4]}
    assert_close(requests.attend(rows), requests.attend(rows, reference))
    batch, q = requests.batch({0: [19]})
    with pytest.raises(ValueError, match="does not fit"):
        cpu.paged_attention(q[:, :5], requests.pool, requests.planes, batch, 1.0)
    with pytest.raises(ValueError, match="does not fit"):
        cpu.paged_attention(q[:, :, ::2], requests.pool, requests.planes, batch, 1.0)


def test_ops_picks_the_compiled_twin_for_the_cpu():
    requests = Requests([50])
    assert same_bits(requests.attend({0: last(50, 3)}, AUTO), requests.attend({0: last(50, 3)}))
