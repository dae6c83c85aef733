"""config.json into ModelConfig: reads what every family shares, then calls the `read` of the family's own module.

Reads the files of transformers 4 (rope_theta and rope_scaling, torch_dtype) and 5 (rope_parameters, dtype), and the
text part of vision-language models. A field that shapes a tensor has no default: a file without it is refused, not
guessed at. A field that changes numbers is read or refused (refused_fields.py). Knows JSON and what all families share,
no tensors.
"""

from __future__ import annotations

from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

from nanokv.core.errors import CheckpointError
from nanokv.models import FAMILIES
from nanokv.models.config import ModelConfig
from nanokv.models.fields import Fields, read_json, shown
from nanokv.models.quantized_fields import Quantization, quantization
from nanokv.models.refused_fields import refuse
from nanokv.models.rope_fields import MOST_POSITIONS, reach
from nanokv.text.files import end_ids

DTYPES = ("float32", "bfloat16", "float16")
MOST_LAYERS = 1024
"""The deepest released model has 126."""
MOST_HEADS = 1 << 16


def read_folder(folder: str | Path) -> ModelConfig:
    """Reads config.json and, for eos ids, generation_config.json and the tokenizer's eos_token.

    folder   of the model
    Raises   CheckpointError naming the file, and the family or the field
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: not a folder; a model is a folder with config.json and *.safetensors")
    path = folder / "config.json"
    if not path.exists():
        raise CheckpointError(f"{path}: no such file; a model folder holds config.json and *.safetensors")
    generation = folder / "generation_config.json"
    more_eos = read_json(generation).get("eos_token_id") if generation.exists() else None
    beside = folder / "hf_quant_config.json"
    stored = Fields(read_json(beside), str(beside)).inside("quantization") if beside.exists() else None
    config = read_config(read_json(path), str(path), more_eos, stored)
    ends = [token_id for token_id in end_ids(folder) if token_id < config.vocab_size]
    return replace(config, eos_token_ids=tuple(dict.fromkeys([*config.eos_token_ids, *ends])))


def read_config(
    data: dict[str, Any], where: str = "config.json", more_eos: Any = None, stored: Fields | None = None
) -> ModelConfig:
    """Reads the content of a config.json.

    where      the file's name in error messages
    more_eos   eos_token_id of generation_config.json
    stored     `quantization` of hf_quant_config.json; counts where config.json has no quantization_config
    Raises     CheckpointError naming the family or the field
    """
    top = Fields(data, where)
    family = _family(top)
    fields = top.inside("text_config") if top.get("text_config") is not None else top
    common = _common(family, top, fields, more_eos) | {"quantization": _quantization(top, fields, stored)}
    config: ModelConfig = import_module(FAMILIES[family][1]).read(fields, common)
    refuse(fields, config)
    return replace(config, max_positions=reach(fields, config))


def _family(fields: Fields) -> str:
    """The model_type. Raises CheckpointError unless it is known and the architecture belongs to it."""
    model_type = fields.get("model_type")
    architectures = fields.get("architectures", [])
    if not isinstance(architectures, list):
        raise fields.error("architectures", "expected a list of names")
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        named = f"model_type={shown(model_type)}"
        raise CheckpointError(f"{fields.where}: {named} is not supported; `nanokv size --help` lists the families")
    if architectures and FAMILIES[model_type][0] not in architectures:
        raise fields.error("architectures", f"expected {FAMILIES[model_type][0]} for model_type={model_type!r}")
    return model_type


def _common(family: str, top: Fields, fields: Fields, more_eos: Any) -> dict[str, Any]:
    """The fields of ModelConfig that are read alike in every family, by name."""
    num_heads, vocab_size = fields.integer("num_attention_heads", most=MOST_HEADS), fields.integer("vocab_size")
    num_kv_heads = fields.integer("num_key_value_heads", default=num_heads, most=MOST_HEADS)
    if num_heads % num_kv_heads:
        raise fields.error("num_key_value_heads", f"does not divide num_attention_heads={num_heads}")
    bos = fields.token_ids("bos_token_id", vocab_size)
    tied = top if top.get("tie_word_embeddings") is not None else fields  # both levels may have it; the top one counts
    return {
        "family": family,
        "vocab_size": vocab_size,
        "hidden_size": fields.integer("hidden_size"),
        "num_layers": fields.integer("num_hidden_layers", most=MOST_LAYERS),
        "num_heads": num_heads,
        "num_kv_heads": num_kv_heads,
        "norm_eps": fields.number("rms_norm_eps"),
        "max_positions": fields.integer("max_position_embeddings", most=MOST_POSITIONS),
        "tie_embeddings": tied.flag("tie_word_embeddings", default=False),
        "attention_bias": fields.flag("attention_bias", default=False),
        "mlp_bias": fields.flag("mlp_bias", default=False),
        "num_extra_layers": fields.integer("num_nextn_predict_layers", default=0, least=0, most=MOST_LAYERS),
        "eos_token_ids": _eos(fields, more_eos, vocab_size),
        "bos_token_id": bos[0] if bos else None,
        "dtype": _dtype(fields) or _dtype(top),
    }


def _quantization(top: Fields, fields: Fields, stored: Fields | None) -> Quantization | None:
    """quantization_config at either level (older files: compression_config), else what hf_quant_config.json says."""
    for place in (top, fields):
        for name in ("quantization_config", "compression_config"):
            if (found := quantization(place.inside(name))) is not None:
                return found
    return None if stored is None else quantization(stored)


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
