"""The exactness law: in float32 on a CPU the bits of a token's logits depend on its request alone."""

import random

import oracles
import pytest
import torch
from helpers import with_logprobs

from nanokv import SamplingParams
from nanokv.core.request import Request
from nanokv.llm import LLM

LENGTHS = (1, 2, 15, 16, 17, 33, 63, 64, 65, 130)


def prompts() -> list[list[int]]:
    return oracles.prompts(LENGTHS)


PARAMS = [
    SamplingParams(max_tokens=12, temperature=0.0 if i % 2 else 1.0, seed=i, logprobs=0, ignore_eos=True)
    for i in range(len(prompts()))
]


def answers(llm: LLM, order: list[int] | None = None) -> list[tuple[list[int], list[float]]]:
    order = order if order is not None else list(range(len(PARAMS)))
    texts = prompts()
    outputs = llm.generate([texts[i] for i in order], [PARAMS[i] for i in order])
    by_prompt = dict(zip(order, outputs, strict=True))
    return with_logprobs(by_prompt[i] for i in range(len(order)))


@pytest.fixture(scope="module")
def alone(tiny_llama):
    """The answer of each request alone, without a prefix cache, its prompt in one step."""
    with LLM(tiny_llama, num_pages=64, prefix_cache=False, max_requests=1) as llm:
        assert llm.stats()["row_invariant"]
        return answers(llm)


@pytest.mark.parametrize("page_size", [1, 4, 16])
@pytest.mark.parametrize("prefix_cache", [True, False])
@pytest.mark.parametrize("budget", [7, 2048])
def test_page_size_prefix_cache_and_chunking_change_no_bit(tiny_llama, alone, page_size, prefix_cache, budget):
    with LLM(
        tiny_llama,
        page_size=page_size,
        num_pages=2048 // page_size,
        prefix_cache=prefix_cache,
        max_step_tokens=budget,
    ) as llm:
        assert answers(llm) == alone
        assert answers(llm) == alone  # now with cache hits
        assert (llm.stats()["hit_tokens"] > 0) == prefix_cache


def test_preemption_changes_no_bit(tiny_llama, alone):
    with LLM(tiny_llama, page_size=4, num_pages=40, max_step_tokens=32) as llm:
        assert answers(llm) == alone
        assert llm.stats()["preemptions"] > 0 and llm.stats()["evictions"] > 0
        llm.engine.cache.check()


def test_order_of_arrival_changes_no_bit(tiny_llama, alone):
    for seed in range(3):
        order = list(range(len(PARAMS)))
        random.Random(seed).shuffle(order)
        schedule = "longest-prefix" if seed else "fcfs"
        with LLM(tiny_llama, page_size=4, num_pages=256, max_step_tokens=50, schedule=schedule) as llm:
            assert answers(llm, order) == alone


def test_arrivals_between_steps_change_no_bit(tiny_llama, alone):
    texts = prompts()
    with LLM(tiny_llama, page_size=4, num_pages=256, max_step_tokens=20) as llm:
        tokens: dict[str, list[int]] = {}
        pending = list(range(len(texts)))
        while pending or llm.engine.has_work:
            if pending:
                i = pending.pop()
                llm.engine.add_request(Request(texts[i], PARAMS[i], str(i)))
            for output in llm.engine.step():
                if output.finished:
                    tokens[output.request_id] = output.token_ids
        assert [tokens[str(i)] for i in range(len(texts))] == [tokens_alone for tokens_alone, _ in alone]


def test_chunking_changes_no_bit_of_a_score(tiny_llama):
    text = prompts()[-4]
    with LLM(tiny_llama, num_pages=64) as whole, LLM(tiny_llama, num_pages=64, max_step_tokens=7, page_size=4) as parts:
        one = whole.score(text)
        assert one.shape == (len(text), whole.model_config.vocab_size) and one.dtype == torch.float32
        assert torch.equal(one, parts.score(text))
        assert torch.equal(one, whole.score(text))
