"""Paged attention on tile registers: close to the reference, the same bits for a row in any step, and only its keys."""

from __future__ import annotations

import pytest
import torch
from helpers import last, same_bits
from test_attention_kernels import MIXED, MIXED_ROWS, Requests
from test_mla_kernels import Expanded, Latents

from nanokv.kernels import reference
from nanokv.kernels.cpu import amx, tile_attention

BF16 = torch.bfloat16
EDGES = [0, 1, 14, 15, 16, 17, 31, 32, 33, 47, 48, 62, 63, 64, 65, 79, 80, 95, 96, 97, 127, 128, 129]

pytestmark = pytest.mark.skipif(not amx.has_tiles(), reason="this machine has no tile registers for bfloat16")


def requests_of(lengths, **more) -> Requests:
    return Requests(lengths, dtype=BF16, q_dtype=BF16, **more)


def latents_of(lengths, **more) -> Latents:
    return Latents(lengths, dtype=BF16, q_dtype=BF16, **more)


def check(requests, rows) -> torch.Tensor:
    """The attention of some rows on tiles, near the reference: a weight is off by 2**-9 of itself, so a result by that
    much of the largest |value|, which is below 6; and its own rounding is up to 2**-8 of it, twice."""
    before = requests.planes.head_dim + requests.planes.rope_dim
    assert tile_attention.is_for(torch.empty(0, 1, before, dtype=BF16), requests.planes)
    mine, truth = requests.attend(rows), requests.attend(rows, reference)
    assert mine.dtype == truth.dtype == BF16
    torch.testing.assert_close(mine.float(), truth.float(), atol=6 * 2**-9, rtol=2**-7)
    return mine


def mates_and_threads_change_no_bit(requests, rows: dict[int, list[int]]) -> None:
    mixed, start, before = check(requests, rows), 0, torch.get_num_threads()
    try:
        for request, positions in rows.items():
            for threads in (1, 2, 3):
                torch.set_num_threads(threads)
                assert same_bits(requests.attend({request: positions}), mixed[start : start + len(positions)])
            start += len(positions)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("page_size", [8, 16, 64])
def test_a_row_has_the_same_bits_with_any_batch_mates_and_threads(page_size):
    mates_and_threads_change_no_bit(requests_of(MIXED, page_size=page_size), MIXED_ROWS)


def test_an_absorbed_row_has_the_same_bits_with_any_batch_mates_and_threads():
    mates_and_threads_change_no_bit(latents_of(MIXED, rank=64, rope=32), MIXED_ROWS)


@pytest.mark.parametrize("heads, kv_heads", [(2, 2), (9, 3), (4, 1), (16, 2), (5, 1), (16, 1), (40, 1)])
def test_every_group_size_agrees_with_the_reference(heads, kv_heads):
    requests = requests_of([65, 130, 20, 1], heads=heads, kv_heads=kv_heads, head_dim=32)
    check(requests, {0: last(65, 65), 1: last(130, 1), 2: last(20, 3), 3: [0]})


@pytest.mark.parametrize("head_dim", [32, 64, 96, 128, 256])
@pytest.mark.parametrize("page_size", [8, 16])
def test_every_head_dim_agrees_with_the_reference(head_dim, page_size):
    check(requests_of([70, 33], head_dim=head_dim, page_size=page_size), {0: last(70, 9), 1: last(33, 33)})


@pytest.mark.parametrize("rank, rope, heads", [(32, 32, 3), (512, 64, 16), (96, 0, 128)])
def test_latents_agree_with_the_reference(rank, rope, heads):
    check(latents_of([130, 20, 64], rank=rank, rope=rope, heads=heads), {0: last(130, 66), 1: [19], 2: [63]})


@pytest.mark.parametrize("nope, value, rope", [(32, 64, 32), (128, 128, 64), (64, 32, 0)])
@pytest.mark.parametrize("length", [1, 16, 63, 130, 160])
def test_expanded_keys_and_values_of_different_widths_agree_with_the_reference(nope, value, rope, length):
    requests = Expanded([length], 3, nope, value, rope, BF16)
    requests.q = [q.to(BF16) for q in requests.q]
    check(requests, {0: list(range(length))})


@pytest.mark.parametrize("page_size", [1, 8, 32, 48, 64, 130])
@pytest.mark.parametrize("make", [requests_of, latents_of])
def test_every_page_size_gives_the_same_bits(make, page_size):
    rows, sizes = {0: last(200, 200), 1: [46]}, {"rank": 64, "rope": 32} if make is latents_of else {}
    ours = make([200, 47], page_size=page_size, **sizes).attend(rows)
    assert same_bits(ours, make([200, 47], page_size=16, **sizes).attend(rows))


@pytest.mark.parametrize("make", [requests_of, latents_of])
def test_a_row_has_the_same_bits_in_a_prefill_in_chunks_and_alone(make):
    requests = make([300], heads=9, **({"rank": 64, "rope": 32} if make is latents_of else {"kv_heads": 3}))
    whole = check(requests, {0: list(range(300))})
    for size in (7, 64, 113):
        chunks = [requests.attend({0: list(range(a, min(a + size, 300)))}) for a in range(0, 300, size)]
        assert same_bits(torch.cat(chunks), whole)
    for position in (*EDGES, 299):
        assert same_bits(requests.attend({0: [position]}), whole[position : position + 1])
    scattered = torch.randperm(300, generator=torch.Generator().manual_seed(3))[:150].tolist()
    for positions in (scattered, [299, 0, 64]):
        assert same_bits(requests.attend({0: positions}), whole[positions])


def test_keys_that_a_row_does_not_see_leave_no_trace():
    requests = requests_of([130], heads=3, kv_heads=1)
    whole = requests.attend({0: EDGES})
    for n, position in enumerate(EDGES):  # every later key and value of the same pages becomes NaN
        alone = requests_of([130], heads=3, kv_heads=1)
        for plane in (alone.planes.k_offset, alone.planes.v_offset):
            pages = reference.attention.plane_view(alone.pool, alone.planes, plane, 64)
            for later in range(position + 1, 130):
                pages[alone.tables[0, later // 16].long(), :, later % 16] = float("nan")
        assert same_bits(alone.attend({0: [position]}), whole[n : n + 1])


def test_scores_far_apart_neither_overflow_nor_vanish():
    requests = requests_of([200], head_dim=32)
    for scale in (30.0, 1e-6):
        requests.scale = scale
        check(requests, {0: list(range(200))})


def test_other_formats_and_dims_do_without_tiles(monkeypatch):
    requests = requests_of([40])
    q = requests.q[0]
    assert tile_attention.is_for(q, requests.planes)
    assert not tile_attention.is_for(q.float(), requests.planes)
    assert not tile_attention.is_for(q, Requests([40]).planes)
    assert not tile_attention.is_for(q, requests_of([40], head_dim=80).planes)
    on_tiles = requests.attend({0: last(40, 3)})
    monkeypatch.setattr(amx, "has_tiles", lambda: False)
    assert not tile_attention.is_for(q, requests.planes)
    assert not same_bits(requests.attend({0: last(40, 3)}), on_tiles)
