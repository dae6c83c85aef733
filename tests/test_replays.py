"""Replays: the recorded calls of a decode step compute the bits of a step that Python runs."""

import threading

import oracles
import pytest
import torch
from helpers import noise, same_bits, with_logprobs

from nanokv import SamplingParams
from nanokv.kernels.cpu import barrier, recording
from nanokv.kernels.ops import AUTO
from nanokv.layers import rotary
from nanokv.llm import LLM

LENGTHS = (1, 3, 16, 33, 70)
PARAMS = [
    SamplingParams(max_tokens=3 + 2 * n, temperature=n % 2, seed=n, logprobs=0, ignore_eos=True)
    for n in range(len(oracles.prompts(LENGTHS)))
]
"""Requests of different lengths: the batch shrinks, so steps of several sizes are recorded."""


def answers(llm: LLM) -> list[tuple]:
    return with_logprobs(llm.generate(oracles.prompts(LENGTHS), PARAMS))


def sizes(llm: LLM) -> set[int]:
    """The numbers of rows that are recorded."""
    return {key[0] for key in llm.engine.runner._replays._sizes}


def both(folder, **config) -> set[int]:
    """Compares answers with and without replays, twice, the second time with prefix hits."""
    config = {"num_pages": 128, "num_states": 40, **config}
    with LLM(folder, graphs=False, **config) as llm:
        expected = [answers(llm), answers(llm)]
        assert llm.engine.runner._replays is None
    with LLM(folder, **config) as llm:
        assert [answers(llm), answers(llm)] == expected
        llm.engine.cache.check()
        return sizes(llm)


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "qwen3_5", "deepseek_v2"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_replayed_steps_change_no_bit(family, dtype, tmp_path):
    folder = oracles.checkpoint(family, tmp_path)
    # Biases in float32, latents in 16 bits and outputs that are no multiple of 16 are computed in torch.
    is_recorded = family in ("llama", "qwen3") or (family, dtype) == ("qwen2", "bfloat16")
    assert both(folder, dtype=dtype) == (set(range(1, 9)) if is_recorded else set())


@pytest.mark.parametrize("codec", ["tq4", "int8"])
def test_replayed_steps_over_codes_change_no_bit(codec, tmp_path):
    assert both(oracles.llama(tmp_path, head_dim=64), codec=codec) == set(range(1, 9))


def test_a_model_whose_steps_compute_in_torch_is_not_recorded(tmp_path):
    assert both(oracles.checkpoint("qwen3_moe", tmp_path)) == set()


def test_an_operation_of_torch_cannot_be_recorded(tmp_path):
    x = noise(2, 32)
    copies = (lambda x: x[:, 1:].contiguous(), lambda x: x[:, 1:].reshape(62), lambda x: x.bfloat16())
    for operation in (torch.sigmoid, torch.clone, lambda x: x.add_(1), lambda x: x[0, 0].item(), *copies):
        for is_inference in (False, True):
            refused, recorded = pytest.raises(recording.CannotRecord), recording.recording(recording.Memory(2), 2)
            with torch.inference_mode(is_inference), refused, recorded:
                operation(x)
    with torch.inference_mode(), recording.recording(recording.Memory(2), 2):
        x[:, 3:].unflatten(1, (29, 1)).transpose(0, 1)
        x.contiguous().float().reshape(64).split(32)


def test_a_recording_computes_nothing_until_it_is_replayed():
    x, residual, weight = noise(3, 64), noise(3, 64, seed=1), noise(64, seed=2)
    untouched = residual.clone()
    with recording.recording(recording.Memory(3), 3) as (made, _):
        normed = AUTO.add_rms_norm(x, residual, weight, 1e-6)
    assert same_bits(residual, untouched)
    for _ in range(2):
        residual.copy_(untouched)
        made.replay()
        again = untouched.clone()
        assert same_bits(normed, AUTO.add_rms_norm(x, again, weight, 1e-6)) and same_bits(residual, again)


def test_kernels_of_another_thread_compute_while_a_step_is_recorded():
    x, weight = noise(300, 64), noise(64, seed=2)
    expected, found = AUTO.rms_norm(x, weight, 1e-6), []
    with recording.recording(recording.Memory(1), 1) as (made, _):
        other = threading.Thread(target=lambda: found.append(AUTO.rms_norm(x, weight, 1e-6)))
        other.start()
        other.join()
    assert same_bits(found[0], expected) and len(made._list) == 0


def test_results_take_the_places_of_the_layer_before_the_last():
    memory = recording.Memory(8)
    addresses = []
    for rows in (2, 8):
        with recording.recording(memory, rows) as (_, next_layer):
            for _ in range(6):
                addresses.append([torch.empty(rows, width).data_ptr() for width in (16, 64, 16)])
                next_layer()
    assert addresses == [addresses[0], addresses[1]] * 6
    assert len({address for layer in addresses for address in layer}) == 6


def test_a_table_of_positions_that_moves_is_recorded_again(tmp_path, monkeypatch):
    monkeypatch.setattr(rotary, "FIRST_POSITIONS", 32)
    both(oracles.llama(tmp_path, max_position_embeddings=4096))


def test_another_number_of_threads_is_recorded_again(tiny_llama):
    with LLM(tiny_llama, num_pages=128) as llm:
        expected = answers(llm)
        before = torch.get_num_threads()
        try:
            torch.set_num_threads(3 - min(before, 2))
            assert answers(llm) == expected
            assert {key[2] for key in llm.engine.runner._replays._sizes} == {3 - min(before, 2)}
        finally:
            torch.set_num_threads(before)


def test_a_fault_while_a_call_is_recorded_is_raised_and_leaves_kernels_as_they_were(monkeypatch):
    def fail(*_):
        raise KeyboardInterrupt

    x, weight = noise(3, 64), noise(64, seed=2)
    expected = AUTO.rms_norm(x, weight, 1e-6)
    monkeypatch.setattr(recording.Recording, "append", fail)
    with pytest.raises(KeyboardInterrupt), recording.recording(recording.Memory(3), 3):
        AUTO.rms_norm(x, weight, 1e-6)
    assert same_bits(AUTO.rms_norm(x, weight, 1e-6), expected)


def test_an_engine_that_computes_while_another_one_records_disturbs_neither(tiny_llama):
    """Steps of other sizes are recorded all the time, because batches grow and shrink."""
    with LLM(tiny_llama, num_pages=128, graphs=False) as llm:
        expected = answers(llm)
    found = []

    def run():
        for _ in range(3):
            with LLM(tiny_llama, num_pages=128) as llm:
                found.append(answers(llm))

    threads = [threading.Thread(target=run) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [expected] * 6


def test_threads_that_sleep_at_every_barrier_compute_the_same():
    x, weight = noise(600, 64), noise(64, seed=2)
    with recording.recording(recording.Memory(600), 600) as (made, _):
        found = AUTO.rms_norm(AUTO.rms_norm(AUTO.rms_norm(x, weight, 1e-6), weight, 1e-6), weight, 1e-6)
    expected = AUTO.rms_norm(AUTO.rms_norm(AUTO.rms_norm(x, weight, 1e-6), weight, 1e-6), weight, 1e-6)
    for _ in range(50):
        made._barrier[made._barrier == barrier.MOST_SPINS] = 0
        found.zero_()
        made.replay()
        assert same_bits(found, expected)
