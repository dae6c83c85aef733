"""Tiny random reference checkpoints, made with transformers: what the models of nanokv are compared with.

Every 1-D parameter is perturbed after construction: transformers starts norms at 1 and biases at 0, which would hide
a norm at the wrong place or a bias that is never added.
"""

from __future__ import annotations

from pathlib import Path

import torch
import transformers

LLAMA = {
    "vocab_size": 256,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "initializer_range": 0.2,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "tie_word_embeddings": False,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e5},
}


def llama(folder: Path, seed: int = 0, dtype: torch.dtype = torch.float32, shard: str | None = None, **fields) -> Path:
    """Writes a tiny Llama into `folder` and returns it.

    fields   replace those of LLAMA
    shard    the size of a shard, such as "100KB"; None writes one file
    """
    torch.manual_seed(seed)
    config = transformers.LlamaConfig(**{**LLAMA, **fields})
    return save(transformers.LlamaForCausalLM(config), folder, seed, dtype, shard)


def save(model: torch.nn.Module, folder: Path, seed: int, dtype: torch.dtype, shard: str | None) -> Path:
    """Perturbs every 1-D parameter, converts and writes the model."""
    generator = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter += 0.3 * torch.randn(parameter.shape, generator=generator)
    options = {} if shard is None else {"max_shard_size": shard}
    model.to(dtype).save_pretrained(folder, **options)
    return folder


def reference(folder: Path) -> transformers.PreTrainedModel:
    """The checkpoint as transformers runs it."""
    return transformers.AutoModelForCausalLM.from_pretrained(folder).eval()


def logits(model: transformers.PreTrainedModel, tokens: list[int]) -> torch.Tensor:
    """float32 [tokens, vocab] of one unpadded sequence, computed at once."""
    with torch.inference_mode():
        return model(torch.tensor([tokens]), use_cache=False).logits[0].float()


def prompt(length: int, vocab_size: int = 256, seed: int = 0) -> list[int]:
    """Random token ids."""
    generator = torch.Generator().manual_seed(1000 + seed)
    return torch.randint(3, vocab_size, (length,), generator=generator).tolist()
