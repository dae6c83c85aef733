"""Hugging Face transformers as a worker of bench_peers.py: `generate` on a batch, a round of clients at a time."""

from __future__ import annotations

import time

import torch
import transformers
from protocol import serve
from transformers import AutoModelForCausalLM, StoppingCriteria


class Clock(StoppingCriteria):
    """Records the time of each token."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **_) -> torch.Tensor:
        self.times.append(time.perf_counter())
        return torch.zeros(len(input_ids), dtype=torch.bool)


class Engine:
    def __init__(self, settings: dict) -> None:
        torch.set_num_threads(settings["threads"])
        dtype = getattr(torch, settings["dtype"])
        self._model = AutoModelForCausalLM.from_pretrained(settings["model"], dtype=dtype).eval()
        flags = {"dtype": settings["dtype"], "attention": self._model.config._attn_implementation}
        self.about = {
            "versions": {"transformers": transformers.__version__, "torch": torch.__version__},
            "flags": {**flags, "threads": torch.get_num_threads(), "call": "generate, greedy, one batch a round"},
        }

    def forget(self) -> None:
        pass  # no state between two calls

    @torch.inference_mode()
    def run(self, prompts: list[list[int]], output_tokens: int, concurrency: int) -> list[tuple[float, float, int]]:
        answered = []
        for start in range(0, len(prompts), concurrency):
            batch = torch.tensor(prompts[start : start + concurrency])
            clock, begin = Clock(), time.perf_counter()
            self._model.generate(
                batch,
                attention_mask=torch.ones_like(batch),
                min_new_tokens=output_tokens,
                max_new_tokens=output_tokens,
                do_sample=False,
                pad_token_id=0,
                stopping_criteria=[clock],
            )
            if len(clock.times) != output_tokens:
                raise RuntimeError(f"{len(clock.times)} of {output_tokens} tokens")
            answered += [(clock.times[0] - begin, clock.times[-1] - begin, 0)] * len(batch)
        return answered


if __name__ == "__main__":
    serve(Engine)
