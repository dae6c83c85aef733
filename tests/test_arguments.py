"""What callers give that does not exist or is of another type: one line, which names what is meant."""

import inspect
from dataclasses import replace

import pytest

import nanokv
from nanokv import LLM, DisaggConfig, EngineConfig, SamplingParams
from nanokv.core.errors import ConfigError, RequestError


@pytest.fixture(scope="module")
def llm():
    with LLM("tiny-gqa", num_pages=16) as llm:
        yield llm


CONSTRUCTORS = [
    (lambda: SamplingParams(temprature=1), RequestError, "temprature: SamplingParams .* the nearest is temperature"),
    (lambda: SamplingParams(foo=1), RequestError, "foo: SamplingParams has no such argument; it has max_tokens, "),
    (lambda: replace(SamplingParams(), max_token=1), RequestError, "the nearest is max_tokens"),
    (lambda: EngineConfig(page_sise=4), ConfigError, "page_sise: EngineConfig .* the nearest is page_size"),
    (lambda: LLM("tiny-gqa", page_sise=4), ConfigError, "the nearest is page_size"),
    (lambda: DisaggConfig(workers=1), ConfigError, "the nearest is worker_cores"),
    (lambda: LLM("tiny-gqa", {"page_size": 4}), ConfigError, "config={'page_size': 4}: expected EngineConfig, or None"),
    (lambda: LLM("tiny-gqa", disagg="yes"), ConfigError, "disagg='yes': expected DisaggConfig, or None"),
    (lambda: LLM("tiny-gqa", EngineConfig(), page_size=4), ConfigError, "page_size: give a config or fields, not both"),
]


@pytest.mark.parametrize(("call", "error", "text"), CONSTRUCTORS)
def test_an_argument_that_does_not_exist_is_refused_with_the_nearest(call, error, text):
    with pytest.raises(error, match=text) as caught:
        call()
    assert "\n" not in str(caught.value)


CALLS = [
    (lambda llm: llm.generate([1], temperature=0), r"the nearest is params=SamplingParams\(temperature=...\)"),
    (lambda llm: llm.generate([1], max_token=5), r"params=SamplingParams\(max_tokens=...\)"),
    (lambda llm: llm.generate([1], progres=True), "the nearest is progress"),
    (lambda llm: llm.generate([1], xyz=True), "it has prompts, params, progress"),
    (lambda llm: llm.stream([1], top_p=0.5), r"top_p: stream has .* params=SamplingParams\(top_p=...\)"),
    (lambda llm: llm.chat([], temperature=0), r"temperature: chat has .* params=SamplingParams\(temperature=...\)"),
    (lambda llm: llm.stream_chat([], seed=0), r"params=SamplingParams\(seed=...\)"),
]


@pytest.mark.parametrize(("call", "text"), CALLS)
def test_sampling_parameters_beside_params_are_refused(llm, call, text):
    with pytest.raises(RequestError, match=text):
        call(llm)


def test_a_checked_class_keeps_its_signature():
    assert list(inspect.signature(SamplingParams).parameters)[:2] == ["max_tokens", "temperature"]
    assert SamplingParams(3, 0.5) == SamplingParams(max_tokens=3, temperature=0.5)


def test_lists_and_none_are_accepted_where_several_values_are():
    params = SamplingParams(stop=None, stop_token_ids=[1, 2], logits_processor=None)
    assert (params.stop, params.stop_token_ids, params.logits_processor) == ((), (1, 2), ())


def test_the_package_lists_its_public_names_and_no_others():
    assert dir(nanokv) == sorted(nanokv.__all__) and "AsyncLLM" in dir(nanokv)
    assert all(getattr(nanokv, name) is not None for name in dir(nanokv))
