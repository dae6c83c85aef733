"""Attention over codes in groups (KIVI) on a CPU: the compiled twin against the torch one, and the bits of a row."""

from __future__ import annotations

from dataclasses import fields

import numpy as np
import pytest
import torch
from harness import step_of
from numba import njit
from test_code_kernels import assert_close

from nanokv.codecs import tables
from nanokv.kernels import cpu, reference
from nanokv.kernels.cpu import lookup
from nanokv.kernels.planes import LOOKUP, GroupPlanes, KVPlanes, OwnPages

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16


class Requests:
    """Requests of full pages in random codes, each followed by one page of unquantized numbers."""

    def __init__(self, full, bits=4, heads=6, kv_heads=2, dim=64, page_size=32, dtype=F32):
        noise = torch.Generator().manual_seed(sum(full) + dim + bits)
        self.full, self.size, self.scale = full, page_size, dim**-0.5
        group = min(dim, page_size)
        codes = kv_heads * page_size * dim * bits // 8
        sizes = (codes, *2 * [2 * kv_heads * dim], codes, *2 * [2 * kv_heads * page_size * dim // group])
        starts = 32 + np.cumsum((0, *sizes))  # 32 bytes of another layer
        names = [field.name for field in fields(GroupPlanes)][:6]
        self.planes = GroupPlanes(
            **dict(zip(names, starts[:6].tolist(), strict=True)), bits=bits, dim=dim, group=group,
            page_bytes=int(starts[6]) + 16, page_size=page_size, kv_heads=kv_heads,
        )  # fmt: skip
        pages = sum(full)
        self.pool = torch.randint(256, (pages, self.planes.page_bytes), generator=noise, dtype=torch.uint8)
        for name in ("k_step", "k_low", "v_step", "v_low"):
            width = sizes[names.index(name)] // 2
            numbers = torch.rand(pages, width, generator=noise) / 2**bits if "step" in name else None
            numbers = torch.randn(pages, width, generator=noise) if numbers is None else numbers
            reference.page_array(self.pool, getattr(self.planes, name), (width,), F16)[:] = numbers
        self.tables = torch.zeros(len(full), max(full) + 1, dtype=torch.int32)
        places = torch.randperm(pages, generator=noise).int().split(full)
        for request, own in enumerate(places):
            self.tables[request, : len(own)] = own
        row = dim * dtype.itemsize
        own = torch.randn(len(full), 2 * kv_heads * page_size * dim, generator=noise).to(dtype)
        self.memory = own.view(torch.uint8)
        self.own_planes = KVPlanes(
            k_offset=0, v_offset=kv_heads * page_size * row, rope_offset=0, page_bytes=self.memory.shape[1],
            page_size=page_size, token_stride=row, head_stride=page_size * row, rope_stride=0, kv_heads=kv_heads,
            head_dim=dim, value_dim=dim, rope_dim=0, dtype=dtype,
        )  # fmt: skip
        self.q = [torch.randn(page_size, heads, dim, generator=noise) for _ in full]

    def attend(self, rows: dict[int, list[int]], twin=cpu) -> torch.Tensor:
        """Rows of each request by their slots in its unquantized page."""
        positions = {n: [self.full[n] * self.size + slot for slot in slots] for n, slots in rows.items()}
        batch = step_of(positions, self.tables, self.size)
        own = torch.tensor(list(rows), dtype=torch.int32)[:, None].expand(-1, self.tables.shape[1]).contiguous()
        starts = torch.tensor([self.full[n] for n in rows], dtype=torch.int32)
        q = torch.cat([self.q[n][slots] for n, slots in rows.items()])
        pages = self.memory, self.own_planes, OwnPages(starts, own)
        return twin.group_attention(q, self.pool, self.planes, *pages, batch, self.scale)


MIXED = {0: [0], 3: list(range(32)), 1: [31], 2: [3, 4, 5], 4: list(range(7, 20))}


@pytest.mark.parametrize("bits", [2, 4])
@pytest.mark.parametrize(("dim", "page_size"), [(16, 32), (32, 32), (48, 64), (64, 32), (64, 64), (96, 32), (128, 64)])
@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=str)
def test_every_dim_page_and_format_agrees_with_the_reference(bits, dim, page_size, dtype):
    requests = Requests([3, 0, 2, 1, 5], bits, dim=dim, page_size=page_size, dtype=dtype)
    assert_close(requests.attend(MIXED), requests.attend(MIXED, reference))


@pytest.mark.parametrize("heads, kv_heads", [(3, 3), (9, 3), (8, 1)])
def test_every_group_of_queries_agrees_with_the_reference(heads, kv_heads):
    requests = Requests([1, 2, 0, 3, 4], heads=heads, kv_heads=kv_heads, dim=32)
    assert_close(requests.attend(MIXED), requests.attend(MIXED, reference))


@pytest.mark.parametrize("bits", [2, 4])
def test_a_row_has_the_same_bits_with_any_batch_mates_and_threads(bits):
    requests, before = Requests([3, 8, 0, 5, 1], bits, heads=9, kv_heads=3), torch.get_num_threads()
    mixed, start = requests.attend(MIXED), 0
    try:
        for request, slots in MIXED.items():
            for n, slot in enumerate(slots):
                torch.set_num_threads(1 + n % 3)
                assert torch.equal(requests.attend({request: [slot]}), mixed[start + n : start + n + 1])
            start += len(slots)
    finally:
        torch.set_num_threads(before)


def test_unquantized_numbers_that_a_row_does_not_see_leave_no_trace():
    requests = Requests([2])
    expected = requests.attend({0: [9]})
    memory = reference.page_array(requests.memory, 0, (4, 32, 64), F32)
    memory[:, :, 10:] = float("nan")
    assert torch.equal(requests.attend({0: [9]}), expected)


def test_arguments_of_another_shape_are_refused():
    requests = Requests([1])
    requests.q = [requests.q[0][:, :5]]
    with pytest.raises(ValueError, match="does not fit"):
        requests.attend({0: [1]})


@pytest.mark.skipif(not lookup._HAS_TABLE_REGISTER, reason="this machine has no register for a table of 16 numbers")
def test_both_ways_of_a_lookup_give_the_same_numbers(monkeypatch):
    codes = np.random.default_rng(0).integers(0, 256, (64, 64), np.uint8)
    table, room = tables.lloyd_max(4, 64).numpy(), np.zeros(32, np.float32)
    rows, found = codes.ctypes.data + 64 * np.arange(64), []
    for has in (True, False):
        monkeypatch.setattr(lookup, "_HAS_TABLE_REGISTER", has)

        @njit
        def decode(codes, rows, table, room, k, v):
            lookup.split_table(table, 16, room)
            lookup.decode_keys(64, codes, 4, 15, LOOKUP, room, 0, 64, k)
            lookup.decode_values(64, rows, 0, 0, 16, 4, 15, LOOKUP, room, 0, 0, 1, v)

        k, v = np.zeros((64, 64), np.float32), np.zeros((64, 64), np.float32)
        decode(*(x.ctypes.data for x in (codes, rows, table, room, k, v)))
        found.append((k, v[:, :32]))
    values = np.concatenate((codes[:, :16] & 15, codes[:, 16:32] >> 4), axis=1)
    for k, v in found:
        assert np.array_equal(k, table[codes >> 4]) and np.array_equal(v, table[values])
