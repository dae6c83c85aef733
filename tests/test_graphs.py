"""Recording of decode steps: errors that fall back to a step without a graph, and errors that do not; all faked."""

import pytest
import torch

from nanokv import SamplingParams
from nanokv.engine import graphs
from nanokv.llm import LLM

GREEDY = SamplingParams(temperature=0, max_tokens=3, ignore_eos=True)


@pytest.fixture
def llm(tiny_llama, monkeypatch):
    """An engine on a CPU with faked recording: a graph is the call itself."""
    monkeypatch.setattr(graphs, "_warm_up", lambda forward: forward())
    monkeypatch.setattr(graphs, "_captured", lambda forward, memory: forward)
    with LLM(tiny_llama, num_pages=16, graphs=True) as made:
        made.engine.runner._graphs._memory = (0, 0)
        yield made


def raising(error: Exception):
    def fail(*_):
        raise error

    return fail


def test_a_step_that_cannot_be_recorded_runs_without_a_graph(llm, monkeypatch, caplog):
    expected = llm.generate([[5, 6, 7]], GREEDY)[0].token_ids
    llm.engine.runner._graphs._sizes.clear()
    monkeypatch.setattr(graphs, "_captured", raising(RuntimeError("operation not permitted when stream is capturing")))
    (output,) = llm.generate([[5, 6, 7]], GREEDY)
    assert output.token_ids == expected and "without CUDA graphs" in caplog.text
    assert llm.engine.runner._graphs._memory is None  # recording is not tried again


@pytest.mark.parametrize(
    ("place", "error"),
    [
        ("_captured", torch.OutOfMemoryError("no memory")),
        ("_warm_up", torch.OutOfMemoryError("no memory")),
        ("_warm_up", RuntimeError("a kernel is wrong")),
    ],
)
def test_an_error_unrelated_to_recording_ends_the_requests_of_the_step(llm, monkeypatch, place, error):
    monkeypatch.setattr(graphs, place, raising(error))
    (output,) = llm.generate([[5, 6, 7]], GREEDY)
    assert output.finish_reason == "error" and str(error) in output.error
    assert llm.engine.runner._graphs._memory is not None
    monkeypatch.setattr(graphs, place, lambda forward, *_: forward)
    assert llm.generate([[5, 6, 7]], GREEDY)[0].finish_reason == "length"
