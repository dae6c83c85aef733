"""How much memory pages get, on a CPU and on a GPU."""

import oracles
import pytest
import torch

from nanokv import EngineConfig
from nanokv.codecs import resolve_codec
from nanokv.core.errors import ConfigError
from nanokv.core.spec import PageLayout
from nanokv.engine.memory import Memory, gpu_memory, memory_for_pages, pool_size
from nanokv.engine.probe import run_largest_step, run_reading_step
from nanokv.models.config import ModelConfig
from nanokv.models.loader import load_model

GIB = 2**30


def test_a_gpu_gives_its_fraction_less_what_is_used_and_what_a_step_needs():
    assert gpu_memory(80 * GIB, 70 * GIB, 5 * GIB, 0.5) == Memory(25 * GIB, 25 * GIB)


def test_a_gpu_keeps_room_to_decode_the_pages_that_it_gives():
    assert gpu_memory(80 * GIB, 70 * GIB, 5 * GIB, 0.5, scratch=0.25) == Memory(20 * GIB, 20 * GIB)


@pytest.mark.parametrize(("codec", "family"), [("tqp3", "llama"), ("kivi4", "qwen3_5"), ("tq4", "deepseek_v3")])
def test_a_step_that_reads_pages_reads_as_many_as_it_is_told(codec, family, tmp_path):
    folder, config = oracles.checkpoint(family, tmp_path), EngineConfig(page_size=32)
    own = resolve_codec(codec, torch.float32)
    cpu = torch.device("cpu")
    model = load_model(folder, ModelConfig.from_folder(folder), torch.float32, cpu, own, 32)
    layout = PageLayout(model.specs, 32)
    model.bind(layout)
    original, read = model.forward, []
    model.forward = lambda batch, store: read.append(batch.page_tables) or original(batch, store)
    for count in (1, 64):
        run_reading_step(count, config, model, layout, cpu)
        assert sorted(read[-1].flatten().tolist()) == list(range(count))


def test_a_gpu_without_room_for_pages_is_an_error_that_names_the_field():
    with pytest.raises(ConfigError, match="gpu_memory_fraction=0.5.*max_step_tokens"):
        gpu_memory(80 * GIB, 40 * GIB, 1, 0.5)


@pytest.mark.parametrize("fraction", [0, 1.5, "most", True])
def test_a_fraction_is_a_number_up_to_one(fraction):
    with pytest.raises(ConfigError, match="gpu_memory_fraction"):
        EngineConfig(gpu_memory_fraction=fraction)


@pytest.mark.parametrize("family", ["llama", "deepseek_v3", "qwen3_5"])
def test_the_largest_step_runs_over_a_store_of_one_page(family, tmp_path):
    folder = oracles.checkpoint(family, tmp_path)
    model_config = ModelConfig.from_folder(folder)
    codec = resolve_codec("raw", torch.float32)
    model = load_model(folder, model_config, torch.float32, torch.device("cpu"), codec, 16)
    layout = PageLayout(model.specs, 16)
    model.bind(layout)
    seen = []
    original = model.forward
    model.forward = lambda batch, store: seen.append((batch, store)) or original(batch, store)
    run_largest_step(EngineConfig(max_step_tokens=200, max_requests=8), model, layout, torch.device("cpu"))
    ((batch, store),) = seen
    assert batch.num_rows == 200 and store.num_pages == 1
    memory = memory_for_pages(EngineConfig(), model, layout, torch.device("cpu"))
    assert 0 < memory.default <= memory.limit
    assert pool_size(EngineConfig(num_pages=3, num_states=4), layout, memory)[0] == 3
