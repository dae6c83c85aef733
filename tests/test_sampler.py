"""Sampling: the usual filters, and noise that depends only on (seed, sample, position)."""

from array import array

import pytest
import torch

from nanokv.core.request import Request, SamplingParams
from nanokv.engine import sampler
from nanokv.engine.sampler import uniform

EOS = (2,)


def request_with(tokens=(5, 6, 7), generated=(), index=0, seed=1, **params) -> Request:
    request = Request(list(tokens), SamplingParams(**params))
    request.tokens = array("i", [*tokens, *generated])
    request.num_prompt, request.num_computed = len(tokens), len(request.tokens)
    request.seed, request.index = seed, index
    return request


def sample(logits, requests, eos):
    last = torch.tensor([request.tokens[-1] for request in requests])
    return sampler.sample(logits, requests, last, eos).fetch()


def counts(logits: list[float], draws: int = 4000, **params) -> torch.Tensor:
    row = torch.tensor(logits)
    requests = [request_with(seed=seed, **params) for seed in range(draws)]
    tokens, _ = sample(row.repeat(draws, 1), requests, EOS)
    return torch.bincount(torch.tensor(tokens), minlength=len(logits)) / draws


def test_temperature_zero_chooses_the_most_likely_token():
    logits = torch.tensor([[0.0, 3.0, 1.0], [4.0, 3.0, 1.0]])
    assert sample(logits, [request_with(temperature=0)] * 2, EOS)[0] == [1, 0]


def test_plain_sampling_follows_the_softmax():
    logits = [1.0, 2.0, 0.0, -1.0]
    # 4,000 draws: the standard error of a frequency is below 0.008; four of them are 0.032.
    assert torch.allclose(counts(logits), torch.tensor(logits).softmax(0), atol=0.032)


def test_a_low_temperature_sharpens_and_a_tiny_one_is_greedy():
    logits = [1.0, 2.0, 0.0, -1.0]
    assert torch.allclose(counts(logits, temperature=0.5), (torch.tensor(logits) * 2).softmax(0), atol=0.032)
    assert counts(logits, temperature=1e-30)[1] == 1.0


def test_top_k_keeps_the_k_most_likely():
    kept = counts([1.0, 2.0, 0.0, -1.0], top_k=2)
    assert kept[2] == kept[3] == 0
    assert kept[1] == pytest.approx(1 / (1 + torch.e**-1), abs=0.032)


def test_top_p_keeps_the_smallest_set_that_reaches_p():
    probabilities = torch.tensor([0.5, 0.3, 0.15, 0.05])
    assert (counts(probabilities.log().tolist(), top_p=0.79) > 0).tolist() == [True, True, False, False]
    assert (counts(probabilities.log().tolist(), top_p=0.81) > 0).tolist() == [True, True, True, False]
    assert (counts(probabilities.log().tolist(), top_p=1e-6) > 0).tolist() == [True, False, False, False]


def test_top_p_applies_to_the_tokens_that_top_k_keeps():
    probabilities = torch.tensor([0.4, 0.3, 0.2, 0.1])
    # Within the top two, 0.4 holds 0.57: a nucleus of 0.5 keeps it alone, over all four it would keep two.
    assert (counts(probabilities.log().tolist(), top_k=2, top_p=0.5) > 0).tolist() == [True, False, False, False]


def test_min_p_drops_tokens_that_are_unlikely_relative_to_the_best():
    probabilities = torch.tensor([0.5, 0.3, 0.15, 0.05])
    assert (counts(probabilities.log().tolist(), min_p=0.29) > 0).tolist() == [True, True, True, False]


def test_a_nucleus_larger_than_the_first_candidates_is_exact():
    logits = torch.zeros(4000)  # flat: top_p=0.9 must keep 3,600 tokens, far more than the first candidates
    requests = [request_with(seed=seed, top_p=0.9) for seed in range(300)]
    tokens, _ = sample(logits.repeat(300, 1), requests, EOS)
    assert len(set(tokens)) > 250
    assert max(tokens) < 3600  # a stable sort keeps the first 3,600 of equals


def test_a_seeded_draw_does_not_depend_on_batch_mates():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(16, 1000, generator=generator)
    for params in ({}, {"top_p": 0.9}, {"top_k": 600}, {"min_p": 0.1}):
        requests = [request_with(seed=row, **params) for row in range(16)]
        together = sample(logits.clone(), requests, EOS)[0]
        alone = [sample(logits[row : row + 1].clone(), [requests[row]], EOS)[0][0] for row in range(16)]
        assert together == alone


def test_noise_differs_by_seed_sample_and_position():
    draws = {uniform(seed, index, position) for seed in (0, 1, 2**100) for index in (0, 1) for position in (3, 4)}
    assert len(draws) == 12
    assert all(0 <= draw < 1 for draw in draws)
    assert uniform(7, 1, 9) == uniform(7, 1, 9)


def test_the_repetition_penalty_lowers_the_logits_of_seen_tokens():
    logits = torch.tensor([[2.0, 1.9, -1.0, -1.1]])
    assert sample(logits.clone(), [request_with(tokens=[0], temperature=0, repetition_penalty=1.5)], EOS)[0] == [1]
    negative = torch.tensor([[-1.0, -1.1]])
    assert sample(negative, [request_with(tokens=[0], temperature=0, repetition_penalty=1.5)], EOS)[0] == [1]


def test_min_tokens_forbids_eos_and_stop_tokens():
    logits = torch.tensor([[0.0, 1.0, 9.0, 8.0]])
    early = request_with(temperature=0, min_tokens=1, stop_token_ids=(3,))
    late = request_with(generated=[0], temperature=0, min_tokens=1, stop_token_ids=(3,))
    assert sample(logits.clone(), [early], EOS)[0] == [1]
    assert sample(logits.clone(), [late], EOS)[0] == [2]


def test_logprobs_ignore_temperature_and_filters():
    logits = torch.tensor([[1.0, 2.0, 3.0, 0.0]])
    tokens, reports = sample(logits.clone(), [request_with(temperature=0.1, top_k=1, logprobs=2)], EOS)
    expected = logits[0].log_softmax(0)
    assert tokens == [2]
    assert reports[0] == pytest.approx({2: float(expected[2]), 1: float(expected[1])})
    assert sample(logits.clone(), [request_with(logprobs=0, temperature=0)], EOS)[1][0].keys() == {2}
