"""CacheStore: whole pages and slices of layers are read as they were written."""

import pytest
import torch
from naive_cache import layout_of

from nanokv.cache.store import CacheStore
from nanokv.core.spec import LayerSpec, PageLayout, Plane

HYBRID = PageLayout(
    [
        LayerSpec(paged=(Plane("k", (2, 4, 3), torch.float16, 1),)),  # 48 bytes
        LayerSpec(state=(Plane("state", (4, 4), torch.float32, None),)),  # no bytes in a page
        LayerSpec(paged=(Plane("codes", (2, 4, 5), torch.uint8, 1), Plane("scale", (2, 4), torch.float16, 1))),
    ],
    page_size=4,
)


def noise(num_pages: int, layout: PageLayout = HYBRID) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(0, 256, (num_pages, layout.page_bytes), dtype=torch.uint8, generator=generator)


def filled(num_pages: int) -> CacheStore:
    store = CacheStore(HYBRID, num_pages)
    store.pages.data.copy_(noise(num_pages))
    return store


def test_a_new_store_is_zeroed_because_zero_times_nan_is_nan():
    store = CacheStore(HYBRID, 9)
    assert store.pages.data.shape == (9, HYBRID.page_bytes) and store.pages.data.dtype == torch.uint8
    assert len(store.pages) == 9
    assert store.pages.data.is_contiguous() and store.pages.data.data_ptr() % 64 == 0
    assert not store.pages.data.any()


def test_pages_are_read_in_the_requested_order():
    store = filled(6)
    assert torch.equal(store.pages.read([4, 0, 4]), noise(6)[[4, 0, 4]])


def test_read_returns_a_copy():
    store = filled(2)
    before = store.pages.read([1])
    store.pages.data.zero_()
    assert torch.equal(before, noise(2)[[1]])


def test_pages_written_to_another_store_have_the_same_bytes():
    store, other = filled(6), CacheStore(HYBRID, 4)
    other.pages.write([3, 1], store.pages.read([2, 5]))
    assert torch.equal(other.pages.data[[3, 1]], store.pages.data[[2, 5]])
    assert not other.pages.data[0].any() and not other.pages.data[2].any()


def test_pages_transferred_layer_by_layer_have_the_same_bytes():
    store, other = filled(5), CacheStore(HYBRID, 5)
    for layer in range(3):
        data = store.pages.read([4, 2], layer, layer + 1)
        assert data.shape[1] == (48, 0, 64)[layer]
        other.pages.write([4, 2], data, layer, layer + 1)
    assert torch.equal(other.pages.data[[2, 4]], store.pages.data[[2, 4]])


def test_writing_one_layer_leaves_the_other_layers_unchanged():
    store = filled(2)
    store.pages.write([0], torch.zeros(1, 64, dtype=torch.uint8), first_layer=2)
    assert torch.equal(store.pages.data[0, :48], noise(2)[0, :48]) and not store.pages.data[0, 48:].any()


def test_reading_and_writing_no_pages_changes_nothing():
    store = filled(2)
    assert store.pages.read([]).shape == (0, HYBRID.page_bytes)
    store.pages.write([], store.pages.read([]))
    assert torch.equal(store.pages.data, noise(2))


def test_copies_run_in_order_so_a_page_may_be_source_and_then_destination():
    store = filled(4)
    store.pages.copy([(0, 1), (2, 0), (1, 3)])
    before = noise(4)
    assert torch.equal(store.pages.data, torch.stack([before[2], before[0], before[2], before[0]]))


def test_a_given_buffer_is_used_in_place_and_keeps_its_contents():
    buffer = noise(3).flatten()
    store = CacheStore(HYBRID, 3, buffer=buffer)
    assert store.pages.data.data_ptr() == buffer.data_ptr()
    assert torch.equal(store.pages.read([0, 1, 2]), noise(3))


@pytest.mark.parametrize(
    "buffer",
    [
        torch.zeros(3 * HYBRID.page_bytes - 1, dtype=torch.uint8),
        torch.zeros(3 * HYBRID.page_bytes, dtype=torch.int8),
        torch.zeros(6 * HYBRID.page_bytes, dtype=torch.uint8)[::2],
    ],
    ids=["short", "wrong dtype", "strided"],
)
def test_a_buffer_that_does_not_fit_is_refused(buffer):
    with pytest.raises(ValueError, match="expected contiguous uint8"):
        CacheStore(HYBRID, 3, buffer=buffer)


def test_data_of_other_layers_is_refused():
    store = filled(3)
    with pytest.raises(ValueError, match=r"expected uint8 \[1, 48\]"):
        store.pages.write([0], store.pages.read([0]), last_layer=1)
    assert torch.equal(store.pages.data, noise(3))


def test_a_plane_is_stored_at_the_offset_of_the_layout():
    layout = layout_of(4)
    store = CacheStore(layout, 3)
    slot = layout.paged(1, "k")
    values = torch.arange(16, dtype=torch.float32)
    store.pages.write([2], values.view(torch.uint8).view(1, -1), first_layer=1)
    found = store.pages.data[2, slot.offset : slot.offset + slot.plane.num_bytes].view(torch.float32)
    assert torch.equal(found, values)
