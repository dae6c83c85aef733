"""nanokv size: numbers from the layout that the engine allocates."""

import json
import xml.etree.ElementTree as ET

import pytest
import torch
from click.testing import CliRunner

from nanokv.bench.size import CacheSize, measure
from nanokv.cli.main import main
from nanokv.cli.size import byte_ticks
from nanokv.core.spec import LayerSpec, PageLayout, Plane
from nanokv.hub.catalog import CATALOG, SHIPPED
from nanokv.models import FAMILIES

NAME = "smollm2-135m-instruct"


def run(*arguments):
    return CliRunner().invoke(main, ["size", *arguments])


def rows(*arguments):
    result = run(*arguments, "--json")
    assert result.exit_code == 0, result.stderr
    return json.loads(result.stdout)["rows"]


def test_smollm2_costs_what_two_planes_of_three_heads_cost():
    first, middle, last = rows(NAME)
    assert first["bytes_per_token"] == 30 * 2 * 3 * 64 * 2 == 23_040
    assert first["bytes_per_token_by_layer"] == [768] * 30
    assert first["state_bytes_per_sequence"] == 0
    assert [row["context_tokens"] for row in (first, middle, last)] == [1024, 16384, 262144]
    assert middle["payload_bytes"] == middle["padded_bytes"] == 16384 * 23_040
    assert [row["within_trained_context"] for row in (first, middle, last)] == [True, False, False]
    assert first["tokens_in_memory"] == (4 << 30) // (16 * 23_040) * 16


def test_options_change_the_layout():
    (row,) = rows(NAME, "--dtype", "float32", "--page-size", "64", "--memory", "1GB", "--context", "100")
    assert row["bytes_per_token"] == 46_080
    assert (row["pages"], row["payload_bytes"], row["padded_bytes"]) == (2, 4_608_000, 128 * 46_080)
    assert row["tokens_in_memory"] == 10**9 // (64 * 46_080) * 64


def test_a_model_may_be_a_name_a_folder_or_a_config(smollm2):
    result = run(NAME, str(smollm2), str(smollm2 / "config.json"), "--json")
    value = json.loads(result.stdout)
    assert value["command"] == "size"
    assert value["model"] == [NAME, str(smollm2), str(smollm2 / "config.json")]
    assert len({row["bytes_per_token"] for row in value["rows"]}) == 1
    assert len(value["rows"]) == 9


def test_every_catalog_name_can_be_measured():
    result = run(*CATALOG)
    assert result.exit_code == 0, result.stderr


def test_without_json_a_table_is_printed():
    text = run(NAME, "--context", "1K,300").stdout
    assert "k 3x64, v 3x64" in text
    assert "4.0 GiB hold 186,400 tokens" in text
    assert "1K" in text
    assert "22.5 MiB" in text
    assert "300" in text


def test_odd_heads_show_what_alignment_costs(tmp_path):
    config = {**CATALOG[NAME].config, "head_dim": 2, "num_key_value_heads": 1, "num_attention_heads": 1}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (row,) = rows(str(tmp_path), "--page-size", "1", "--context", "10")
    assert (row["bytes_per_token"], row["payload_bytes"], row["padded_bytes"]) == (240, 2400, 10 * 30 * 2 * 16)


def test_states_count_once_per_sequence():
    spec = LayerSpec(
        paged=(Plane("k", (2, 16, 8), torch.bfloat16, 1),), state=(Plane("state", (3, 5), torch.float32, None),)
    )
    layout = PageLayout([spec, spec], 16)
    one = CacheSize("x", measure(NAME, "auto", "raw", 16).config, "bfloat16", "raw", layout)
    assert one.payload(17) == 17 * 64 + 120
    assert one.padded(17) == 2 * 16 * 64 + 128
    assert one.tokens_in(128 + 3 * 1024 + 5) == 48
    only = PageLayout([LayerSpec(state=spec.state)], 16)
    recurrent = CacheSize("x", one.config, "bfloat16", "raw", only)
    assert (recurrent.tokens_in(63), recurrent.tokens_in(64), recurrent.padded(10**6)) == (0, None, 64)


def test_mla_hybrid_and_gqa_models_compare_in_one_command():
    result = run("deepseek-v3", "qwen3.5-9b", "llama-3.1-70b", "--json")
    one = {row["model"]: row for row in json.loads(result.stdout)["rows"] if row["context_tokens"] == 1024}
    v3, hybrid, llama = one["deepseek-v3"], one["qwen3.5-9b"], one["llama-3.1-70b"]
    assert v3["scalars_per_token_layer"] == 576 and v3["bytes_per_token"] == 576 * 2 * 61 == 70_272
    assert v3["scalars_per_token_layer_mha"] == 32_768 and v3["scalars_per_token_layer_gqa"] == 2048
    assert llama["scalars_per_token_layer"] == llama["scalars_per_token_layer_gqa"] == 2048
    assert (hybrid["attention_layers"], hybrid["recurrent_layers"]) == (8, 24)
    assert hybrid["state_bytes_per_sequence"] == 24 * (32 * 128 * 128 * 4 + 8192 * 3 * 2)
    assert hybrid["state_equals_kv_tokens"] == 1572
    assert v3["state_equals_kv_tokens"] is llama["state_equals_kv_tokens"] is None
    assert hybrid["unverified_fields"] == ["mamba_ssm_dtype", "rope_type", "mrope_interleaved", "mlp_only_layers"]
    text = run("deepseek-v3", "qwen3.5-9b").stdout
    assert "128 heads x 128 = 16,384 scalars are K or V alone; K and V are 32,768" in text
    assert "stated by one source only: mamba_ssm_dtype" in text


@pytest.mark.parametrize(
    ("name", "per_token", "state"),
    [
        ("qwen3-0.6b", 114_688, 0),
        ("qwen3-30b-a3b", 98_304, 0),
        ("deepseek-v2-lite", 31_104, 0),
        ("qwen3-next-80b-a3b", 24_576, 36 * (2 * 2**20 + 8192 * 3 * 2)),
        ("qwen3.5-0.8b", 12_288, 18 * (2**20 + 6144 * 3 * 2)),
        ("qwen3.5-35b-a3b", 20_480, 30 * (2 * 2**20 + 8192 * 3 * 2)),
    ],
)
def test_every_family_costs_what_its_layers_keep(name, per_token, state):
    (row,) = rows(name, "--context", "1K")
    assert (row["bytes_per_token"], row["state_bytes_per_sequence"]) == (per_token, state)


def test_the_growth_is_drawn(tmp_path):
    for name in ("growth.svg", "growth.png"):
        result = run(NAME, "--plot", str(tmp_path / name))
        assert result.exit_code == 0, result.stderr
        assert result.stderr == f"wrote {tmp_path / name}\n"
    assert "svg" in ET.parse(tmp_path / "growth.svg").getroot().tag
    assert (tmp_path / "growth.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("arguments", "code", "complaint"),
    [
        (["nonsense"], 1, "'nonsense' is not a model"),
        ([NAME, "--codec", "zip"], 2, "codec='zip': allowed are"),
        ([NAME, "--memory", "much"], 2, "memory='much'"),
        ([NAME, "--memory", "0"], 2, "memory='0'"),
        ([NAME, "--context", "1K,x"], 2, "'x': expected token counts"),
        ([NAME, "--context", "0"], 2, "'0': expected token counts"),
        ([NAME, "--plot", "growth.pdf"], 2, ".png or .svg"),
        ([NAME, "--plot", "/no/such/folder/growth.png"], 1, "/no/such/folder/growth.png: No such file"),
    ],
)
def test_bad_input_is_one_line(arguments, code, complaint):
    result = run(*arguments)
    assert (result.exit_code, result.stdout) == (code, "")
    assert complaint in result.stderr
    assert result.stderr.count("\n") == 1


def test_an_unknown_name_is_answered_with_all_known_ones():
    complaint = run("nope").stderr
    assert all(name in complaint for name in (*CATALOG, *SHIPPED)) and complaint.count("\n") == 1


def test_an_unknown_family_is_named(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "mamba"}')
    result = run(str(tmp_path / "config.json"))
    assert result.exit_code == 1
    complaint = "model_type='mamba' is not supported; `nanokv size --help` lists the families"
    assert result.stderr == f"nanokv: {tmp_path}/config.json: {complaint}\n"
    assert all(family in run("--help").stdout for family in FAMILIES)


@pytest.mark.parametrize("options", [[], ["--json"]])
def test_a_model_that_cannot_be_sized_hides_no_other(tmp_path, options):
    good, bad, worse = (tmp_path / f"{name}.json" for name in ("good", "bad", "worse"))
    good.write_text(json.dumps(CATALOG[NAME].config))
    bad.write_text('{"model_type": "mamba"}')
    worse.write_text(json.dumps({**CATALOG[NAME].config, "hidden_size": 2**63}))
    result = run(str(bad), str(good), str(worse), *options)
    assert result.exit_code == 1
    assert [line.split(": ")[1] for line in result.stderr.splitlines()] == [str(bad), str(worse)]
    assert str(good) in result.stdout and str(bad) not in result.stdout.replace(f'"{bad}"', "")
    only = run(str(bad), str(worse), *options)
    assert (only.exit_code, only.stdout, only.stderr) == (1, "", result.stderr)


def test_a_codec_that_one_model_cannot_have_hides_no_other():
    result = run("deepseek-v2-lite", "qwen3-0.6b", "--codec", "kivi4", "--page-size", "32")
    assert result.exit_code == 1 and result.stderr.count("\n") == 1
    assert "qwen3-0.6b: qwen3, bfloat16, codec kivi4" in result.stdout


def test_quantised_weights_do_not_change_the_cache(tmp_path):
    path = tmp_path / "config.json"
    for method in ({"quant_method": "fp8", "weight_block_size": [128, 128]}, {"quant_method": "gptq", "bits": 4}):
        path.write_text(json.dumps({**CATALOG["deepseek-v3"].config, "quantization_config": method}))
        (row,) = rows(str(path), "--context", "1K", "--memory", "1TiB")
        assert (row["bytes_per_token"], row["memory_bytes"]) == (70_272, 1 << 40)


def test_the_ticks_of_the_figure_are_sizes_that_people_say():
    assert byte_ticks(1 << 20, 5 << 20) == [1 << 20, 1 << 21, 1 << 22, 1 << 23]
    assert byte_ticks(3 << 20, 4 << 30) == [1 << i for i in range(20, 34, 2)]  # 1, 4, 16, 64, 256 MiB, 1, 4 GiB
    assert byte_ticks(1, 1 << 45) == [1 << i for i in range(0, 60, 10)]
    assert byte_ticks(5, 5) == [4, 8]


def test_points_beyond_the_trained_context_are_marked_in_the_figure(tmp_path):
    drawn = {}
    for context in ("1K,8K", "1K,64K"):
        assert run(NAME, "--context", context, "--plot", str(tmp_path / "growth.svg")).exit_code == 0
        drawn[context] = (tmp_path / "growth.svg").read_text()
    words = "<!-- beyond the trained context -->"
    assert words in drawn["1K,64K"] and words not in drawn["1K,8K"]
    assert all("<!-- 256 MiB -->" in one and "<!-- 4 GiB -->" in one for one in drawn.values())
