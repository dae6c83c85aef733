"""`bench disagg`: three modes over the same prompts, and the transfers of the split one."""

import os

import pytest

from nanokv.bench import disagg as bench
from nanokv.bench.disagg import MODES, measure_disagg
from nanokv.llm import LLM


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="one core for each process")
def test_each_mode_answers_all_prompts_and_only_the_split_one_transfers_them(tiny_llama, monkeypatch):
    monkeypatch.setattr(bench, "PAUSE_S", 0.05)
    monkeypatch.setattr(bench, "TRANSFERS", 2)

    def load(disagg=None, **fields):
        return LLM(tiny_llama, dtype="float32", max_model_len=512, num_pages=256, disagg=disagg, **fields)

    ticks = []
    rows = measure_disagg(load, 256, 2, 2, 16, 32, tick=lambda: ticks.append(1))
    assert [row["mode"] for row in rows] == list(MODES)
    assert len(ticks) == 2 * len(MODES)
    *together, split = rows
    for row in rows:
        assert len(row["arrivals_s"]) == 2
        assert row["longest_stall_s"] >= row["tpot_p99_s"] >= row["tpot_p50_s"] > 0
    for row in together:
        assert row["hand_over_s"] is None and row["bytes_moved"] == 0
    assert [(one["tokens"], len(one["seconds"])) for one in split["hand_overs"]] == [
        (256, 2),
        (64, 2),
    ]
    assert split["hand_over_s"] > 0
    assert 256 < split["bytes_moved"] < 256 * 8  # a PREFILL names pages and tokens; no tensor travels
