"""config.json into ModelConfig: reads what every family shares, then calls the `read` of the family's own module.

Reads the files of transformers 4 (rope_theta and rope_scaling, torch_dtype) and 5 (rope_parameters, dtype), and the
text part of vision-language models. A field that shapes a tensor has no default: a file without it is refused, not
guessed at. Knows JSON and what all families share, no tensors.
"""

from __future__ import annotations

from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

from nanokv.core.errors import CheckpointError
from nanokv.models import FAMILIES
from nanokv.models.config import ModelConfig
from nanokv.models.fields import Fields, read_json
from nanokv.text.files import end_ids

DTYPES = ("float32", "bfloat16", "float16")


def read_folder(folder: str | Path) -> ModelConfig:
    """Reads config.json and, for eos ids, generation_config.json and the tokenizer's eos_token.

    folder   of the model
    Raises   CheckpointError naming the file, and the family or the field
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: not a folder; a model is a folder with config.json and *.safetensors")
    path = folder / "config.json"
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file; a model folder holds config.json and *.safetensors")
    generation = folder / "generation_config.json"
    more_eos = read_json(generation).get("eos_token_id") if generation.is_file() else None
    config = read_config(read_json(path), str(path), more_eos)
    ends = [token_id for token_id in end_ids(folder) if token_id < config.vocab_size]
    return replace(config, eos_token_ids=tuple(dict.fromkeys([*config.eos_token_ids, *ends])))


def read_config(data: dict[str, Any], where: str = "config.json", more_eos: Any = None) -> ModelConfig:
    """Reads the content of a config.json.

    where      the file's name in error messages
    more_eos   eos_token_id of generation_config.json
    Raises     CheckpointError naming the family or the field
    """
    top = Fields(data, where)
    family = _family(top)
    for part in (top, top.inside("text_config")):
        if (method := part.get("quantization_config")) is not None:
            method = method.get("quant_method", method) if isinstance(method, dict) else method
            raise part.error("quantization_config", f"{method!r} weights are not supported; use the plain checkpoint")
    fields = top.inside("text_config") if top.get("text_config") is not None else top
    if fields.get("hidden_act", "silu") != "silu":
        raise fields.error("hidden_act", "only 'silu' is supported")
    if fields.flag("use_sliding_window", default=False):
        raise fields.error("use_sliding_window", "attention over a window is not supported")
    return import_module(FAMILIES[family][1]).read(fields, _common(family, top, fields, more_eos))


def _family(fields: Fields) -> str:
    """The model_type. Raises CheckpointError unless it is known and the architecture belongs to it."""
    model_type = fields.get("model_type")
    architectures = fields.get("architectures", [])
    known = ", ".join(f"{name} ({architecture})" for name, (architecture, _) in FAMILIES.items())
    if not isinstance(architectures, list):
        raise fields.error("architectures", "expected a list of names")
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        named = f"model_type={model_type!r}" + (f" ({architectures})" if architectures else "")
        raise CheckpointError(f"{fields.where}: {named} is not supported; supported are {known}")
    if architectures and FAMILIES[model_type][0] not in architectures:
        raise fields.error("architectures", f"not supported for model_type {model_type!r}; supported are {known}")
    return model_type


def _common(family: str, top: Fields, fields: Fields, more_eos: Any) -> dict[str, Any]:
    """The fields of ModelConfig that are read alike in every family, by name."""
    num_heads, vocab_size = fields.integer("num_attention_heads"), fields.integer("vocab_size")
    num_kv_heads = fields.integer("num_key_value_heads", default=num_heads)
    if num_heads % num_kv_heads:
        raise fields.error("num_key_value_heads", f"does not divide num_attention_heads={num_heads}")
    bos = fields.token_ids("bos_token_id", vocab_size)
    tied = top if top.get("tie_word_embeddings") is not None else fields  # both levels may have it; the top one counts
    return {
        "family": family,
        "vocab_size": vocab_size,
        "hidden_size": fields.integer("hidden_size"),
        "num_layers": fields.integer("num_hidden_layers"),
        "num_heads": num_heads,
        "num_kv_heads": num_kv_heads,
        "norm_eps": fields.number("rms_norm_eps"),
        "max_positions": fields.integer("max_position_embeddings"),
        "tie_embeddings": tied.flag("tie_word_embeddings", default=False),
        "attention_bias": fields.flag("attention_bias", default=False),
        "mlp_bias": fields.flag("mlp_bias", default=False),
        "num_extra_layers": fields.integer("num_nextn_predict_layers", default=0, least=0),
        "eos_token_ids": _eos(fields, more_eos, vocab_size),
        "bos_token_id": bos[0] if bos else None,
        "dtype": _dtype(fields) or _dtype(top),
    }


def _eos(fields: Fields, more: Any, vocab_size: int) -> tuple[int, ...]:
    """The ids of both files, each once, in order."""
    added = Fields({"eos_token_id": more}, f"{Path(fields.where).parent / 'generation_config.json'}")
    ids = fields.token_ids("eos_token_id", vocab_size) + added.token_ids("eos_token_id", vocab_size)
    return tuple(dict.fromkeys(ids))


def _dtype(fields: Fields) -> str | None:
    """dtype, or torch_dtype of older files; None where the file has neither."""
    name = "dtype" if fields.get("dtype") is not None else "torch_dtype"
    value = fields.get(name)
    if value is None:
        return None
    plain = value.removeprefix("torch.") if isinstance(value, str) else value
    if plain not in DTYPES:
        raise fields.error(name, f"not supported; supported are {', '.join(DTYPES)}")
    return plain
