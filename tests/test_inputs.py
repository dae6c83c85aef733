"""The inputs of a step: arrays of its requests, padding to a fixed size, and the block that copies them to a device."""

from array import array

import numpy as np
import torch

from nanokv.core.request import Request, SamplingParams
from nanokv.engine.graphs import page_ladder, row_ladder
from nanokv.engine.inputs import Block, arrays_of, batch_of, on_device, padded, take_in_flight

CPU = torch.device("cpu")


def request(tokens, computed: int, scheduled: int, pages, in_flight: int | None = None, state=None) -> Request:
    made = Request(list(tokens), SamplingParams())
    made.tokens, made.num_prompt, made.max_tokens = array("i", tokens), len(tokens), 100
    made.num_computed, made.num_scheduled, made.held.pages = computed, scheduled, array("i", pages)
    made.in_flight, made.held.state_id = in_flight, state
    return made


def test_a_step_mixes_chunks_decodes_and_in_flight_tokens():
    chunk = request(range(10, 20), 2, 5, [7, 3, 9])
    decode = request(range(30, 35), 4, 1, [5, 6])
    late = request(range(40, 44), 4, 1, [8, 2], in_flight=3)
    arrays = arrays_of([chunk, decode, late], 4)
    assert arrays["token_ids"].tolist() == [12, 13, 14, 15, 16, 34, 0]
    assert arrays["positions"].tolist() == [2, 3, 4, 5, 6, 4, 4]
    assert arrays["write_pages"].tolist() == [7, 7, 3, 3, 3, 6, 2]
    assert arrays["write_slots"].tolist() == [2, 3, 0, 1, 2, 0, 0]
    assert arrays["request_starts"].tolist() == [0, 5, 6, 7]
    assert arrays["logit_rows"].tolist() == [5, 6]
    views = on_device(arrays, CPU)
    take_in_flight(views, torch.tensor([100, 101, 102, 103]))
    assert batch_of(views, 4).token_ids.tolist() == [12, 13, 14, 15, 16, 34, 103]


def test_padding_adds_one_token_requests_on_a_page_and_state_of_their_own():
    arrays = arrays_of([request(range(9), 8, 1, [4, 5, 6], state=2), request(range(3), 2, 1, [1], state=0)], 4)
    filled = padded(arrays, 4, 8, page=99, state=7)
    batch = batch_of(on_device(filled, CPU), 4)
    assert batch.num_rows == batch.num_requests == 4
    assert batch.write_pages.tolist() == [6, 1, 99, 99] and batch.positions.tolist() == [8, 2, 0, 0]
    assert batch.page_tables[:, :3].tolist() == [[4, 5, 6], [1, 0, 0], [99, 0, 0], [99, 0, 0]]
    assert batch.state_ids.tolist() == [2, 0, 7, 7]
    assert batch.logit_rows.tolist() == [0, 1, 2, 3]


def test_a_block_keeps_its_addresses_and_takes_new_values():
    first = arrays_of([request(range(9), 8, 1, [4, 5, 6])], 4)
    second = arrays_of([request(range(20, 29), 8, 1, [7, 8, 9])], 4)
    block = Block(first, CPU)
    addresses = {name: view.data_ptr() for name, view in block.views.items()}
    for arrays in (first, second):
        block.fill(arrays)
        for name, array_ in arrays.items():
            assert np.array_equal(block.views[name].numpy(), array_) and block.views[name].numpy().dtype == array_.dtype
    assert addresses == {name: view.data_ptr() for name, view in block.views.items()}
    assert all(address % 8 == 0 for address in addresses.values())


def test_the_ladders_of_graph_sizes_end_exactly_at_the_limit():
    assert row_ladder(1) == [1] and row_ladder(5) == [1, 2, 4, 5]
    assert row_ladder(64) == [1, 2, 4, 8, 16, 32, 48, 64]
    assert page_ladder(10) == [10] and page_ladder(64) == [64] and page_ladder(2560) == [64, 256, 1024, 2560]
