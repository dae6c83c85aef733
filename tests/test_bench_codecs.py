"""nanokv bench codecs: errors beside theory, words beside the reference, rows, the command."""

import json
import math
import sys
import xml.etree.ElementTree as ET
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from click.testing import CliRunner

from nanokv import LLM
from nanokv.bench import report
from nanokv.bench.codec_errors import model_errors, random_errors, record, replay, theory
from nanokv.bench.codec_quality import Judged, Reference, summary
from nanokv.bench.codec_speed import in_turns, requests_at_once
from nanokv.bench.codec_texts import texts_for, topics
from nanokv.bench.codecs import ALL, CodecBench, Plan, key, notes, page_size_of, sizes, swept
from nanokv.cli.main import main
from nanokv.codecs import resolve_codec
from nanokv.codecs.tables import distortion
from nanokv.core.errors import CacheError, CodecError, ConfigError

ROOT = Path(__file__).resolve().parents[1]
PLAN = Plan(texts=2, text_tokens=64, points=((1, 32), (2, 64), (1, 4096)), steps=2, turns=2, requests=3, context=64)


@pytest.fixture(scope="module")
def open_llm(tiny_llama):
    return lambda **fields: LLM(tiny_llama, **{"kv_memory": "2MiB", "debug_checks": True} | fields)


@pytest.fixture(scope="module")
def raw(open_llm):
    with open_llm() as made:
        yield made


@pytest.fixture(scope="module")
def bench(open_llm, raw):
    return CodecBench(open_llm, raw, PLAN)


def run(*arguments):
    return CliRunner().invoke(main, ["bench", "codecs", *map(str, arguments)])


# ---- errors -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("codec", ["tq2", "tq3", "tq4", "tqp3", "tqp3-orth", "qjl"])
def test_random_vectors_lose_what_theory_says(codec):
    found = random_errors(resolve_codec(codec, torch.float32), 64, 16)
    assert found["random_k_mse"] == pytest.approx(theory(codec, 64), rel=0.05)


def test_the_raw_codec_loses_nothing_and_pairs_lose_on_one_side():
    assert set(random_errors(resolve_codec("raw", torch.float32), 64, 16).values()) == {0.0}
    found = random_errors(resolve_codec("tq4/raw", torch.float32), 64, 16)
    assert found["random_v_mse"] == 0 < found["random_k_mse"]


def test_theory_is_that_of_the_papers():
    assert theory("tq2", 64) == distortion(2, 64)
    assert theory("tqp2", 64) == pytest.approx(math.pi / 2 * 0.358387, rel=1e-4)
    assert theory("int8", 64) is None


def test_layers_are_replayed_on_what_they_saw(open_llm, raw):
    ids = list(range(64))
    recorded = record(raw, ids)
    assert [(one.layer, one.inputs.shape) for one in recorded] == [(0, (64, 64)), (1, (64, 64))]
    assert [x.shape for x in recorded[0].vectors] == [(64, 2, 16)] * 2
    assert type(raw.engine.model.layers[0].mixer).__name__ == "Attention"  # no tap is left behind
    assert set(model_errors(raw, recorded).values()) == {0.0}
    for codec in ("int8", "kivi4", "tq4"):
        with open_llm(codec=codec, page_size=page_size_of(codec)) as llm:
            assert 0 < model_errors(llm, recorded)["attention_error"] < 0.5
    assert torch.equal(replay(raw, 1, recorded[1].inputs)[0], recorded[1].outputs)


# ---- quality ------------------------------------------------------------------------------------------------------


def test_the_reference_agrees_with_itself_and_int4_less_than_int8(open_llm, raw):
    texts = topics(raw, 2, 100)
    assert [len(ids) for ids in texts.values()] == [100, 100]
    reference, (name, ids) = Reference(raw, texts), next(iter(texts.items()))
    itself = reference.judge(raw, name)
    log_probs = raw.score(ids)[:-1].log_softmax(-1)
    surprise = -log_probs[torch.arange(99), torch.tensor(ids[1:])].mean().item()
    assert itself == Judged(0.0, 1.0, pytest.approx(surprise, rel=1e-5))
    with open_llm(codec="int8") as eight, open_llm(codec="int4") as four:
        better, worse = reference.judge(eight, name), reference.judge(four, name)
    p, q = log_probs.double(), None
    with open_llm(codec="int4") as four:
        q = four.score(ids)[:-1].double().log_softmax(-1)
    assert worse.kl == pytest.approx((p.exp() * (p - q)).sum(-1).mean().item(), rel=1e-3)
    assert 0 < better.kl < worse.kl
    assert worse.top1 < 1


def test_means_and_spread_are_over_texts():
    found = summary([Judged(0.1, 0.9, 1.0), Judged(0.3, 0.7, 2.0)], [Judged(0, 1, 1.0), Judged(0, 1, 1.0)])
    assert found["kl"] == pytest.approx(0.2)
    assert found["kl_std"] == pytest.approx(0.02**0.5)
    assert found["perplexity_ratio"] == pytest.approx((1 + math.e) / 2)
    assert summary([Judged(0.1, 0.9, 1.0)], [Judged(0, 1, 1.0)])["kl_std"] == 0


def test_texts_too_long_for_the_model_are_refused(raw):
    with pytest.raises(ConfigError, match="at most 512 here"):
        topics(raw, 1, 600)


def test_a_small_shipped_model_is_judged_on_the_language_it_knows():
    with LLM(ROOT / "weights/tiny-gqa", num_pages=64) as llm:
        texts = {name: ids[:256] for name, ids in texts_for(llm, 2, 256).items()}
        assert [len(ids) for ids in texts.values()] == [256, 256]
        assert "The key of" in llm.tokenizer.decode(texts["facts 0"])
        (own, _), python = summary_of(llm, texts), summary_of(llm, topics(llm, 1, 256))[0]
    vocab = llm.model_config.vocab_size
    assert own["perplexity"] < 30 < vocab < python["perplexity"]
    assert "does not know the language" in notes([{"part": "codec", "codec": "tq4", **python}], "float32", vocab)[0]
    assert notes([{"part": "codec", "codec": "tq4", **own}], "float32", vocab) == []


def summary_of(llm, texts):
    reference = Reference(llm, texts)
    judged = [reference.judge(llm, name) for name in texts]
    return [summary([one], [one]) for one in judged]


def test_the_row_of_raw_is_explained_where_its_dtype_costs_something():
    rows = [{"part": "codec", "codec": "raw", "perplexity": 3.0}]
    (note,) = notes(rows, "bfloat16", 100)
    assert "the KL of raw is the cost of bfloat16" in note
    assert notes(rows, "float32", 100) == []


# ---- sizes and rows -----------------------------------------------------------------------------------------------


def test_sizes_are_those_of_the_pool(open_llm, raw):
    for codec, expected in (("raw", 2 * 2 * 2 * 16 * 4), ("tq4", 2 * 2 * 2 * (8 + 2)), ("fp8/tq4", 2 * 2 * (18 + 10))):
        found = sizes(raw, codec)
        with open_llm(codec=codec) as llm:
            store = llm.engine.store
            assert found["pool_bytes_per_token"] == store.pages.data.nbytes / len(store.pages) / 16
        assert found["bytes_per_token"] == expected
        assert found["true_bits"] == 8 * expected / (2 * 2 * 2 * 16)
        assert found["tokens_in_1gib"] == 2**30 // (16 * expected) * 16


def test_smaller_codes_let_more_requests_run(bench, raw):
    found = {codec: bench._requests_at_once(codec)["requests_at_once"] for codec in ("raw", "fp8", "tq4")}
    assert found["raw"] == PLAN.requests
    assert found["raw"] < found["fp8"] < found["tq4"]
    assert requests_at_once(raw, 64) == len(raw.engine.store.pages) // 5
    assert raw.stats()["pages_cached"] == raw.stats()["requests_running"] == 0


def test_a_slow_turn_is_not_repeated(raw, monkeypatch):
    assert in_turns(raw, raw, 1, 32, 1, turns=2)["turns"] == 2
    monkeypatch.setattr("nanokv.bench.codec_speed.ONCE_S", 0)
    assert in_turns(raw, raw, 1, 32, 1, turns=2)["turns"] == 1


def test_rows_come_once_each_and_known_ones_are_not_measured_again(bench):
    ticks = []
    rows = list(bench.rows("tq4", tick=lambda: ticks.append(1)))
    assert [key(row) for row in rows] == [
        ("codec", "tq4", None, None),
        ("speed", "tq4", 1, 32),
        ("speed", "tq4", 2, 64),
    ]
    assert len(ticks) == bench.num_ticks(["tq4"], [])
    assert all(row["speed_ratio_min"] <= row["speed_ratio"] <= row["speed_ratio_max"] for row in rows[1:])
    assert [key(row) for row in bench.rows("tq4", known={key(row) for row in rows[:2]})] == [key(rows[2])]
    (one,) = bench.rows("raw/tq4", with_speed=False)
    assert one["random_k_mse"] == one["model_k_mse"] == 0 < one["model_v_mse"]
    assert "requests_at_once" not in one


def test_a_sweep_leaves_out_sides_that_do_not_stand_alone():
    assert swept(["raw", "tq4", "qjl", "kivi4"]) == ["tq4/raw", "qjl/raw", "raw/tq4"]
    for name in swept(ALL):
        resolve_codec(name, torch.float32)


# ---- the command --------------------------------------------------------------------------------------------------


def test_it_prints_one_object_and_draws_a_figure_and_names_what_does_not_fit(tiny_llama, tmp_path):
    figure = tmp_path / "codecs.svg"
    result = run(
        tiny_llama,
        "--quick",
        "--codecs",
        "raw,tq4,polar,kivi4",
        "--sweep",
        "--kv-memory",
        "4MiB",
        "--json",
        "--plot",
        figure,
    )
    assert result.exit_code == 0, result.stderr
    found = json.loads(result.stdout)
    assert found["command"] == "bench codecs"
    assert found["settings"]["prefill"] == "exact"
    assert [row["codec"] for row in found["rows"] if row["part"] == "codec"] == [
        "raw", "tq4", "kivi4", "tq4/raw", "raw/tq4",
    ]  # fmt: skip
    assert {left["codec"] for left in found["settings"]["left_out"]} == {"polar", "polar/raw", "raw/polar"}
    assert "multiples of 64" in result.stderr
    assert all(value is None or isinstance(value, (int, float, str)) for row in found["rows"] for value in row.values())
    assert ET.parse(figure).getroot().tag.endswith("svg")
    *_, (columns, lines, _) = report.codec_tables(found["rows"])
    assert [[show(line) != "" for _, show in columns] for line in lines] == [[True, True]] * 3


def test_it_prints_tables_for_people(tiny_llama):
    result = run(tiny_llama, "--quick", "--codecs", "fp8", "--kv-memory", "4MiB")
    assert result.exit_code == 0, result.stderr
    for word in ("bits", "KL", "tokens/s", "1 x 256"):
        assert word in result.stdout
    assert "…" not in result.stdout


@pytest.mark.parametrize("error", [RuntimeError("broken"), CodecError("broken")])
def test_a_failure_of_one_codec_keeps_the_others_and_is_no_choice_left_out(error, tiny_llama, monkeypatch):
    measured = CodecBench.rows

    def rows(self, codec, **options):
        if codec == "int8":
            raise error
        yield from measured(self, codec, **options)

    monkeypatch.setattr(CodecBench, "rows", rows)
    result = run(tiny_llama, "--quick", "--codecs", "int8,fp8", "--kv-memory", "4MiB", "--json")
    assert result.exit_code == 1
    assert f"int8: {type(error).__name__}: broken" in result.stderr
    found = json.loads(result.stdout)
    assert {row["codec"] for row in found["rows"]} == {"fp8"}
    assert found["settings"]["left_out"] == [] and [one["codec"] for one in found["settings"]["failures"]] == ["int8"]


@pytest.mark.parametrize("name", ["tq5", "qjl/qjl", "", "kivi4/tq4"])
def test_a_wrong_codec_name_is_one_line_that_names_the_allowed_ones(name, tiny_llama):
    result = run(tiny_llama, "--codecs", f"raw,{name}")
    assert result.exit_code == 2
    assert "allowed" in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1


# ---- the script ---------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_run_that_was_broken_off_goes_on_and_failures_are_named(tiny_llama, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    import bench_codecs

    def call(*more):
        monkeypatch.setattr(sys, "argv", ["bench_codecs.py", "--quick", "--output", str(path), *more])
        with pytest.raises(SystemExit) as left:
            bench_codecs.main()
        return left.value.code

    path = tmp_path / "codecs.json"
    monkeypatch.setattr(bench_codecs, "ALL", ("fp8", "tq4"))
    arguments = ["--model", str(tiny_llama), "--tiny", "no-such-model"]
    assert call(*arguments) == 1
    found = json.loads(path.read_text())
    assert [failure["model"] for failure in found["failures"]] == ["no-such-model"]
    codecs = [row["codec"] for row in found["rows"] if row["part"] == "codec"]
    assert codecs == ["fp8", "tq4", "fp8/raw", "tq4/raw", "raw/fp8", "raw/tq4"]
    assert path.with_suffix(".svg").exists()

    kept = found["rows"][:2]
    refused = {"model": str(tiny_llama), "codec": "tq4", "reason": "a choice that could not be honoured then"}
    path.write_text(json.dumps(found | {"rows": kept, "left_out": [refused]}))
    call(*arguments)
    assert refused not in json.loads(path.read_text())["left_out"]  # its rows are there
    again = json.loads(path.read_text())["rows"]
    assert again[:2] == kept
    assert len(again) == len(found["rows"])
    assert "another settings" in call("--model", str(tiny_llama), "--tiny", "")


def test_only_a_choice_that_cannot_be_honoured_is_left_out(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    import bench_codecs

    def refusing(error):
        yield {"part": "codec", "codec": "tq4"}
        raise error

    result = bench_codecs.Result(tmp_path / "codecs.json", "model", {}, fresh=False)
    for error in (ConfigError("no"), CodecError("not finite"), CacheError("books")):
        result.measure("model", "tq4", lambda error=error: refusing(error))
    found = json.loads(result.path.read_text())
    assert [one["reason"] for one in found["left_out"]] == ["no"]
    assert [one["error"] for one in found["failures"]] == ["CodecError: not finite", "CacheError: books"]
    assert len(found["rows"]) == 3


def test_the_answer_of_a_recall_is_counted_to_the_last_token(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    import bench_codecs

    item = SimpleNamespace(prompt="the key is 4 2. the key is", answer=" 4 2")

    class Model:
        tokenizer = SimpleNamespace(encode=lambda text, add_special: [ord(letter) for letter in text])

        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

        def generate(self, prompts, params, progress=None):
            assert [one.max_tokens for one in params] == [4, 4]
            return [SimpleNamespace(token_ids=[ord(letter) for letter in text]) for text in (" 4 2", " 4 3")]

    (row,) = bench_codecs.recall(lambda **_: Model(), "tq4", {64: [item, item]})
    assert (row["distance"], row["items"], row["exact"]) == (64, 2, 0.5)
