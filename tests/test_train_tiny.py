"""Training of the tiny models: a killed run resumes exactly, and an exported checkpoint loads."""

import argparse
import sys
from pathlib import Path

import pytest
import tokenizers
import torch

from nanokv.text.tokenizer import Tokenizer

ROOT = Path(__file__).resolve().parents[1]
CONFIGS = ["tiny-gqa", "tiny-mla", "tiny-hybrid"]


@pytest.fixture(scope="module")
def tiny():
    patch = pytest.MonkeyPatch()
    patch.syspath_prepend(str(ROOT / "scripts"))
    import train_tiny
    from tiny import measure, models, muon

    patch.setattr(train_tiny, "EVERY", 2)
    yield type("Tiny", (), {"train": train_tiny, "measure": measure, "models": models, "muon": muon})
    patch.undo()


def trainer(tiny, folder, limit, model="tiny-gqa"):
    """A run of two stages; the second ends after `limit` steps."""
    from rich.console import Console

    level = tiny.train.Level(4, 3, 0.3)
    stages = tuple(
        tiny.train.Stage(name, 48, 2, {"recall": 1.0, "two": 1.0}, level, steps, {}, ("recall 64",), skip=0.5)
        for name, steps in (("one", 3), ("two", limit))
    )
    folder.mkdir(exist_ok=True)
    options = argparse.Namespace(
        model=model, seed=3, work=folder, out=folder / "out", minutes=None, compile=False, bfloat16=False
    )
    return tiny.train.Trainer(options, stages, Console(quiet=True))


@pytest.mark.slow
def test_a_killed_run_resumes_to_the_same_weights(tiny, tmp_path, monkeypatch):
    whole = trainer(tiny, tmp_path / "whole", 4)
    whole.run()
    killed = trainer(tiny, tmp_path / "killed", 4)
    save, saves = killed.save, []

    def die_later():
        saves.append(killed.at.total)
        if len(saves) == 4:
            raise KeyboardInterrupt
        save()

    monkeypatch.setattr(killed, "save", die_later)
    with pytest.raises(KeyboardInterrupt):
        killed.run()
    again = trainer(tiny, tmp_path / "killed", 4)
    again.run()
    assert again.at.total == whole.at.total == 7
    for name, tensor in whole.model.state_dict().items():
        assert torch.equal(tensor, again.model.state_dict()[name]), name
    assert [entry["step"] for entry in again.at.history] == [entry["step"] for entry in whole.at.history]


def test_a_run_of_another_model_is_not_resumed(tiny, tmp_path):
    trainer(tiny, tmp_path, 1).run()
    with pytest.raises(SystemExit, match="another --work"):
        trainer(tiny, tmp_path, 1, model="tiny-mla").run()


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("model", CONFIGS)
def test_blocked_attention_matches_sdpa(model, masked, tiny):
    made = tiny.models.build(model, 300, seed=5).eval()
    ids = torch.randint(4, 300, (2, 200))
    seen = (torch.rand(2, 1, 200, 200) < 0.7) | torch.eye(200, dtype=torch.bool)
    with torch.inference_mode():
        found = made(input_ids=ids, attention_mask=seen if masked else None, use_cache=False).logits
        made.set_attn_implementation("sdpa")
        expected = made(input_ids=ids, attention_mask=seen.tril() if masked else None, use_cache=False).logits
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)


def test_training_masks_the_hidden_facts_from_the_blind_questions(tiny, tmp_path):
    """In a row of across-chunk facts, a blind question does not attend to the hidden facts after "There is"."""
    run = trainer(tiny, tmp_path, 1)
    level = tiny.train.Level(4, 3, 0.3, blind=1.0)
    stage = tiny.train.Stage("across", 96, 4, {"across": 1.0}, level, 1, {})
    masks = []
    forward = run.model.model.forward

    def spy(*args, attention_mask, **kwargs):
        masks.append(attention_mask)
        return forward(*args, attention_mask=attention_mask, **kwargs)

    run.model.model.forward = spy
    run.train_step(stage, 0.0)
    run.rng.seed(run.options.seed)
    _, kinds, _ = run.batch(stage)
    asks, hides = kinds[:, :-1] & tiny.train.BLIND > 0, kinds[:, :-1] & tiny.train.HIDDEN > 0
    assert asks.any() and hides.any() and not (asks & hides).any()
    (seen,) = masks
    for row in range(4):
        assert not seen[row, 0][asks[row]][:, hides[row]].any()
        assert seen[row, 0][~asks[row]].all() and seen[row, 0][:, ~hides[row]].all()


@pytest.mark.parametrize("model", CONFIGS)
def test_an_exported_model_is_a_complete_checkpoint(model, tiny, tmp_path):
    import transformers
    from make_corpus import TOKENIZER

    backend = tokenizers.Tokenizer.from_file(str(TOKENIZER))
    made = tiny.models.build(model, backend.get_vocab_size(), seed=5)
    for _ in range(2):  # the second export replaces the first
        tiny.models.export(made, backend, tmp_path / model)
    assert sorted(path.name for path in tmp_path.iterdir()) == [model]
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / model)
    assert loaded.dtype == torch.bfloat16
    for name, tensor in made.state_dict().items():
        assert torch.equal(tensor.to(torch.bfloat16), loaded.state_dict()[name]), name
    messages = [{"role": "user", "content": "Hello."}]
    ids = Tokenizer.from_folder(tmp_path / model).chat(messages)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / model)
    assert theirs.apply_chat_template(messages, add_generation_prompt=True)["input_ids"] == ids
    assert (tmp_path / model / "model.safetensors").stat().st_size < 8_000_000


def test_muon_takes_the_steps_of_torch(tiny):
    torch.manual_seed(0)
    start = [torch.randn(24, 8), torch.randn(8, 24), torch.randn(8, 8)]
    gradients = [[torch.randn_like(tensor) for tensor in start] for _ in range(3)]
    ours = [torch.nn.Parameter(tensor.clone()) for tensor in start]
    theirs = [torch.nn.Parameter(tensor.clone()) for tensor in start]
    muon = tiny.muon.Muon(ours, rate=0.02)
    reference = torch.optim.Muon(theirs, lr=0.02, momentum=0.95, weight_decay=0.05, adjust_lr_fn="original")
    for step in gradients:
        for parameters in (ours, theirs):
            for parameter, gradient in zip(parameters, step, strict=True):
                parameter.grad = gradient.clone()
        muon.step(1.0)
        reference.step()
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=2e-3)  # torch computes in bfloat16


def test_isolated_chunks_attend_to_themselves_and_the_question_to_all(tiny):
    from make_corpus import items

    (item,) = items("across-chunk 128", 1)
    seen = tiny.measure.isolated(item)
    assert seen.shape == (128, 128)
    (first, second, third) = item.bounds[:3]
    assert seen[second[0] : second[1], second[0] : second[1]].all()
    assert not seen[second[0] : second[1], first[0] : first[1]].any()
    assert not seen[third[0] : third[1], 1 : third[0]].any()
    assert seen[:, 0].all()
    assert seen[item.bounds[-1][1] :].all()
    paired = tiny.measure.own_pair(item)
    assert paired[second[0] : second[1], first[0] : first[1]].all()
    assert not paired[third[0] : third[1], 1 : third[0]].any()


def test_the_shipped_model_needs_the_first_chunk_to_read_the_second(tiny):
    """A repaired cache must recover this loss: isolated chunks leave chance, one in four; the own pair is enough."""
    import transformers
    from make_corpus import TOKENIZER, Encoder, items

    model = transformers.AutoModelForCausalLM.from_pretrained(
        ROOT / "weights/tiny-gqa", dtype=torch.float32, attn_implementation="sdpa"
    )
    encoder, asked = Encoder(tokenizers.Tokenizer.from_file(str(TOKENIZER))), items("across-chunk 128", 100)
    whole, isolated, paired = (
        tiny.measure.score(model, encoder, asked, visible).exact
        for visible in (None, tiny.measure.isolated, tiny.measure.own_pair)
    )
    assert whole >= 0.95 and paired >= 0.95
    assert isolated <= 0.25 + 2 * (0.25 * 0.75 / len(asked)) ** 0.5


def test_an_exact_score_counts_whole_answers(tiny):
    """A model that always gives one digit scores on the first token of an answer, if it matches, and on no more."""
    from make_corpus import TOKENIZER, Encoder, items

    encoder = Encoder(tokenizers.Tokenizer.from_file(str(TOKENIZER)))
    made = tiny.models.build("tiny-gqa", encoder.tokenizer.get_vocab_size(), seed=5).eval()
    asked = items("recall 64", 60)
    (seven,) = encoder(" 7")
    made.lm_head = torch.nn.Linear(128, made.config.vocab_size, bias=False)
    torch.nn.init.zeros_(made.lm_head.weight)
    made.model.norm = torch.nn.Module()
    made.model.norm.forward = lambda hidden: torch.ones_like(hidden)
    made.lm_head.weight.data[seven] = 1.0
    found = tiny.measure.score(made, encoder, asked)
    assert found.items == 60
    assert found.first == sum(item.answer.startswith(" 7") for item in asked) / 60
    assert found.exact == sum(item.answer == " 7 7 7" for item in asked) / 60


def test_the_script_prints_its_help(tiny, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["train_tiny.py", "--help"])
    with pytest.raises(SystemExit) as left:
        tiny.train.main()
    assert left.value.code == 0 and "--evaluate" in capsys.readouterr().out
