"""Tests that need a GPU: kernels and engine against the CPU, graphs and overlap on and off, no synchronisation."""

import math
from dataclasses import replace

import oracles
import pytest
import torch

from nanokv import SamplingParams
from nanokv.core.request import Request
from nanokv.engine.device import cuda_obstacle
from nanokv.engine.device_sampler import sample_on_device
from nanokv.kernels import reference
from nanokv.kernels.ops import AUTO
from nanokv.kernels.planes import KVPlanes
from nanokv.llm import LLM

pytestmark = pytest.mark.gpu
TIE = 1e-4
"""Two logits that differ by less may swap their order."""
FAMILIES = ["llama", "qwen3", "qwen3_moe", "deepseek_v2_lite", "deepseek_v3", "qwen3_next", "qwen3_5"]
GREEDY = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True)
PROMPTS = [oracles.prompt(length, seed=length) for length in (1, 5, 17, 64, 130)]
ROOM = {"num_pages": 128, "num_states": 24}


@pytest.fixture(scope="module", autouse=True)
def card():
    obstacle = cuda_obstacle(0)
    if obstacle is not None:
        pytest.skip(obstacle)
    return torch.device("cuda")


@pytest.fixture(scope="module", params=FAMILIES)
def model(request, tmp_path_factory):
    """A family's folder, its greedy tokens on a CPU, and the gap of the top two logits at each of them."""
    folder = oracles.checkpoint(request.param, tmp_path_factory.mktemp(request.param))
    with LLM(folder, device="cpu", **ROOM) as llm:
        expected = [output.token_ids for output in llm.generate(PROMPTS, GREEDY)]
        gaps = []
        for prompt, tokens in zip(PROMPTS, expected, strict=True):
            best = llm.score([*prompt, *tokens[:-1]])[len(prompt) - 1 :].topk(2).values
            gaps.append((best[:, 0] - best[:, 1]).tolist())
    return folder, expected, gaps


def assert_equal_but_for_ties(model, answers: list[list[int]]) -> None:
    _, expected, gaps = model
    for own, theirs, gap in zip(answers, expected, gaps, strict=True):
        differs = next((i for i in range(len(theirs)) if own[i] != theirs[i]), None)
        assert differs is None or gap[differs] < TIE, (
            f"token {differs}: {own} instead of {theirs}, logits {gap[differs]} apart"
        )


@pytest.mark.parametrize("graphs", [True, False])
@pytest.mark.parametrize("overlap", [True, False])
def test_the_engine_on_a_gpu_gives_the_tokens_of_the_cpu(model, graphs, overlap):
    with LLM(model[0], device="cuda", graphs=graphs, overlap=overlap, **ROOM) as llm:
        for _ in range(2):  # the second time with cache hits
            assert_equal_but_for_ties(model, [output.token_ids for output in llm.generate(PROMPTS, GREEDY)])
        llm.engine.cache.check()


def test_small_pages_and_chunks_give_the_tokens_of_the_cpu(model):
    with LLM(model[0], device="cuda", page_size=4, num_pages=60, num_states=24, max_step_tokens=32) as llm:
        assert_equal_but_for_ties(model, [output.token_ids for output in llm.generate(PROMPTS, GREEDY)])
        llm.engine.cache.check()


def test_decode_steps_are_recorded_as_graphs(model):
    with LLM(model[0], device="cuda", **ROOM) as llm:
        llm.generate(PROMPTS, GREEDY)
        graphs = llm.engine.runner._graphs
        assert graphs._sizes and graphs._memory is not None  # None once a kernel could not be recorded


def test_a_decode_step_never_synchronises_with_the_device(model):
    with LLM(model[0], device="cuda", **ROOM) as llm:
        llm.generate(PROMPTS[:2], GREEDY)  # compiles and records
        for prompt in PROMPTS[:2]:
            llm.engine.add_request(Request(prompt, SamplingParams(seed=1, max_tokens=12, top_p=0.9, ignore_eos=True)))
        for _ in range(4):
            llm.engine.step()
        torch.cuda.set_sync_debug_mode("error")
        try:
            for _ in range(4):
                llm.engine.step()
        finally:
            torch.cuda.set_sync_debug_mode("default")


def test_pages_take_no_more_than_the_configured_fraction_of_gpu_memory(model, card):
    with LLM(model[0], device="cuda", gpu_memory_fraction=0.3) as llm:
        stats = llm.stats()
        taken = stats["pages_total"] * stats["page_bytes"] + stats.get("states_total", 0) * stats["state_bytes"]
        assert taken < 0.3 * torch.cuda.mem_get_info(card)[1]
        assert llm.generate(PROMPTS[0], GREEDY)[0].finish_reason == "length"


def test_the_device_sampler_chooses_the_same_tokens_on_a_gpu_and_a_cpu(card):
    from test_device_sampler import KINDS, requests_of

    logits = 3 * torch.randn(len(KINDS), 2000, generator=torch.Generator().manual_seed(0))
    requests, last = requests_of(KINDS, 5), torch.arange(len(KINDS))
    ours = sample_on_device(logits.clone().to(card), requests, last.to(card), (2,)).fetch()
    theirs = sample_on_device(logits.clone(), requests, last, (2,)).fetch()
    assert ours[0] == theirs[0]


# ---- kernels ------------------------------------------------------------------------------------------------------


def close(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    """Asserts a difference within 1e-4 in float32, and otherwise within 1 % of the norm."""
    if theirs.dtype == torch.float32:
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    else:
        assert (ours.float() - theirs.float()).norm() <= 0.01 * theirs.float().norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("heads", "kv_heads", "dim"), [(4, 4, 64), (9, 3, 64), (16, 4, 128), (16, 2, 128)])
def test_attention_on_a_gpu_matches_the_reference(card, dtype, heads, kv_heads, dim):
    from harness import step_of

    rows = {0: [999], 1: range(17), 2: [15], 3: range(60, 125), 4: [0], 5: [4095]}
    generator = torch.Generator().manual_seed(0)
    tables = torch.randperm(6 * 256, generator=generator).view(6, 256).int()
    batch = step_of({request: list(own) for request, own in rows.items()}, tables, 16)
    batch = replace(batch, **{k: v.to(card) for k, v in vars(batch).items() if torch.is_tensor(v)})
    size = 16 * dim * dtype.itemsize * kv_heads
    planes = KVPlanes(
        0, size, 0, 2 * size, 16, dim * dtype.itemsize, 16 * dim * dtype.itemsize, 0, kv_heads, dim, dim, 0, dtype
    )
    pool = torch.randn(6 * 256, 2 * size // dtype.itemsize, generator=generator).to(card, dtype).view(torch.uint8)
    q = torch.randn(batch.num_rows, heads, dim, generator=generator).to(card, dtype)
    arguments = (q, pool, planes, batch, 1 / math.sqrt(dim))
    close(AUTO.paged_attention(*arguments), reference.paged_attention(*arguments))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [1, 16, 1000])
def test_norms_and_gates_on_a_gpu_match_the_reference(card, dtype, rows):
    generator = torch.Generator().manual_seed(rows)
    x, residual, z = (torch.randn(rows, 1024, generator=generator).to(card, dtype) for _ in range(3))
    weight = torch.randn(1024, generator=generator).to(card, dtype)
    close(AUTO.rms_norm(x, weight, 1e-6), reference.rms_norm(x, weight, 1e-6))
    own, theirs = residual.clone(), residual.clone()
    close(AUTO.add_rms_norm(x, own, weight, 1e-6), reference.add_rms_norm(x, theirs, weight, 1e-6))
    close(own, theirs)
    close(AUTO.silu_mul(x), reference.silu_mul(x))
    close(AUTO.sigmoid_mul(x, z), reference.sigmoid_mul(x, z))
    close(AUTO.gated_rms_norm(x, z, weight[:128], 1e-6), reference.gated_rms_norm(x, z, weight[:128], 1e-6))
