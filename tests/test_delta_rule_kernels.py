"""Gated DeltaNet: both twins against a recurrence in float64, and the law that a row's bits depend on its request."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import same_bits
from recurrent_requests import Requests, Rows

from nanokv.kernels import cpu, reference
from nanokv.kernels.ops import AUTO
from nanokv.kernels.planes import StatePlanes
from nanokv.kernels.reference.delta_rule import conv_view, state_view

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
FORMATS = [(F32, F32), (F32, BF16), (BF16, BF16)]  # activations, what the convolution keeps
LENGTHS = [1, 2, 3, 63, 64, 65, 130]


def assert_close(mine: torch.Tensor, truth: torch.Tensor) -> None:
    """float32: results of size 1 gather rounding errors over the last dozens of tokens. 16 bits: rounded once."""
    step = {F32: 2e-6, BF16: 2**-8, F16: 2**-11}[mine.dtype]
    torch.testing.assert_close(mine.double(), truth.double(), atol=4e-6, rtol=step)


def assert_truth(requests: Requests, steps: list[Rows], last_op="delta_rule_chunk") -> None:
    """Both twins take the steps; their results, and the states of the requests that end, are close to the truth."""
    for twin in (cpu, reference):
        states = requests.pool()
        for rows in steps:
            found = requests.rule(rows, states, twin, last_op if rows is steps[-1] else "delta_rule_chunk")
            parts = found.split([end - start for start, end in rows.values()])
            for (request, (start, end)), part in zip(rows.items(), parts, strict=True):
                results, last_state = requests.truth(request)
                assert_close(part, results[start:end])
                if end == requests.lengths[request]:
                    assert_close(state_view(states, requests.planes)[requests.ids[request]], last_state)


@pytest.mark.parametrize("group", [1, 2])
@pytest.mark.parametrize("key_dim, value_dim", [(16, 16), (32, 32), (128, 128), (16, 128), (128, 16), (24, 48)])
def test_every_shape_agrees_with_a_recurrence_in_float64(key_dim, value_dim, group):
    requests = Requests(LENGTHS, group=group, key_dim=key_dim, value_dim=value_dim)
    assert_truth(requests, [requests.whole()])


def test_decodes_prefills_and_requests_that_resume_share_a_step():
    requests = Requests([130, 90, 1, 64, 71, 20, 200])
    first = {0: (0, 70), 1: (0, 89), 4: (0, 3), 6: (0, 70)}
    assert_truth(requests, [first, {3: (0, 64), 0: (70, 130), 2: (0, 1), 1: (89, 90), 4: (3, 71), 5: (0, 20)}])
    assert_truth(requests, [first, {6: (70, 128)}, {6: (128, 200), 0: (70, 71)}])


def test_a_step_of_decodes_agrees_with_a_recurrence_in_float64():
    requests = Requests([1, 2, 40, 65, 3], key_dim=128, value_dim=128)
    last = {request: (length - 1, length) for request, length in enumerate(requests.lengths)}
    first = {request: (0, start) for request, (start, _) in last.items() if start}
    for op in ("delta_rule_step", "delta_rule_chunk"):
        assert_truth(requests, [first, last], op)


@pytest.mark.parametrize("dtype", [BF16, pytest.param(F16, marks=pytest.mark.slow)], ids=str)
def test_sixteen_bit_results_are_float32_results_rounded_once(dtype):
    requests = Requests([130, 7], dtype=dtype)
    assert_truth(requests, [requests.whole()])


def test_transformers_gives_the_same_results_and_states():
    from transformers.models.qwen3_5.modeling_qwen3_5 import (
        torch_chunk_gated_delta_rule,
        torch_recurrent_gated_delta_rule,
    )

    requests = Requests([131], key_dim=32, value_dim=128)
    terms = [term.float()[None] for term in requests.terms(0)]
    keep = {"output_final_state": True, "use_qk_l2norm_in_kernel": True}
    prompt, state = torch_chunk_gated_delta_rule(*[term[:, :130] for term in terms], **keep)
    token, end = torch_recurrent_gated_delta_rule(*[term[:, 130:] for term in terms], initial_state=state, **keep)
    for twin in (cpu, reference):
        states = requests.pool()
        assert_close(requests.rule({0: (0, 130)}, states, twin), prompt[0].flatten(1))
        assert_close(state_view(states, requests.planes)[requests.ids[0]], state[0])
        assert_close(requests.rule({0: (130, 131)}, states, twin, "delta_rule_step"), token[0].flatten(1))
        assert_close(state_view(states, requests.planes)[requests.ids[0]], end[0])


@pytest.mark.parametrize("dtype, conv_dtype", FORMATS, ids=str)
def test_the_convolution_agrees_with_torch_in_float64(dtype, conv_dtype):
    requests = Requests([1, 2, 3, 4, 5, 64, 300], key_dim=24, dtype=dtype, conv_dtype=conv_dtype)
    begun = {request: (0, length // 2) for request, length in enumerate(requests.lengths) if length > 1}
    rest = {request: (length // 2, length) for request, length in enumerate(requests.lengths)}
    for twin in (cpu, reference):
        states = requests.pool()
        requests.conv(begun, states, twin)
        found = requests.conv(rest, states, twin).split([end - start for start, end in rest.values()])
        for request, (start, _) in rest.items():
            inputs = F.pad(requests.x[request].to(conv_dtype).double().T, (3, 0))
            truth = F.conv1d(inputs, requests.weight.double()[:, None], groups=len(inputs))
            assert_close(found[request], F.silu(truth).T[start:])
            kept = conv_view(states, requests.planes)[requests.ids[request]]
            assert same_bits(kept, inputs[:, -3:].to(conv_dtype))


@pytest.mark.parametrize("dtype, conv_dtype", FORMATS, ids=str)
def test_a_prompt_has_the_same_bits_in_any_chunks(dtype, conv_dtype):
    requests = Requests([200], key_dim=32, value_dim=128, dtype=dtype, conv_dtype=conv_dtype)
    states = requests.pool()
    whole = requests.layer({0: (0, 200)}, states)
    for cuts in ([1, 2, 3, 100], [64, 128], [70, 71, 72], [7, 65, 66, 199], list(range(1, 200))):
        mine = requests.pool()
        parts = [requests.layer({0: span}, mine) for span in zip([0, *cuts], [*cuts, 200], strict=True)]
        assert same_bits(torch.cat(parts), whole)
        assert same_bits(mine, states)


@pytest.mark.parametrize("dtype, conv_dtype", FORMATS, ids=str)
def test_a_request_has_the_same_bits_with_any_batch_mates(dtype, conv_dtype):
    requests = Requests([130, 90, 1, 64, 71, 20], dtype=dtype, conv_dtype=conv_dtype)
    steps = [{0: (0, 70), 1: (0, 89), 4: (0, 3)}, {3: (0, 64), 0: (70, 130), 2: (0, 1), 1: (89, 90), 4: (3, 71)}]
    together, alone = requests.pool(), requests.pool()
    for rows in steps:
        parts = requests.layer(rows, together).split([end - start for start, end in rows.values()])
        for (request, span), part in zip(rows.items(), parts, strict=True):
            assert same_bits(requests.layer({request: span}, alone), part)
    assert same_bits(together, alone)


def test_the_convolution_overwrites_its_columns_and_no_others():
    requests = Requests([9], dtype=BF16, conv_dtype=BF16)
    for twin in (cpu, reference):
        batch, x, _ = requests.step(requests.whole())
        wide, before = x._base, x._base.clone()
        out = twin.short_conv(x, requests.weight, requests.pool(), requests.planes, batch)
        assert out.data_ptr() == x.data_ptr()
        changed = (wide != before).any(dim=0)
        assert changed[8:-8].all() and not changed[:8].any() and not changed[-8:].any()


def test_one_row_has_the_same_bits_as_a_step_and_as_a_chunk():
    requests = Requests([1, 1, 1], key_dim=128, value_dim=128)
    states, others = requests.pool(), requests.pool()
    assert same_bits(
        requests.rule(requests.whole(), states, op="delta_rule_step"), requests.rule(requests.whole(), others)
    )
    assert same_bits(states, others)


def test_the_number_of_threads_changes_no_bit():
    requests = Requests([90, 1, 17], group=1, key_dim=64, value_dim=128)
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            states = requests.pool()
            results.append((requests.layer(requests.whole(), states), states))
    finally:
        torch.set_num_threads(before)
    for found, states in results[1:]:
        assert same_bits(found, results[0][0])
        assert same_bits(states, results[0][1])


@pytest.mark.parametrize("twin", [cpu, reference], ids=["cpu", "reference"])
def test_only_the_planes_of_the_layer_in_states_of_the_step_are_written(twin):
    requests = Requests([5, 1, 70])
    states, planes = requests.pool(), requests.planes
    requests.conv(requests.whole(), states, twin)
    requests.rule(requests.whole(), states, twin)
    for written in (conv_view(states, planes), state_view(states, planes)):
        own = written[requests.ids[:3].long()]
        assert own.isfinite().all()
        written[requests.ids[:3].long()] = torch.full_like(own, float("nan"))
        # The same NaN as in untouched bytes.
        written.view(torch.int32 if written.dtype == F32 else torch.int16)[requests.ids[:3].long()] = -1
    assert (states == 255).all()


@pytest.mark.parametrize("twin", [cpu, reference], ids=["cpu", "reference"])
def test_a_request_at_position_0_does_not_read_its_state(twin):
    requests = Requests([1, 40])
    states, zeros = requests.pool(), torch.zeros_like(requests.pool())
    others = torch.randint(0, 127, states.shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    for op in (requests.conv, requests.rule):
        truth = op(requests.whole(), zeros, twin)
        assert same_bits(op(requests.whole(), states, twin), truth)
        assert same_bits(op(requests.whole(), others, twin), truth)
    ids = requests.ids[:2].long()
    for plane in (conv_view, state_view):
        assert same_bits(plane(states, requests.planes)[ids], plane(zeros, requests.planes)[ids])


@pytest.mark.parametrize("twin", [cpu, reference], ids=["cpu", "reference"])
def test_a_state_that_decays_at_once_neither_overflows_nor_vanishes(twin):
    """A decay of exp(-2,000) over a chunk, and one of exactly 1 beside it."""
    requests = Requests([130])
    requests.a_log = torch.tensor([30.0, 0.1, 1e-30, 88.0]).log()
    requests.dt_bias = torch.tensor([1.0, 0.0, 0.0, 100.0])
    requests.gates[0][:, 1] = torch.tensor([200.0, -200.0]).repeat(65)  # betas of 1 and of 0
    found = requests.rule(requests.whole(), requests.pool(), twin)
    assert found.isfinite().all()
    # What the fast heads answer is one token's k . q times its v; q . k near 0 loses digits.
    torch.testing.assert_close(found.double(), requests.truth(0)[0], atol=2e-5, rtol=0.0)


def test_a_long_request_stays_close_to_the_truth():
    requests = Requests([1500], key_heads=1, group=1, key_dim=128)
    assert_truth(requests, [requests.whole()])


def test_states_past_four_gibibytes_are_reached():
    requests = Requests([3], key_heads=1, group=1)
    requests.planes = StatePlanes(1 << 19, (1 << 20) - 4096, 1 << 20, 1, 1, 32, 32, 4, F32)
    requests.ids = torch.tensor([4199], dtype=torch.int32)
    states = torch.from_numpy(np.zeros((4200, 1 << 20), np.uint8))  # only touched states take memory
    requests.conv({0: (0, 3)}, states)
    assert_close(requests.rule({0: (0, 3)}, states), requests.truth(0)[0])
    assert_close(state_view(states, requests.planes)[4199], requests.truth(0)[1])
    assert same_bits(conv_view(states, requests.planes)[4199], requests.x[0].T)


def test_no_rows_give_no_rows_and_inputs_that_do_not_fit_are_refused():
    requests = Requests([20, 5])
    states = requests.pool()
    for twin in (cpu, reference):
        assert requests.conv({0: (0, 0)}, states, twin).shape == (0, requests.planes.channels)
        assert requests.rule({0: (0, 0)}, states, twin).shape == (0, 4 * 32)
        assert (states == 255).all()
    assert_close(requests.rule({0: (0, 0), 1: (0, 5)}, states), requests.truth(1)[0])
    batch, x, gates = requests.step({0: (0, 1)})
    given = (requests.a_log, requests.dt_bias, states, requests.planes, batch)
    with pytest.raises(ValueError, match="do not fit"):
        cpu.delta_rule_chunk(x[:, 1:], gates, *given)
    with pytest.raises(ValueError, match="do not fit"):
        cpu.delta_rule_step(x, gates[:, 1:], *given)
    with pytest.raises(ValueError, match="side by side"):
        cpu.delta_rule_chunk(x, torch.cat([gates, gates], dim=1)[:, ::2], *given)
    with pytest.raises(ValueError, match="do not fit"):
        cpu.short_conv(x, requests.weight[:, 1:], states, requests.planes, batch)


def test_ops_picks_the_compiled_twins_for_the_cpu():
    requests = Requests([50])
    ours, theirs = requests.pool(), requests.pool()
    assert same_bits(requests.conv(requests.whole(), ours, AUTO), requests.conv(requests.whole(), theirs))
    assert same_bits(requests.rule(requests.whole(), ours, AUTO), requests.rule(requests.whole(), theirs))
    assert same_bits(requests.rule({0: (49, 50)}, ours, AUTO, "delta_rule_step"), requests.rule({0: (49, 50)}, theirs))
    assert same_bits(ours, theirs)
