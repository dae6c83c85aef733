"""Hidden checks of lesson 01: random cases against the engine's own functions."""

import torch

from nanokv.bench.decode import bytes_per_step
from nanokv.bench.request import prefill_share
from nanokv.core.metrics import RequestMetrics
from nanokv.core.request import Request, SamplingParams
from nanokv.core.spec import LayerSpec, Plane
from nanokv.engine import sampler
from nanokv.engine.text_stream import TextStream
from nanokv.learn.expect import equal, near, random_of, tensor_of
from nanokv.learn.patching import reference


def test_01_1_random_layers():
    random = random_of("planes")
    for _ in range(50):
        size, heads = random.randint(1, 40), random.randint(1, 9)
        kinds = [random.choice([torch.float32, torch.bfloat16, torch.uint8]) for _ in range(random.randint(1, 4))]
        planes = [Plane(f"p{i}", (heads, size, random.randint(1, 40)), kind, 1) for i, kind in enumerate(kinds)]
        fields = (tuple(planes), (Plane("state", (4, 8), torch.float32, None),))
        equal(LayerSpec(*fields).bytes_per_token, reference(LayerSpec)(*fields).bytes_per_token, f"LayerSpec{fields}")


def test_01_2_random_times():
    random = random_of("times")
    for _ in range(50):
        times = sorted(random.uniform(0, 9) for _ in range(random.randint(0, 5)))
        got = RequestMetrics(arrival=random.uniform(-5, 0), token_times=times).tpot
        expected = reference(RequestMetrics)(arrival=0.0, token_times=times).tpot
        if expected is None:
            equal(got, None, f"tpot of tokens at {times}")
        else:
            near(got, expected, f"tpot of tokens at {times}")


def test_01_3_random_times():
    random = random_of("shares")
    for _ in range(50):
        times = random.uniform(0, 2), random.uniform(0, 1), random.uniform(2, 9)
        near(prefill_share(*times), reference(prefill_share)(*times), f"prefill_share{times}")


def test_01_4_random_sizes():
    random = random_of("sizes")
    for _ in range(50):
        sizes = [random.randint(0, 1000) for _ in range(random.choice([4, 5]))]
        equal(bytes_per_step(*sizes), reference(bytes_per_step)(*sizes), f"bytes_per_step{tuple(sizes)}")


class Pieces:
    is_byte_level = True
    special_ids = frozenset()

    def __init__(self, random) -> None:
        self.table = ["".join(random.choices("ab", k=random.randint(1, 3))).encode() for _ in range(12)]

    def bytes_of_token(self, token_id: int) -> bytes:
        return self.table[token_id]


def test_01_5_random_texts_of_two_letters():
    random = random_of("texts")
    for _ in range(200):
        tokenizer = Pieces(random)
        stop = tuple("".join(random.choices("ab", k=random.randint(1, 5))) for _ in range(random.randint(0, 3)))
        pair = TextStream(tokenizer, stop), reference(TextStream)(tokenizer, stop)
        first = random.randint(0, 3)
        for place in range(12):
            token = random.randrange(12)
            deltas = []
            for stream in pair:
                stream.push(token, place >= first)
                deltas.append((stream.take_delta(), stream.stopped))
            equal(deltas[0], deltas[1], f"delta and stopped after token {place} with the stop texts {stop}")
            if pair[1].stopped:
                break


def test_01_6_random_rows_and_filters():
    random = random_of("rows")
    for case in range(150):
        size = random.choice([5, 40, 700])
        row = (tensor_of(f"row {case}", size) * random.choice([0.1, 1.0, 4.0])).softmax(0)
        params = SamplingParams(
            top_k=random.choice([0, 0, 1, 3, 600]),
            top_p=random.choice([1.0, 1.0, 0.9, 0.3]),
            min_p=random.choice([0.0, 0.0, 0.2]),
        )
        request = Request([1], params)
        request.seed, request.index = random.randrange(1000), random.randrange(4)
        request.tokens.extend([1] * random.randint(1, 50))
        best = row.topk(min(sampler.CANDIDATES, size))
        arguments = request, row, best.values, best.indices
        equal(sampler._draw(*arguments), reference(sampler._draw)(*arguments), f"a row of {size} with {params}"[:150])
