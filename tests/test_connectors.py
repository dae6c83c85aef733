"""Connectors: an engine takes computed pages from any number of connectors, and its answers stay the same."""

import itertools
from collections import deque

import pytest
from oracles import prompt

from nanokv import SamplingParams
from nanokv.cache.observers import Observers
from nanokv.core.keys import page_keys, root_key
from nanokv.core.request import Request
from nanokv.engine.connector import Delivery
from nanokv.engine.engine import Engine
from nanokv.llm import LLM

GREEDY = SamplingParams(temperature=0, max_tokens=5, ignore_eos=True)
PAGE = 4


class HostTier:
    """A Connector and CacheObserver that keeps evicted pages in a dictionary and delivers them again.

    delivers   the position up to which it really delivers tokens, as a function of (found, upto)
    """

    def __init__(self, delivers=lambda found, upto: upto) -> None:
        self.kept, self.arrived, self.store, self.delivers = {}, deque(), None, delivers
        self.num_started = self.num_told = 0

    def stored(self, keys, pages) -> None:
        self.num_told += len(keys)

    def evicting(self, keys, pages) -> None:
        self.num_told -= len(keys)

    def keys(self, request: Request) -> list[bytes]:
        return page_keys(request.tokens, PAGE, root_key(b"", request.params.cache_salt))

    def offers(self, request: Request, found: int) -> int:
        upto = found
        for key in self.keys(request)[found // PAGE : (request.num_tokens - 1) // PAGE]:
            if key not in self.kept:
                break
            upto += PAGE
        return upto

    def start(self, request: Request, upto: int, checkpoints) -> None:
        self.num_started += 1
        found = request.num_computed
        upto = self.delivers(found, upto)
        for place in range(found // PAGE, upto // PAGE):
            self.store.pages.write([request.held.pages[place]], self.kept[self.keys(request)[place]])
        self.arrived.append(Delivery(request, upto))

    def save(self, moves, store) -> None:
        for key, page in moves.saves:
            self.kept[key] = store.pages.read([page])

    def abort(self, request: Request) -> bool:
        return any(one.request is request for one in self.arrived)

    def collect(self, wait: bool) -> deque[Delivery]:
        return self.arrived

    def close(self) -> None:
        pass

    def stats(self) -> dict:
        return {}


@pytest.fixture
def model(tiny_llama):
    with LLM(tiny_llama, page_size=PAGE, num_pages=16) as llm:
        yield llm.engine.model, llm.config


def answers(engine: Engine, prompts: list[list[int]]) -> list[list[int]]:
    """Greedy tokens, one request after the other; checks the cache after every step."""
    tokens = []
    for ids in prompts:
        engine.add_request(Request(ids, GREEDY))
        outputs = []
        while engine.has_work:
            outputs += engine.step()
            engine.cache.check()
        assert outputs[-1].finish_reason == "length"
        tokens.append(outputs[-1].token_ids)
    return tokens


def engine_with(model, *tiers: HostTier) -> Engine:
    engine = Engine(*model, None, connectors=tiers, observers=Observers(tiers, b""))
    for tier in tiers:
        tier.store = engine.store
    return engine


PROMPTS = [prompt(40, seed=1), prompt(40, seed=2), prompt(40, seed=1), prompt(40, seed=2)]


def test_a_connector_restores_evicted_pages_and_no_token_changes(model):
    tier = HostTier()
    alone = answers(Engine(*model, None), PROMPTS)
    engine = engine_with(model, tier)
    assert answers(engine, PROMPTS) == alone
    assert tier.num_started == 2 and tier.num_told == engine.cache.stats()["pages_cached"]


@pytest.mark.parametrize(
    "delivers", [lambda found, upto: found, lambda found, upto: found + PAGE, lambda found, upto: upto + 100]
)
def test_a_connector_that_delivers_less_than_it_offered_changes_no_token(model, delivers):
    tier = HostTier(lambda found, upto: min(upto, delivers(found, upto)))
    assert answers(engine_with(model, tier), PROMPTS) == answers(Engine(*model, None), PROMPTS)
    assert tier.num_started >= 2


def test_a_request_is_computed_locally_after_two_failed_transfers(model):
    tier = HostTier(lambda found, upto: found)
    engine = engine_with(model, tier)
    answers(engine, PROMPTS[:2])
    started = tier.num_started
    answers(engine, PROMPTS[:1])
    assert tier.num_started - started == 2


def test_the_connector_that_offers_the_most_tokens_is_used(model):
    rich, poor = HostTier(), HostTier()
    engine = engine_with(model, poor, rich)
    answers(engine, PROMPTS[:2])
    for key in tuple(poor.kept)[1:]:
        del poor.kept[key]
    answers(engine, PROMPTS[:1])
    assert (rich.num_started, poor.num_started) == (1, 0)


def test_a_request_aborted_in_transfer_holds_its_pages_until_the_delivery(model):
    tier = HostTier()
    engine = engine_with(model, tier)
    answers(engine, PROMPTS[:2])
    request = Request(PROMPTS[0], GREEDY, "r")
    engine.add_request(request)
    tier.collect = lambda wait: deque()
    engine.step()
    assert request.in_transfer
    engine.abort("r")
    held = engine.cache.stats()["pages_held"]
    engine.step()
    assert held > 0 and engine.cache.stats()["pages_held"] == held
    del tier.collect
    engine.step()
    engine.cache.check()
    assert engine.cache.stats()["pages_held"] == 0


def test_an_exception_in_a_connector_ends_only_its_own_request(model):
    tier = HostTier()
    engine = engine_with(model, tier)
    alone = answers(engine, PROMPTS[:2])

    def failing(*arguments):
        raise RuntimeError("as the test wished")

    tier.start = failing
    engine.add_request(Request(PROMPTS[0], GREEDY, "r"))
    outputs = []
    while engine.has_work:
        outputs += engine.step()
    assert "as the test wished" in outputs[-1].error
    del tier.start
    assert answers(engine, PROMPTS[1:2]) == alone[1:2]


def test_pages_of_a_transfer_that_failed_to_start_stay_until_it_is_collected(model):
    tier = HostTier()
    engine = engine_with(model, tier)
    answers(engine, PROMPTS[:2])
    start, collect = tier.start, tier.collect

    def failing(*arguments):
        start(*arguments)  # it writes, and fails after that
        raise RuntimeError("as the test wished")

    tier.start, tier.collect = failing, lambda wait: deque()
    engine.add_request(Request(PROMPTS[0], GREEDY, "r"))
    (output,) = engine.step()
    assert "as the test wished" in output.error and engine.cache.stats()["pages_held"] > 0
    tier.start, tier.collect = start, collect
    engine.step()
    engine.cache.check()
    assert engine.cache.stats()["pages_held"] == 0


def test_a_connector_that_fails_to_save_changes_no_token(model, caplog):
    tier = HostTier()
    engine = engine_with(model, tier)

    def failing(*arguments):
        raise OSError("no space left")

    tier.save = failing
    assert answers(engine, PROMPTS) == answers(Engine(*model, None), PROMPTS)
    assert "failed to save" in caplog.text and not tier.kept


def test_ctrl_c_between_a_plan_and_its_transfer_starts_the_request_again(model):
    tier = HostTier()
    engine = engine_with(model, tier)
    alone = answers(engine, PROMPTS[:2])
    engine.add_request(Request(PROMPTS[0], GREEDY, "r"))
    drain_moves = engine.cache.drain_moves

    def interrupted():
        engine.cache.drain_moves = drain_moves
        raise KeyboardInterrupt

    engine.cache.drain_moves = interrupted
    with pytest.raises(KeyboardInterrupt):
        engine.step()
    outputs = []
    for _ in range(20):
        outputs += engine.step()
    assert outputs and outputs[-1].token_ids == alone[0] and not engine.has_work


def run_interrupted(model, number: int | None) -> tuple[dict, int]:
    """Tokens of each sample of a few requests with Ctrl-C at event `number`, and the number of events."""
    tier = HostTier()
    engine = engine_with(model, tier)
    sampled = SamplingParams(seed=1, n=2, max_tokens=4, ignore_eos=True)
    for name, ids in enumerate(PROMPTS):
        engine.add_request(Request(ids, sampled if name % 2 else GREEDY, str(name)))
    tokens, num_events, num_steps = {}, 0, 0

    def interrupt(event) -> None:
        nonlocal num_events
        num_events += 1
        if num_events - 1 == number:
            raise KeyboardInterrupt

    engine.events.subscribe(interrupt)
    while engine.has_work and (num_steps := num_steps + 1) < 300:
        try:
            for output in engine.step():
                tokens[output.request_id, output.index] = output.token_ids, output.finish_reason
        except KeyboardInterrupt:
            pass
    engine.cache.check()
    assert not engine.has_work and engine.cache.stats()["pages_held"] == 0
    return tokens, num_events


def test_ctrl_c_in_any_event_of_a_run_loses_no_request_and_no_page(model):
    alone, num_events = run_interrupted(model, None)
    assert len(alone) == 6
    for number in range(num_events):
        assert run_interrupted(model, number)[0] == alone, number


def broken(*arguments):
    raise OSError("the tier is away")


@pytest.mark.parametrize("what", ["offers", "collect", "save"])
def test_a_connector_that_raises_costs_no_request_and_no_token(model, what):
    """`collect` works now and then: before it does, nothing says that the connector writes no more."""
    tier = HostTier()
    works, calls = getattr(tier, what), itertools.count()
    setattr(tier, what, lambda *given: works(*given) if what == "collect" and next(calls) % 3 == 2 else broken())
    assert answers(engine_with(model, tier), PROMPTS) == answers(Engine(*model, None), PROMPTS)


def test_an_abort_that_raises_keeps_the_pages_quarantined(model):
    tier = HostTier()
    engine = engine_with(model, tier)
    answers(engine, PROMPTS[:2])
    tier.collect, tier.abort = (lambda wait: deque()), broken
    engine.add_request(Request(PROMPTS[0], GREEDY, "r"))
    engine.step()
    engine.abort("r")
    engine.step()
    assert engine.cache.stats()["pages_held"] > 0
    del tier.collect
    engine.step()
    engine.cache.check()
    assert engine.cache.stats()["pages_held"] == 0


def test_an_offer_and_a_delivery_beyond_the_prompt_are_cut(model):
    class Boaster(HostTier):
        def offers(self, request, found):
            offer = super().offers(request, found)
            return 10**6 if offer > found else found

        def start(self, request, upto, checkpoints):
            assert upto <= request.num_tokens
            super().start(request, super().offers(request, request.num_computed), checkpoints)

    engine = engine_with(model, Boaster())
    assert answers(engine, PROMPTS) == answers(Engine(*model, None), PROMPTS)


def test_the_numbers_of_connectors_are_summed(model):
    one, two = HostTier(), HostTier()
    one.stats, two.stats = (lambda: {"remote_lost": 1}), (lambda: {"remote_lost": 2, "stale_messages": 0})
    stats = Engine(*model, None, connectors=[one, two]).stats()
    assert (stats["remote_lost"], stats["stale_messages"]) == (3, 0)
