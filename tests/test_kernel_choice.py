"""EngineConfig.kernels: reference kernels give the tokens of the compiled ones, and need neither numba nor Triton."""

import inspect
import json
import subprocess
import sys
from dataclasses import asdict
from functools import cache

import oracles
import pytest
import torch

from nanokv.codecs import RawCodec
from nanokv.core.config import EngineConfig
from nanokv.core.errors import ConfigError
from nanokv.core.request import SamplingParams
from nanokv.disagg.worker import PrefillModel
from nanokv.kernels import cpu, reference
from nanokv.kernels.ops import AUTO, Ops
from nanokv.llm import LLM
from nanokv.models.loader import load_model
from nanokv.models.read import read_folder

FAMILIES = list(oracles.FAMILIES)
CODED = [("llama", "tq4", 16), ("llama", "kivi4", 32), ("deepseek_v3", "tq4", 16)]
OPS = [name for name, member in vars(Ops).items() if not name.startswith("_") and hasattr(member, "__wrapped__")]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return cache(lambda family: oracles.checkpoint(family, tmp_path_factory.mktemp(family)))


def answers(folder, **fields) -> list[list[int]]:
    """Greedy answers to prompts that are prefilled together, the longest in two steps."""
    params = SamplingParams(max_tokens=12, temperature=0, ignore_eos=True)
    prompts = [oracles.prompt(length, seed=length) for length in (1, 33, 90)]
    with LLM(folder, device="cpu", dtype="float32", num_pages=64, max_step_tokens=80, **fields) as llm:
        return [output.token_ids for output in llm.generate(prompts, params)]


@pytest.mark.parametrize("family", FAMILIES)
def test_reference_kernels_give_the_tokens_of_the_compiled_ones(folders, family):
    folder = folders(family)
    assert answers(folder, kernels="reference") == answers(folder)


@pytest.mark.parametrize(("family", "codec", "page_size"), CODED)
def test_reference_kernels_give_the_same_tokens_with_a_codec(folders, family, codec, page_size):
    fields = {"codec": codec, "page_size": page_size}
    assert answers(folders(family), kernels="reference", **fields) == answers(folders(family), **fields)


def test_a_model_with_reference_kernels_imports_no_numba(folders):
    codecs = ("raw", "fp8", "tq4", "tqp3", "polar", "qjl", "kivi4")
    wide = oracles.llama(folders("llama").parent / "wide", hidden_size=256)  # polar needs head_dim=64
    cases = [(str(folders(family)), "raw") for family in FAMILIES] + [(str(wide), codec) for codec in codecs]
    code = (
        "import json, sys\n"
        "from nanokv import LLM, SamplingParams\n"
        f"for folder, codec in json.loads({json.dumps(cases)!r}):\n"
        "    with LLM(folder, device='cpu', codec=codec, page_size=32, num_pages=8, kernels='reference') as llm:\n"
        "        llm.generate([[3, 4, 5]], SamplingParams(max_tokens=3, temperature=0))\n"
        "        llm.stats()\n"
        "    compiled = {'numba', 'llvmlite', 'nanokv.kernels.cpu', 'nanokv.kernels.cuda'} & set(sys.modules)\n"
        "    assert not compiled, (folder, codec, compiled)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_wrong_choice_names_the_allowed_ones():
    with pytest.raises(ConfigError, match="kernels='fast': allowed are auto, reference"):
        EngineConfig(kernels="fast")
    with pytest.raises(ConfigError, match="kernels='fast': allowed are auto, reference"):
        Ops("fast")


@pytest.mark.parametrize("name", OPS)
def test_an_op_has_the_signature_and_the_docstring_of_its_reference(name):
    specification = getattr(reference, name)
    assert inspect.signature(getattr(AUTO, name)) == inspect.signature(specification)
    assert getattr(AUTO, name).__doc__ == specification.__doc__
    assert inspect.signature(getattr(cpu, name)).parameters.keys() == inspect.signature(specification).parameters.keys()


def test_every_compiled_kernel_is_an_op():
    assert sorted(OPS) == sorted(name for name, value in vars(cpu).items() if inspect.isfunction(value))


def test_the_device_selects_kernels_unless_the_reference_is_chosen():
    here, nowhere = torch.ones(1), torch.ones(1, device="meta")
    assert AUTO.implementations(here) is cpu and AUTO.implementations(nowhere) is reference
    assert Ops("reference").implementations(here) is reference


def test_two_models_of_one_process_may_differ(folders):
    config = read_folder(folders("llama"))
    auto, plain = (
        load_model(folders("llama"), config, torch.float32, "cpu", RawCodec(torch.float32), 16, kernels=kernels)
        for kernels in ("auto", "reference")
    )
    assert (auto.head.packed.form, plain.head.packed.form) == ("blocks", "plain")
    assert (auto.norm.ops, plain.norm.ops) == (AUTO, Ops("reference"))
    assert AUTO.are_recordable and not plain.is_recordable, "reference kernels read sizes on the host"


def test_a_prefill_process_computes_with_the_kernels_of_its_engine(folders):
    config = EngineConfig(**json.loads(json.dumps(asdict(EngineConfig(kernels="reference")))))  # as they travel
    assert PrefillModel(folders("llama"), config, "cpu", "float32").decoder.norm.ops == Ops("reference")
