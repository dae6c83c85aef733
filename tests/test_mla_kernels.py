"""Latent attention: the absorbed and the expanded form through one paged attention, and the ops around it."""

from __future__ import annotations

import pytest
import torch
from harness import step_of
from helpers import last, noise, same_bits

from nanokv.core.spec import LayerSpec, PageLayout, Plane
from nanokv.kernels import cpu, reference
from nanokv.kernels.cpu import amx
from nanokv.kernels.ops import AUTO
from nanokv.kernels.planes import KVPlanes
from nanokv.kernels.reference import linear as plain
from nanokv.kernels.reference.attention import plane_view, rope_view

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
ODD = [1, 15, 16, 17, 63, 64, 65, 1000]


def assert_close(mine: torch.Tensor, truth: torch.Tensor, atol: float = 1e-5) -> None:
    """As in test_attention_kernels.py: float32 by a few ulp of scores near 10, 16 bits by one rounding."""
    assert mine.dtype == truth.dtype and mine.shape == truth.shape
    step = {F32: 0.0, BF16: 2**-7, F16: 2**-10}[truth.dtype]
    torch.testing.assert_close(mine.float(), truth.float(), atol=atol, rtol=step)


def latent_planes(layout: PageLayout, layer: int) -> KVPlanes:
    latent, k_rope = layout.paged(layer, "latent"), layout.paged(layer, "k_rope")
    (page_size, rank), rope, dtype = latent.plane.shape, k_rope.plane.shape[1], latent.plane.dtype
    return KVPlanes(
        k_offset=latent.offset, v_offset=latent.offset, rope_offset=k_rope.offset, page_bytes=layout.page_bytes,
        page_size=page_size, token_stride=rank * dtype.itemsize, head_stride=0, rope_stride=rope * dtype.itemsize,
        kv_heads=1, head_dim=rank, value_dim=rank, rope_dim=rope, dtype=dtype,
    )  # fmt: skip


def latent_layout(rank: int, rope: int, page_size: int, dtype: torch.dtype) -> PageLayout:
    planes = Plane("latent", (page_size, rank), dtype, 0), Plane("k_rope", (page_size, rope), dtype, 0)
    return PageLayout([LayerSpec(paged=planes)] * 2, page_size)


def expanded_planes(kv_heads: int, nope: int, value: int, rope: int, tokens: int, dtype: torch.dtype) -> KVPlanes:
    size, width = dtype.itemsize, kv_heads * (nope + value) + rope
    return KVPlanes(
        k_offset=0, v_offset=nope * size, rope_offset=kv_heads * (nope + value) * size,
        page_bytes=tokens * width * size, page_size=tokens, token_stride=width * size,
        head_stride=(nope + value) * size, rope_stride=width * size, kv_heads=kv_heads, head_dim=nope, value_dim=value,
        rope_dim=rope, dtype=dtype,
    )  # fmt: skip


class Latents:
    """Requests with random latents and rope keys in shuffled pages; every byte that no token owns reads as NaN."""

    def __init__(self, lengths, heads=16, rank=32, rope=8, page_size=16, dtype=F32, q_dtype=F32):
        layout = latent_layout(rank, rope, page_size, dtype)
        self.planes, self.scale = latent_planes(layout, 1), (rank + rope) ** -0.5
        counts = [layout.pages_for(length) for length in lengths]
        shuffled = torch.randperm(sum(counts), generator=torch.Generator().manual_seed(page_size)).int()
        self.pool = torch.full((sum(counts), layout.page_bytes), 255, dtype=torch.uint8)
        self.tables = torch.zeros(len(lengths), max(counts), dtype=torch.int32)
        latents, rope_keys = (
            plane_view(self.pool, self.planes, self.planes.k_offset, rank),
            rope_view(self.pool, self.planes),
        )
        self.latents, self.rope_keys, self.q = [], [], []
        for request, pages in enumerate(shuffled.split(counts)):
            self.tables[request, : len(pages)] = pages
            tokens = torch.arange(lengths[request])
            where, slots = pages[tokens // page_size].long(), tokens % page_size
            # The same numbers for every page size, so that results can be compared across them.
            self.latents.append(noise(lengths[request], rank, seed=3 * request).to(dtype))
            self.rope_keys.append(noise(lengths[request], rope, seed=3 * request + 1).to(dtype))
            self.q.append(noise(lengths[request], heads, rank + rope, seed=3 * request + 2).to(q_dtype))
            latents[where, 0, slots], rope_keys[where, slots] = self.latents[-1], self.rope_keys[-1]

    def attend(self, rows: dict[int, list[int]], twin=cpu) -> torch.Tensor:
        batch = step_of(rows, self.tables, self.planes.page_size)
        q = torch.cat([self.q[request][positions] for request, positions in rows.items()])
        return twin.paged_attention(q, self.pool, self.planes, batch, self.scale)


class Expanded:
    """Requests of any length, each with its keys and values in one scratch page, row after row."""

    def __init__(self, lengths, heads=4, nope=16, value=24, rope=8, dtype=F32):
        tokens = max(lengths)
        self.planes, self.scale = expanded_planes(heads, nope, value, rope, tokens, dtype), (nope + rope) ** -0.5
        width = heads * (nope + value) + rope
        rows = torch.full((len(lengths), tokens, width), float("nan")).to(dtype)
        for request, length in enumerate(lengths):
            rows[request, :length] = noise(length, width, seed=request).to(dtype)
        self.pool = rows.view(len(lengths), -1).view(torch.uint8)
        self.tables = torch.arange(len(lengths), dtype=torch.int32)[:, None]
        self.q = [noise(length, heads, nope + rope, seed=100 + length) for length in lengths]

    attend = Latents.attend


MIXED = {0: [0], 3: last(17, 17), 1: last(15, 1), 4: last(63, 2), 7: last(1000, 70), 5: last(64, 1),
         6: last(65, 65), 2: last(16, 1)}  # fmt: skip


@pytest.mark.parametrize("dtype, q_dtype", [(F32, F32), (BF16, F32), (BF16, BF16), (F16, F32)], ids=str)
@pytest.mark.parametrize("rank, rope", [(32, 8), (512, 64)])
def test_absorbed_prefills_and_decodes_agree_with_the_reference(rank, rope, dtype, q_dtype, monkeypatch):
    monkeypatch.setattr(amx, "has_tiles", lambda: False)  # test_tile_attention.py tests weights in bfloat16
    requests = Latents(ODD, rank=rank, rope=rope, dtype=dtype, q_dtype=q_dtype)
    assert_close(requests.attend(MIXED), requests.attend(MIXED, reference))


@pytest.mark.parametrize("heads", [1, 3, 4, 5, 8, 16, 128])
def test_any_number_of_query_heads_shares_one_latent(heads):
    requests = Latents([130, 20], heads=heads, rank=80, rope=20, dtype=BF16)
    for rows in ({0: [129]}, {0: last(130, 66), 1: [19]}):
        assert_close(requests.attend(rows), requests.attend(rows, reference))


@pytest.mark.parametrize("page_size", [1, 4, 16, 48, 130])
@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_every_page_size_of_latents_gives_the_same_bits(page_size, dtype):
    rows = {0: last(200, 200), 1: [46]}
    ours = Latents([200, 47], page_size=page_size, dtype=dtype).attend(rows)
    assert same_bits(ours, Latents([200, 47], page_size=16, dtype=dtype).attend(rows))


@pytest.mark.parametrize("dtype, q_dtype", [(F32, F32), (BF16, F32), (BF16, BF16)], ids=str)
def test_an_absorbed_row_has_the_same_bits_in_a_prefill_in_chunks_and_alone(dtype, q_dtype):
    requests = Latents([300], rank=100, rope=12, dtype=dtype, q_dtype=q_dtype)
    whole = requests.attend({0: list(range(300))})
    for size in (7, 64, 113):
        chunks = [requests.attend({0: list(range(a, min(a + size, 300)))}) for a in range(0, 300, size)]
        assert same_bits(torch.cat(chunks), whole)
    for position in (0, 1, 15, 62, 63, 64, 65, 127, 128, 299):
        assert same_bits(requests.attend({0: [position]}), whole[position : position + 1])


def test_an_absorbed_row_has_the_same_bits_with_any_batch_mates_and_threads():
    requests, before = Latents(ODD, rank=64, rope=16), torch.get_num_threads()
    mixed, start = requests.attend(MIXED), 0
    try:
        for request, rows in MIXED.items():
            for threads in (1, 2, 3, 5):
                torch.set_num_threads(threads)
                assert same_bits(requests.attend({request: rows}), mixed[start : start + len(rows)])
            start += len(rows)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("nope, value, rope", [(16, 24, 8), (24, 16, 8), (128, 128, 64), (100, 70, 20), (48, 16, 0)])
@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_expanded_keys_and_values_of_different_widths_agree_with_the_reference(nope, value, rope, dtype):
    for heads, length in ((4, 130), (1, 65), (3, 64), (2, 63), (4, 17), (4, 16), (4, 15), (16, 1)):
        requests = Expanded([length], heads, nope, value, rope, dtype)
        rows = {0: list(range(length))}
        assert_close(requests.attend(rows), requests.attend(rows, reference))


def test_requests_of_different_lengths_share_a_step_of_expanded_rows():
    requests = Expanded([130, 1, 1000, 65, 17], heads=3)
    rows = {2: last(1000, 130), 0: list(range(130)), 4: [16], 1: [0], 3: last(65, 40)}
    mixed = requests.attend(rows)
    assert_close(mixed, requests.attend(rows, reference))
    start = 0
    for request, positions in rows.items():
        assert same_bits(requests.attend({request: positions}), mixed[start : start + len(positions)])
        start += len(positions)


@pytest.mark.parametrize("twin", [reference, cpu], ids=["reference", "compiled"])
def test_absorbed_attention_is_expanded_attention(twin):
    heads, rank, rope, nope, value, length = 4, 32, 8, 16, 24, 150
    latents = Latents([length], heads, rank, rope)
    up_k, up_v = noise(heads, nope, rank, seed=50) * rank**-0.5, noise(heads, value, rank, seed=51) * rank**-0.5
    q_nope, q_rope = noise(length, heads, nope, seed=52), noise(length, heads, rope, seed=53)
    latents.scale = (nope + rope) ** -0.5
    latents.q = [torch.cat((plain.head_linear(q_nope, up_k.transpose(1, 2)), q_rope), dim=-1)]
    rows = {0: list(range(length))}
    absorbed = plain.head_linear(latents.attend(rows, twin).view(length, heads, rank), up_v)

    expanded = Expanded([length], heads, nope, value, rope)
    keys = torch.einsum("tr,hnr->thn", latents.latents[0], up_k)
    values = torch.einsum("tr,hnr->thn", latents.latents[0], up_v)
    scratch = torch.cat((torch.cat((keys, values), dim=-1).flatten(1), latents.rope_keys[0]), dim=1)
    expanded.pool, expanded.q = scratch.view(1, -1).view(torch.uint8), [torch.cat((q_nope, q_rope), dim=-1)]
    assert_close(absorbed.flatten(1), expanded.attend(rows, twin), atol=2e-5)


def stored(rows: int, heads: int, rank: int, rope: int, page_size: int, dtype, x_dtype):
    """A step of rows at odd positions, each with a slot of its own in shuffled pages; q_rope and kv are views."""
    layout = latent_layout(rank, rope, page_size, dtype)
    order = torch.randperm(layout.pages_for(rows) + 2, generator=torch.Generator().manual_seed(1)).int()
    place = torch.arange(rows)
    positions = torch.randperm(900, generator=torch.Generator().manual_seed(2))[:rows]
    batch = step_of({0: positions.tolist()}, order[None], page_size, order[place // page_size], place % page_size)
    angles = noise(900, rope // 2, seed=3) * 10
    q = noise(rows, heads, 20 + rope, seed=4, dtype=x_dtype)
    kv = noise(rows, rank + rope + 5, seed=5, dtype=x_dtype)
    pool = torch.full((len(order), layout.page_bytes), 7, dtype=torch.uint8)
    return q, kv, torch.cat([angles.cos(), angles.sin()], dim=1), pool, latent_planes(layout, 1), batch


@pytest.mark.parametrize("dtype, x_dtype", [(F32, F32), (BF16, F32), (BF16, BF16), (F16, F32)], ids=str)
@pytest.mark.parametrize("shape", [(1, 16, 512, 64, 16), (40, 3, 33, 8, 4), (200, 4, 32, 6, 1)], ids=str)
def test_latents_are_normed_rotated_and_written_as_by_the_reference(shape, dtype, x_dtype):
    _, _, rank, _, page_size = shape
    for weight_dtype in {F32, x_dtype}:
        q, kv, cos_sin, pool, planes, batch = stored(*shape, dtype, x_dtype)
        weight = noise(rank, seed=6, dtype=weight_dtype)
        results = []
        for twin in (cpu, reference):
            own_q, own_kv, own_pool = q.clone(), kv.clone(), pool.clone()
            twin.store_latent(own_q[..., 20:], own_kv[:, :-5], weight, 1e-6, cos_sin, own_pool, planes, batch)
            where = batch.write_pages.long(), batch.write_slots.long()
            latent = plane_view(own_pool, planes, planes.k_offset, rank)[where[0], 0, where[1]]
            results.append((own_q, own_kv, latent, rope_view(own_pool, planes)[where]))
            # Everything else is unchanged: the rest of q, the latent in kv, the columns after it.
            assert same_bits(own_q[..., :20], q[..., :20])
            assert same_bits(own_kv[:, :rank], kv[:, :rank]) and same_bits(own_kv[:, -5:], kv[:, -5:])
            assert same_bits(results[-1][3], own_kv[:, rank:-5].to(dtype))
            untouched = torch.ones(pool.shape[0], page_size, dtype=torch.bool)
            untouched[where] = False
            assert (rope_view(own_pool, planes)[untouched].view(torch.uint8) == 7).all()
            assert (own_pool[:, : planes.k_offset] == 7).all()
        for mine, truth in zip(*results, strict=True):
            # Two roundings (before and after the weight, or to the page) may move a 16-bit number by two ulp.
            step = {F32: 2e-6, BF16: 2**-6, F16: 2**-9}[mine.dtype]
            torch.testing.assert_close(mine.float(), truth.float(), atol=1e-6, rtol=step)


def test_a_stored_row_has_the_same_bits_with_any_batch_mates():
    q, kv, cos_sin, pool, planes, batch = stored(90, 4, 100, 16, 16, F32, F32)
    weight = noise(100, seed=6)
    whole_q, whole_kv, whole_pool = q.clone(), kv.clone(), pool.clone()
    cpu.store_latent(whole_q[..., 20:], whole_kv[:, :-5], weight, 1e-6, cos_sin, whole_pool, planes, batch)
    for row in (0, 7, 8, 89):
        own_q, own_kv, own_pool = q[row : row + 1].clone(), kv[row : row + 1].clone(), pool.clone()
        page, slot = batch.write_pages[row], batch.write_slots[row]
        alone = step_of({0: [int(batch.positions[row])]}, batch.page_tables, 16, page[None], slot[None])
        cpu.store_latent(own_q[..., 20:], own_kv[:, :-5], weight, 1e-6, cos_sin, own_pool, planes, alone)
        assert same_bits(own_q[0], whole_q[row]) and same_bits(own_kv[0], whole_kv[row])
        latents = [plane_view(bytes_, planes, planes.k_offset, 100)[page, 0, slot] for bytes_ in (own_pool, whole_pool)]
        assert same_bits(*latents)


def test_latents_that_do_not_fit_are_refused():
    q, kv, cos_sin, pool, planes, batch = stored(3, 4, 32, 8, 16, F32, F32)
    weight = noise(32)
    with pytest.raises(ValueError, match="do not fit"):
        cpu.store_latent(q[..., 20:], kv, weight, 1e-6, cos_sin, pool, planes, batch)
    with pytest.raises(ValueError, match="do not fit"):
        cpu.store_latent(q[..., 22:], kv[:, :-7], weight, 1e-6, cos_sin, pool, planes, batch)
    with pytest.raises(ValueError, match="side by side"):
        cpu.store_latent(q[..., ::2][..., 6:], kv[:, :-5], weight, 1e-6, cos_sin, pool, planes, batch)


def test_ops_picks_the_compiled_twins_for_the_cpu():
    requests = Latents([50])
    assert same_bits(requests.attend({0: last(50, 3)}, AUTO), requests.attend({0: last(50, 3)}))
    q, kv, cos_sin, pool, planes, batch = stored(9, 4, 32, 8, 16, F32, F32)
    pools = pool.clone(), pool.clone()
    for twin, own in zip((cpu, AUTO), pools, strict=True):
        twin.store_latent(q.clone()[..., 20:], kv.clone()[:, :-5], noise(32), 1e-6, cos_sin, own, planes, batch)
    assert torch.equal(*pools)
