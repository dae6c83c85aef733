"""Planning: the number of tokens of each request in a step. A real cache and no model: commits simulate steps."""

from array import array

import pytest
import torch
from naive_cache import prompt

from nanokv.cache.manager import CacheManager
from nanokv.core.config import EngineConfig
from nanokv.core.events import Events
from nanokv.core.request import Request, SamplingParams
from nanokv.core.spec import LayerSpec, PageLayout, Plane
from nanokv.engine import admission_policy
from nanokv.engine.scheduler import Scheduler, StepPlan

PAGE = 4


class House:
    """A scheduler over a real cache; `finish` commits a plan as the engine does, and every request samples 1."""

    def __init__(self, num_pages: int = 64, **config) -> None:
        config = {"page_size": PAGE, "max_step_tokens": 16, "max_requests": 4, **config}
        self.config = EngineConfig(**config)
        layout = PageLayout([LayerSpec(paged=(Plane("k", (1, PAGE, 1), torch.float32, 1),))], PAGE)
        self.cache = CacheManager(layout, num_pages, self.config.prefix_cache, Events())
        self.scheduler = Scheduler(self.config, self.cache, Events())

    def add(self, tokens, name: str = "", **params) -> Request:
        request = Request(list(tokens), SamplingParams(**params), name)
        request.tokens = array("i", tokens)
        request.num_prompt = len(request.tokens)
        request.num_forks = request.params.n - 1
        self.scheduler.add(request)
        return request

    def plan(self) -> StepPlan:
        plan = self.scheduler.plan()
        assert plan.num_tokens <= self.config.max_step_tokens
        self.cache.check()
        return plan

    def finish(self, plan: StepPlan) -> None:
        for request in plan.requests:
            request.advance()
            self.cache.commit(request)
            if request.num_to_compute == 0:
                request.tokens.append(1)
        self.cache.check()

    def step(self) -> list[tuple[str, int]]:
        plan = self.plan()
        rows = [(request.request_id, request.num_scheduled) for request in plan.requests]
        self.finish(plan)
        return rows


def test_a_long_prompt_is_read_in_chunks_of_the_budget():
    house = House()
    house.add(prompt(40), "a")
    assert [house.step() for _ in range(4)] == [[("a", 16)], [("a", 16)], [("a", 8)], [("a", 1)]]


def test_decodes_come_before_chunks_and_share_a_step_with_them():
    house = House()
    house.add(prompt(20), "long")
    house.add(prompt(3, 100), "short")
    assert house.step() == [("long", 16)]
    assert house.step() == [("long", 4), ("short", 3)]
    house.add(prompt(40, 200), "late")
    assert house.step() == [("long", 1), ("short", 1), ("late", 14)]


def test_max_requests_counts_the_samples_of_each_request():
    house = House(max_requests=3)
    house.add([1, 2], "two", n=2)
    house.add([3, 4], "also two", n=2)
    house.add([5, 6], "one")
    assert house.step() == [("two", 2)]  # first come, first served: "one" does not overtake


def test_the_newest_request_is_preempted_and_readmitted_first():
    house = House(num_pages=6, prefix_cache=False)
    old, new = house.add(prompt(8), "old"), house.add(prompt(8, 50), "new")
    assert house.step() == [("old", 8), ("new", 8)]
    house.add([9], "third")
    seen = []
    while len(seen) < 8:
        seen.append(house.step())
    # Both grow by a page (6 pages), then "old" takes a page of "new", which is preempted.
    assert seen[0] == [("old", 1), ("new", 1)]
    assert seen[4] == [("old", 1)]
    assert new in house.scheduler.waiting and house.scheduler.waiting[0] is new
    assert new.num_computed == 0 and len(new.held.pages) == 0 and new.num_tokens > 8
    house.scheduler.remove(old)
    assert house.step()[0] == ("new", new.num_tokens - 1)  # its generated tokens are computed again, and none is lost
    assert house.scheduler.num_preemptions == 1


def test_requests_that_all_need_the_last_page_do_not_livelock():
    house = House(num_pages=4, prefix_cache=False, max_requests=4)
    requests = [house.add(prompt(4, 10 * i), str(i)) for i in range(4)]
    finished = []
    for _ in range(200):
        house.step()
        for request in [r for r in house.scheduler.running if r.num_generated >= 9]:
            house.scheduler.remove(request)
            finished.append(request.request_id)
    assert sorted(finished) == ["0", "1", "2", "3"]
    assert len(requests) == 4


def test_admission_leaves_room_for_the_running_requests():
    house = House(num_pages=5)
    house.add(prompt(12), "running")
    house.step()
    house.add(prompt(7, 100), "waits")  # needs two pages; "running" is about to take one of the two that are left
    assert house.step() == [("running", 1)]


def test_a_request_waits_for_a_shared_prefix_that_another_request_computes():
    house = House(max_step_tokens=24)
    house.add(prompt(60), "first")
    second = house.add([*prompt(48), 900, 901], "second")
    other = house.add(prompt(6, 500), "other")
    assert house.step() == [("first", 24)]
    assert house.step() == [("first", 24)]
    assert house.step() == [("first", 12), ("second", 2), ("other", 6)]
    assert second.held.num_cached == 48 and other.held.num_cached == 0


def test_other_requests_overtake_one_that_waits_for_a_prefix():
    house = House(max_step_tokens=70)
    house.add(prompt(60), "first")
    house.add(prompt(60), "same")
    house.add(prompt(6, 500), "other")
    assert house.step() == [("first", 60), ("other", 6)]
    assert house.step() == [("first", 1), ("other", 1), ("same", 4)]


def test_a_request_does_not_wait_for_a_short_shared_prefix():
    house = House(max_step_tokens=64)
    house.add(prompt(30), "first")
    house.add(prompt(30), "second")
    assert house.step() == [("first", 30), ("second", 30)]


@pytest.mark.parametrize("end", ["abort", "preempt"])
def test_an_abort_or_a_preemption_ends_the_wait_for_its_prefix(end):
    house = House(max_step_tokens=16)
    first = house.add(prompt(60), "first")
    house.add([*prompt(48), 900], "second")
    house.step()
    house.scheduler.remove(first) if end == "abort" else house.scheduler.preempt(first)
    rows = house.step()
    assert rows[0][0] == ("second" if end == "abort" else "first")


def test_requests_with_different_salts_do_not_wait_for_each_other():
    house = House(max_step_tokens=64, max_requests=4)
    house.add(prompt(40), "first", cache_salt="a")
    house.add(prompt(40), "second", cache_salt="b")
    assert house.step() == [("first", 40), ("second", 24)]


def test_longest_prefix_admits_a_request_that_was_passed_over_too_often(monkeypatch):
    monkeypatch.setattr(admission_policy, "MAX_PASSED_OVER", 3)
    house = House(schedule="longest-prefix", max_requests=1, num_pages=128)
    warm = house.add(prompt(16), "warm")
    house.step()
    house.scheduler.remove(warm)
    house.add(prompt(16, 300), "cold")
    order = []
    for i in range(6):
        house.add([*prompt(12), 700 + i], f"hot{i}")
        name = house.step()[0][0]
        order.append(name)
        house.scheduler.remove(house.scheduler.running[0])
    assert order == ["hot0", "hot1", "hot2", "cold", "hot3", "hot4"]


def test_removing_a_running_or_waiting_request_frees_every_page():
    house = House(num_pages=16, prefix_cache=False)
    running, waiting = house.add(prompt(30), "a"), house.add(prompt(30, 50), "b")
    house.step()
    for request in (running, waiting):
        house.scheduler.remove(request)
    assert house.cache.stats()["pages_free"] == 16
    assert not house.plan().requests
