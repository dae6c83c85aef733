"""The memory budget of pages, on a CPU and on a GPU."""

import oracles
import pytest
import torch

from nanokv import EngineConfig
from nanokv.codecs import resolve_codec
from nanokv.codecs.latents import RawLatentPages
from nanokv.core.errors import ConfigError
from nanokv.core.spec import PageLayout
from nanokv.engine.memory import MemoryBudget, gpu_memory, memory_for_pages, pool_size, reading_scratch
from nanokv.engine.profile_run import run_largest_step, run_reading_step
from nanokv.models.loader import load_model
from nanokv.models.read import read_folder

GIB = 2**30
CPU = torch.device("cpu")


def test_a_gpu_budget_is_its_fraction_minus_used_memory_and_the_memory_of_a_step():
    assert gpu_memory(80 * GIB, 70 * GIB, 5 * GIB, 0.5) == MemoryBudget(25 * GIB, 25 * GIB)


def test_a_gpu_budget_reserves_scratch_in_proportion_to_its_pages():
    assert gpu_memory(80 * GIB, 70 * GIB, 5 * GIB, 0.5, scratch=0.25) == MemoryBudget(20 * GIB, 20 * GIB)


def bound(folder, codec: str, dtype: torch.dtype = torch.float32, page_size: int = 32, exact: bool = True):
    own = resolve_codec(codec, dtype, exact)
    model = load_model(folder, read_folder(folder), dtype, CPU, own, page_size)
    layout = PageLayout(model.specs, page_size)
    model.bind(layout)
    return model, layout


@pytest.mark.parametrize(("codec", "family"), [("tqp3", "llama"), ("kivi4", "qwen3_5"), ("tq4", "deepseek_v3")])
def test_a_reading_step_reads_the_requested_number_of_pages(codec, family, tmp_path):
    model, layout = bound(oracles.checkpoint(family, tmp_path), codec)
    original, read = model.forward, []
    model.forward = lambda batch, store: read.append(batch) or original(batch, store)
    for count, rows in ((1, 1), (1, 20), (64, 1), (64, 64)):
        run_reading_step(count, rows, EngineConfig(page_size=32), model, layout, CPU)
        batch = read[-1]
        assert sorted(batch.page_tables.flatten().tolist()) == list(range(count))
        assert batch.num_rows == max(rows, batch.num_requests)
        assert (batch.positions[batch.request_starts[1:].long() - 1] == batch.page_tables.shape[1] * 32 - 1).all()


@pytest.mark.parametrize("family", oracles.FAMILIES)
def test_reading_scratch_is_the_larger_of_decodes_and_a_prompt_over_cached_pages(family, tmp_path):
    model, layout = bound(oracles.checkpoint(family, tmp_path), "tq4", page_size=16, exact=False)
    original, read, own = model.forward, [], layout.page_bytes
    model.forward = lambda batch, store: read.append(batch) or original(batch, store)

    def scratch(*bytes_of_a_page: float) -> float:
        """The scratch found if a page takes these extra shares of its size in decodes, and then in prompts."""
        read.clear()
        each = iter(own * (1 + more) for more in bytes_of_a_page for _ in range(2))

        def peak(run) -> int:
            run()
            return round(read[-1].page_tables.numel() * next(each)) + 1000

        config = EngineConfig(max_step_tokens=96, codec="tq4", prefill="fast")
        return reading_scratch(peak, config, model, layout, CPU)

    assert scratch(0.25, 0.5) == pytest.approx(0.5, abs=0.01)
    assert [batch.num_rows > batch.num_requests for batch in read] == [False, False, True, True]
    assert read[2].num_rows == read[3].num_rows
    assert scratch(0.25, 0.0) == pytest.approx(0.25, abs=0.01)


def test_the_prompt_over_cached_pages_expands_latents(tmp_path, monkeypatch):
    model, layout = bound(oracles.checkpoint("deepseek_v3", tmp_path), "raw", torch.bfloat16, page_size=16)
    expanded, own = [], RawLatentPages.expanded
    monkeypatch.setattr(RawLatentPages, "expanded", lambda self, *rest: expanded.append(rest[-1]) or own(self, *rest))
    reading_scratch(lambda run: run() or 0, EngineConfig(), model, layout, CPU)
    longest = 1 << (model.config.max_positions.bit_length() - 1)  # a power of two, so that it divides the probed pages
    assert max(int(batch.positions[-1]) for batch in expanded) == longest - 1


def test_scratch_for_one_request_at_a_time_is_at_most_that_of_the_longest():
    assert gpu_memory(80 * GIB, 70 * GIB, 5 * GIB, 0.5, 0.25, at_once=4 * GIB) == MemoryBudget(24 * GIB, 24 * GIB)
    assert gpu_memory(80 * GIB, 70 * GIB, 5 * GIB, 0.5, 0.25, at_once=400 * GIB) == MemoryBudget(20 * GIB, 20 * GIB)


def test_the_error_for_a_gpu_without_room_for_pages_names_the_field():
    with pytest.raises(ConfigError, match="gpu_memory_fraction=0.5.*max_step_tokens"):
        gpu_memory(80 * GIB, 40 * GIB, 1, 0.5)


@pytest.mark.parametrize("fraction", [0, 1.5, "most", True])
def test_a_memory_fraction_must_be_a_positive_number_up_to_one(fraction):
    with pytest.raises(ConfigError, match="gpu_memory_fraction"):
        EngineConfig(gpu_memory_fraction=fraction)


@pytest.mark.parametrize("family", ["llama", "deepseek_v3", "qwen3_5"])
def test_the_largest_step_runs_on_a_store_of_one_page(family, tmp_path):
    folder = oracles.checkpoint(family, tmp_path)
    model_config = read_folder(folder)
    codec = resolve_codec("raw", torch.float32)
    model = load_model(folder, model_config, torch.float32, torch.device("cpu"), codec, 16)
    layout = PageLayout(model.specs, 16)
    model.bind(layout)
    seen = []
    original = model.forward
    model.forward = lambda batch, store: seen.append((batch, store)) or original(batch, store)
    run_largest_step(EngineConfig(max_step_tokens=200, max_requests=8), model, layout, torch.device("cpu"))
    ((batch, store),) = seen
    assert batch.num_rows == 200 and len(store.pages) == 1
    memory = memory_for_pages(EngineConfig(), model, layout, torch.device("cpu"))
    assert 0 < memory.default <= memory.limit
    assert pool_size(EngineConfig(num_pages=3, num_states=4), layout, memory)[0] == 3
