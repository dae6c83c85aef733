"""Every kernel builds without a GPU, keeps its numbers in registers, and fits into shared memory."""

from __future__ import annotations

import importlib.util
import re
import sys
from pathlib import Path

import pytest

if importlib.util.find_spec("triton") is None:
    pytest.skip("triton is not installed", allow_module_level=True)

sys.path.insert(0, str(Path(__file__).parents[1] / "scripts"))

import compile_kernels as report
import torch
import triton
import triton.language as tl

from nanokv.kernels.cuda.launch import Launch

KEPT_SHORT = {"Llama-3.1-8B", "DeepSeek-V2-Lite", "Qwen3.5-0.8B", "Qwen3-30B-A3B"}
BFLOAT_MMA = re.compile(r"(mma\.sync|wgmma|tcgen05\.mma)\S*(\.bf16|kind::f16)")


@pytest.fixture(scope="module")
def decode_launches() -> list[Launch]:
    """Launches of a decode of one model of each kind, in bfloat16, at most two of a kernel; all take minutes."""
    with pytest.MonkeyPatch.context() as patch:
        for kind in ("GROUPED", "LATENT", "RECURRENT", "MIXTURES"):
            models = getattr(report, kind)
            patch.setattr(report, kind, {name: models[name] for name in models if name in KEPT_SHORT})
        found = report.launches("one decode")
    kernels: dict[str, list[Launch]] = {}
    for launch in found:
        if "fp16" not in report.config_of(launch):
            kernels.setdefault(launch.kernel.__name__, []).append(launch)
    return [launch for same in kernels.values() for launch in same[:2]]


def fits(built: report.Built) -> bool:
    return built.row["shared_bytes"] <= report.SHARED_LIMIT[built.row["target"]]


def is_in_registers(built: report.Built) -> bool:
    return built.row["stack_bytes"] == built.row["local_bytes"] == 0


def multiplies(launch: Launch) -> bool:
    return launch.kernel.__name__ in ("attention_kernel", "code_attention_kernel", "experts_kernel")


def test_decode_kernels_fit_and_use_no_memory_for_numbers_on_an_h100(decode_launches):
    names = set()
    for launch in decode_launches:
        built = report.build(launch, "sm_90")
        assert fits(built) and is_in_registers(built), built.row
        if multiplies(launch):
            assert BFLOAT_MMA.search(built.ptx), built.row
        names.add(built.row["kernel"])
    assert {"attention_kernel", "code_attention_kernel", "merge_kernel", "rope_and_store_kernel"} <= names
    assert {"delta_rule_step_kernel", "experts_kernel"} <= names


@pytest.mark.parametrize("target", ["sm_80", pytest.param("sm_100", marks=pytest.mark.slow)])
def test_decode_attention_fits_and_uses_no_memory_for_numbers_on_other_cards(decode_launches, target):
    attention = [launch for launch in decode_launches if launch.kernel.__name__ == "attention_kernel"]
    assert len(attention) == 2  # grouped queries, latents
    for launch in attention:
        built = report.build(launch, target)
        assert fits(built) and is_in_registers(built) and BFLOAT_MMA.search(built.ptx), built.row


@triton.jit
def spilling_kernel(x, SIZE: tl.constexpr):
    """Needs all its numbers twice, before and after their sum: with one warp, 512 of them in each thread."""
    at = x + tl.arange(0, SIZE)
    numbers = tl.load(at)
    tl.store(at, numbers * tl.sum(numbers))


def test_the_check_sees_a_kernel_that_spills():
    x = torch.empty(1, dtype=torch.float32, device="meta")
    many, few = (Launch(spilling_kernel, {"x": x, "SIZE": size}, {"num_warps": 1}) for size in (1 << 14, 1 << 10))
    assert not is_in_registers(report.build(many, "sm_90"))
    assert is_in_registers(report.build(few, "sm_90"))


@pytest.mark.slow
@pytest.mark.parametrize("target", report.TARGETS)
def test_every_kernel_of_every_model_builds_and_fits(target):
    decodes = {report.config_of(launch) for launch in report.launches(*report.DECODES)}
    for launch in report.launches():
        built = report.build(launch, target)
        assert fits(built), built.row
        assert report.config_of(launch) not in decodes or is_in_registers(built), built.row
        if multiplies(launch) and "bf16" in report.config_of(launch):
            assert BFLOAT_MMA.search(built.ptx), built.row
