"""SmolLM2 in float32: the greedy tokens of ten prompts are those of transformers on the same folder."""

import pytest
import torch

from nanokv import SamplingParams
from nanokv.llm import LLM

NUM_TOKENS = 32
TIE = 1e-4
PROMPTS = [
    "What is the capital of France?",
    "Write a haiku about the sea.",
    "def fibonacci(n):",
    "List the first ten prime numbers.",
    "Explain gravity to a child in two sentences.",
    "Translate to German: I like green apples.",
    "今日は何曜日ですか？",
    "🙂🙃 What do these mean?",
    "  Two spaces, 3 tabs\t\t\t and 1234567890.",
    "The quick brown fox jumps over the lazy dog. " * 12,
]


@pytest.mark.parametrize(
    "prompts", [PROMPTS[6:], pytest.param(PROMPTS[:6], marks=pytest.mark.slow)], ids=["odd", "plain"]
)
def test_greedy_tokens_match_transformers(smollm2, prompts):
    from transformers import AutoModelForCausalLM

    with LLM(smollm2, dtype="float32", kv_memory="256MiB", max_step_tokens=64) as llm:
        params = SamplingParams(temperature=0, max_tokens=NUM_TOKENS, ignore_eos=True)
        ids = [llm.tokenizer.chat([{"role": "user", "content": text}]) for text in prompts]
        ours = [output.token_ids for output in llm.generate(ids, params)]
    reference = AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32)
    ties = 0
    for prompt, tokens in zip(ids, ours, strict=True):
        with torch.inference_mode():
            logits = reference(torch.tensor([[*prompt, *tokens]])).logits[0, len(prompt) - 1 : -1]
        top = logits.topk(2, dim=-1)
        gaps = (top.values[:, 0] - top.values[:, 1]).tolist()
        for token, expected, gap in zip(tokens, top.indices[:, 0].tolist(), gaps, strict=True):
            if token != expected:
                assert gap < TIE, f"{token} instead of {expected}, whose lead is {gap}"
                ties += 1
    print(f"{ties} ties in {NUM_TOKENS * len(prompts)} tokens")
    assert ties <= 1


def test_bfloat16_answers_a_simple_question(smollm2):
    with LLM(smollm2, kv_memory="256MiB") as llm:
        assert llm.stats()["bytes_per_token"] == 30 * 2 * 3 * 64 * 2
        question = [{"role": "user", "content": "What is the capital of France? Answer in one sentence."}]
        assert "Paris" in llm.chat(question, SamplingParams(temperature=0, max_tokens=32)).text


@pytest.mark.slow
def test_the_logits_of_a_long_context_match_transformers(smollm2):
    """Logits of 4,096 tokens, in chunks of an odd size, against one forward pass of transformers."""
    from transformers import AutoModelForCausalLM

    text = torch.randint(0, 49000, (4096,), generator=torch.Generator().manual_seed(0)).tolist()
    with LLM(smollm2, dtype="float32", kv_memory="512MiB", max_step_tokens=333) as llm:
        ours = llm.score(text)
    with torch.inference_mode():
        theirs = AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32)(torch.tensor([text])).logits[0]
    assert (ours - theirs).abs().max() < 2e-3  # float32 sums over 4,096 keys in another order, logits of up to 40
