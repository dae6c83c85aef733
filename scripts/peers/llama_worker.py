"""llama.cpp as a worker of bench_peers.py: its C interface, with all requests of a job as sequences of one batch.

The library has no prefix cache across sequences and no scheduler, so a job must be one round: as many prompts as
clients. Prompts are computed first, n_batch tokens a call. Then all sequences decode together.
"""

from __future__ import annotations

import ctypes
import time
from importlib.metadata import version

import llama_cpp as llama
import numpy as np
from protocol import serve

MAX_SEQUENCES = 16


class Engine:
    def __init__(self, settings: dict) -> None:
        llama.llama_backend_init()
        model = llama.llama_model_load_from_file(settings["gguf"].encode(), llama.llama_model_default_params())
        if not model:
            raise RuntimeError(f"{settings['gguf']} cannot be loaded")
        flags = {
            "n_ctx": MAX_SEQUENCES * settings["max_model_len"],
            "n_seq_max": MAX_SEQUENCES,
            "n_batch": settings["max_step_tokens"],
            "n_ubatch": 512,
            "n_threads": settings["threads"],
            "n_threads_batch": settings["threads"],
            "flash_attn_type": llama.LLAMA_FLASH_ATTN_TYPE_ENABLED,
        }
        params = llama.llama_context_default_params()
        for name, value in flags.items():
            setattr(params, name, value)
        self._context = llama.llama_init_from_model(model, params)
        if not self._context:
            raise RuntimeError("llama.cpp cannot make a context")
        self._vocab_size = llama.llama_vocab_n_tokens(llama.llama_model_get_vocab(model))
        self._batch_tokens = settings["max_step_tokens"]
        self._batch = llama.llama_batch_init(self._batch_tokens, 0, 1)
        self.about = {
            "versions": {"llama-cpp-python": version("llama_cpp_python")},
            "flags": {**flags, "gguf": "BF16", "build": llama.llama_print_system_info().decode().strip(" |")},
        }

    def forget(self) -> None:
        llama.llama_memory_clear(llama.llama_get_memory(self._context), False)

    def run(self, prompts: list[list[int]], output_tokens: int, concurrency: int) -> list[tuple[float, float, int]]:
        if len(prompts) > concurrency or len(prompts) > MAX_SEQUENCES:
            raise ValueError("one round of at most 16 requests")
        self.forget()
        begin = time.perf_counter()
        rows = [
            (token, place, sequence, place == len(prompt) - 1)
            for sequence, prompt in enumerate(prompts)
            for place, token in enumerate(prompt)
        ]
        tokens: dict[int, int] = {}
        first: dict[int, float] = {}
        for start in range(0, len(rows), self._batch_tokens):
            found = self._decode(rows[start : start + self._batch_tokens])
            tokens |= found
            first |= dict.fromkeys(found, time.perf_counter())
        for step in range(output_tokens - 1):
            tokens = self._decode([(tokens[s], len(prompt) + step, s, True) for s, prompt in enumerate(prompts)])
        end = time.perf_counter()
        return [(first[sequence] - begin, end - begin, 0) for sequence in range(len(prompts))]

    def _decode(self, rows: list[tuple[int, int, int, bool]]) -> dict[int, int]:
        """Computes rows (token, position, sequence, wanted). Returns the most likely next token by wanted sequence."""
        batch = self._batch
        batch.n_tokens = len(rows)
        for i, (token, position, sequence, wanted) in enumerate(rows):
            batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.logits[i] = token, position, 1, wanted
            batch.seq_id[i][0] = sequence
        if llama.llama_decode(self._context, batch) != 0:
            raise RuntimeError("llama_decode failed")
        found = {}
        for i, (_, _, sequence, wanted) in enumerate(rows):
            if wanted:
                logits = llama.llama_get_logits_ith(self._context, i)
                address = ctypes.cast(logits, ctypes.POINTER(ctypes.c_float))
                found[sequence] = int(np.ctypeslib.as_array(address, (self._vocab_size,)).argmax())
        return found


if __name__ == "__main__":
    serve(Engine)
