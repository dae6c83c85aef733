"""Shared by all tests: the folder of weights, SmolLM2, which is pulled once into the checkout, and a tiny Llama."""

import os
import signal
from pathlib import Path

import pytest

from nanokv.core.spin import bound_spins

ROOT = Path(__file__).resolve().parents[1]

bound_spins()  # before a test imports torch

# The package may be installed elsewhere; its tests, and the commands they start, use the checkout's weights.
os.environ.setdefault("NANOKV_HOME", str(ROOT / "weights"))

# A shell starts a background job (`nohup pytest &`) with Ctrl-C ignored, and so do all processes that the job starts:
# tests that send it would wait in vain.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """The folder of SmolLM2-135M-Instruct, which is pulled if it is missing."""
    from nanokv.hub.pull import pull

    return pull("smollm2-135m-instruct")


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory) -> Path:
    """A random Llama of two layers in float32, made with transformers; it has no tokenizer."""
    import oracles

    return oracles.llama(tmp_path_factory.mktemp("tiny-llama"))


@pytest.fixture(scope="session")
def tokenizer(smollm2):
    """SmolLM2's tokenizer, ours."""
    from nanokv.text.tokenizer import Tokenizer

    return Tokenizer.from_folder(smollm2)


@pytest.fixture(scope="session")
def theirs(smollm2):
    """SmolLM2's tokenizer as transformers runs it."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(smollm2)


@pytest.fixture
def threads(request):
    """One thread of torch, unless a test asks for more: tiny products gain nothing, and lose much on a busy machine."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(getattr(request, "param", 1))
    yield
    torch.set_num_threads(before)
