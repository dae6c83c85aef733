"""Every family in float32: against transformers, against itself bit for bit, and in every layout of checkpoints."""

import json
from dataclasses import replace
from functools import cache

import oracles
import pytest
import torch
from harness import Rig, load, make_batch
from safetensors.torch import load_file, save_file

from nanokv.codecs import RawCodec
from nanokv.core.errors import CheckpointError
from nanokv.models.loader import load_model, tensors
from nanokv.models.read import read_config, read_folder

pytestmark = pytest.mark.usefixtures("threads")
CLOSE = {"rtol": 0, "atol": 1e-4}
PROMPT = oracles.prompt(130)
FAMILIES = list(oracles.FAMILIES)
EXACT = [name for name in FAMILIES if name not in oracles.HYBRIDS]
LENGTHS = (1, 2, 3, 4, 63, 64, 65, 130)
"""Prompts that end at, before and after the boundaries of convolutions, pages and chunks."""
NEAR_TIE = 1e-4
"""If the reference's two best logits differ by less, either token is correct, because rounding decides."""


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return cache(lambda family: oracles.checkpoint(family, tmp_path_factory.mktemp(family)))


@pytest.fixture(scope="module")
def references(folders):
    return cache(lambda family: oracles.reference(folders(family)))


@pytest.mark.parametrize("chunk", [130, 37, 1], ids=["at once", "in odd chunks", "token by token"])
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_match_transformers(folders, references, family, chunk):
    got = Rig(load(folders(family))).run(PROMPT, chunk)
    torch.testing.assert_close(got, oracles.logits(references(family), PROMPT), **CLOSE)


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_match_where_prompts_end_near_boundaries(folders, references, family):
    decoder = load(folders(family))
    for length in LENGTHS:
        tokens = oracles.prompt(length, seed=length)
        expected = oracles.logits(references(family), tokens)
        torch.testing.assert_close(Rig(decoder).run(tokens, length), expected, **CLOSE)


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_tokens_match_transformers(folders, references, family):
    """Prompts in odd chunks, then token by token. The reference reads each answer once: row i is its next token."""
    rig, ties, answers = Rig(load(folders(family))), 0, 16
    for length in LENGTHS:
        sequence = rig.sequence(oracles.prompt(length, seed=100 + length) + [0] * answers)
        while (left := length - sequence.num_computed) > 0:
            scores = rig.step((sequence, min(left, 37)), last_only=True)[0]
        for place in range(length, length + answers):
            sequence.tokens[place] = int(scores[-1].argmax())
            scores = rig.step((sequence, 1))[0]
        truth = oracles.logits(references(family), sequence.tokens)[length - 1 : -1]
        gap = truth.amax(-1) - truth.gather(-1, torch.tensor(sequence.tokens[length:]).unsqueeze(-1)).squeeze(-1)
        assert (gap < NEAR_TIE).all(), f"after {length} tokens"
        ties += int((gap > 0).sum())
    print(f"{family}: {ties} near ties in {len(LENGTHS) * answers} tokens")
    assert 1000 * ties <= len(LENGTHS) * answers


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_match_in_steps_that_mix_prefill_chunks_and_decodes(folders, references, family):
    rig = Rig(load(folders(family), page_size=8))
    sequences = [rig.sequence(oracles.prompt(length, seed=length)) for length in (70, 33, 9)]
    rows = [[], [], []]
    for counts in ([66, 0, 0], [1, 20, 3], [1, 12, 5], [1, 1, 1], [1, 0, 0]):
        asked = [(place, count) for place, count in enumerate(counts) if count]
        results = rig.step(*((sequences[place], count) for place, count in asked))
        for (place, _), logits in zip(asked, results, strict=True):
            rows[place].append(logits)
    for sequence, parts in zip(sequences, rows, strict=True):
        torch.testing.assert_close(torch.cat(parts), oracles.logits(references(family), sequence.tokens), **CLOSE)


@pytest.mark.parametrize("family", FAMILIES)
def test_chunk_sizes_and_page_sizes_change_no_bit(folders, family):
    """This includes Gated DeltaNet: on a CPU one recurrence computes prefill and decode."""
    folder = folders(family)
    decoder = load(folder)
    whole = Rig(decoder).run(PROMPT, 130)
    for chunk in (64, 37, 3, 1):
        assert torch.equal(Rig(decoder).run(PROMPT, chunk), whole), f"chunks of {chunk}"
    for page_size in (1, 4):
        got = Rig(load(folder, page_size=page_size), num_pages=4 + 130 // page_size).run(PROMPT, 50)
        assert torch.equal(got, whole), f"pages of {page_size}"


@pytest.mark.parametrize("family", FAMILIES)
def test_batch_mates_change_no_bit(folders, family):
    decoder = load(folders(family))
    prompts = [oracles.prompt(length, seed=length) for length in (3, 70, 18, 41)]
    alone = [Rig(decoder).run(tokens, len(tokens)) for tokens in prompts]
    rig = Rig(decoder)
    sequences = [rig.sequence(tokens) for tokens in prompts]
    together = rig.step(*((sequence, len(sequence.tokens) - 1) for sequence in sequences))
    last = rig.step(*((sequence, 1) for sequence in reversed(sequences)))[::-1]
    for got, row, expected in zip(together, last, alone, strict=True):
        assert torch.equal(torch.cat((got, row)), expected)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_hook_between_layers_sees_each_layer_and_changes_nothing(folders, family):
    decoder, tokens = load(folders(family)), oracles.prompt(9)
    rig = Rig(decoder)
    sequence, seen = rig.sequence(tokens), []

    def between(layer, x, residual, batch):
        seen.append((layer, x.shape, residual.shape, batch.num_rows))
        return x, residual, batch

    with torch.inference_mode():
        watched = decoder.forward(make_batch([(sequence, 9)], rig.page_size), rig.store, between)
    assert seen == [(layer, (9, 64), (9, 64), 9) for layer in range(decoder.config.num_layers)]
    assert torch.equal(watched, Rig(decoder).run(tokens, 9))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dropped_after", [0, 1])
def test_a_hook_between_layers_may_drop_a_request(folders, family, dropped_after):
    decoder, tokens = load(folders(family)), oracles.prompt(18, seed=18)
    rig = Rig(decoder)
    sequences = [rig.sequence(one) for one in (oracles.prompt(7), tokens)]

    def between(layer, x, residual, batch):
        if layer != dropped_after:
            return x, residual, batch
        rows, left = batch.select([1])
        return x[rows], residual[rows], replace(left, logit_rows=torch.arange(18))

    with torch.inference_mode():
        batch = make_batch([(sequences[0], 7), (sequences[1], 18)], rig.page_size)
        logits = decoder.forward(batch, rig.store, between)
    assert torch.equal(logits, Rig(decoder).run(tokens, 18))


def test_a_hook_between_layers_may_replace_rows(folders):
    decoder = load(folders("llama"))
    rig = Rig(decoder)
    batch = make_batch([(rig.sequence(PROMPT[:5]), 5)], rig.page_size)
    with torch.inference_mode():
        logits = decoder.forward(batch, rig.store, lambda layer, x, residual, batch: (x * 0, residual * 0, batch))
    assert not logits.any()


@pytest.mark.parametrize("family", ["deepseek_v2_lite", "deepseek_v3"])
def test_expanded_prefill_and_absorbed_decode_agree_in_half_precision(folders, references, family):
    """bfloat16 expands where that is cheaper; float32 never does, because its bits must not depend on the choice."""
    decoder = load(folders(family), torch.bfloat16)
    assert decoder.layers[0].mixer.expand is not None and load(folders(family)).layers[0].mixer.expand is None
    expanded = Rig(decoder).run(PROMPT, 130)
    for layer in decoder.layers:
        layer.mixer.expand = None
    absorbed = Rig(decoder).run(PROMPT, 130)
    assert not torch.equal(expanded, absorbed)
    for got in (expanded, absorbed):
        cosine = torch.nn.functional.cosine_similarity(got, oracles.logits(references(family), PROMPT))
        assert cosine.median() > 0.98  # a row that bfloat16 routes to other experts may differ much


@pytest.mark.parametrize("family", ["mistral", "qwen3_vl", "qwen3_vl_moe"])
def test_a_family_that_computes_as_another_matches_transformers(tmp_path, family):
    """Logits of a prompt in odd chunks, and the greedy answer after it."""
    make = oracles.checkpoint if family == "mistral" else oracles.vision_language
    folder = make(family, tmp_path)
    rig, reference = Rig(load(folder)), oracles.reference(folder)
    torch.testing.assert_close(rig.run(PROMPT, 37), oracles.logits(reference, PROMPT), **CLOSE)
    prompt = oracles.prompt(65, seed=5)
    expected = reference.generate(torch.tensor([prompt]), max_new_tokens=16, do_sample=False, eos_token_id=None)
    sequence = rig.sequence(prompt + [0] * 16)
    scores = rig.step((sequence, 65))[0]
    for place in range(65, 81):
        sequence.tokens[place] = int(scores[-1].argmax())
        scores = rig.step((sequence, 1))[0]
    assert sequence.tokens == expected[0].tolist()


def test_experts_of_qwen3_vl_load_transposed_as_released_and_plain(tmp_path):
    """transformers 4 stores [experts, in, out], transformers 5 also [experts, out, in]; the shape tells."""
    folder = oracles.vision_language("qwen3_vl_moe", tmp_path / "plain", moe_intermediate_size=24)
    stored = load_file(folder / "model.safetensors")
    fused = {name for name in stored if ".experts." in name}
    assert {tuple(stored[name].shape) for name in fused} == {(8, 48, 64), (8, 64, 24)}
    edit(folder, tmp_path / "released", {}, {})
    turned = {name: one.transpose(1, 2).contiguous() if name in fused else one for name, one in stored.items()}
    save_file(turned, tmp_path / "released" / "model.safetensors")
    got = [Rig(load(tmp_path / name)).run(PROMPT[:20], 20) for name in ("plain", "released")]
    assert torch.equal(*got)
    expected = oracles.logits(oracles.reference(tmp_path / "released"), PROMPT[:20])
    torch.testing.assert_close(got[0], expected, **CLOSE)


def test_kimi_k2_is_deepseek_v3_under_another_name(folders, tmp_path):
    folder = edit(folders("deepseek_v3"), tmp_path, {"model_type": "kimi_k2"}, {})
    assert torch.equal(Rig(load(folder)).run(PROMPT[:20], 20), Rig(load(folders("deepseek_v3"))).run(PROMPT[:20], 20))


# ---- layouts of checkpoints -----------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["qwen3_moe", "deepseek_v3", "qwen3_next", "qwen3_5_moe"])
def test_fused_and_separate_expert_tensors_give_the_same_logits(folders, tmp_path, family):
    folder = folders(family)
    oracles.reference(folder).save_pretrained(tmp_path, save_original_format=False)
    stored = load_file(tmp_path / "model.safetensors")
    assert any(name.endswith("experts.gate_up_proj") for name in stored)
    assert torch.equal(Rig(load(tmp_path)).run(PROMPT[:20], 20), Rig(load(folder)).run(PROMPT[:20], 20))


@pytest.mark.parametrize("family", ["qwen3_5", "qwen3_5_moe"])
def test_the_text_model_of_a_vision_language_checkpoint_loads(tmp_path, family):
    folder = oracles.vision_language(family, tmp_path / "vl")
    stored = load_file(folder / "model.safetensors")
    assert any(name.startswith("model.language_model.") for name in stored)
    assert any(name.startswith("model.visual.") for name in stored)
    reference = oracles.reference(folder)
    expected = oracles.logits(reference, PROMPT[:70])
    torch.testing.assert_close(Rig(load(folder)).run(PROMPT[:70], 70), expected, **CLOSE)
    reference.save_pretrained(tmp_path / "text")  # keeps the prefix, although the config is that of a text model
    torch.testing.assert_close(Rig(load(tmp_path / "text")).run(PROMPT[:70], 70), expected, **CLOSE)


def test_multi_token_prediction_layers_are_ignored(folders, tmp_path):
    edit(
        folders("deepseek_v3"), tmp_path, {"num_nextn_predict_layers": 1}, {"model.layers.3.eh_proj.weight": (64, 128)}
    )
    edit(folders("qwen3_5"), tmp_path / "mtp", {}, {"mtp.fc.weight": (64, 128), "mtp.norm.weight": (64,)})
    for folder in (tmp_path, tmp_path / "mtp"):
        load(folder)


def test_a_sharded_checkpoint_gives_the_logits_of_a_single_file(folders, tmp_path):
    folder = oracles.checkpoint("qwen3_5_moe", tmp_path, shard="100KB")
    assert (folder / "model.safetensors.index.json").exists()
    assert torch.equal(Rig(load(folder)).run(PROMPT[:20], 20), Rig(load(folders("qwen3_5_moe"))).run(PROMPT[:20], 20))


@pytest.mark.parametrize("family", FAMILIES)
def test_old_and_new_config_keys_give_the_same_config(folders, family, tmp_path):
    data = json.loads((folders(family) / "config.json").read_text())
    old = {key: value for key, value in data.items() if key not in ("rope_parameters", "dtype", "layer_types")}
    rope = dict(data["rope_parameters"])
    old["rope_theta"] = rope.pop("rope_theta")
    if "partial_rotary_factor" in rope:
        old["partial_rotary_factor"] = rope.pop("partial_rotary_factor")
    kind = rope.pop("rope_type")
    old["rope_scaling"] = None if kind == "default" else {"type": kind, **rope}
    old["torch_dtype"] = data["dtype"]
    if "num_local_experts" in old:
        old["num_experts"] = old.pop("num_local_experts")
    assert read_config(old) == read_config(data)


@pytest.mark.parametrize("family", FAMILIES)
def test_dummy_weights_need_no_weight_files(folders, family, tmp_path):
    (tmp_path / "config.json").write_text((folders(family) / "config.json").read_text())
    config = read_folder(tmp_path)
    codec = RawCodec(torch.bfloat16)
    decoder = load_model(tmp_path, config, torch.bfloat16, "cpu", codec, 16, load="dummy")
    got = Rig(decoder).run(PROMPT[:20], 20)
    assert got.isfinite().all() and got.std() > 0
    stored = {name for name in load_file(folders(family) / "model.safetensors") if name != "lm_head.weight"}
    assert {name for name in tensors(config) if name != "lm_head.weight"} == stored


def edit(folder, target, config, more):
    """Copies a checkpoint with other config fields and further tensors."""
    target.mkdir(exist_ok=True)
    data = json.loads((folder / "config.json").read_text())
    (target / "config.json").write_text(json.dumps({**data, **config}))
    stored = load_file(folder / "model.safetensors")
    save_file({**stored, **{name: torch.zeros(shape) for name, shape in more.items()}}, target / "model.safetensors")
    return target


@pytest.mark.parametrize(
    ("family", "config", "more", "complaint"),
    [
        ("qwen3_moe", {"num_experts_per_tok": 9, "num_local_experts": 8}, {}, "num_experts_per_tok=9"),
        ("deepseek_v3", {"n_group": 3}, {}, "n_group=3"),
        ("deepseek_v3", {"scoring_func": "softmax"}, {}, "scoring_func='softmax'"),
        ("deepseek_v2", {"topk_method": "best"}, {}, "topk_method='best'"),
        ("deepseek_v3", {}, {"model.layers.1.mlp.experts.0.up_proj.weight_scale_inv": (1, 1)}, "weight_scale_inv"),
        ("deepseek_v3", {}, {"model.layers.3.eh_proj.weight": (64, 128)}, "unexpected: model.layers.3.eh_proj"),
        (
            "qwen3_moe",
            {"num_local_experts": 12},
            {},
            r"missing: model.layers.\{0,2\}.mlp.experts.\{8-11\}.gate_proj.weight, ",
        ),
        ("qwen3_5", {"linear_num_value_heads": 3}, {}, "linear_num_value_heads=3"),
        ("qwen3_5", {"layer_types": ["full_attention"]}, {}, "layer_types"),
        ("qwen3_5", {"linear_key_head_dim": 16}, {}, "misshapen"),
        ("qwen3_5", {"attention_bias": True}, {}, "attention_bias=True"),
        ("qwen3", {"use_sliding_window": True}, {}, "use_sliding_window"),
        ("qwen3", {"layer_types": ["sliding_attention", "full_attention"]}, {}, "layer_types"),
    ],
)
def test_the_error_names_the_part_of_a_checkpoint_that_does_not_fit(folders, tmp_path, family, config, more, complaint):
    with pytest.raises(CheckpointError, match=complaint):
        load(edit(folders(family), tmp_path, config, more))
