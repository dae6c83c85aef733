"""CacheManager: match, reserve, commit and release, with a test for each known pitfall of other engines."""

import json

import pytest
from naive_cache import House, prompt

from nanokv.core.errors import CacheError


@pytest.mark.parametrize(("length", "cached"), [(1, 0), (4, 0), (5, 4), (8, 4), (9, 8), (11, 8)])
def test_a_hit_is_whole_pages_and_leaves_at_least_one_token_to_compute(length, cached):
    house = House(16)
    house.serve(prompt(12))
    request = house.request(prompt(length))
    assert house.cache.prefix_length(request) == cached
    assert house.cache.match(request) == cached == request.num_computed == request.held.num_cached
    assert len(request.held.pages) == cached // 4


def test_the_next_turn_hits_the_previous_answer_except_its_last_token():
    house = House(16)
    house.serve(prompt(6), answer=[50, 51, 52])  # 6 + 2 tokens are computed, two full pages; 52 is not computed
    assert house.admit(turn := house.request([*prompt(6), 50, 51, 52, 60]))
    house.run()
    assert turn.held.num_cached == 8


def test_pages_are_not_matched_before_they_are_computed():
    house = House(16)
    first = house.request(prompt(12))
    house.admit(first)
    house.cache.commit(first)
    assert house.cache.prefix_length(house.request(prompt(12))) == 0
    house.run()
    assert house.cache.prefix_length(house.request(prompt(12))) == 8


def test_in_flight_tokens_are_not_published():
    house = House(16)
    first = house.request(prompt(9))
    house.admit(first, 8)
    house.run(come_back=False)
    assert first.num_computed == 8 and first.held.num_published == 0
    house.cache.commit(first, in_flight=3)
    assert first.held.num_published == 1
    house.cache.commit(first)
    assert first.held.num_published == 2


def test_two_requests_that_compute_the_same_pages_in_one_step_keep_one_copy():
    house = House(16)
    assert house.admit(first := house.request(prompt(9))) and house.admit(second := house.request(prompt(9)))
    house.run()
    assert first.held.pages[:2] == second.held.pages[:2] and first.held.pages[2] != second.held.pages[2]
    assert house.cache.stats()["pages_held"] == 2 and house.cache.stats()["pages_free"] == 12


def test_different_salts_share_no_pages():
    house = House(16)
    house.serve(prompt(8), salt="mine")
    for salt, hit in (("mine", 4), (None, 0), ("", 0), ("yours", 0)):
        assert house.cache.prefix_length(house.request(prompt(8), salt)) == hit


def test_a_preempted_request_hits_its_own_pages_and_is_counted_once():
    house = House(16)
    request = house.request(prompt(6))
    house.admit(request)
    for token in (50, 51, 52):
        house.run(token)
        assert house.schedule(request, 1)
    house.drop(request)  # the token at position 8 was scheduled and not computed
    assert (request.num_computed, request.held.num_published, len(request.held.pages), request.held.node) == (
        0,
        0,
        0,
        None,
    )
    assert house.admit(request) and request.num_computed == 8
    house.run()
    stats = house.cache.stats()
    assert (request.held.num_cached, stats["hit_tokens"], stats["queried_tokens"]) == (0, 0, 6)


def test_hits_are_counted_at_admission_and_not_at_each_attempt():
    house = House(4)
    house.serve(prompt(8))
    big = house.request(prompt(40))
    assert not house.admit(big) and not house.admit(big)
    assert house.cache.stats()["queried_tokens"] == 8
    assert house.admit(late := house.request(prompt(9)))
    assert (house.cache.stats()["hit_tokens"], house.cache.stats()["queried_tokens"], late.held.num_cached) == (
        8,
        17,
        8,
    )


def test_no_page_is_published_or_matched_without_a_prefix_cache():
    house = House(16, prefix_cache=False)
    house.serve(prompt(9), answer=[1, 2])
    assert not house.cache.prefix_length(house.request(prompt(9))) and house.cache.stats()["pages_free"] == 16


def test_a_scoring_request_matches_no_pages_and_frees_its_duplicates():
    house = House(16)
    house.serve(prompt(8))
    scored = house.request(prompt(8))
    scored.logit_blocks = []
    assert house.cache.match(scored) == 0 and house.schedule(scored, 8) and scored.num_computed == 0
    house.running.append(scored)
    house.run()
    assert house.cache.stats()["pages_cached"] == 2 and house.cache.stats()["queried_tokens"] == 8


def test_a_reservation_adds_only_the_pages_that_the_chunk_needs():
    house = House(16)
    house.admit(request := house.request(prompt(30)), 3)
    for chunk, pages in ((3, 2), (2, 2), (1, 3), (16, 7), (4, 8)):
        house.run()
        assert house.schedule(request, chunk) and len(request.held.pages) == pages


def test_a_failed_reservation_changes_nothing():
    house = House(4)
    house.serve(prompt(8))
    house.admit(house.request(prompt(13)), 1)
    house.cache.match(second := house.request(prompt(9, 100)))
    before = house.cache.stats()
    assert not house.cache.reserve(second, 9)
    assert house.cache.stats() == before and not second.held.pages
    house.cache.release(second)
    house.verify()


def test_unlocked_cached_pages_are_evicted_and_locked_pages_are_not():
    house = House(4)
    house.serve(prompt(8))
    house.serve(prompt(8, 100))
    assert house.admit(holder := house.request(prompt(8)))  # locks one cached page and allocates one
    assert house.cache.num_available == 2
    assert not house.admit(house.request(prompt(9, 200)))
    assert house.admit(house.request(prompt(8, 200)))
    house.run()
    assert house.cache.stats()["evictions"] == 3 and holder.held.num_cached == 4


def test_a_reused_page_is_not_matched_under_its_old_tokens():
    house = House(2)
    house.serve(prompt(8))
    house.serve(prompt(8, 100))
    assert house.cache.prefix_length(house.request(prompt(9))) == 0


def test_pages_for_rounds_tokens_up_to_whole_pages():
    cache = House(4).cache
    assert (cache.pages_for(16), cache.pages_for(17)) == (4, 5)


def test_a_second_release_changes_nothing_and_a_second_match_is_an_error():
    house = House(4)
    request = house.request(prompt(6))
    house.admit(request)
    with pytest.raises(CacheError, match="matched twice"):
        house.cache.match(request)
    for _ in range(2):
        house.cache.release(request)
        house.cache.check()
    assert house.cache.stats()["pages_free"] == 4
    with pytest.raises(CacheError, match="match it first"):
        house.cache.commit(request)


def test_reset_drops_all_pages_that_are_not_locked():
    house = House(8)
    house.serve(prompt(12))
    house.cache.match(house.request(prompt(6)))
    house.cache.reset()
    stats = house.cache.stats()
    assert (stats["pages_cached"], stats["pages_locked"], stats["pages_free"], stats["evictions"]) == (1, 1, 7, 0)


# -- forks


def forked(house, length=6, count=2):
    parent = house.request(prompt(length))
    assert house.admit(parent)
    house.run(next_token=50)
    return [parent] + [house.fork(parent, 51 + n) for n in range(count - 1)]


def test_samples_share_full_pages_and_copy_only_the_partial_page():
    house = House(16)
    samples = forked(house, count=3)
    assert house.cache.stats()["pages_free"] == 14
    assert all(house.schedule(sample, 1) for sample in samples)
    tail = samples[2].held.pages[1]  # the last writer is the only owner of the page
    assert house.cache._moves.pages == [(tail, samples[0].held.pages[1]), (tail, samples[1].held.pages[1])]
    house.run()
    assert house.cache.stats()["copies"] == 2 and house.cache.stats()["pages_free"] == 12


def test_forks_share_full_pages_by_reference_count_without_a_prefix_cache():
    house = House(16, prefix_cache=False)
    parent, child = forked(house, length=10)
    assert house.schedule(parent, 1) and house.schedule(child, 1)
    house.run()
    assert parent.held.pages[:2] == child.held.pages[:2] and house.cache.stats()["pages_free"] == 12
    house.drop(parent)
    house.verify()


def test_a_fork_shares_computed_pages_and_not_the_empty_pages_of_its_parent():
    house = House(16)
    house.serve(prompt(5))
    parent = house.request(prompt(30))
    house.admit(parent, 2)
    house.run()
    assert house.schedule(parent, 12) and len(parent.held.pages) == 5
    child = house.fork(parent, 99)
    assert (len(child.held.pages), child.num_computed, child.held.num_cached) == (2, 6, 4)
    house.run()


def test_a_write_to_a_shared_page_needs_a_free_page_for_the_copy():
    house = House(2)
    parent, child = forked(house)
    assert not house.schedule(parent, 1)
    house.drop(child)
    assert house.schedule(parent, 1) and house.cache.drain_moves().pages == []


def test_the_source_of_a_copy_may_become_the_destination_of_a_later_copy():
    house = House(5, prefix_cache=False)
    first, second = forked(house, length=3)
    other, another = forked(house, length=2)
    assert house.schedule(first, 1)
    house.drop(second)  # the source of the copy of `first` is free now and is allocated next
    assert house.schedule(other, 1) and house.schedule(another, 1)
    assert house.cache._moves.pages[0][0] == house.cache._moves.pages[1][1]
    house.run()


def test_a_copy_into_a_page_that_was_freed_meanwhile_is_harmless():
    house = House(5)
    parent, child = forked(house)
    assert house.schedule(parent, 1)
    house.drop(parent)  # its copy is still listed
    assert house.admit(late := house.request(prompt(8, 100)))
    assert house.cache._moves.pages[0][1] in late.held.pages and house.schedule(child, 1)
    house.run()


def test_a_copy_of_a_copy_in_one_step_reads_the_first_copy():
    house = House(8)
    parent, _ = forked(house)
    assert house.schedule(parent, 1)
    child = house.fork(parent, 60)
    house.drop(parent)
    assert house.schedule(child, 1)
    house.run()


def test_a_page_shared_with_a_fork_is_published_after_the_fork_has_a_copy():
    house = House(8)
    parent = house.request(prompt(7))
    house.admit(parent)
    house.run(50)
    assert house.schedule(parent, 1)
    child = house.fork(parent, 51)  # the parent's next token is already scheduled into the partial page
    house.run()
    assert (parent.num_computed, parent.held.num_published) == (8, 1)
    assert house.schedule(child, 1)
    house.run()
    assert (parent.held.num_published, child.held.num_published) == (2, 2) and parent.held.pages[1] != child.held.pages[
        1
    ]


def test_a_fork_of_other_tokens_or_another_namespace_is_refused():
    house = House(8)
    parent = forked(house, count=1)[0]
    for child in (house.request(prompt(7, 1)), house.request(prompt(7), "salt"), house.request(prompt(3)), parent):
        with pytest.raises(CacheError):
            house.cache.fork(parent, child)
    house.verify()


def test_the_event_log_records_the_life_of_every_page(tmp_path):
    house = House(4, event_log=str(tmp_path / "events.jsonl"))
    house.serve(prompt(9))
    house.serve(prompt(9), answer=[1])
    house.serve(prompt(9, 100))
    records = [json.loads(line) for line in (tmp_path / "events.jsonl").read_text().splitlines()[1:]]
    story = [(record["event"], record.get("request"), record["pages"]) for record in records]
    assert story[:4] == [
        ("match", "r1", []),
        ("alloc", "r1", [0, 1, 2]),
        ("publish", "r1", [0, 1]),
        ("free", "r1", [2]),
    ]
    assert story[4:6] == [("match", "r2", [0, 1]), ("alloc", "r2", [2])]
    assert [event for event, _, _ in story[-4:]] == ["evict", "alloc", "publish", "free"]
    assert story[-4] == ("evict", None, [1])  # the last page of the older prompt
