"""The device sampler, run on a CPU: with the same noise it chooses the tokens of the host sampler."""

from array import array

import pytest
import torch

from nanokv.core.request import Request, SamplingParams
from nanokv.engine.device_sampler import sample_on_device
from nanokv.engine.sampler import sample

EOS = (2,)
KINDS = [
    {"temperature": 0},
    {},
    {"temperature": 0.3},
    {"top_p": 0.9},
    {"top_p": 0.05},
    {"top_k": 1},
    {"top_k": 40},
    {"top_k": 40, "top_p": 0.8},
    {"top_k": 1500, "top_p": 0.95},
    {"min_p": 0.1},
    {"min_p": 0.2, "top_k": 30, "top_p": 0.9},
    {"repetition_penalty": 1.7},
    {"repetition_penalty": 1.7, "temperature": 0},
    {"min_tokens": 9, "stop_token_ids": (7, 8)},
    {"logprobs": 0},
    {"logprobs": 3, "temperature": 0},
]


def requests_of(kinds: list[dict], seed: int) -> list[Request]:
    made = []
    for row, params in enumerate(kinds):
        request = Request([1, 5, 6], SamplingParams(**params))
        request.tokens, request.num_prompt, request.num_computed = array("i", [1, 5, 6, 9]), 3, 5
        request.seed = seed + row
        made.append(request)
    return made


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("vocab", [50, 2000])
def test_the_device_sampler_chooses_the_tokens_of_the_host_sampler(seed, vocab):
    logits = 3 * torch.randn(len(KINDS), vocab, generator=torch.Generator().manual_seed(seed))
    requests, last = requests_of(KINDS, 100 * seed), torch.arange(len(KINDS)) % vocab
    tokens, reports = sample(logits.clone(), requests, last, EOS).fetch()
    sampled = sample_on_device(logits.clone(), requests, last, EOS)
    device_tokens, device_reports = sampled.fetch()
    assert device_tokens == tokens and sampled.token_ids.tolist() == tokens
    for own, theirs in zip(reports, device_reports, strict=True):
        assert own is None if theirs is None else own == pytest.approx(theirs)


def test_the_repetition_penalty_includes_a_last_token_unknown_to_the_host():
    logits = torch.tensor([[2.0, 0.0, 0.0, 1.9, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0]])
    requests = requests_of([{"temperature": 0, "repetition_penalty": 1.5}], 0)
    for sampler in (sample, sample_on_device):
        assert sampler(logits.clone(), requests, torch.tensor([0]), EOS).fetch()[0] == [3]
        assert sampler(logits.clone(), requests, torch.tensor([9]), EOS).fetch()[0] == [0]


def test_a_nonfinite_row_gives_none_and_changes_no_other_row():
    logits = torch.randn(3, 40, generator=torch.Generator().manual_seed(0))
    logits[1] = float("nan")
    requests, last = requests_of([{}, {"top_p": 0.5}, {"top_k": 5}], 3), torch.zeros(3, dtype=torch.int64)
    tokens, _ = sample_on_device(logits.clone(), requests, last, EOS).fetch()
    assert tokens == sample(logits.clone(), requests, last, EOS).fetch()[0] and tokens[1] is None


def test_draws_follow_the_softmax():
    row = torch.tensor([1.0, 2.0, 0.0, -1.0])
    requests = requests_of([{"top_p": 0.999}] * 4000, 0)
    tokens, _ = sample_on_device(row.repeat(4000, 1), requests, torch.zeros(4000, dtype=torch.int64), ()).fetch()
    frequencies = torch.bincount(torch.tensor(tokens), minlength=4) / 4000
    assert torch.allclose(frequencies, row.softmax(0), atol=0.032)  # four standard errors
