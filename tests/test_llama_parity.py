"""The Llama family in float32: against transformers, and against itself bit for bit."""

from dataclasses import replace

import oracles
import pytest
import torch
from harness import Rig, load, make_batch

from nanokv.core.errors import CacheError
from nanokv.core.spec import PageLayout

pytestmark = pytest.mark.usefixtures("threads")
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 5e5,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
VARIANTS = {
    "tied": {"tie_word_embeddings": True},
    "untied": {},
    "one head each": {"num_key_value_heads": 4},
    "groups of three": {"hidden_size": 72, "num_attention_heads": 9, "num_key_value_heads": 3},
    "groups of four": {"num_key_value_heads": 1},
    "wide heads": {"head_dim": 32},
    "narrow heads": {"head_dim": 8},
    "llama3 positions": {"rope_parameters": LLAMA3},
    "linear positions": {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}},
    "biases": {"attention_bias": True, "mlp_bias": True},
    "old epsilon": {"rms_norm_eps": 1e-2, "num_hidden_layers": 3},
}
CLOSE = {"rtol": 0, "atol": 1e-4}
PROMPT = oracles.prompt(130)


@pytest.fixture(scope="module", params=VARIANTS, ids=lambda name: name.replace(" ", "-"))
def variant(request, tmp_path_factory):
    """A decoder and the logits of PROMPT as transformers computes them."""
    folder = oracles.llama(tmp_path_factory.mktemp("variant"), **VARIANTS[request.param])
    return load(folder), oracles.logits(oracles.reference(folder), PROMPT)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """The folder of one checkpoint, groups of two, untied."""
    return oracles.llama(tmp_path_factory.mktemp("model"))


@pytest.mark.parametrize("chunk", [130, 37, 1], ids=["at once", "in odd chunks", "token by token"])
def test_logits_match_transformers(variant, chunk):
    decoder, expected = variant
    torch.testing.assert_close(Rig(decoder).run(PROMPT, chunk), expected, **CLOSE)


@pytest.mark.parametrize("length", [1, 2, 15, 16, 17, 63, 64, 65])
def test_logits_match_where_prompts_end_near_page_boundaries(model, length):
    reference, decoder = oracles.reference(model), load(model)
    tokens = oracles.prompt(length, seed=length)
    torch.testing.assert_close(Rig(decoder).run(tokens, length), oracles.logits(reference, tokens), **CLOSE)


def test_greedy_tokens_match_transformers(model):
    reference, rig = oracles.reference(model), Rig(load(model))
    sequence, count = rig.sequence(PROMPT[:40] + [0] * 24), 40
    scores = rig.step((sequence, 40), last_only=True)[0]
    for place in range(40, 64):
        sequence.tokens[place] = int(scores[-1].argmax())
        scores = rig.step((sequence, 1))[0]
    with torch.inference_mode():
        expected = reference.generate(
            torch.tensor([PROMPT[:count]]), do_sample=False, max_new_tokens=24, eos_token_id=None
        )
    assert sequence.tokens == expected[0].tolist()


def test_logits_match_in_steps_that_mix_prefill_chunks_and_decodes(model):
    reference, rig = oracles.reference(model), Rig(load(model, page_size=8))
    lengths = [50, 33, 9]
    sequences = [rig.sequence(oracles.prompt(length, seed=length)) for length in lengths]
    rows = [[], [], []]
    for counts in ([49, 0, 0], [1, 20, 3], [0, 12, 5], [0, 1, 1]):
        asked = [(place, count) for place, count in enumerate(counts) if count]
        results = rig.step(*((sequences[place], count) for place, count in asked))
        for (place, _), logits in zip(asked, results, strict=True):
            rows[place].append(logits)
    for sequence, parts in zip(sequences, rows, strict=True):
        torch.testing.assert_close(torch.cat(parts), oracles.logits(reference, sequence.tokens), **CLOSE)


def test_the_head_computes_only_the_requested_rows(model):
    decoder = load(model)
    whole = Rig(decoder).run(PROMPT[:30], 30)
    rig = Rig(decoder)
    (last,) = rig.step((rig.sequence(PROMPT[:30]), 30), last_only=True)
    assert last.shape == (1, 256) and last.dtype == torch.float32
    assert torch.equal(last[0], whole[-1])


def test_a_step_may_request_no_logits(model):
    rig = Rig(load(model))
    sequence = rig.sequence(PROMPT[:20])
    batch = replace(make_batch([(sequence, 12)], 16), logit_rows=torch.zeros(0, dtype=torch.int64))
    assert rig.decoder.forward(batch, rig.store).shape == (0, 256)
    sequence.num_computed = 12
    expected = Rig(rig.decoder).run(PROMPT[:20], 20)[12:]
    assert torch.equal(rig.step((sequence, 8))[0], expected)


def test_layers_can_be_called_one_by_one(model):
    rig = Rig(load(model))
    expected = rig.run(PROMPT[:20], 20)
    batch = make_batch([(rig.sequence(PROMPT[:20]), 20)], 16)
    x, residual = rig.decoder.embed(batch)
    for layer in rig.decoder.layers:
        x = layer(x, residual, rig.store, batch)
    assert torch.equal(rig.decoder.logits(x, residual, batch), expected)


def test_a_layout_with_another_page_size_is_refused(model):
    decoder = load(model, page_size=16)
    for layout in (PageLayout(decoder.specs, 8), PageLayout(load(model, page_size=8).specs, 8)):
        with pytest.raises(CacheError, match="page size"):
            decoder.bind(layout)


@pytest.mark.parametrize("threads", [1, 2], indirect=True)
@pytest.mark.parametrize("name", ["groups of three", "biases", "narrow heads"])
def test_chunk_sizes_and_page_sizes_change_no_bit(tmp_path, name):
    folder = oracles.llama(tmp_path, **VARIANTS[name])
    decoder = load(folder)
    whole = Rig(decoder).run(PROMPT, 130)
    for chunk in (64, 37, 3, 1):
        assert torch.equal(Rig(decoder).run(PROMPT, chunk), whole), f"chunks of {chunk}"
    for page_size in (1, 4, 64):
        decoder = load(folder, page_size=page_size)
        got = Rig(decoder, num_pages=4 + 130 // page_size).run(PROMPT, 50)
        assert torch.equal(got, whole), f"pages of {page_size}"


@pytest.mark.parametrize("threads", [1, 2], indirect=True)
def test_batch_mates_change_no_bit(model):
    decoder = load(model)
    prompts = [oracles.prompt(length, seed=length) for length in (3, 70, 18, 41)]
    alone = [Rig(decoder).run(tokens, len(tokens)) for tokens in prompts]
    rig = Rig(decoder)
    sequences = [rig.sequence(tokens) for tokens in prompts]
    together = rig.step(*((sequence, len(sequence.tokens) - 1) for sequence in sequences))
    last = rig.step(*((sequence, 1) for sequence in reversed(sequences)))[::-1]
    for got, row, expected in zip(together, last, alone, strict=True):
        assert torch.equal(torch.cat((got, row)), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, pytest.param(torch.float16, marks=pytest.mark.slow)], ids=str)
def test_half_precision_logits_stay_close_to_transformers(model, dtype):
    expected = oracles.logits(oracles.reference(model), PROMPT)
    got = Rig(load(model, dtype)).run(PROMPT, 50)
    assert got.dtype == torch.float32 and got.isfinite().all()
    assert torch.nn.functional.cosine_similarity(got, expected).min() > 0.98
