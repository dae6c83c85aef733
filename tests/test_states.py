"""Checkpoints of recurrent states: their positions, the requests that start from them, and their eviction."""

import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from naive_cache import House, prompt

from nanokv.cache.pool import StatePool
from nanokv.cache.radix import RadixTree
from nanokv.cache.states import States
from nanokv.core.errors import CacheError
from nanokv.core.request import Request, SamplingParams
from nanokv.core.spec import LayerSpec, PageLayout, Plane


def house(num_pages: int = 64, num_states: int = 16, **more) -> House:
    return House(num_pages, num_states=num_states, **more)


def matched(place: House, tokens) -> tuple[int, int]:
    """(cached, matched) tokens of a request that is matched and released."""
    request = place.request(tokens)
    assert place.cache.prefix_length(request) == place.cache.match(request)
    lengths = request.held.num_cached, request.held.num_kv_matched
    place.cache.release(request)
    place.cache.check()
    return lengths


def test_a_prompt_leaves_a_checkpoint_at_its_last_page_boundary():
    place = house()
    place.serve(prompt(11))  # a second request of the same tokens can use at most 10 of them, so 8
    assert matched(place, prompt(11)) == (8, 8)
    assert matched(place, [*prompt(8), 90]) == (8, 8)
    assert matched(place, [*prompt(7), 90, 91]) == (0, 4)  # pages without a state cannot be used


def test_a_repeated_prompt_of_whole_pages_hits_all_but_its_last_page():
    place = house()
    place.serve(prompt(12))
    assert matched(place, prompt(12)) == (8, 8)


def test_the_next_turn_starts_at_the_last_page_boundary_of_the_answer():
    place = house()
    place.serve(prompt(11), answer=range(50, 60))  # 21 tokens are computed: five pages
    assert matched(place, [*prompt(11), *range(50, 60), 70, 71]) == (20, 20)
    assert place.cache.stats()["states_cached"] == 2  # prompt and answer


def test_a_chunk_ends_at_the_next_checkpoint_position():
    place = house()
    request = place.request(prompt(23))
    place.cache.match(request)
    assert place.cache.limit_chunk(request, 23) == 20
    assert place.cache.limit_chunk(request, 6) == 6
    other = house(interval=8)
    request = other.request(prompt(23))
    other.cache.match(request)
    assert other.cache.limit_chunk(request, 23) == 8


def test_prompt_and_answer_leave_a_checkpoint_at_every_interval():
    place = house(interval=8)
    place.serve(prompt(21), answer=range(50, 60))
    for length, cached in ((9, 8), (17, 16), (21, 20)):
        assert matched(place, prompt(length))[0] == cached
    assert matched(place, [*prompt(21), 50, 51, 52, 99])[0] == 24
    assert matched(place, [*prompt(21), *range(50, 60), 99])[0] == 28


def test_a_prompt_that_diverges_leaves_a_checkpoint_at_the_branch():
    place = house()
    system = prompt(16)
    place.serve([*system, *prompt(9, 30)])
    assert matched(place, [*system, *prompt(9, 60)]) == (0, 16)
    second = place.serve([*system, *prompt(9, 60)])
    assert (second.held.num_cached, second.held.num_kv_matched) == (0, 16)
    assert matched(place, [*system, *prompt(9, 90)]) == (16, 16)


def test_pages_that_are_computed_again_are_freed_as_duplicates():
    place = house()
    system = prompt(16)
    place.serve([*system, *prompt(5, 30)])
    pages = place.cache.stats()["pages_cached"]
    place.serve([*system, *prompt(5, 60)])
    assert place.cache.stats()["pages_cached"] == pages + 1  # only the new page


def test_a_checkpoint_can_be_requested_at_a_position_still_ahead():
    place = house()
    first = place.request([*prompt(16), *prompt(9, 30)])
    place.admit(first, 3)
    assert place.cache.request_checkpoint(first, 16)
    place.run()
    assert place.cache.limit_chunk(first, 22) == 13
    place.schedule(first, 13)
    place.run()
    place.schedule(first, place.cache.limit_chunk(first, 9))  # the state is copied before the next step updates it
    assert matched(place, [*prompt(16), 99]) == (16, 16)
    place.run()
    assert not place.cache.request_checkpoint(first, 8)  # the state is already past it


def test_the_least_recently_used_state_is_evicted_and_its_pages_stay():
    place = house(num_states=4)
    place.serve(prompt(9))
    place.serve(prompt(9, 20))
    place.serve(prompt(9, 40))
    assert matched(place, prompt(9)) == (8, 8)  # used just now
    for start in (60, 80):
        place.serve(prompt(9, start))
    stats = place.cache.stats()
    assert stats["state_evictions"] > 0 and stats["evictions"] == 0
    assert matched(place, prompt(9, 20)) == (0, 8)
    assert matched(place, prompt(9, 80)) == (8, 8)


def test_a_state_is_evicted_with_its_pages():
    place = house(num_pages=6)
    place.serve(prompt(13))
    place.serve(prompt(13, 20))
    place.cache.check()
    stats = place.cache.stats()
    assert stats["evictions"] > 0 and stats["states_cached"] == 1
    place.cache.reset()
    assert place.cache.stats()["states_free"] == 16


def test_a_request_may_take_the_only_cached_state_as_its_own():
    place = house(num_states=2)
    place.serve(prompt(9))
    other = place.request(prompt(9, 50))
    assert place.admit(other, 1)
    place.run()
    request = place.request([*prompt(8), 90, 91])
    assert place.admit(request, 1) and request.held.num_cached == 8
    assert place.cache.stats()["states_free"] == 0
    place.run()  # House checks that the request continues from the state of its own tokens
    for one in (request, other):
        place.drop(one)


def test_a_match_without_a_free_state_is_an_error():
    place = house(num_states=2)
    for start in (0, 20):
        assert place.admit(place.request(prompt(3, start)))
    late = place.request(prompt(3, 40))
    with pytest.raises(CacheError, match="gets no state"):
        place.cache.match(late)
    place.cache.release(late)
    place.cache.check()


def test_forks_continue_from_the_state_of_the_parent():
    place = house()
    parent = place.request(prompt(10))
    place.admit(parent)
    place.prefill(parent)
    children = [place.fork(parent, token) for token in (50, 51)]
    assert len({parent.held.state_id, *(child.held.state_id for child in children)}) == 3
    for token in range(60, 66):
        for request in place.running:
            assert place.schedule(request, 1)
        place.run(token)
    for request in list(place.running):
        place.drop(request)
    assert place.cache.stats()["states_held"] == 0


def test_a_fork_shorter_than_its_parent_is_refused():
    place = house()
    parent = place.request(prompt(10))
    place.admit(parent)
    place.prefill(parent)
    child = place.request(prompt(9))
    with pytest.raises(CacheError, match="rolled back"):
        place.cache.fork(parent, child)


def test_a_preempted_request_resumes_at_its_last_page_boundary():
    place = house()
    request = place.request(prompt(6))
    place.admit(request)
    place.prefill(request, 50)
    for token in range(51, 58):
        assert place.schedule(request, 1)
        place.run(token)
    computed = request.num_computed
    place.drop(request)
    assert place.admit(request) and request.num_computed == computed // 4 * 4
    place.run()


def test_the_checkpoint_of_an_in_flight_step_is_filed_at_its_commit():
    place = house()
    request = place.request(prompt(11))
    place.admit(request)
    place.run(come_back=False)  # 8 tokens: a page boundary, but no page is published yet
    place.schedule(request, 3)
    assert place.cache.stats()["states_cached"] == 0
    place.cache.commit(request)  # the previous step is committed, the next one has not run
    assert place.cache.stats()["states_cached"] == 1
    place.run()
    assert matched(place, prompt(11)) == (8, 8)
    place.drop(request)


def test_the_state_of_a_failed_step_is_not_kept():
    place = house()
    request = place.request(prompt(9))
    place.admit(request)
    place.run()
    request.num_scheduled = 1  # a step that stopped halfway
    place.cache.release(request)
    place.running.remove(request)
    assert place.cache.stats()["states_cached"] == 0


def test_no_state_is_kept_and_no_chunk_is_shortened_without_a_prefix_cache():
    place = house(prefix_cache=False)
    request = place.request(prompt(11))
    assert place.admit(request) and request.num_scheduled == 11
    place.run()
    place.drop(request)
    assert place.cache.stats()["states_free"] == 16


def test_check_detects_a_state_that_was_released_twice():
    pool = StatePool(2)
    state = pool.allocate()
    pool.check([state])
    pool.release(state)
    pool.release(state)
    with pytest.raises(CacheError, match="twice"):
        pool.check([])


@settings(max_examples=80, deadline=None)
@given(seed=st.integers(0, 2**32), num_moves=st.integers(1, 200), num_states=st.integers(4, 12))
def test_no_request_continues_from_the_state_of_other_tokens(seed, num_moves, num_states):
    """Requests arrive, decode, fork and are preempted or aborted in any order; House knows the tokens of each state."""
    rng = random.Random(seed)
    place = House(20, page_size=2, num_states=num_states, interval=rng.choice([None, 4]))
    waiting = []
    for _ in range(num_moves):
        move = rng.choices(["arrive", "resume", "preempt", "finish", "fork", "reset", "step"], [3, 2, 1, 1, 1, 0.2, 6])[
            0
        ]
        free = len(place.running) < num_states // 2
        if move == "arrive" and free:
            tokens = [rng.randint(0, 1) for _ in range(rng.randint(1, 12))]
            place.admit(place.request(tokens, rng.choice([None, "a"])), rng.randint(1, 12))
        elif move == "resume" and waiting and free and place.admit(waiting[0], rng.randint(1, 12)):
            waiting.pop(0)
        elif move == "preempt" and place.running:
            waiting.append(request := rng.choice(place.running))
            place.drop(request)
        elif move == "finish" and place.running:
            place.drop(rng.choice(place.running))
        elif move == "fork" and free and (ready := [r for r in place.running if r.num_to_compute == 1]):
            parent = rng.choice(ready)
            if parent.num_scheduled == 0:
                place.fork(parent, rng.randint(0, 1))
        elif move == "reset":
            place.cache.reset()
        elif move == "step":
            for request in place.running:
                if request.num_scheduled == 0 and rng.random() < 0.8:
                    place.schedule(request, place.cache.limit_chunk(request, rng.randint(1, request.num_to_compute)))
            place.run(rng.randint(0, 1))
            for request in [request for request in place.running if request.num_tokens > 16]:
                place.drop(request)
        place.cache.check()
    for request in list(place.running):
        place.drop(request)
    place.cache.reset()
    assert place.cache.stats()["states_free"] == num_states


def test_partial_pages_need_no_checkpoint():
    tail = Plane("tail", (1,), torch.float32, token_axis=None)
    kept = Plane("k", (4, 1), torch.float32, token_axis=0)
    layout = PageLayout([LayerSpec(paged=(kept,), partial_page=(tail,))], 4)
    assert (layout.is_recurrent, layout.states_per_request, layout.state_bytes) == (False, 1, 16)
    tree = RadixTree(4)
    states = States(3, 4, None, tree, layout.is_recurrent)
    node, _ = tree.match_prefix(b"")
    assert states.reachable(node) is node
    requests = [Request([1] * 9, SamplingParams()) for _ in range(3)]
    for request in requests:
        states.open(request, node, 0)
        assert states.limit_chunk(request, 9) == 9 and states.request_checkpoint(request, 4)
        states.capture(request)
        states.file_checkpoint(request)
    assert states.take_copies() == [] and sorted(request.held.state_id for request in requests) == [0, 1, 2]
    states.check(requests)
    states.release(requests[0])
    states.fork(requests[1], requests[0])
    assert states.take_copies() == [(requests[1].held.state_id, requests[0].held.state_id)]


def test_a_partial_delivery_publishes_no_page_beyond_its_tokens():
    place = house(interval=4)
    request = place.request(prompt(40))
    place.cache.match(request)
    assert place.cache.reserve(request, 39)
    reserved = place.cache.reserve_checkpoints(request, 39)
    assert max(position for position, _ in reserved) > 8
    place.cache.adopt(request, 8)
    assert request.num_computed == 8 and place.cache.stats()["pages_cached"] == 2
    place.cache.check()
    assert place.cache.prefix_length(place.request(prompt(40))) <= 8
    place.cache.release(request)
    place.cache.check()
