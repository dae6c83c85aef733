"""Every family in the engine: the exactness law, states in the prefix cache, samples, scores, aborts.

On a CPU the law includes Gated DeltaNet: one recurrence computes prefill and decode, so its bits depend on a request's
own tokens alone.
"""

import json

import oracles
import pytest
import torch
from helpers import with_logprobs

from nanokv import SamplingParams
from nanokv.bench import size
from nanokv.core.errors import ConfigError, RequestError
from nanokv.core.request import Request
from nanokv.hub.catalog import CATALOG
from nanokv.llm import LLM

FAMILIES = ["qwen3", "qwen3_moe", "deepseek_v2_lite", "deepseek_v3", "qwen3_next", "qwen3_5", "qwen3_5_moe"]
LENGTHS = (1, 3, 17, 64, 130)
ROOM = {"num_states": 40}


def prompts() -> list[list[int]]:
    return oracles.prompts(LENGTHS)


PARAMS = [
    SamplingParams(max_tokens=8, temperature=0.0 if i % 2 else 1.0, seed=i, logprobs=0, ignore_eos=True)
    for i in range(len(prompts()))
]


def answers(llm: LLM) -> list[tuple[list[int], list[float]]]:
    return with_logprobs(llm.generate(prompts(), PARAMS))


@pytest.fixture(scope="module", params=FAMILIES)
def model(request, tmp_path_factory):
    """A family's folder, and the answer of each request alone, without a prefix cache, its prompt in one step."""
    folder = oracles.checkpoint(request.param, tmp_path_factory.mktemp(request.param))
    with LLM(folder, num_pages=64, prefix_cache=False, max_requests=1, **ROOM) as llm:
        return folder, answers(llm)


@pytest.mark.parametrize(
    ("page_size", "prefix_cache", "budget"), [(1, True, 7), (4, True, 2048), (16, True, 7), (16, False, 2048)]
)
def test_page_size_prefix_cache_and_chunking_change_no_bit(model, page_size, prefix_cache, budget):
    folder, alone = model
    config = {"page_size": page_size, "num_pages": 2048 // page_size, "prefix_cache": prefix_cache}
    with LLM(folder, max_step_tokens=budget, **config, **ROOM) as llm:
        assert answers(llm) == alone
        assert answers(llm) == alone  # now with cache hits
        assert (llm.stats()["hit_tokens"] > 0) == prefix_cache
        llm.engine.cache.check()


def test_preemption_changes_no_bit(model):
    folder, _ = model
    texts = [oracles.prompt(length, seed=length) for length in (3, 5, 9, 17)]
    greedy = SamplingParams(max_tokens=30, temperature=0.0, ignore_eos=True)
    with LLM(folder, num_pages=64, max_requests=1, prefix_cache=False, **ROOM) as llm:
        alone = [output.token_ids for output in llm.generate(texts, greedy)]
    with LLM(folder, page_size=4, num_pages=14, max_step_tokens=32, **ROOM) as llm:
        assert [output.token_ids for output in llm.generate(texts, greedy)] == alone
        assert llm.stats()["preemptions"] > 0 and llm.stats()["evictions"] > 0
        llm.engine.cache.check()


def test_scores_and_samples_repeat_and_aborts_free_all_pages_and_states(model):
    folder, _ = model
    text = prompts()[-3]
    with LLM(folder, num_pages=64, **ROOM) as llm, LLM(folder, num_pages=64, max_step_tokens=7, page_size=4) as parts:
        assert torch.equal(llm.score(text), parts.score(text))
        sampled = SamplingParams(max_tokens=6, n=3, seed=5, ignore_eos=True)
        three = llm.generate([text], sampled)
        assert len({tuple(output.token_ids) for output in three}) > 1
        again = llm.generate([text], sampled)
        assert [output.token_ids for output in again] == [output.token_ids for output in three]
        for steps in range(6):
            request_id = llm.engine.add_request(Request(prompts()[3], SamplingParams(max_tokens=4, n=2)))
            for _ in range(steps):
                llm.engine.step()
            if request_id in llm.engine:
                llm.engine.abort(request_id)
            while llm.engine.has_work:
                llm.engine.step()
            llm.engine.cache.check()
            assert llm.stats()["pages_held"] == llm.stats().get("states_held", 0) == 0


# ---- states -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def hybrid(tmp_path_factory):
    return oracles.checkpoint("qwen3_5", tmp_path_factory.mktemp("hybrid"))


def test_a_second_turn_hits_at_least_90_percent_of_the_first(tmp_path):
    hybrid = oracles.checkpoint("qwen3_5", tmp_path / "longer", max_position_embeddings=1024)
    first = oracles.prompt(600, seed=1)
    greedy = SamplingParams(max_tokens=20, temperature=0.0, ignore_eos=True)
    with LLM(hybrid, num_pages=256, num_states=8) as llm:
        answer = llm.generate(first, greedy)[0].token_ids
        (second,) = llm.generate([*first, *answer, 7, 8, 9], greedy)
        assert second.cached_tokens == second.kv_matched_tokens >= 0.9 * len([*first, *answer])


def test_requests_that_arrive_together_share_the_state_of_their_prefix(hybrid):
    shared = oracles.prompt(200, seed=3)
    batch = [[*shared, 10 + i, 20 + i] for i in range(4)]
    greedy = SamplingParams(max_tokens=2, temperature=0.0, ignore_eos=True)
    with LLM(hybrid, num_pages=256, num_states=16) as llm:
        outputs = llm.generate(batch, greedy)
        assert [output.cached_tokens for output in outputs] == [0, 192, 192, 192]


def test_matched_pages_without_a_state_are_counted_separately(hybrid):
    shared = oracles.prompt(100, seed=3)
    greedy = SamplingParams(max_tokens=2, temperature=0.0, ignore_eos=True)
    with LLM(hybrid, num_pages=256, num_states=16) as llm:
        llm.generate([*shared, *oracles.prompt(60, seed=4)], greedy)
        (second,) = llm.generate([*shared, *oracles.prompt(60, seed=5)], greedy)
        assert (second.cached_tokens, second.kv_matched_tokens) == (0, 96)
        assert llm.stats()["kv_hit_tokens"] == 96 and llm.stats()["hit_tokens"] == 0
        (third,) = llm.generate([*shared, *oracles.prompt(60, seed=6)], greedy)
        assert (third.cached_tokens, third.kv_matched_tokens) == (96, 96)


@pytest.mark.parametrize("failure", [RuntimeError, KeyboardInterrupt])
def test_a_checkpoint_whose_copy_was_not_made_is_dropped(hybrid, monkeypatch, failure):
    text, greedy = oracles.prompt(100, seed=9), SamplingParams(max_tokens=4, temperature=0.0, ignore_eos=True)
    with LLM(hybrid, num_pages=64, num_states=8) as llm:
        truth = llm.generate(text, greedy)[0].token_ids
        llm.reset_prefix_cache()
        request_id = llm.engine.add_request(Request(text, greedy))
        llm.engine.step()  # 96 tokens: a checkpoint is due, and the next step copies it first

        def fail(_copies):
            assert llm.stats()["states_cached"] == 1
            raise failure("before any copy")

        with monkeypatch.context() as patch:
            patch.setattr(llm.engine.store.pages, "copy", fail)
            if failure is KeyboardInterrupt:
                with pytest.raises(KeyboardInterrupt):
                    llm.engine.step()
                llm.engine.abort(request_id)
            else:
                (output,) = llm.engine.step()
                assert output.finish_reason == "error"
        while llm.engine.has_work:
            llm.engine.step()
        llm.engine.cache.check()
        assert llm.stats()["states_cached"] == 0
        (again,) = llm.generate(text, greedy)
        assert again.token_ids == truth and again.cached_tokens == 0
        assert (again.kv_matched_tokens > 0) == (failure is RuntimeError)  # an interrupt drops the tree, too


def test_memory_is_split_evenly_between_pages_and_states(hybrid):
    with LLM(hybrid, kv_memory="4MiB") as llm:
        stats = llm.stats()
        assert stats["states_total"] == 2 * 2**20 // stats["state_bytes"]
        pages, states = (stats[f"{what}s_total"] * stats[f"{what}_bytes"] for what in ("page", "state"))
        assert 4 * 2**20 - stats["page_bytes"] < pages + states <= 4 * 2**20
        assert llm.engine.config.max_requests == stats["states_total"] // 2
        with pytest.raises(RequestError, match="n=40"):
            llm.generate([5], SamplingParams(n=40))


def test_memory_too_small_for_one_request_is_refused(hybrid):
    with pytest.raises(ConfigError, match="beside 2 states"):
        LLM(hybrid, kv_memory="100KiB")


def test_a_state_interval_must_be_a_multiple_of_the_page_size(hybrid):
    with pytest.raises(ConfigError, match="multiple of page_size"):
        LLM(hybrid, page_size=16, state_interval=40)


@pytest.mark.parametrize("family", ["deepseek_v2_lite", "deepseek_v3"])
def test_mla_keeps_one_latent_and_one_key_per_token_and_layer(tmp_path, family):
    folder = oracles.checkpoint(family, tmp_path)
    with LLM(folder, num_pages=8) as llm:
        assert llm.stats()["bytes_per_token"] == 3 * (32 + 8) * 4
        assert llm.engine.layout.page_payload == 16 * llm.stats()["bytes_per_token"]
        assert llm.engine.store.pages.data.shape == (8, llm.engine.layout.page_bytes)


def test_deepseek_v3_caches_576_numbers_per_token_and_layer_as_size_reports(tmp_path):
    """With the attention sizes of the model, and few heads and layers."""
    small = {"num_hidden_layers": 2, "first_k_dense_replace": 2, "vocab_size": 256, "hidden_size": 64,
             "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 4}  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(CATALOG["deepseek-v3"].config | small))
    said = size.row(size.measure(str(tmp_path), "auto", "raw", 16), 128, 1 << 30)
    with LLM(tmp_path, load="dummy", num_pages=8, max_model_len=128) as llm:
        assert llm.stats()["bytes_per_token"] == said["bytes_per_token"] == 2 * 576 * 2
        assert llm.engine.layout.page_payload == said["page_payload_bytes"] == 16 * 2 * 576 * 2
        assert llm.engine.store.pages.data.nbytes == said["padded_bytes"] == said["payload_bytes"]
        assert llm.generate([5, 6, 7], SamplingParams(max_tokens=2, ignore_eos=True))[0].finish_reason == "length"
