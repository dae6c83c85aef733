"""The class LLM on a real model with real text: prompts of every kind, streams, chats, stop texts, scoring."""

import re
import sys
from io import StringIO
from pathlib import Path
from threading import Thread

import pytest

from nanokv import SamplingParams
from nanokv.core.errors import CheckpointError, NanokvError, RequestError
from nanokv.core.stats import STATS, markdown
from nanokv.llm import LLM

GREEDY = SamplingParams(temperature=0, max_tokens=16)
COUNTING = "1 2 3 4 5 6 7 8 9 10 11 12"


@pytest.fixture(scope="module")
def llm(smollm2):
    with LLM(smollm2, kv_memory="256MiB") as llm:
        yield llm


def test_prompts_may_be_texts_or_token_ids_one_or_several(llm):
    ids = llm.tokenizer.encode(COUNTING)
    one = llm.generate(COUNTING, GREEDY)
    assert len(one) == 1 and one[0].prompt_token_ids == ids
    assert llm.generate(ids, GREEDY)[0].text == one[0].text
    outputs = llm.generate([COUNTING, ids, "Hello"], [GREEDY, GREEDY, SamplingParams(temperature=0, max_tokens=3)])
    assert [len(output.token_ids) for output in outputs] == [16, 16, 3]
    assert outputs[0].text == outputs[1].text == one[0].text
    assert llm.generate([], GREEDY) == []


def test_params_that_differ_in_number_from_the_prompts_are_refused(llm):
    with pytest.raises(RequestError, match="2 for 1 prompts"):
        llm.generate("a", [GREEDY, GREEDY])


def test_an_invalid_prompt_fails_the_call_and_leaves_no_request_behind(llm):
    with pytest.raises(RequestError):
        llm.generate(["fine", [10**6]], GREEDY)
    assert not llm.engine.has_work or [llm.engine.step(), llm.engine.has_work][1] is False
    llm.engine.cache.check()


def test_the_deltas_of_a_stream_add_up_to_the_text(llm):
    outputs = list(llm.stream(COUNTING, GREEDY))
    assert "".join(output.delta for output in outputs) == outputs[-1].text == llm.generate(COUNTING, GREEDY)[0].text
    assert [output.finished for output in outputs] == [False] * (len(outputs) - 1) + [True]


def test_streams_interleave_with_each_other_and_with_generate(llm):
    first, second = llm.stream(COUNTING, GREEDY), llm.stream("Once upon a time", GREEDY)
    texts = ["", ""]
    for _ in range(4):
        texts[0] += next(first).delta
        texts[1] += next(second).delta
    between = llm.generate("Hello", GREEDY)[0].text
    texts[0] += "".join(output.delta for output in first)
    texts[1] += "".join(output.delta for output in second)
    expected = [output.text for output in llm.generate([COUNTING, "Once upon a time", "Hello"], GREEDY)]
    assert [*texts, between] == expected


@pytest.mark.parametrize("steps", [0, 1, 3])
def test_closing_a_stream_aborts_its_request(llm, steps):
    stream = llm.stream(COUNTING, SamplingParams(max_tokens=1000, temperature=0, ignore_eos=True))
    for _ in range(steps):
        next(stream)
    stream.close()
    assert stream.request_id not in llm.engine
    assert list(stream) == []
    assert llm.stats()["pages_held"] == 0


def test_a_stop_text_across_token_boundaries_ends_the_answer(llm):
    free = llm.generate(COUNTING, GREEDY)[0].text
    stop = free[7:12]  # cut without regard to tokens
    outputs = list(llm.stream(COUNTING, SamplingParams(temperature=0, max_tokens=16, stop=(stop, "never there"))))
    assert outputs[-1].text == free[: free.index(stop)]
    assert outputs[-1].finish_reason == "stop"
    assert "".join(output.delta for output in outputs) == outputs[-1].text  # no delta was retracted


def test_an_incomplete_stop_text_is_part_of_the_final_text(llm):
    free = llm.generate(COUNTING, GREEDY)[0].text
    held = llm.generate(COUNTING, SamplingParams(temperature=0, max_tokens=16, stop=(free[-3:] + "never",)))[0]
    assert held.text == free and held.finish_reason == "length"


def test_stop_texts_are_ignored_before_min_tokens(llm):
    free = llm.generate(COUNTING, GREEDY)[0]
    stop = free.text[:2]
    late = SamplingParams(temperature=0, max_tokens=16, stop=(stop,), min_tokens=10)
    assert len(llm.generate(COUNTING, late)[0].token_ids) >= 10


def test_a_stop_text_may_match_at_exactly_min_tokens(llm):
    free = llm.generate(COUNTING, GREEDY)[0]
    texts = [output.text for output in llm.stream(COUNTING, GREEDY)]
    stop = texts[3][len(texts[2]) :]  # the text of the fourth token
    at = next(i for i, text in enumerate(texts) if stop in text) + 1
    exact = SamplingParams(temperature=0, max_tokens=16, stop=(stop,), min_tokens=at)
    assert len(llm.generate(COUNTING, exact)[0].token_ids) == at <= len(free.token_ids)


def test_a_chat_with_several_samples_is_refused(llm):
    with pytest.raises(RequestError, match="n=2"):
        llm.chat([{"role": "user", "content": "hi"}], SamplingParams(n=2))


def test_several_conversations_are_answered_in_one_call(llm):
    chats = [[{"role": "user", "content": text}] for text in ("Say hello.", "Count to three.", "Name a colour.")]
    lengths = [SamplingParams(temperature=0, max_tokens=count) for count in (3, 4, 5)]
    answers = llm.chat(chats, lengths)
    asked = [llm.chat(chat, GREEDY).prompt_token_ids for chat in chats]
    assert [answer.prompt_token_ids for answer in answers] == asked
    assert [len(answer.token_ids) for answer in answers] == [3, 4, 5]
    assert [answer.text for answer in llm.chat(chats[:1], GREEDY)] == [llm.chat(chats[0], GREEDY).text]
    for params in (SamplingParams(n=2), [GREEDY, SamplingParams(n=3), GREEDY]):
        with pytest.raises(RequestError, match=r"n=\d: a chat has one answer"):
            llm.chat(chats, params)
    with pytest.raises(RequestError, match="2 for 3 prompts"):
        llm.chat(chats, lengths[:2])
    with pytest.raises(RequestError, match="one conversation"):
        llm.stream_chat(chats)


class Screen(StringIO):
    """A stderr, which may be a terminal."""

    def __init__(self, is_terminal: bool) -> None:
        super().__init__()
        self.isatty = lambda: is_terminal


@pytest.mark.parametrize(
    ("is_terminal", "count", "progress", "drawn"),
    [
        (True, 12, None, True), (True, 7, None, False), (False, 12, None, False),
        (False, 2, True, True), (True, 12, False, False),
    ],
)  # fmt: skip
def test_a_bar_counts_the_answers_of_many_prompts(llm, monkeypatch, is_terminal, count, progress, drawn):
    monkeypatch.setattr(sys, "stderr", Screen(is_terminal))
    params = SamplingParams(max_tokens=2, ignore_eos=True)
    outputs = llm.generate(["Hi"] * count, params, progress=progress)
    chats = llm.chat([[{"role": "user", "content": "Hi"}]] * count, params, progress=progress)
    assert len(outputs) == len(chats) == count
    text = re.sub(r"\x1b\[[^a-zA-Z]*[a-zA-Z]", "", sys.stderr.getvalue())
    assert (text.count(f"{count}/{count}") >= 2 and f"{2 * count} tokens" in text) if drawn else text == ""


def test_an_llm_and_an_output_print_as_one_short_line(llm):
    assert repr(llm).startswith("LLM(smollm2-135m-instruct, bfloat16 on ") and len(repr(llm)) < 120
    assert repr(llm).endswith(", codec raw, requests of up to 8,192 tokens)")
    output = llm.generate(COUNTING, SamplingParams(temperature=0, max_tokens=60, ignore_eos=True))[0]
    assert repr(output.text[:70])[:-1] in repr(output) and len(repr(output)) < 220 and "\n" not in repr(output)
    assert f"{len(output.prompt_token_ids)} (" in repr(output) and "+ 60 tokens, length)" in repr(output)


@pytest.mark.slow
def test_the_programs_in_the_readme_run(capsys):
    programs = re.findall(r"```python\n(.*?)```", (Path(__file__).parents[1] / "README.md").read_text(), re.S)
    assert len(programs) >= 2
    for program in programs:
        exec(compile(program, "README.md", "exec"), {"__name__": "readme"})
    assert re.search(r"^(Yes|No)$", capsys.readouterr().out, re.M)


def test_a_chat_is_answered_and_its_next_turn_hits_the_cache(llm):
    messages = [{"role": "user", "content": "What is the capital of France? Answer in one sentence."}]
    answer = llm.chat(messages, SamplingParams(temperature=0, max_tokens=40))
    assert "Paris" in answer.text and answer.finish_reason == "stop"
    messages += [{"role": "assistant", "content": answer.text}, {"role": "user", "content": "And of Italy?"}]
    outputs = list(llm.stream_chat(messages, SamplingParams(temperature=0, max_tokens=5)))
    assert outputs[-1].cached_tokens >= 32


def test_seeded_samples_repeat_and_unseeded_ones_differ(llm):
    seeded = SamplingParams(seed=5, max_tokens=12)
    texts = [output.text for output in llm.generate([COUNTING] * 2, seeded)]
    assert texts[0] == texts[1]
    free = SamplingParams(max_tokens=12, temperature=1.5)
    assert len({output.text for output in llm.generate(["Once"] * 4, free)}) > 1


def test_scores_predict_the_tokens_of_greedy_decoding(llm):
    output = llm.generate(COUNTING, GREEDY)[0]
    text = [*output.prompt_token_ids, *output.token_ids]
    best = llm.score(text).argmax(dim=-1).tolist()
    assert best[len(output.prompt_token_ids) - 1 : -1] == output.token_ids


def test_stats_are_the_values_of_the_documented_table(llm):
    values = llm.stats()
    kinds = {stat.name: str if stat.kind == "text" else (int, float) for stat in STATS}
    assert all(isinstance(value, kinds[name]) for name, value in values.items())
    assert list(values) == [stat.name for stat in STATS if not stat.only]
    assert markdown() in (Path(__file__).parents[1] / "docs/stats.md").read_text()


def test_the_error_for_a_missing_model_suggests_a_fix(tmp_path):
    with pytest.raises(CheckpointError, match="nanokv pull"):
        LLM("no-such-model")
    with pytest.raises(CheckpointError, match="config.json"):
        LLM(tmp_path)


def test_a_model_without_a_tokenizer_takes_only_token_ids(tiny_llama):
    with LLM(tiny_llama, num_pages=64) as llm:
        assert llm.tokenizer is None
        assert llm.generate([[5, 6, 7]], GREEDY)[0].text == ""
        with pytest.raises(RequestError, match=r"tokenizer\.json"):
            llm.generate("text", GREEDY)
        with pytest.raises(RequestError, match=r"tokenizer\.json"):
            llm.chat([{"role": "user", "content": "hi"}])


@pytest.mark.parametrize("prompts", [None, 5, b"abc", {"a": 1}, [True], [1.9, 2], [None]])
def test_an_invalid_prompt_is_refused(llm, prompts):
    with pytest.raises(RequestError, match=r"prompts=|prompt_token_ids"):
        llm.generate(prompts, GREEDY)
    with pytest.raises(RequestError, match="prompt_token_ids"):
        llm.score(prompts)


@pytest.mark.parametrize("params", [{"max_tokens": 3}, "b", 5])
def test_params_of_another_type_are_refused(llm, params):
    calls = [
        lambda: llm.generate("a", params),
        lambda: llm.generate(["a", "b"], params),
        lambda: llm.generate("a", [params]),
        lambda: llm.stream("a", params),
        lambda: llm.chat([{"role": "user", "content": "a"}], params),
    ]
    for call in calls:
        with pytest.raises(RequestError, match=re.escape(f"params={params!r}: expected SamplingParams")):
            call()


def test_threads_share_steps_and_get_their_own_answers(llm):
    prompts = [f"Thread {i} counts: 1 2 3" for i in range(4)]
    expected = [llm.generate(prompt, GREEDY)[0].token_ids for prompt in prompts]
    answers: dict[int, list[int]] = {}

    def ask(place: int) -> None:
        if place % 2:
            answers[place] = llm.generate(prompts[place], GREEDY)[0].token_ids
        else:
            answers[place] = list(llm.stream(prompts[place], GREEDY))[-1].token_ids

    threads = [Thread(target=ask, args=(place,)) for place in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [answers[place] for place in range(4)] == expected
    llm.engine.cache.check()


def test_a_closed_llm_refuses_requests(tiny_llama):
    llm = LLM(tiny_llama, num_pages=8)
    llm.close()
    llm.close()
    with pytest.raises(NanokvError, match="closed"):
        llm.generate([5, 6], GREEDY)
