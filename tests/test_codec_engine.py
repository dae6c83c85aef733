"""Codecs in the engine: the exactness law for each codec and family, forks, quality, partial pages, errors."""

import oracles
import pytest
import torch
from helpers import with_logprobs

from nanokv import EngineConfig, SamplingParams
from nanokv.codecs import kivi, latents, pages
from nanokv.codecs.latents import LatentPages
from nanokv.codecs.pages import AttentionPages
from nanokv.core.errors import CodecError, ConfigError
from nanokv.core.request import Request
from nanokv.llm import LLM

CODECS = ["fp8", "int8", "int4/tq2", "rot4", "tq2", "tq3", "tq4", "tqp3", "tqp4-orth", "polar", "qjl", "raw/tq4"]
KIVI = ["kivi2", "kivi4"]
FAMILIES = ["qwen3", "deepseek_v2_lite", "deepseek_v3", "qwen3_next", "qwen3_5_moe"]
GREEDY = SamplingParams(max_tokens=6, temperature=0.0, logprobs=0, ignore_eos=True)
LONG = SamplingParams(max_tokens=20, temperature=0.0, logprobs=0, ignore_eos=True)


@pytest.fixture(scope="module")
def wide(tmp_path_factory):
    """A Llama of two layers with a head size of 64, which every codec supports."""
    return oracles.llama(tmp_path_factory.mktemp("wide"), head_dim=64)


def prompts() -> list[list[int]]:
    shared = oracles.prompt(100, seed=3)
    return [oracles.prompt(5), oracles.prompt(33, seed=1), shared, [*shared[:70], 5, 6], [*shared[:64], 9], shared[:32]]


def answers(llm: LLM, texts: list[list[int]] | None = None, params: SamplingParams = GREEDY):
    return with_logprobs(llm.generate(prompts() if texts is None else texts, params))


# ---- exactness ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("codec", [*CODECS, *KIVI])
def test_cache_hits_chunks_preemption_and_batch_mates_change_no_bit(wide, codec):
    """The page size changes no bit either, except for KIVI, whose groups are pages."""
    is_kivi = codec in KIVI
    with LLM(wide, codec=codec, page_size=32, num_pages=32, max_requests=1, prefix_cache=False) as llm:
        alone = answers(llm)
    with LLM(wide, codec=codec, page_size=32 if is_kivi else 8, num_pages=96, max_step_tokens=41) as llm:
        assert answers(llm) == alone
        assert answers(llm) == alone and llm.stats()["hit_tokens"] > 0
        llm.engine.cache.check()
    texts = [oracles.prompt(length, seed=length) for length in ((28, 29, 30) if is_kivi else (3, 5, 9, 17))]
    with LLM(wide, codec=codec, page_size=32, num_pages=64, max_requests=1, prefix_cache=False) as llm:
        alone = answers(llm, texts, LONG)
    tight = {"page_size": 32, "num_pages": 5} if is_kivi else {"page_size": 4, "num_pages": 14}
    with LLM(wide, codec=codec, max_step_tokens=32, **tight) as llm:
        assert answers(llm, texts, LONG) == alone
        assert llm.stats()["preemptions"] > 0
        llm.engine.cache.check()


@pytest.fixture(scope="module", params=FAMILIES)
def family(request, tmp_path_factory):
    return oracles.checkpoint(request.param, tmp_path_factory.mktemp(request.param))


@pytest.mark.parametrize("codec", ["tq4", "tqp3", "kivi4"])
def test_every_family_keeps_the_exactness_law_with_a_codec(family, codec):
    room = {"num_states": 12, "page_size": 32, "codec": codec}
    if codec == "kivi4" and "deepseek" in str(family):
        with pytest.raises(ConfigError, match="codec='kivi4': it writes keys and values in two ways"):
            LLM(family, num_pages=32, **room)
        return
    with LLM(family, num_pages=32, max_requests=1, prefix_cache=False, **room) as llm:
        alone = answers(llm)
    with LLM(family, num_pages=32, max_step_tokens=41, **room) as llm:
        assert answers(llm) == alone
        assert answers(llm) == alone and llm.stats()["hit_tokens"] > 0
        llm.engine.cache.check()


@pytest.mark.parametrize(
    ("fields", "are_padded"),
    [
        ({}, True),
        ({"codec": "fp8/tq3"}, True),
        ({"codec": "tq4", "prefill": "fast", "native_layers": "first1"}, True),
        ({"codec": "tqp3"}, False),
        ({"codec": "kivi4", "native_layers": "first1"}, False),
    ],
)
def test_decode_steps_are_padded_if_every_layer_can_be_recorded(wide, fields, are_padded):
    with LLM(wide, page_size=32, num_pages=16, graphs=True, **fields) as llm:
        assert (llm.engine.runner._graphs is not None) == are_padded
        assert len(llm.engine.store.pages) == 16 + are_padded  # the page of padding
        assert llm.stats()["pages_total"] == 16


def test_raw_latents_and_states_are_recorded_and_quantized_latents_are_not(tmp_path):
    for family, codec, are_padded in (
        ("deepseek_v3", "tq4", False),
        ("deepseek_v3", "raw", True),
        ("qwen3_5", "tq4", True),
    ):
        folder = oracles.checkpoint(family, tmp_path / f"{family} {codec}")
        with LLM(folder, codec=codec, num_pages=16, num_states=8, graphs=True) as llm:
            assert (llm.engine.runner._graphs is not None) == are_padded


@pytest.mark.parametrize("codec", ["tq3", "tqp4", "kivi4"])
def test_samples_of_one_prompt_share_pages_until_they_diverge(wide, codec):
    params = SamplingParams(max_tokens=40, n=3, seed=5, ignore_eos=True)
    text = oracles.prompt(50, seed=2)
    with LLM(wide, codec=codec, page_size=32, num_pages=32) as llm:
        three = [output.token_ids for output in llm.generate([text], params)]
        assert len(set(map(tuple, three))) == 3 and llm.stats()["copies"] > 0
        again = [output.token_ids for output in llm.generate([text], params)]
        assert again == three
        for steps in (1, 2, 5):
            request_id = llm.engine.add_request(Request(text, params))
            for _ in range(steps):
                llm.engine.step()
            llm.engine.abort(request_id)
            llm.engine.cache.check()
        assert llm.stats()["pages_held"] == llm.stats().get("states_held", 0) == 0


@pytest.mark.parametrize(
    ("family", "codec", "module", "name"),
    [
        ("llama", "tqp3", pages, "used_pages"),
        ("llama", "kivi4", kivi, "Pieces"),
        ("deepseek_v3", "tq4", latents, "used_pages"),
    ],
)
def test_values_common_to_all_layers_are_computed_once_a_step(family, codec, module, name, tmp_path, monkeypatch):
    own, calls = getattr(module, name), []
    monkeypatch.setattr(module, name, lambda batch: calls.append(batch) or own(batch))
    folder = oracles.checkpoint(family, tmp_path)
    with LLM(folder, codec=codec, page_size=32, num_pages=16, max_step_tokens=32) as llm:
        calls.clear()  # of the step at load that measures keys
        llm.generate([oracles.prompt(50)], GREEDY)
        assert len(calls) == llm.engine.num_steps == 7 and len(set(map(id, calls))) == 7


# ---- quality and modes --------------------------------------------------------------------------------------------


def divergence(truth: torch.Tensor, other: torch.Tensor) -> float:
    truth, other = truth.log_softmax(-1), other.log_softmax(-1)
    return (truth.exp() * (truth - other)).sum(-1).mean().item()


def test_codecs_with_smaller_errors_stay_closer_to_the_raw_codec(wide):
    text = oracles.prompt(150, seed=8)

    def score(codec: str, **fields) -> torch.Tensor:
        with LLM(wide, codec=codec, page_size=32, num_pages=16, **fields) as llm:
            return llm.score(text)

    raw = score("raw")
    loss = {codec: divergence(raw, score(codec)) for codec in ("int8", "fp8", "tq4", "tq3", "tq2", "tqp4", "tqp4-orth")}
    order = sorted(loss, key=loss.get)
    assert order == ["int8", "fp8", "tq4", "tqp4-orth", "tq3", "tqp4", "tq2"] or order[:3] == ["int8", "fp8", "tq4"]
    assert loss["fp8"] < loss["tq4"] / 5 and loss["tqp4-orth"] < loss["tqp4"]
    mixed = score("tq3", native_layers="first1")
    assert 0 < divergence(raw, mixed) < loss["tq3"]
    assert torch.equal(score("tq3", unquantized_layers="first1"), mixed)
    assert torch.equal(score("tq3", native_layers="first1,last1"), raw)


@pytest.mark.parametrize("codec", ["tq3", "raw/tq2", "kivi2"])
def test_fast_prefill_attends_to_the_unquantized_numbers_of_its_chunk(wide, codec):
    text = oracles.prompt(80, seed=4)
    with (
        LLM(wide, page_size=32, num_pages=16) as raw,
        LLM(wide, codec=codec, prefill="fast", page_size=32, num_pages=16) as fast,
        LLM(wide, codec=codec, prefill="fast", page_size=32, num_pages=16, max_step_tokens=48) as halves,
        LLM(wide, codec=codec, page_size=32, num_pages=16) as exact,
    ):
        truth, whole, parts = raw.score(text), fast.score(text), halves.score(text)
        assert torch.allclose(whole, truth, atol=1e-3)
        assert torch.allclose(parts[:48], truth[:48], atol=1e-3) and not torch.allclose(parts, truth, atol=1e-3)
        # Decoding reads codes in both.
        one = exact.generate([text], LONG)[0].token_ids
        assert len(one) == len(fast.generate([text], LONG)[0].token_ids) == 20


def with_biased_keys(folder):
    """A checkpoint whose keys have a large constant in common, as the first layers of Qwen2 have."""
    import safetensors.torch

    folder = oracles.llama(folder, head_dim=64, attention_bias=True)
    (file,) = folder.glob("*.safetensors")
    weights = safetensors.torch.load_file(file)
    for layer in range(2):
        bias = weights[f"model.layers.{layer}.self_attn.k_proj.bias"].view(-1, 64)
        bias.zero_()
        bias[:, 30], bias[:, 31] = 60, -40
    safetensors.torch.save_file(weights, file, metadata={"format": "pt"})
    return folder


def test_centered_keys_keep_attention_and_lose_less_of_biased_keys(tmp_path):
    folder = with_biased_keys(tmp_path)
    text = oracles.prompt(150, seed=9)

    def score(**fields) -> tuple[torch.Tensor, list[torch.Tensor]]:
        with LLM(folder, page_size=32, num_pages=16, **fields) as llm:
            return llm.score(text), [one.mean for one in llm.engine.model.key_means()]

    raw, _ = score()
    plain, _ = score(codec="tq4")
    centered, means = score(codec="tq4", center_keys=True)
    assert divergence(raw, centered) < divergence(raw, plain) / 4
    again = score(codec="tq4", center_keys=True)[1]
    assert means and all(torch.equal(mean, other) for mean, other in zip(means, again, strict=True))
    # Unquantized keys minus their mean give the same softmax.
    plain, centered = score(codec="raw/int8")[0], score(codec="raw/int8", center_keys=True)[0]
    assert torch.allclose(plain, centered, atol=1e-2) and not torch.equal(plain, centered)


# ---- partial pages of KIVI ----------------------------------------------------------------------------------------


def test_a_kivi_request_hits_whole_pages_and_holds_one_state(wide):
    text = oracles.prompt(100, seed=6)
    with LLM(wide, codec="kivi4", page_size=32, num_pages=32, max_requests=5) as llm:
        llm.generate([text], GREEDY)
        assert llm.generate([text], GREEDY)[0].cached_tokens == 96
        stats = llm.stats()
        assert (stats["states_total"], stats["states_cached"], stats["states_held"]) == (5, 0, 0)
        assert (
            llm.engine.layout.state_payload == 2 * 2 * 2 * 32 * 64 * 4
        )  # layers, K and V, heads, tokens, numbers, bytes


def test_keys_with_a_large_common_offset_are_named_at_load(tmp_path, wide, caplog):
    folder = with_biased_keys(tmp_path)

    def warnings(model, **fields) -> list[str]:
        caplog.clear()
        LLM(model, num_pages=16, **fields).close()
        return [record.getMessage() for record in caplog.records if record.name == "nanokv"]

    (line,) = warnings(folder, codec="tq4")
    assert "the keys of 2 layers have a large common offset" in line
    assert line.endswith("codec tq4 loses what differs between them; use --center-keys") and "\n" not in line
    assert "the keys of 1 layer have" in warnings(folder, codec="fp8", native_layers="last1")[0]
    assert warnings(folder, codec="tq4", center_keys=True) == []
    assert warnings(folder, codec="raw/tq4") == warnings(folder, codec="kivi4") == warnings(folder) == []
    assert warnings(wide, codec="tq4") == []


def test_the_default_page_size_follows_the_codec(wide):
    with LLM(wide, codec="kivi4", num_pages=4) as llm:
        assert llm.engine.layout.page_size == llm.config.page_size == 32
    assert EngineConfig(codec="tq4").page_size == EngineConfig().page_size == 16
    assert EngineConfig(codec="kivi2", page_size=64).page_size == 64


def test_partial_pages_take_at_most_half_of_the_memory(wide):
    with LLM(wide, codec="kivi2", page_size=32, kv_memory="1MiB") as llm:
        stats = llm.stats()
        assert stats["states_total"] * stats["state_bytes"] <= 2**19
        assert llm.engine.config.max_requests == stats["states_total"]


# ---- errors -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"codec": "zip"}, "codec='zip': allowed are raw, fp8"),
        ({"codec": "fp8/zip"}, "codec='fp8/zip': allowed are raw, fp8"),
        ({"codec": "tq4/kivi4"}, "allowed are raw, fp8"),
        ({"codec": "tq4/"}, "codec='tq4/': allowed are raw, fp8"),
        ({"codec": "tq4/qjl"}, "codec='tq4/qjl': qjl keeps products with keys only"),
        ({"codec": "kivi4", "page_size": 16}, "allowed are 32 and 64: use --page-size 32"),
        ({"native_layers": "foo"}, "native_layers='foo': expected such as 'first2,last2'"),
        ({"codec": "tq4", "native_layers": "some"}, "native_layers='some': expected such as 'first2,last2'"),
        ({"codec": "tq4", "native_layers": "last3"}, "native_layers='last3': this model has 2 layers with attention"),
        ({"native_layers": "first1", "unquantized_layers": "first1"}, "are the same option: give one of them"),
        ({"codec": "tq4", "prefill": "slow"}, "prefill='slow': allowed are exact, fast"),
        ({"center_keys": True}, "center_keys=True: no layer of this model writes keys in codes"),
    ],
)
def test_the_error_names_an_invalid_codec_option(wide, fields, message):
    with pytest.raises(ConfigError, match=message):
        LLM(wide, num_pages=16, **fields)


def test_the_error_names_a_head_size_that_the_codec_does_not_support(tmp_path):
    narrow = oracles.llama(tmp_path / "narrow", head_dim=24)
    with pytest.raises(ConfigError, match="codec='tq4': head_dim=24 of this model; allowed are multiples of 16"):
        LLM(narrow, codec="tq4", num_pages=16)
    odd = oracles.llama(tmp_path / "odd", head_dim=48)
    with pytest.raises(ConfigError, match="codec='polar': head_dim=48 of this model; allowed are multiples of 64"):
        LLM(odd, codec="polar", num_pages=16)
    with pytest.raises(ConfigError, match="codec='kivi2': head_dim=48"):
        LLM(odd, codec="kivi2", page_size=32, num_pages=16)


def test_latents_refuse_two_codecs_and_codecs_for_keys_only(tmp_path):
    folder = oracles.checkpoint("deepseek_v3", tmp_path)
    for codec in ("fp8/tq4", "qjl"):
        with pytest.raises(ConfigError, match=f"codec='{codec}': multi-head latent attention keeps one latent"):
            LLM(folder, codec=codec, num_pages=16)


def poison(llm: LLM, monkeypatch, position: int, value: float) -> None:
    """Sets the last number of the last layer's value vector at `position` to `value`."""
    mixer, forward = llm.engine.model.layers[1].mixer, llm.engine.model.forward
    project, rows = mixer.qkv, []

    def noticing(batch, store, between=None):
        rows[:] = (batch.positions == position).nonzero()[:, 0].tolist()
        return forward(batch, store, between)

    def broken(x: torch.Tensor) -> torch.Tensor:
        qkv = project(x)
        qkv[rows, -1] = value
        return qkv

    monkeypatch.setattr(llm.engine.model, "forward", noticing)
    monkeypatch.setattr(mixer, "qkv", broken)


@pytest.mark.parametrize(
    ("codec", "value", "position", "loop"),
    [  # position 40 is in a chunk of the prompt that asks for no logits; 72 is decoded
        ("tq4", float("nan"), 40, {}),
        ("tq4", float("inf"), 72, {"overlap": True, "graphs": True}),
        ("raw/fp8", float("inf"), 40, {"overlap": True}),
        ("tqp3", 1e6, 72, {}),
        ("kivi4", float("nan"), 40, {"overlap": True}),
        ("kivi4", 1e6, 72, {"graphs": True}),
    ],
)
def test_a_nonfinite_or_too_large_number_ends_only_its_own_request(wide, codec, value, position, loop, monkeypatch):
    texts = [oracles.prompt(length, seed=length) for length in (5, 70, 20)]
    with LLM(wide, codec=codec, page_size=32, num_pages=16, max_step_tokens=32, **loop) as llm:
        truth = answers(llm, texts)
        llm.reset_prefix_cache()
        poison(llm, monkeypatch, position, value)
        well, ill, fine = llm.generate(texts, GREEDY)
        assert [well.token_ids, fine.token_ids] == [truth[0][0], truth[2][0]]
        assert ill.finish_reason == "error" and f"codec='{codec}': keys or values are not finite" in ill.error
        assert ill.token_ids == truth[1][0][: max(0, position - 69)]
        assert llm.stats()["pages_held"] == llm.stats().get("states_held", 0) == 0
        llm.engine.cache.check()
        monkeypatch.undo()
        (again,) = llm.generate([texts[1]], GREEDY)  # the chunk with that number was not published
        assert again.cached_tokens == (64 if position > 70 else 0) and again.token_ids == truth[1][0]


@pytest.mark.parametrize("at", ["latent", "rotated key"])
def test_a_nonfinite_latent_ends_only_its_own_request(at, tmp_path, monkeypatch):
    folder, texts = oracles.checkpoint("deepseek_v3", tmp_path), [oracles.prompt(5), oracles.prompt(20, seed=1)]
    with LLM(folder, codec="tq4", num_pages=16, prefix_cache=False) as llm:
        truth = answers(llm, texts)
        mixer, compute = llm.engine.model.layers[0].mixer, LatentPages._compute

        def broken(*arguments):
            latents, keys = compute(*arguments)
            (latents if at == "latent" else keys)[arguments[-1].positions == 19, ..., 0] = float("nan")
            return latents, keys

        monkeypatch.setattr(LatentPages, "_compute", broken)
        assert isinstance(mixer.pages, LatentPages)
        well, ill = llm.generate(texts, GREEDY)
        assert (well.token_ids, ill.finish_reason) == (truth[0][0], "error")


def test_nonfinite_key_means_are_refused_at_the_start(wide, monkeypatch):
    attend = AttentionPages.attend

    def broken(self, qkv, *rest):
        qkv[3] = float("nan")
        return attend(self, qkv, *rest)

    monkeypatch.setattr(AttentionPages, "attend", broken)
    with pytest.raises(CodecError, match="center_keys=True: codec='tq4': keys or values are not finite"):
        LLM(wide, codec="tq4", center_keys=True, num_pages=16)
