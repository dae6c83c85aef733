"""GGUF files of the llama architecture, converted back to the checkpoint they were made from.

The conversion undoes names, the order of rows in q and k (llama.cpp rotates neighbours, checkpoints rotate halves), and
block quantisation. It holds one tensor in memory at a time.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from nanokv.core.errors import PullError
from nanokv.hub.folder import write_json
from nanokv.hub.gguf_file import GGUFFile
from nanokv.hub.gguf_tokenizer import build_tokenizer

SUPPORTED = ("llama",)
Progress = Callable[[str, int, int | None], None]
"""Called with (stage, units done, units in all or None). Stages are "wait", "fetch", "verify" and "convert"."""


def undo_permutation(weight: np.ndarray, num_heads: int) -> np.ndarray:
    """Reorders the rows of a q or k projection from llama.cpp's pairs of neighbours to halves.

    weight    [num_heads * head_dim, width]
    Returns   the same shape
    Source    the inverse of LlamaModel.permute in llama.cpp's convert_hf_to_gguf.py
    """
    rows, width = weight.shape
    return weight.reshape(num_heads, rows // num_heads // 2, 2, width).swapaxes(1, 2).reshape(rows, width)


def read_config(file: GGUFFile) -> dict:
    """The config.json of the checkpoint that the file was made from.

    Raises PullError naming the key or tensor that is missing, or the feature that is not supported.
    """
    arch = file.require("general.architecture")
    if arch not in SUPPORTED:
        raise PullError(f"{file.path}: architecture {arch!r} is not supported; supported are {', '.join(SUPPORTED)}")
    if file.get("llama.expert_count"):
        raise PullError(f"{file.path}: a mixture of experts is not supported in GGUF files; dense llama models are")
    if "token_embd.weight" not in file.tensor_names:
        raise PullError(f"{file.path}: tensor token_embd.weight is missing")
    heads = file.require("llama.attention.head_count")
    hidden = file.require("llama.embedding_length")
    head_dim = file.get("llama.attention.key_length", hidden // heads)
    if file.get("llama.rope.dimension_count", head_dim) != head_dim:
        raise PullError(f"{file.path}: llama.rope.dimension_count differs from the head size {head_dim}")
    theta = _shortest(file.get("llama.rope.freq_base", 10000.0))
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": file.shape("token_embd.weight")[0],
        "hidden_size": hidden,
        "intermediate_size": file.require("llama.feed_forward_length"),
        "num_hidden_layers": file.require("llama.block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": file.get("llama.attention.head_count_kv", heads),
        "head_dim": head_dim,
        "hidden_act": "silu",
        "rms_norm_eps": _shortest(file.require("llama.attention.layer_norm_rms_epsilon")),
        "rope_theta": theta,
        "rope_scaling": _rope_scaling(file, theta, head_dim),
        "max_position_embeddings": file.require("llama.context_length"),
        "tie_word_embeddings": "output.weight" not in file.tensor_names,
        "attention_bias": False,
        "mlp_bias": False,
        "bos_token_id": file.get("tokenizer.ggml.bos_token_id"),
        "eos_token_id": _eos_ids(file),
        "pad_token_id": file.get("tokenizer.ggml.padding_token_id"),
        "torch_dtype": "bfloat16",
    }


def _shortest(value: float) -> float:
    """The shortest decimal that is the same float32: 9.999999747378752e-06 was written as 1e-05."""
    return float(str(np.float32(value)))


def _eos_ids(file: GGUFFile) -> int | list[int] | None:
    ids = [file.get(f"tokenizer.ggml.{key}_token_id") for key in ("eos", "eot", "eom")]
    ids = list(dict.fromkeys(i for i in ids if i is not None))
    return ids if len(ids) > 1 else ids[0] if ids else None


def _rope_scaling(file: GGUFFile, theta: float, head_dim: int) -> dict | None:
    """Linear scaling, or Llama 3's, of which GGUF stores a divisor for each frequency instead of the parameters."""
    kind = file.get("llama.rope.scaling.type", "none")
    if kind == "linear":
        return {"rope_type": "linear", "factor": file.require("llama.rope.scaling.factor")}
    if kind != "none":
        raise PullError(f"{file.path}: rope scaling {kind!r} is not supported; none, linear and Llama 3's are")
    if "rope_freqs.weight" not in file.tensor_names:
        return None
    divisors = file.tensor("rope_freqs.weight")
    llama3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
    low, high, original = llama3.values()
    factor = float(divisors.max())
    turns = original * theta ** -(np.arange(0, head_dim, 2) / head_dim) / (2 * np.pi)
    smooth = np.clip((turns - low) / (high - low), 0, 1)
    if divisors.shape != smooth.shape or not np.allclose(divisors, 1 / ((1 - smooth) / factor + smooth), rtol=1e-3):
        raise PullError(f"{file.path}: rope_freqs.weight does not follow Llama 3's scaling, the only one supported")
    return {"rope_type": "llama3", "factor": factor, **llama3}


def tensor_table(config: dict) -> dict[str, tuple[str, tuple[int, ...], int]]:
    """Checkpoint name -> (GGUF name, shape, heads), for every tensor; heads is 0 where rows are not permuted."""
    hidden, ffn, dim = config["hidden_size"], config["intermediate_size"], config["head_dim"]
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    table = {
        "model.embed_tokens.weight": ("token_embd.weight", (config["vocab_size"], hidden), 0),
        "model.norm.weight": ("output_norm.weight", (hidden,), 0),
    }
    if not config["tie_word_embeddings"]:
        table["lm_head.weight"] = ("output.weight", (config["vocab_size"], hidden), 0)
    layer = {
        "input_layernorm": ("attn_norm", (hidden,), 0),
        "post_attention_layernorm": ("ffn_norm", (hidden,), 0),
        "self_attn.q_proj": ("attn_q", (heads * dim, hidden), heads),
        "self_attn.k_proj": ("attn_k", (kv_heads * dim, hidden), kv_heads),
        "self_attn.v_proj": ("attn_v", (kv_heads * dim, hidden), 0),
        "self_attn.o_proj": ("attn_output", (hidden, heads * dim), 0),
        "mlp.gate_proj": ("ffn_gate", (ffn, hidden), 0),
        "mlp.up_proj": ("ffn_up", (ffn, hidden), 0),
        "mlp.down_proj": ("ffn_down", (hidden, ffn), 0),
    }
    for i in range(config["num_hidden_layers"]):
        for name, (source, shape, permuted) in layer.items():
            table[f"model.layers.{i}.{name}.weight"] = (f"blk.{i}.{source}.weight", shape, permuted)
    return table


def convert(path: Path, model: Path, generation: dict, progress: Progress) -> None:
    """Writes the checkpoint of a GGUF file: config, weights rounded to bf16, tokenizer, template.

    path         of the GGUF file
    model        an existing, empty folder
    generation   sampling defaults that generation_config.json gets with the special token ids
    progress     called after each tensor
    Raises       PullError, one line, for a file that is damaged or not supported; OSError where the disk fails
    """
    file = GGUFFile(path)
    config = read_config(file)
    table = tensor_table(config)
    wanted = {source: shape for source, shape, _ in table.values()}
    missing = sorted(set(wanted) - file.tensor_names)
    extra = sorted(file.tensor_names - set(wanted) - {"rope_freqs.weight"})
    wrong = [f"{n} {list(file.shape(n))}" for n, shape in wanted.items() if n not in missing and file.shape(n) != shape]
    for problem, names in (("missing", missing), ("unknown", extra), ("of the wrong shape", wrong)):
        if names:
            more = f" and {len(names) - 5} more" if len(names) > 5 else ""
            raise PullError(f"{path}: tensors {problem}: {', '.join(names[:5])}{more}")

    tokenizer, tokenizer_config = build_tokenizer(file)
    (model / "tokenizer.json").write_text(tokenizer.to_str(pretty=True), encoding="utf-8")
    tokenizer_config["model_max_length"] = config["max_position_embeddings"]
    write_json(model / "tokenizer_config.json", tokenizer_config)
    if template := file.get("tokenizer.chat_template"):
        (model / "chat_template.jinja").write_text(template, encoding="utf-8")
    special = {key: config[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id") if config[key] is not None}
    write_json(model / "generation_config.json", {**special, **generation})
    write_json(model / "config.json", config)
    _write_weights(file, table, model / "model.safetensors", progress)


def _write_weights(file: GGUFFile, table: dict, path: Path, progress: Progress) -> None:
    """One safetensors file in bf16, written tensor by tensor: 8 bytes of header length, a JSON header, the data."""
    import torch

    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, (_, shape, _) in table.items():
        size = 2 * int(np.prod(shape))
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as out:
        out.write(len(text).to_bytes(8, "little") + text)
        for done, (source, _, permuted) in enumerate(table.values()):
            progress("convert", done, len(table))
            weight = undo_permutation(file.tensor(source), permuted) if permuted else file.tensor(source)
            rounded = torch.from_numpy(np.array(weight, dtype=np.float32)).to(torch.bfloat16)
            out.write(rounded.view(torch.uint8).numpy().data)
        progress("convert", len(table), len(table))
