"""Both ends of a connection between hosts, as threads of one process: what each does about the other's faults."""

import threading
import time

import oracles
import pytest

from nanokv import LLM, DisaggConfig, EngineConfig, SamplingParams
from nanokv.disagg import prefiller, server
from nanokv.disagg.config import split_address
from nanokv.disagg.worker import Model
from test_disagg_hosts import ROOM, free_address

GREEDY = SamplingParams(max_tokens=4, temperature=0.0, ignore_eos=True)


@pytest.fixture
def address(tiny_llama) -> str:
    """Of a prefill process that is a thread."""
    address = free_address()
    model = Model(tiny_llama, EngineConfig(page_size=8, kv_memory="8MiB"), "cpu", "float32")
    threading.Thread(target=server.listen, args=(model, split_address(address), 1.0), daemon=True).start()
    return address


def test_a_prompt_whose_layers_flow_for_longer_than_the_heartbeat_kills_nobody(address, tiny_llama, monkeypatch):
    after_layer, prompt = server.SendingSession.after_layer, oracles.prompt(150, seed=1)

    def slow(session, layer, batch):
        time.sleep(0.1)
        after_layer(session, layer, batch)

    monkeypatch.setattr(server.SendingSession, "after_layer", slow)
    monkeypatch.setattr(server, "GROUP_BYTES", 1)  # each layer is sent
    monkeypatch.setattr(prefiller, "STEP_TOKENS", 16)
    with LLM(tiny_llama, **ROOM) as llm:
        alone = llm.generate([prompt], GREEDY)[0].token_ids
    with LLM(tiny_llama, disagg=DisaggConfig(connect=address, heartbeat_s=1.0), **ROOM) as llm:
        output = llm.generate([prompt], GREEDY)[0]
        assert output.token_ids == alone and output.metrics.ttft > 1.5
        assert llm.stats()["worker_deaths"] == llm.stats()["remote_lost"] == 0
