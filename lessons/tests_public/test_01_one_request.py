"""Public checks of lesson 01."""

import numpy as np
import torch

from nanokv.bench.decode import bytes_per_step
from nanokv.bench.request import prefill_share
from nanokv.core.metrics import RequestMetrics
from nanokv.core.request import Request, SamplingParams
from nanokv.core.spec import LayerSpec, Plane
from nanokv.engine import sampler
from nanokv.engine.text_stream import TextStream
from nanokv.learn.expect import equal, near


def test_01_1_keys_and_values_of_three_heads_of_64_numbers():
    spec = LayerSpec(paged=tuple(Plane(name, (3, 16, 64), torch.bfloat16, token_axis=1) for name in "kv"))
    equal(spec.bytes_per_token, 2 * 3 * 64 * 2, "bytes per token of k and v, each [3, 16, 64] in bfloat16")


def test_01_1_the_token_axis_may_stand_anywhere():
    spec = LayerSpec(paged=(Plane("latent", (32, 512), torch.float32, token_axis=0),))
    equal(spec.bytes_per_token, 512 * 4, "bytes per token of latent [32, 512] in float32")


def test_01_1_a_state_costs_nothing_per_token():
    spec = LayerSpec(state=(Plane("state", (4, 8, 8), torch.float32, token_axis=None),))
    equal(spec.bytes_per_token, 0, "bytes per token of a layer that keeps only a state")


def test_01_2_three_tokens_have_two_gaps():
    metrics = RequestMetrics(arrival=1.0, token_times=[3.0, 3.5, 4.5])
    near(metrics.tpot, 0.75, "tpot of tokens at 3.0, 3.5 and 4.5 s")


def test_01_2_one_token_has_no_gap():
    equal(RequestMetrics(arrival=0.0, token_times=[2.0]).tpot, None, "tpot of one token")
    equal(RequestMetrics(arrival=0.0).tpot, None, "tpot of no token")


def test_01_2_waiting_for_the_first_token_does_not_count():
    for wait in (0.1, 100.0):
        metrics = RequestMetrics(arrival=0.0, token_times=[wait, wait + 0.2, wait + 0.4])
        near(metrics.tpot, 0.2, f"tpot after a first token at {wait} s")


def test_01_3_a_hit_saves_the_prefill_but_for_one_step():
    near(prefill_share(1.0, 0.1, 10.0), 0.09, "prefill_share(ttft 1.0, tpot 0.1, total 10.0)")
    near(prefill_share(5.0, 0.5, 6.0), 0.75, "prefill_share(ttft 5.0, tpot 0.5, total 6.0)")


def test_01_3_a_short_prompt_saves_nothing_and_no_share_is_negative():
    near(prefill_share(0.05, 0.1, 2.0), 0.0, "prefill_share(ttft 0.05, tpot 0.1, total 2.0)")


def test_01_4_weights_are_read_once_and_the_cache_once_a_request():
    equal(bytes_per_step(1000, 1, 10, 7), 1070, "bytes_per_step(weights 1000, batch 1, context 10, 7 per token)")
    equal(bytes_per_step(1000, 4, 10, 7), 1280, "bytes_per_step(weights 1000, batch 4, context 10, 7 per token)")


def test_01_4_a_state_is_read_and_written_whatever_the_context():
    for context in (0, 10):
        expected = 500 + 3 * (context * 2 + 80)
        equal(bytes_per_step(500, 3, context, 2, 40), expected, f"with states of 40 bytes, context {context}")


class Letters:
    """A tokenizer whose tokens are letters."""

    is_byte_level = True
    special_ids = frozenset()

    def bytes_of_token(self, token_id: int) -> bytes:
        return bytes([token_id])


def said(text: str, stop: tuple[str, ...], may_stop: bool = True) -> tuple[list[str], bool]:
    """The delta after each letter, and whether the answer stopped."""
    stream, deltas = TextStream(Letters(), stop), []
    for letter in text:
        stream.push(ord(letter), may_stop)
        deltas.append(stream.take_delta())
        if stream.stopped:
            break
    stream.flush(may_stop)
    deltas.append(stream.take_delta())
    return deltas, stream.stopped


def test_01_5_without_a_stop_text_each_letter_comes_at_once():
    equal(said("abc", ()), (["a", "b", "c", ""], False), "the deltas of 'abc', and stopped")


def test_01_5_a_stop_text_is_found_across_tokens_and_cut_off():
    deltas, stopped = said("one END two", ("END",))
    equal("".join(deltas), "one ", "the text before the stop text 'END'")
    equal(stopped, True, "stopped")


def test_01_5_an_incomplete_stop_text_is_shown_in_the_end():
    deltas, stopped = said("EN route", ("END",))
    equal("".join(deltas), "EN route", "the whole text")
    equal(stopped, False, "stopped")


def test_01_5_the_earliest_of_several_stop_texts_counts():
    stream = TextStream(Letters(), ("ya", "xy"))
    stream._take("abxya", True)
    equal(stream.text, "ab", "the text of 'abxya' with the stop texts 'ya' and 'xy'")


def test_01_5_before_min_tokens_nothing_stops():
    deltas, stopped = said("aENDb", ("END",), may_stop=False)
    equal(("".join(deltas), stopped), ("aENDb", False), "text and stopped while may_stop is False")


def test_01_5_a_stop_text_that_was_complete_before_min_tokens_does_not_count():
    stream = TextStream(Letters(), ("EN", "a longer stop text"))
    for place, letter in enumerate("aENDb"):
        stream.push(ord(letter), may_stop=place > 2)
    stream.flush(True)
    equal((stream.text, stream.stopped), ("aENDb", False), "text and stopped, with min_tokens reached after 'aEN'")


def drawn(probabilities, position: int, seed: int = 7, **params) -> int:
    row = torch.tensor(probabilities)
    request = Request([1], SamplingParams(**params))
    request.seed = seed
    request.tokens.extend([1] * position)
    request.num_computed = position
    best = row.topk(min(sampler.CANDIDATES, len(row)))
    return sampler._draw(request, row, best.values, best.indices)


def chosen(weights: list[float], ids: list[int], position: int, seed: int = 7) -> int:
    """The first of `ids` at which the cumulative weight exceeds the uniform number."""
    target, passed = sampler.uniform(seed, 0, position) * sum(weights), 0.0
    for weight, token in zip(weights, ids, strict=True):
        passed += weight
        if passed > target:
            return token
    raise AssertionError("unreachable")


def test_01_6_without_filters_tokens_are_drawn_by_their_probabilities():
    for position in range(40):
        expected = chosen([0.1, 0.6, 0.3], [0, 1, 2], position)
        equal(drawn([0.1, 0.6, 0.3], position), expected, f"the token at position {position}")


def test_01_6_top_k_keeps_the_k_most_likely():
    for position in range(40):
        expected = chosen([0.5, 0.3], [3, 1], position)
        equal(drawn([0.1, 0.3, 0.1, 0.5], position, top_k=2), expected, f"top_k=2, position {position}")


def test_01_6_the_nucleus_is_the_smallest_set_that_reaches_top_p():
    for position in range(40):
        expected = chosen([0.5, 0.25], [2, 0], position)
        equal(drawn([0.25, 0.125, 0.5, 0.125], position, top_p=0.7), expected, f"top_p=0.7, position {position}")
    equal(drawn([0.25, 0.125, 0.5, 0.125], 3, top_p=0.01), 2, "top_p=0.01 keeps the most likely token")


def test_01_6_min_p_drops_tokens_far_less_likely_than_the_best():
    for position in range(40):
        expected = chosen([0.6, 0.3], [1, 2], position)
        equal(drawn([0.1, 0.6, 0.3], position, min_p=0.4), expected, f"min_p=0.4, position {position}")


def test_01_6_the_nucleus_is_measured_within_the_tokens_that_top_k_kept():
    for position in range(40):
        expected = chosen([0.4], [0], position)
        got = drawn([0.4, 0.3, 0.2, 0.1], position, top_k=2, top_p=0.5)
        equal(got, expected, f"top_k=2 and top_p=0.5, position {position}")


def test_01_6_a_nucleus_wider_than_the_candidates_is_found_too():
    probabilities = torch.full((2048,), 1 / 2048)
    tokens = {drawn(probabilities.tolist(), position, top_p=0.9) for position in range(300)}
    if len(tokens) < 150:
        raise AssertionError(f"300 draws from 2048 equal tokens gave {len(tokens)} different ones: too few")
    assert np.all(np.array(sorted(tokens)) < 2048)
