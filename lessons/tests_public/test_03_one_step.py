"""Public checks of lesson 03."""

from array import array

from nanokv.bench.measure import percentile
from nanokv.cache.contract import Moves
from nanokv.core.config import EngineConfig
from nanokv.core.events import Events
from nanokv.core.request import Request
from nanokv.engine.inputs import arrays_of, num_logit_rows
from nanokv.engine.scheduler import Scheduler, StepPlan
from nanokv.learn.expect import equal, near


def known(num_tokens: int, start: int = 0, computed: int = 0, scheduled: int = 0, pages=()) -> Request:
    """A request whose tokens are start, start + 1, ..."""
    request = Request(list(range(start, start + num_tokens)))
    request.tokens, request.num_prompt = array("i", request.prompt_token_ids), num_tokens
    request.num_computed, request.num_scheduled, request.held.pages = computed, scheduled, array("i", pages)
    return request


class Pages:
    """The cache that a scheduler needs, by plain counting: no tree, no hits."""

    def __init__(self, num_pages: int) -> None:
        self.free = list(range(num_pages))
        self.copies: list[tuple[int, int]] = []

    @property
    def num_available(self) -> int:
        return len(self.free)

    def pages_for(self, num_tokens: int) -> int:
        return -(-num_tokens // 4)

    def match(self, request: Request) -> int:
        return 0

    def prefix_length(self, request: Request) -> int:
        return 0

    def reserve(self, request: Request, num_tokens: int) -> bool:
        missing = max(0, self.pages_for(request.num_computed + num_tokens) - len(request.held.pages))
        if missing > len(self.free):
            return False
        request.held.pages.extend([self.free.pop() for _ in range(missing)])
        return True

    def commit(self, request: Request, in_flight: int = 0) -> None:
        pass

    def release(self, request: Request) -> None:
        self.free.extend(request.held.pages)
        request.held.pages, request.num_computed = array("i"), 0

    def limit_chunk(self, request: Request, num_tokens: int) -> int:
        return num_tokens

    def request_checkpoint(self, request: Request, position: int) -> bool:
        return True

    def drain_moves(self) -> Moves:
        moves, self.copies = Moves(self.copies), []
        return moves


class House:
    """A scheduler over some pages; `step` plans, and carries the plan out as the engine does."""

    def __init__(self, num_pages: int, **config) -> None:
        self.cache = Pages(num_pages)
        self.scheduler = Scheduler(EngineConfig(page_size=4, prefix_cache=False, **config), self.cache, Events())

    def add(self, *requests: Request) -> None:
        for number, request in enumerate(requests):
            request.request_id = f"{number}"
            self.scheduler.add(request)

    def step(self) -> list[tuple[Request, int]]:
        plan = self.scheduler.plan()
        planned = [(request, request.num_scheduled) for request in plan.requests]
        for request in plan.requests:
            request.advance()
            if request.num_computed == request.num_tokens:
                request.tokens.append(7)
        return planned

    def named(self, planned: list[tuple[Request, int]], *requests: Request) -> list[tuple[str, int]]:
        names = {id(request): "abcdef"[place] for place, request in enumerate(requests)}
        return [(names[id(request)], count) for request, count in planned]


def test_03_1_the_median_of_an_odd_number_of_values_is_one_of_them():
    near(percentile([5.0, 1.0, 3.0], 0.5), 3.0, "percentile([5, 1, 3], 0.5)")


def test_03_1_values_between_two_ranks_are_interpolated():
    near(percentile([0.0, 10.0], 0.25), 2.5, "percentile([0, 10], 0.25)")
    near(percentile([4.0, 1.0, 2.0, 3.0], 0.9), 3.7, "percentile([4, 1, 2, 3], 0.9)")


def test_03_1_the_ends_are_the_smallest_and_the_largest():
    near(percentile([3.0, 9.0, 6.0], 0.0), 3.0, "share 0")
    near(percentile([3.0, 9.0, 6.0], 1.0), 9.0, "share 1")
    near(percentile([4.0], 0.99), 4.0, "one value")


def test_03_2_a_chunk_in_the_middle_of_a_prompt_needs_no_logits():
    equal(num_logit_rows(known(10, computed=0, scheduled=4)), 0, "logit rows for tokens 0 to 3 of 10")
    equal(num_logit_rows(known(10, computed=4, scheduled=5)), 0, "logit rows for tokens 4 to 8 of 10")


def test_03_2_the_last_known_token_gives_the_next_one():
    equal(num_logit_rows(known(10, computed=4, scheduled=6)), 1, "logit rows for tokens 4 to 9 of 10")
    equal(num_logit_rows(known(10, computed=9, scheduled=1)), 1, "logit rows in a decode")


def test_03_2_scoring_needs_the_logits_of_every_row():
    request = known(10, computed=2, scheduled=5)
    request.logit_blocks = []
    equal(num_logit_rows(request), 5, "logit rows of a request that is scored")


def test_03_3_a_prefill_and_a_decode_in_one_step():
    one = known(6, start=100, computed=0, scheduled=6, pages=[3, 1])
    two = known(10, start=200, computed=9, scheduled=1, pages=[5, 2, 4])
    batch = arrays_of([one, two], 4)
    for name, expected in {
        "token_ids": [100, 101, 102, 103, 104, 105, 209],
        "positions": [0, 1, 2, 3, 4, 5, 9],
        "write_pages": [3, 3, 3, 3, 1, 1, 4],
        "write_slots": [0, 1, 2, 3, 0, 1, 1],
        "request_starts": [0, 6, 7],
        "page_tables": [[3, 1, 0], [5, 2, 4]],
        "logit_rows": [5, 6],
        "state_ids": [],
    }.items():
        equal(batch[name].tolist(), expected, name)
    equal(batch["is_in_flight"].tolist(), [False] * 7, "is_in_flight")


def test_03_3_a_chunk_starts_where_the_last_one_ended():
    request = known(12, start=50, computed=5, scheduled=4, pages=[7, 6, 8])
    batch = arrays_of([request], 4)
    equal(batch["token_ids"].tolist(), [55, 56, 57, 58], "token_ids")
    equal(batch["positions"].tolist(), [5, 6, 7, 8], "positions")
    equal(batch["write_pages"].tolist(), [6, 6, 6, 8], "write_pages")
    equal(batch["logit_rows"].tolist(), [], "logit_rows: the prompt goes on after this chunk")


def test_03_3_dtypes_are_those_of_the_batch():
    request = known(4, computed=0, scheduled=4, pages=[0])
    request.held.state_id = 3
    batch = arrays_of([request], 4)
    for name in ("token_ids", "logit_rows"):
        equal(str(batch[name].dtype), "int64", f"dtype of {name}")
    for name in ("positions", "write_pages", "write_slots", "request_starts", "page_tables", "state_ids"):
        equal(str(batch[name].dtype), "int32", f"dtype of {name}")
    equal(batch["state_ids"].tolist(), [3], "state_ids")


def has_room(num_available: int, running: list[Request], request: Request, found_pages: int = 0) -> bool:
    house = House(num_available)
    house.scheduler.running = running
    return house.scheduler._has_room(request, found_pages)


def test_03_4_an_empty_engine_admits_any_request():
    equal(has_room(1, [], known(400)), True, "room for a request in an empty engine")


def test_03_4_a_request_needs_room_for_its_tokens_and_the_next_one():
    running = [known(4, pages=[0])]  # may grow by one page
    equal(has_room(3, running, known(7)), True, "8 tokens in 3 free pages, one promised")
    equal(has_room(3, running, known(8)), False, "9 tokens in 3 free pages, one promised")


def test_03_4_pages_found_in_the_cache_need_no_room():
    running = [known(4, pages=[0])]
    equal(has_room(3, running, known(16), found_pages=3), True, "17 tokens, 3 pages of them found")
    equal(has_room(2, running, known(16), found_pages=3), False, "the same in 2 free pages")


def test_03_4_running_requests_may_still_need_pages_of_their_prompts():
    running = [known(16, pages=[0]), known(4, pages=[1])]  # 3 pages to come and one, then one
    equal(has_room(6, running, known(3)), True, "1 page in 6 free pages, 5 promised")
    equal(has_room(5, running, known(3)), False, "1 page in 5 free pages, 5 promised")


def running_house(num_pages: int, *lengths: int) -> tuple[House, list[Request]]:
    """Running requests that have computed all their tokens but the last one."""
    house, requests = House(num_pages), [known(length, start=100 * place) for place, length in enumerate(lengths)]
    for request in requests:
        house.cache.match(request)
        house.cache.reserve(request, request.num_tokens)
        request.num_computed = request.num_tokens
        request.tokens.append(7)
        house.scheduler.running.append(request)
    return house, requests


def test_03_5_with_enough_room_no_request_is_preempted():
    house, (one, _two) = running_house(4, 4, 4)
    equal(house.scheduler._make_room(one, 1, StepPlan()), True, "room was made")
    equal(len(house.scheduler.running), 2, "requests that still run")
    equal(len(one.held.pages), 2, "pages of the request")


def test_03_5_the_newest_request_is_preempted_first():
    house, (one, two, three) = running_house(3, 4, 4, 4)
    equal(house.scheduler._make_room(one, 1, StepPlan()), True, "room was made")
    equal(house.scheduler.running == [one, two], True, "the two oldest go on running")
    equal(list(house.scheduler.waiting) == [three], True, "the newest waits again")
    equal(house.scheduler.num_preemptions, 1, "num_preemptions")


def test_03_5_a_preempted_request_leaves_the_plan_too():
    house, (one, two) = running_house(2, 4, 4)
    plan = StepPlan(requests=[two])
    house.scheduler._make_room(one, 1, plan)
    equal(plan.requests == [], True, "the preempted request is out of the plan")


def test_03_5_the_request_itself_may_be_the_newest():
    house, (one, two) = running_house(2, 4, 4)
    equal(house.scheduler._make_room(two, 1, StepPlan()), False, "room for the newest")
    equal(house.scheduler.running == [one], True, "the oldest goes on running")


def test_03_6_a_prompt_longer_than_the_budget_is_computed_in_chunks():
    house, one = House(16, max_step_tokens=4), known(10)
    house.add(one)
    equal([house.named(house.step(), one) for _ in range(4)], [[("a", 4)], [("a", 4)], [("a", 2)], [("a", 1)]], "steps")


def test_03_6_decodes_come_before_chunks_of_a_prompt():
    house, long, short = House(16, max_step_tokens=6), known(14), known(3, start=50)
    house.add(long, short)
    steps = [house.named(house.step(), long, short) for _ in range(4)]
    equal(steps[0], [("a", 6)], "step 1: the budget is spent")
    equal(steps[1], [("a", 6)], "step 2")
    equal(steps[2], [("a", 2), ("b", 3)], "step 3: the end of the long prompt, and the short one is admitted")
    equal(steps[3], [("a", 1), ("b", 1)], "step 4: both decode")


def test_03_6_a_decoding_request_is_planned_first_although_it_arrived_later():
    house, one, two = House(32, max_step_tokens=5), known(3), known(20, start=50)
    house.add(one, two)
    steps = [house.named(house.step(), one, two) for _ in range(3)]
    equal(steps, [[("a", 3), ("b", 2)], [("a", 1), ("b", 4)], [("a", 1), ("b", 4)]], "steps")
    house.scheduler.running.reverse()
    equal(house.named(house.step(), one, two), [("a", 1), ("b", 4)], "a step after the order of running was reversed")


def test_03_6_a_step_that_preempts_admits_no_request():
    house, (one, two) = running_house(2, 4, 4)
    house.add(known(1, start=900))
    planned = house.named(house.step(), one, two)
    equal(planned, [("a", 1)], "a full pool: the older one decodes, the newer one was preempted")
    equal(len(house.scheduler.waiting), 2, "requests that wait")


def test_03_6_copies_of_pages_are_in_the_plan():
    house, (_one,) = running_house(8, 6)
    house.cache.copies = [(3, 5)]
    equal(house.scheduler.plan().moves.pages, [(3, 5)], "moves.pages of the plan, when the cache lists 3 to 5")
    equal(house.cache.copies, [], "copies left in the cache after planning")
