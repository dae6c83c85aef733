"""Tiny models for the lessons: a config.json and no weights. The engine fills in seeded noise (load="dummy").

These lessons need no meaningful text, only the computation and the memory behind it. A step of such a model takes
about a millisecond.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

from nanokv import LLM

LLAMA = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 512, "hidden_size": 64,
    "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "head_dim": 16, "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "max_position_embeddings": 4096,
    "tie_word_embeddings": True, "bos_token_id": 1, "eos_token_id": 2, "torch_dtype": "float32",
}  # fmt: skip
"""Two layers of grouped-query attention: 512 bytes of keys and values a token."""


def engine(config: dict = LLAMA, **fields) -> LLM:
    """An LLM of random weights in float32; `fields` are those of EngineConfig."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "config.json").write_text(json.dumps(config), encoding="utf-8")
        return LLM(folder, load="dummy", dtype="float32", device="cpu", **fields)
