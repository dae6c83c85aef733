"""Public checks of lesson 09."""

from array import array

from nanokv.core.request import Request
from nanokv.disagg.granted_cache import GrantedCache, GrantedPages
from nanokv.disagg.messages import HEADER, MAX_FRAME, Layers, Ping, ProtocolError, encode, take_frames
from nanokv.learn.expect import equal, refuses


def test_09_1_whole_frames_are_removed_from_the_buffer():
    buffer = bytearray(encode(Ping(generation=1)) + encode(Ping(generation=1)))
    equal(len(take_frames(buffer)), 2, "messages in two whole frames")
    equal(len(buffer), 0, "bytes left")


def test_09_1_a_frame_may_arrive_byte_by_byte():
    frame, buffer, seen = encode(Ping(generation=1)), bytearray(), []
    for byte in frame:
        buffer.append(byte)
        seen.append(len(take_frames(buffer)))
    equal(seen, [0] * (len(frame) - 1) + [1], "messages after each byte of a frame")
    equal(len(buffer), 0, "bytes left")


def test_09_1_the_beginning_of_the_next_frame_stays_in_the_buffer():
    frame = encode(Ping(generation=1))
    buffer = bytearray(frame + frame[:3])
    equal(len(take_frames(buffer)), 1, "messages in a frame and three bytes of another")
    equal(bytes(buffer), frame[:3], "bytes left")


def test_09_1_a_length_above_the_limit_is_refused_at_once():
    buffer = bytearray(HEADER.pack(MAX_FRAME + 1))
    refuses(ProtocolError, lambda: take_frames(buffer), "a frame that claims to be longer than MAX_FRAME")
    refuses(ProtocolError, lambda: take_frames(bytearray(HEADER.pack(9)), longest=8), "a frame longer than longest=8")


def test_09_1_the_bytes_behind_layers_are_no_frame():
    layers = Layers(generation=1, request="r", attempt=1, places=b"", first=0, last=1)
    buffer = bytearray(encode(Ping(generation=1)) + encode(layers) + b"\xff\xff\xff\xffpages")
    equal([message.kind for message in take_frames(buffer)], ["PING", "LAYERS"], "messages up to LAYERS")
    equal(bytes(buffer), b"\xff\xff\xff\xffpages", "bytes left")


def given(checkpoints: dict[int, int], state: int | None = 5) -> tuple[GrantedCache, Request]:
    cache, request = GrantedCache(4), Request(list(range(30)))
    request.tokens = array("i", request.prompt_token_ids)
    cache.give(request, GrantedPages(array("i", [7, 3, 9]), 8, state, checkpoints))
    request.held.state_id = state
    return cache, request


def test_09_2_a_match_finds_the_granted_pages():
    cache, request = given({}, state=2)
    request.held.state_id = None
    equal(cache.match(request), 8, "tokens computed, as in the PREFILL message")
    equal(list(request.held.pages), [7, 3, 9], "pages of the request")
    equal(request.held.state_id, 2, "state of the request")
    equal((request.num_computed, request.held.num_cached), (8, 8), "num_computed and num_cached")


def test_09_2_each_request_has_pages_of_its_own():
    cache, one = given({})
    two = Request([1])
    cache.give(two, GrantedPages(array("i", [4]), 0, None, {}))
    cache.match(one)
    equal(cache.match(two), 0, "tokens computed of the second request")
    equal((list(one.held.pages), list(two.held.pages)), ([7, 3, 9], [4]), "pages of the two requests")


def test_09_3_a_chunk_ends_at_the_nearest_checkpoint_ahead():
    cache, request = given({12: 1, 20: 2})
    request.num_computed = 8
    equal(cache.limit_chunk(request, 100), 4, "tokens from 8, checkpoints at 12 and 20")
    equal(cache.limit_chunk(request, 3), 3, "tokens from 8, checkpoints at 12 and 20, three asked for")
    request.num_computed = 12
    equal(cache.limit_chunk(request, 100), 8, "tokens from 12: the checkpoint at 12 is done")


def test_09_3_without_checkpoints_a_chunk_is_as_long_as_asked():
    cache, request = given({})
    equal(cache.limit_chunk(request, 22), 22, "tokens without checkpoints")
    cache, request = given({4: 1})
    request.num_computed = 8
    equal(cache.limit_chunk(request, 22), 22, "tokens when the only checkpoint lies behind")


def test_09_4_a_reached_checkpoint_is_copied():
    cache, request = given({12: 1, 20: 2})
    request.num_computed = 12
    cache.commit(request)
    equal(cache.drain_moves().states, [(5, 1)], "copies (from, to) at position 12")


def test_09_4_other_positions_copy_nothing():
    cache, request = given({12: 1})
    for position in (8, 11, 13):
        request.num_computed = position
        cache.commit(request)
    equal(cache.drain_moves().states, [], "copies at positions 8, 11 and 13")


def test_09_4_tokens_in_flight_do_not_count():
    cache, request = given({12: 1, 20: 0})
    request.num_computed = 20
    cache.commit(request, in_flight=8)
    equal(cache.drain_moves().states, [(5, 1)], "copies at 20, of which 8 are in flight")
    cache.commit(request)
    equal(cache.drain_moves().states, [(5, 0)], "copies when none is in flight: state 0 is a state")
