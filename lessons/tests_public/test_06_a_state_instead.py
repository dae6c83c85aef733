"""Public checks of lesson 06."""

import torch

from nanokv.cache.radix import Node, RadixTree
from nanokv.cache.states import Recurrence, States
from nanokv.core.batch import Batch
from nanokv.core.request import Request
from nanokv.kernels.planes import StatePlanes
from nanokv.kernels.reference import delta_rule as rule
from nanokv.layers.deltanet import DeltaConfig, GatedDeltaNet
from nanokv.learn.expect import close, equal, tensor_of


def step_of(*spans: tuple[int, int, int]) -> Batch:
    """A step: the state, the first position and the number of rows of each request."""
    positions = [start + row for _, start, rows in spans for row in range(rows)]
    starts = [0]
    for _, _, rows in spans:
        starts.append(starts[-1] + rows)
    unused = torch.zeros(len(positions), dtype=torch.int32)
    return Batch(
        token_ids=unused.long(), positions=torch.tensor(positions, dtype=torch.int32), write_pages=unused,
        write_slots=unused, request_starts=torch.tensor(starts, dtype=torch.int32), page_tables=unused[:, None],
        logit_rows=unused.long(), state_ids=torch.tensor([state for state, _, _ in spans], dtype=torch.int32),
        page_size=16,
    )  # fmt: skip


def planes_of(heads: int = 2, dim: int = 4, kernel: int = 3, dtype=torch.float32) -> StatePlanes:
    channels = 3 * heads * dim
    conv_bytes = -(-channels * (kernel - 1) * dtype.itemsize // 16) * 16
    return StatePlanes(0, conv_bytes, conv_bytes + heads * dim * dim * 4, heads, heads, dim, dim, kernel, dtype)


def pool_of(planes: StatePlanes, states: int = 4) -> torch.Tensor:
    """A pool of states in which every byte is nonzero."""
    return torch.full((states, planes.state_bytes), 0x3F, dtype=torch.uint8)


def test_06_1_a_state_is_a_matrix_for_each_head_and_the_last_inputs():
    spec = GatedDeltaNet.spec(DeltaConfig(2, 4, 16, 8, 4), torch.bfloat16)
    got = {plane.name: (plane.shape, plane.dtype, plane.token_axis) for plane in spec.state}
    expected = {"state": ((4, 16, 8), torch.float32, None), "conv": ((96, 3), torch.bfloat16, None)}
    equal(got, expected, "planes of a state")


def test_06_1_a_layer_keeps_nothing_per_token():
    spec = GatedDeltaNet.spec(DeltaConfig(2, 4, 16, 8, 4), torch.float32)
    equal(spec.paged, (), "planes of a page")
    equal(spec.bytes_per_token, 0, "bytes per token")
    equal(spec.bytes_per_sequence, 4 * 16 * 8 * 4 + 96 * 3 * 4, "bytes per sequence")


def convolved(inputs: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """The whole sequence, one output at a time."""
    kernel, rows = weight.shape[1], []
    for row in range(len(inputs)):
        total = torch.zeros(inputs.shape[1])
        for back in range(min(kernel, row + 1)):
            total += inputs[row - back] * weight[:, kernel - 1 - back]
        rows.append(total * total.sigmoid())
    return torch.stack(rows)


def test_06_2_a_prompt_starts_from_zeros():
    planes = planes_of()
    x, weight = tensor_of("x", 5, planes.channels), tensor_of("w", planes.channels, 3)
    got = rule.short_conv(x.clone(), weight, pool_of(planes), planes, step_of((1, 0, 5)))
    close(got, convolved(x, weight), "five rows of a fresh request", ("row", "channel"))


def test_06_2_steps_of_any_length_give_the_same_result():
    planes = planes_of(kernel=4)
    x, weight, pool = tensor_of("x", 7, planes.channels), tensor_of("w", planes.channels, 4), pool_of(planes)
    got, at = [], 0
    for rows in (1, 1, 3, 2):
        got.append(rule.short_conv(x[at : at + rows].clone(), weight, pool, planes, step_of((2, at, rows))))
        at += rows
    close(torch.cat(got), convolved(x, weight), "seven rows in steps of 1, 1, 3 and 2", ("row", "channel"))


def test_06_2_requests_do_not_see_each_other():
    planes = planes_of()
    x, weight = tensor_of("x", 6, planes.channels), tensor_of("w", planes.channels, 3)
    got = rule.short_conv(x.clone(), weight, pool_of(planes), planes, step_of((3, 0, 2), (0, 0, 4)))
    expected = torch.cat((convolved(x[:2], weight), convolved(x[2:], weight)))
    close(got, expected, "two requests of 2 and 4 rows", ("row", "channel"))


def test_06_2_the_result_replaces_the_input():
    planes = planes_of()
    x, weight = tensor_of("x", 3, planes.channels), tensor_of("w", planes.channels, 3)
    expected = convolved(x, weight)
    rule.short_conv(x, weight, pool_of(planes), planes, step_of((0, 0, 3)))
    close(x, expected, "x after the call", ("row", "channel"))


class Inputs:
    """q, k, v and gates of some tokens."""

    def __init__(self, label: str, rows: int, planes: StatePlanes) -> None:
        heads = planes.value_heads
        self.qkv, self.gates = (
            tensor_of(f"{label} qkv", rows, planes.channels),
            tensor_of(f"{label} g", rows, 2 * heads),
        )
        self.a_log, self.dt_bias = tensor_of(f"{label} a", heads) - 2, tensor_of(f"{label} dt", heads) - 2

    def slice(self, start: int, end: int) -> tuple[torch.Tensor, ...]:
        return self.qkv[start:end], self.gates[start:end], self.a_log, self.dt_bias


def recurrence(inputs: Inputs, planes: StatePlanes, state: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The rule as in the paper, one token and one head at a time. Returns the results and the last state."""
    q, k, v, log_decay, beta = rule._terms(*inputs.slice(0, len(inputs.qkv)), planes)
    state, rows = state.clone(), []
    for token in range(len(q)):
        for head in range(planes.value_heads):
            state[head] *= log_decay[token, head].exp()
            said = state[head].T @ k[token, head]
            state[head] += torch.outer(k[token, head], beta[token, head] * (v[token, head] - said))
        rows.append(torch.cat([state[head].T @ q[token, head] for head in range(planes.value_heads)]))
    return torch.stack(rows), state


def test_06_3_a_first_token_starts_from_zeros():
    planes = planes_of()
    inputs, pool = Inputs("first", 1, planes), pool_of(planes)
    got = rule.delta_rule_step(*inputs.slice(0, 1), pool, planes, step_of((2, 0, 1)))
    expected, state = recurrence(inputs, planes, torch.zeros(2, 4, 4))
    close(got, expected, "the result of a first token", ("row", "channel"))
    close(rule.state_view(pool, planes)[2], state, "its state", ("head", "key", "value"))


def test_06_3_the_state_moves_on():
    planes = planes_of()
    inputs, pool = Inputs("moves", 4, planes), pool_of(planes)
    got = [rule.delta_rule_step(*inputs.slice(row, row + 1), pool, planes, step_of((1, row, 1))) for row in range(4)]
    expected, state = recurrence(inputs, planes, torch.zeros(2, 4, 4))
    close(torch.cat(got), expected, "results of four tokens, one in each step", ("row", "channel"))
    close(rule.state_view(pool, planes)[1], state, "the state afterwards", ("head", "key", "value"))


def test_06_3_each_row_uses_the_state_of_its_request():
    planes = planes_of()
    pool, inputs = pool_of(planes), Inputs("rows", 2, planes)
    view = rule.state_view(pool, planes)
    view[:] = tensor_of("states", *view.shape)
    before = view.clone()
    rule.delta_rule_step(*inputs.slice(0, 2), pool, planes, step_of((3, 5, 1), (0, 9, 1)))
    close(view[1], before[1], "state 1, which no row uses", ("head", "key", "value"))
    one = Inputs("rows", 2, planes)
    one.qkv, one.gates = inputs.qkv[1:], inputs.gates[1:]
    close(view[0], recurrence(one, planes, before[0])[1], "state 0, of the second row", ("head", "key", "value"))


def chunked(inputs: Inputs, planes: StatePlanes, state: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    terms = rule._terms(*inputs.slice(0, len(inputs.qkv)), planes)
    result, after = rule._chunk(state, *(term.transpose(0, 1) for term in terms))
    return result.transpose(0, 1).flatten(1), after


def test_06_4_a_chunk_of_one_token_equals_one_step():
    planes = planes_of()
    inputs, state = Inputs("one", 1, planes), tensor_of("state", 2, 4, 4)
    (got, after), (expected, moved) = chunked(inputs, planes, state), recurrence(inputs, planes, state)
    close(got, expected, "the result of one token", ("row", "channel"), 1e-4)
    close(after, moved, "the state after one token", ("head", "key", "value"), 1e-4)


def test_06_4_tokens_of_a_chunk_see_the_writes_of_earlier_ones():
    planes = planes_of()
    inputs = Inputs("chunk", 6, planes)
    (got, after), (expected, moved) = (run(inputs, planes, torch.zeros(2, 4, 4)) for run in (chunked, recurrence))
    close(got, expected, "results of six tokens", ("row", "channel"), 1e-4)
    close(after, moved, "the state after six tokens", ("head", "key", "value"), 1e-4)


def test_06_4_a_chunk_starts_from_a_nonzero_state():
    planes = planes_of()
    inputs, state = Inputs("long", 40, planes), tensor_of("state", 2, 4, 4)
    (got, after), (expected, moved) = chunked(inputs, planes, state), recurrence(inputs, planes, state)
    close(got, expected, "results of 40 tokens", ("row", "channel"), 1e-3)
    close(after, moved, "the state after 40 tokens", ("head", "key", "value"), 1e-3)


def chain(*states: int | None) -> list[Node]:
    """A root and a chain of nodes below it with these states."""
    nodes = [Node(None, b"", [])]
    for state in states:
        node = Node(nodes[-1], b"", [])
        node.state = state
        nodes.append(node)
    return nodes


def some_states(page_size: int = 4, interval: int | None = None) -> States:
    return States(8, page_size, interval, RadixTree(page_size))


def test_06_5_the_deepest_node_with_a_state_is_found():
    _root, a, _b, c = chain(5, None, None)
    equal(some_states().reachable(c) is a, True, "from a node without a state: the node with a state, two above")
    equal(some_states().reachable(a) is a, True, "from a node with a state: itself")


def test_06_5_a_request_starts_at_the_root_without_any_state():
    root, _a, b = chain(None, None)
    equal(some_states().reachable(b) is root, True, "from a chain without states: the root")
    equal(some_states().reachable(root) is root, True, "from the root: itself")


def test_06_5_state_0_is_a_state():
    _root, a, b = chain(0, None)
    equal(some_states().reachable(b) is a, True, "a node with the state number 0")


def running(num_tokens: int, computed: int, wanted: set[int]) -> Request:
    request = Request([1])
    request.tokens = [1] * num_tokens
    request.num_computed, request.held.recurrence = computed, Recurrence(0, wanted=wanted)
    return request


def test_06_6_a_step_stops_at_the_last_page_boundary_that_leaves_a_token():
    states = some_states(page_size=4)
    equal(states.limit_chunk(running(11, 0, set()), 100), 8, "of 11 tokens in pages of 4, from 0")
    equal(states.limit_chunk(running(11, 8, set()), 3), 3, "of 11 tokens in pages of 4, from 8, 3 asked for")
    equal(
        states.limit_chunk(running(12, 0, set()), 100),
        8,
        "of 12 tokens in pages of 4, from 0: one token must remain to compute",
    )


def test_06_6_a_step_stops_at_the_nearest_wanted_position():
    states = some_states(page_size=4)
    equal(states.limit_chunk(running(40, 0, {8, 20}), 100), 8, "of 40 tokens, wanted at 8 and 20, from 0")
    equal(states.limit_chunk(running(40, 8, {8, 20}), 100), 12, "of 40 tokens, wanted at 8 and 20, from 8")
    equal(states.limit_chunk(running(40, 8, {20}), 5), 5, "of 40 tokens, wanted at 20, from 8, 5 asked for")


def test_06_6_a_step_stops_at_the_next_multiple_of_the_interval():
    states = some_states(page_size=4, interval=16)
    equal(
        [states.limit_chunk(running(60, at, set()), 100) for at in (0, 10, 16)],
        [16, 6, 16],
        "of 60 tokens, interval 16, from 0, 10 and 16",
    )


def test_06_6_without_an_interval_a_step_stops_at_no_multiple():
    equal(
        some_states(interval=None).limit_chunk(running(101, 0, set()), 70),
        70,
        "of 101 tokens without an interval, 70 asked for",
    )
