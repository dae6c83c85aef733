"""Codecs on SmolLM2 in float32: the divergence of next-token distributions from those of the raw codec."""

from pydoc_data.topics import topics

import pytest
import torch

from nanokv.llm import LLM

pytestmark = pytest.mark.slow
TEXTS = ("assignment", "formatstrings", "class", "try")


def scores(folder, **fields) -> list[torch.Tensor]:
    """Log-probabilities of every position of each text."""
    with LLM(folder, dtype="float32", num_pages=32, page_size=32, **fields) as llm:
        return [llm.score(llm.tokenizer.encode(topics[name])[:320]).log_softmax(-1) for name in TEXTS]


def test_codecs_keep_the_order_of_their_errors_on_a_real_model(smollm2):
    raw = scores(smollm2)

    def loss(codec: str) -> float:
        pairs = zip(raw, scores(smollm2, codec=codec), strict=True)
        return sum((truth.exp() * (truth - other)).sum(-1).mean().item() for truth, other in pairs) / len(TEXTS)

    tq4, int4 = loss("tq4"), loss("int4")
    assert tq4 <= int4 / 2
    assert loss("fp8") < tq4 / 5 and loss("int8") < tq4 / 5
    assert tq4 < loss("tqp4") and tq4 < loss("tq3")
