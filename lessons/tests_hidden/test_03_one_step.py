"""Hidden checks of lesson 03: random steps against the engine's own functions."""

from array import array

import torch

from nanokv.bench.measure import percentile
from nanokv.cache.manager import CacheManager
from nanokv.core.config import EngineConfig
from nanokv.core.events import Events
from nanokv.core.request import Request
from nanokv.core.spec import LayerSpec, PageLayout, Plane
from nanokv.engine.inputs import arrays_of, num_logit_rows
from nanokv.engine.scheduler import Scheduler
from nanokv.learn.expect import equal, near, random_of
from nanokv.learn.patching import reference


def test_03_1_random_values():
    random = random_of("values")
    for _ in range(100):
        values = [random.uniform(-5, 5) for _ in range(random.randint(1, 9))]
        share = random.choice([0.0, 1.0, random.random()])
        near(percentile(values, share), reference(percentile)(values, share), f"percentile({values}, {share})")


def test_03_1_the_list_of_values_is_not_changed():
    values = [3.0, 1.0, 2.0]
    percentile(values, 0.5)
    equal(values, [3.0, 1.0, 2.0], "the list after percentile")


def requests_of_a_step(random) -> list[Request]:
    requests, pages = [], list(range(200))
    random.shuffle(pages)
    has_states = random.random() < 0.5
    for number in range(random.randint(1, 6)):
        length = random.randint(1, 40)
        request = Request([random.randrange(1000) for _ in range(length)])
        request.tokens = array("i", request.prompt_token_ids)
        request.num_computed = random.randrange(length)
        request.num_scheduled = random.randint(1, length - request.num_computed)
        request.held.pages = array("i", [pages.pop() for _ in range(-(-length // 4) + random.randint(0, 2))])
        request.logit_blocks = [] if random.random() < 0.2 else None
        request.held.state_id = number if has_states else None
        requests.append(request)
    return requests


def test_03_2_random_requests():
    random = random_of("rows")
    for _ in range(60):
        for request in requests_of_a_step(random):
            equal(num_logit_rows(request), reference(num_logit_rows)(request), f"logit rows of {request}")


def test_03_3_random_steps():
    random = random_of("steps")
    for _ in range(60):
        requests = requests_of_a_step(random)
        got, expected = (make(requests, 4) for make in (arrays_of, reference(arrays_of)))
        equal(sorted(got), sorted(expected), "names of the arrays")
        for name, other in expected.items():
            equal((got[name].tolist(), got[name].dtype), (other.tolist(), other.dtype), name)


def house(kind: type[Scheduler], random) -> list:
    """The plans of a scheduler, step by step, for a random workload in a small pool."""
    layout = PageLayout([LayerSpec(paged=(Plane("k", (4, 1), torch.float32, 0),))], 4)
    num_pages = random.randint(6, 20)
    cache = CacheManager(layout, num_pages, prefix_cache=random.random() < 0.5)
    config = EngineConfig(page_size=4, max_step_tokens=random.randint(3, 24), max_requests=random.randint(1, 5))
    scheduler, seen = kind(config, cache, Events()), []
    left = {}
    for number in range(random.randint(2, 8)):
        length = random.randint(1, 12)
        request = Request([random.randrange(3) for _ in range(length)], request_id=str(number))
        request.tokens, request.num_prompt = array("i", request.prompt_token_ids), length
        left[number] = random.randint(1, (num_pages - 1) * 4 - length - 4) if num_pages * 4 > length + 9 else 1
        scheduler.add(request)
    for _ in range(300):
        plan = scheduler.plan()
        seen.append(([(r.request_id, r.num_scheduled) for r in plan.requests], plan.moves.pages, plan.moves.states))
        for request in list(plan.requests):
            request.advance()
            cache.commit(request)
            if request.num_computed == request.num_tokens:
                request.tokens.append(random.randrange(3))
                left[int(request.request_id)] -= 1
                if left[int(request.request_id)] == 0:
                    scheduler.remove(request)
        cache.check()
        if not scheduler.running and not scheduler.waiting:
            break
    return [*seen, scheduler.num_preemptions]


def test_03_4_random_workloads():
    for case in range(10):
        got, expected = (house(kind, random_of(f"house {case}")) for kind in (Scheduler, reference(Scheduler)))
        for step, (one, other) in enumerate(zip(got, expected, strict=False)):
            equal(one, other, f"step {step} of a random workload: (request, tokens) of the plan, copies")
        equal(len(got), len(expected), "steps")


def test_03_5_random_workloads():
    test_03_4_random_workloads()


def test_03_6_random_workloads():
    test_03_4_random_workloads()
