"""What a bench shows: captions, spreads, marks of noise, and what it had measured when it was interrupted."""

import itertools
import json
import re
import xml.etree.ElementTree as ET
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from click.testing import CliRunner
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from nanokv import LLM
from nanokv.bench import decode, figures, labels, prefix, report, request
from nanokv.bench.measure import cache_bytes, is_noise, ranged
from nanokv.cli import common
from nanokv.cli.main import main

ROOT = Path(__file__).resolve().parents[1]
SMALL = {
    "request": ["--prompt-tokens", "40,80", "--output-tokens", 4, "--repeat", 2],
    "prefix": ["--prompt-tokens", 48, "--output-tokens", 3, "--shared", "0,1", "--concurrency", "1,2",
               "--requests", 3, "--repeat", 2],
    "decode": ["--batch", "1,2", "--context", "32,64", "--steps", 2, "--repeat", 2],
    "codecs": ["--codecs", "raw,fp8,tq4", "--quick", "--kv-memory", "4MiB"],
    "disagg": ["--prompt-tokens", 64, "--prompts", 1, "--running", 2, "--context", 16, "--repeat", 1],
}  # fmt: skip
INTERRUPTED = {
    # What is called, at which call the user presses Ctrl-C, and the runs of each row that was measured until then.
    "request": ("nanokv.bench.request.closed_loop", 7, [2, 1]),
    "prefix": ("nanokv.bench.prefix.run_point", 4, [2, 1]),
    "decode": ("nanokv.bench.decode.decode_speed", 4, [2, 1]),
    "codecs": ("nanokv.bench.codecs.in_turns", 2, ["raw", "raw", "fp8"]),
    "disagg": ("nanokv.bench.disagg.run_trace", 3, [1]),
}


@pytest.fixture(autouse=True)
def _quick_bandwidth(monkeypatch):
    """No test here needs the true bandwidth of memory, nor pauses between prompts."""
    monkeypatch.setattr("nanokv.bench.measure.BANDWIDTH_BYTES", 1 << 20)
    monkeypatch.setattr("nanokv.bench.disagg.PAUSE_S", 0.05)


def bench(*arguments):
    return CliRunner().invoke(main, ["bench", *map(str, arguments)])


def at_call(number, error, target, monkeypatch):
    """Raises `error` in the place of this call of a function, counted from 1."""
    module, _, name = target.rpartition(".")
    real, calls = getattr(__import__(module, fromlist=[name]), name), itertools.count(1)

    def called(*arguments, **options):
        if next(calls) == number:
            raise error
        return real(*arguments, **options)

    monkeypatch.setattr(target, called)


# ---- interrupts ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("what", SMALL)
def test_an_interrupted_bench_shows_what_it_measured_until_then(what, tiny_llama, tmp_path, monkeypatch):
    target, number, expected = INTERRUPTED[what]
    at_call(number, KeyboardInterrupt, target, monkeypatch)
    figure = tmp_path / "figure.svg"
    result = bench(what, tiny_llama, *SMALL[what], "--json", "--plot", figure)
    assert result.exit_code == 130, result.stderr
    found = json.loads(result.stdout)
    assert found["settings"]["interrupted"] is True
    assert [row["codec"] if what == "codecs" else row["repeats"] for row in found["rows"]] == expected
    assert f"interrupted: {common.counted(len(expected), 'row')} until then" in result.stderr
    assert ET.parse(figure).getroot().tag.endswith("svg")


def test_an_interrupted_bench_prints_its_table(tiny_llama, monkeypatch):
    target, number, _ = INTERRUPTED["decode"]
    at_call(number, KeyboardInterrupt, target, monkeypatch)
    result = bench("decode", tiny_llama, *SMALL["decode"])
    assert result.exit_code == 130
    assert "of the limit" in result.stdout and len(re.findall(r"^ +1 +\d+", result.stdout, re.MULTILINE)) == 2


def test_a_bench_interrupted_before_its_first_row_prints_no_table(tiny_llama, tmp_path, monkeypatch):
    at_call(1, KeyboardInterrupt, INTERRUPTED["decode"][0], monkeypatch)
    result = bench("decode", tiny_llama, *SMALL["decode"], "--plot", tmp_path / "figure.png")
    assert (result.exit_code, result.stdout) == (130, "")
    assert result.stderr.startswith("interrupted: 0 rows") and not (tmp_path / "figure.png").exists()


# ---- captions -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("what", [what for what in SMALL if what != "disagg"])
def test_a_figure_says_what_was_measured_where_and_when(what, tiny_llama, monkeypatch):
    drawn = []
    monkeypatch.setattr(common, "save_figure", lambda figure, path: drawn.append(figure))
    result = bench(what, tiny_llama, *SMALL[what], "--plot", "figure.png", "--json")
    assert result.exit_code == 0, result.stderr
    text = " ".join(drawn[0].get_supxlabel().split())
    found = json.loads(result.stdout)
    machine = found["hardware"]
    expected = [f"bench {what}: {tiny_llama}", "float32", f"{machine['cpu']}, {machine['cpus']} cores", found["date"],
                machine["instructions"], f"{machine['threads']} threads", "nanokv 0.",
                f"torch {torch.__version__}"]  # fmt: skip
    assert [words for words in expected if " ".join(words.split()) not in text] == []
    assert ("codec raw" in text) == (what != "codecs")


def test_a_caption_names_the_gpu_of_a_run_on_one_and_what_differs_from_the_default():
    machine = {"cpu": "a CPU", "cpus": 8, "gpus": ["a GPU"], "system": "Linux", "python": "3.11", "torch": "2",
               "threads": 4}  # fmt: skip
    settings = {"device": "cuda:0", "dtype": "bfloat16", "dummy": True, "kernels": "reference", "repeat": 5}
    first, second = report.caption(
        {"command": "bench decode", "model": "m", "settings": settings | {"interrupted": True}, "hardware": machine}
    ).splitlines()
    assert first == "bench decode: m, random weights, bfloat16, reference kernels, median of 5 (lowest to highest), " \
        "interrupted"  # fmt: skip
    assert second == "a GPU, 4 threads, Linux, torch 2, Python 3.11"


def test_a_caption_fits_the_width_of_its_figure():
    for width in (5, 13):
        figure = Figure(figsize=(width, 3), layout="constrained")
        canvas = FigureCanvasAgg(figure)
        figures.add_caption(figure, "words of a caption " * 20)
        canvas.draw()
        assert figure._supxlabel.get_window_extent().x1 <= figure.bbox.x1


# ---- spreads and noise --------------------------------------------------------------------------------------------


def test_a_number_of_several_runs_stands_over_its_lowest_and_highest():
    row = {"repeats": 3, "context_tokens": 1, "batch": 1, "bytes_per_step": 1, "bytes_per_s": 1, "noise": False}
    row |= ranged("step_s", [0.0123, 0.0119, 0.02]) | ranged("output_tokens_per_s", [81, 84, 50])
    row |= ranged("bandwidth_share", [0.5, 0.6, 0.4])
    cells = dict(zip([title for title, _ in report.DECODE], [show(row) for _, show in report.DECODE], strict=True))
    assert cells["step"] == "12.3 ms\n11.9 to 20 ms"
    assert cells["tokens/s"] == "81\n50 to 84"
    assert cells["of the limit"] == "50 %\n40 to 60 %"


def test_impossible_shares_are_noise():
    assert [is_noise(share) for share in (-0.01, 0, 0.5, 1.05, 1.06)] == [True, False, False, False, True]
    assert [is_noise(share, ceiling=0.04) for share in (0.03, 0.042, 0.05)] == [False, False, True]


def noisy(what, tiny_llama, tmp_path):
    """The rows, the table, and the words of the figure of a bench."""
    printed = bench(what, tiny_llama, *SMALL[what])
    figure = tmp_path / "figure.svg"
    import matplotlib

    with matplotlib.rc_context({"svg.fonttype": "none"}):
        result = bench(what, tiny_llama, *SMALL[what], "--json", "--plot", figure)
    assert printed.exit_code == result.exit_code == 0, result.stderr
    return json.loads(result.stdout)["rows"], printed.stdout, figure.read_text()


def slower(real, factor):
    """A closed loop whose every second call takes `factor` times as long: the one with a hit."""
    calls = itertools.count(1)

    def called(*arguments):
        loop, scale = real(*arguments), factor if next(calls) % 2 == 0 else 1
        times = {name: scale * getattr(loop.requests[0], name) for name in ("ttft_s", "tpot_s", "latency_s")}
        return SimpleNamespace(requests=[SimpleNamespace(**vars(loop.requests[0]) | times)])

    return called


@pytest.mark.parametrize("factor", [100, 1e-9])
def test_a_negative_saving_or_one_beyond_its_ceiling_is_marked(factor, tiny_llama, tmp_path, monkeypatch):
    monkeypatch.setattr(request, "closed_loop", slower(request.closed_loop, factor))
    rows, table, figure = noisy("request", tiny_llama, tmp_path)
    assert [row["noise"] for row in rows] == [True, True]
    assert table.count("noise ") == 2 and report.NOISE in table and "noise: saved" in figure


def test_throughput_beyond_its_ceiling_is_marked(tiny_llama, tmp_path, monkeypatch):
    slow = prefix.Speeds(1.0, dict.fromkeys([(clients, shared) for clients in (1, 2) for shared in (0, 48)], 1.0))
    monkeypatch.setattr(prefix, "measure_speeds", lambda *_: slow)
    rows, table, figure = noisy("prefix", tiny_llama, tmp_path)
    assert all(row["noise"] for row in rows)
    assert table.count("noise ") == 4 and report.NOISE in table and "noise: over 105 %" in figure


@pytest.mark.parametrize("cache", [None, 1 << 40])
def test_bandwidth_beyond_the_limit_is_marked_unless_a_step_fits_in_the_cache(cache, tiny_llama, tmp_path, monkeypatch):
    monkeypatch.setattr(decode, "bandwidth", lambda device, num_bytes: 1.0)
    monkeypatch.setattr(decode, "cache_bytes", lambda device: cache)
    rows, table, figure = noisy("decode", tiny_llama, tmp_path)
    assert all((row["noise"], row["in_cache"]) == (cache is None, cache is not None) for row in rows)
    assert (report.NOISE in table, report.IN_CACHE in table) == (cache is None, cache is not None)
    assert ("noise: over 105 %" in figure) == (cache is None)


def test_raw_that_differs_from_itself_is_marked(tiny_llama, monkeypatch):
    speeds = itertools.cycle([1.0, 2.0])
    monkeypatch.setattr("nanokv.bench.codec_speed.decode_speed", lambda *_: next(speeds))
    printed = bench("codecs", tiny_llama, "--codecs", "raw,fp8", "--quick", "--kv-memory", "4MiB").stdout
    assert printed.count("noise ") == 1 and report.NOISE in printed


def test_the_cache_of_the_processor_is_read():
    found = cache_bytes(torch.device("cpu"))
    assert found is None or 1 << 15 <= found < 1 << 34


def test_every_measured_number_of_a_row_has_its_lowest_and_highest(tiny_llama):
    with LLM(tiny_llama, num_pages=200) as llm:
        rows = [
            request.measure_request(llm, 40, 3, repeat=2),
            decode.measure_decode(llm, [1], [32], steps=2, repeat=2)[0],
            prefix.measure_prefix(llm, 48, 3, [0], [1], requests=2, repeat=2)[0],
        ]
    columns = (report.REQUEST, report.DECODE, report.PREFIX)
    known = {"prompt", "output", "a hit can save", "batch", "context", "MB a step", "GB/s", "clients", "shared",
             "hit ratio", "ceiling", "computed"}  # fmt: skip
    for row, titles in zip(rows, columns, strict=True):
        for title, show in titles:
            assert title in known or "\n" in show(row) or row["repeats"] == 1, title
        for name in [name for name in row if f"{name}_min" in row]:
            assert row[f"{name}_min"] <= row[name] <= row[f"{name}_max"], name


# ---- labels -------------------------------------------------------------------------------------------------------


def overlapping(boxes):
    pairs = itertools.combinations(boxes, 2)
    return [(a, b) for a, b in pairs if a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]]


def test_labels_of_crowded_points_cover_neither_points_nor_one_another():
    points = [(100 + 7 * i, 100 + 5 * (i * i % 7)) for i in range(14)]
    corners = labels.place(points, [(40, 10)] * 14, (0, 0, 400, 300))
    boxes = [(x, y, x + 40, y + 10) for x, y in corners]
    assert overlapping(boxes) == []
    assert not any(x < a < x + 40 and y < b < y + 10 for x, y in corners for a, b in points)
    assert corners == labels.place(points, [(40, 10)] * 14, (0, 0, 400, 300))


def test_heights_are_spread_out_in_their_order():
    heights = [10.0, 50.0, 51.0, 52.0, 90.0]
    found = labels.spread_out(heights, 10)
    assert found == [10, 41, 51, 61, 90]
    assert labels.spread_out([3.0, 1.0, 2.0], 10) == [12, -8, 2]


def test_no_label_of_the_published_codecs_covers_another():
    result = json.loads((ROOT / "docs/benchmarks/codecs.json").read_text())
    figure = Figure(figsize=(13, 6), layout="constrained")
    canvas = FigureCanvasAgg(figure)
    figures.draw_codecs(figure, [row for row in result["rows"] if row["model"] == result["model"]])
    canvas.draw()
    for axes in figure.axes:
        assert len(axes.texts) >= 14
        # An annotation's own extent covers its line too: only the text counts.
        boxes = [super(type(text), text).get_window_extent(canvas.get_renderer()).extents for text in axes.texts]
        assert overlapping(boxes) == []


def test_codecs_are_told_apart_by_colour_and_marker():
    from nanokv.bench.codecs import ALL

    assert len({(labels.colour(name, ALL), labels.marker(name)) for name in ALL}) == len(ALL)
