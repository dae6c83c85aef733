"""ModelConfig: config.json of every family in one vocabulary. Knows names and numbers, no tensors.

Reads the files of transformers 4 (rope_theta and rope_scaling, torch_dtype) and 5 (rope_parameters, dtype). A field
that shapes a tensor has no default: a file without it is refused, not guessed at.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nanokv.core.errors import CheckpointError
from nanokv.layers.rotary import ROPE_KINDS, RopeConfig
from nanokv.models import FAMILIES

DTYPES = ("float32", "bfloat16", "float16")


@dataclass(frozen=True)
class ModelConfig:
    """What a model is, in nanokv's words; the name in config.json stands beside each where it differs."""

    family: str
    """model_type: which module builds it, see nanokv.models.FAMILIES."""
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    """Width inside the feed-forward layer."""
    num_layers: int
    """num_hidden_layers"""
    num_heads: int
    """num_attention_heads: query heads."""
    num_kv_heads: int
    """num_key_value_heads: heads of k and v, each shared by num_heads / num_kv_heads query heads."""
    head_dim: int
    """Width of a head; hidden_size / num_heads where the file does not say."""
    norm_eps: float
    """rms_norm_eps"""
    rope: RopeConfig
    max_positions: int
    """max_position_embeddings: tokens the model was trained for."""
    tie_embeddings: bool
    """tie_word_embeddings: whether the head is the embedding table."""
    attention_bias: bool
    """Whether q, k, v and o have one."""
    mlp_bias: bool
    """Whether gate, up and down have one."""
    eos_token_ids: tuple[int, ...]
    """eos_token_id of config.json, then those that generation_config.json adds."""
    bos_token_id: int | None
    dtype: str | None
    """The checkpoint's own: "float32", "bfloat16", "float16", or None where the file does not say."""

    @classmethod
    def from_folder(cls, folder: str | Path) -> ModelConfig:
        """Reads config.json and, for eos ids, generation_config.json. Raises CheckpointError naming file and field."""
        folder = Path(folder)
        if not folder.is_dir():
            raise CheckpointError(f"{folder}: not a folder; a model is a folder with config.json and *.safetensors")
        path = folder / "config.json"
        if not path.is_file():
            raise CheckpointError(f"{path}: no such file; a model folder holds config.json and *.safetensors")
        data = read_json(path)
        generation = folder / "generation_config.json"
        more_eos = read_json(generation).get("eos_token_id") if generation.is_file() else None
        return cls._read(_Fields(data, str(path)), more_eos)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> ModelConfig:
        """Reads the content of a config.json. Raises CheckpointError naming the family or the field."""
        return cls._read(_Fields(data, "config.json"), None)

    @classmethod
    def _read(cls, fields: _Fields, more_eos: Any) -> ModelConfig:
        family = _family(fields)
        if fields.get("quantization_config") is not None:
            method = fields.get("quantization_config")
            method = method.get("quant_method", method) if isinstance(method, dict) else method
            raise fields.error("quantization_config", f"{method!r} weights are not supported; use the plain checkpoint")
        if fields.get("hidden_act", "silu") != "silu":
            raise fields.error("hidden_act", "only 'silu' is supported")
        hidden_size = fields.integer("hidden_size")
        num_heads = fields.integer("num_attention_heads")
        num_kv_heads = fields.integer("num_key_value_heads", default=num_heads)
        if num_heads % num_kv_heads:
            raise fields.error("num_key_value_heads", f"does not divide num_attention_heads={num_heads}")
        if fields.get("head_dim") is None and hidden_size % num_heads:
            raise fields.error("hidden_size", f"not a multiple of num_attention_heads={num_heads}, and no head_dim")
        head_dim = fields.integer("head_dim", default=hidden_size // num_heads)
        if head_dim % 2:
            raise fields.error("head_dim", f"{head_dim} is odd, and rotary positions turn pairs of dimensions")
        vocab_size = fields.integer("vocab_size")
        bos = fields.token_ids("bos_token_id", vocab_size)
        return cls(
            family=family,
            vocab_size=vocab_size,
            hidden_size=hidden_size,
            intermediate_size=fields.integer("intermediate_size"),
            num_layers=fields.integer("num_hidden_layers"),
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            norm_eps=fields.number("rms_norm_eps"),
            rope=_rope(fields, head_dim),
            max_positions=fields.integer("max_position_embeddings"),
            tie_embeddings=fields.flag("tie_word_embeddings", default=False),
            attention_bias=fields.flag("attention_bias", default=False),
            mlp_bias=fields.flag("mlp_bias", default=False),
            eos_token_ids=_eos(fields, more_eos, vocab_size),
            bos_token_id=bos[0] if bos else None,
            dtype=_dtype(fields),
        )


class _Fields:
    """Typed reading of one JSON object; every complaint names the file, the field and its value."""

    def __init__(self, data: dict[str, Any], where: str) -> None:
        if not isinstance(data, dict):
            raise CheckpointError(f"{where}: expected a JSON object, found {type(data).__name__}")
        self.data = data
        self.where = where

    def get(self, name: str, default: Any = None) -> Any:
        value = self.data.get(name)
        return default if value is None else value

    def error(self, name: str, complaint: str) -> CheckpointError:
        value = f"={self.data[name]!r}" if name in self.data else ""
        return CheckpointError(f"{self.where}: {name}{value}: {complaint}")

    def _required(self, name: str, default: Any) -> Any:
        value = self.get(name, default)
        if value is None:
            raise self.error(name, "is missing; the file is incomplete, fetch the model again")
        return value

    def integer(self, name: str, default: int | None = None) -> int:
        value = self._required(name, default)
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise self.error(name, "expected an integer of at least 1")
        return value

    def number(self, name: str, default: float | None = None) -> float:
        value = self._required(name, default)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < math.inf:
            raise self.error(name, "expected a number above 0")
        return float(value)

    def flag(self, name: str, default: bool) -> bool:
        value = self.get(name, default)
        if not isinstance(value, bool):
            raise self.error(name, "expected true or false")
        return value

    def token_ids(self, name: str, vocab_size: int) -> tuple[int, ...]:
        """A token id, a list of them, or nothing."""
        value = self.get(name, [])
        ids = value if isinstance(value, list) else [value]
        for token_id in ids:
            if isinstance(token_id, bool) or not isinstance(token_id, int) or not 0 <= token_id < vocab_size:
                raise self.error(name, f"expected token ids below vocab_size={vocab_size}")
        return tuple(ids)


def _family(fields: _Fields) -> str:
    """The model_type, if both it and the architecture are known and belong together."""
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


def _rope(fields: _Fields, head_dim: int) -> RopeConfig:
    """From rope_parameters, or from rope_scaling and rope_theta beside it."""
    name = "rope_parameters" if fields.get("rope_parameters") is not None else "rope_scaling"
    rope = _Fields(fields.get(name, {}), f"{fields.where}: {name}")
    if any(isinstance(value, dict) for value in rope.data.values()):
        raise fields.error(name, "positions that differ from layer to layer are not supported")
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in ROPE_KINDS:
        raise fields.error(name, f"rope type {kind!r} is not supported; supported are {', '.join(ROPE_KINDS)}")
    for part in (fields, rope):
        if part.get("partial_rotary_factor", 1.0) != 1.0:
            raise part.error("partial_rotary_factor", "only 1.0 is supported in this family")
    theta = rope.number("rope_theta", default=fields.number("rope_theta", default=10000.0))
    if kind == "default":
        return RopeConfig(head_dim, theta)
    factor = rope.number("factor")
    if kind == "linear":
        return RopeConfig(head_dim, theta, kind, factor)
    low, high = rope.number("low_freq_factor"), rope.number("high_freq_factor")
    if not low < high:
        raise rope.error("low_freq_factor", f"expected less than high_freq_factor={high:g}")
    return RopeConfig(head_dim, theta, kind, factor, low, high, rope.integer("original_max_position_embeddings"))


def _eos(fields: _Fields, more: Any, vocab_size: int) -> tuple[int, ...]:
    """The ids of both files, each once, in order."""
    added = _Fields({"eos_token_id": more}, f"{Path(fields.where).parent / 'generation_config.json'}")
    ids = fields.token_ids("eos_token_id", vocab_size) + added.token_ids("eos_token_id", vocab_size)
    return tuple(dict.fromkeys(ids))


def _dtype(fields: _Fields) -> str | None:
    name = "dtype" if fields.get("dtype") is not None else "torch_dtype"
    value = fields.get(name)
    if value is None:
        return None
    plain = value.removeprefix("torch.") if isinstance(value, str) else value
    if plain not in DTYPES:
        raise fields.error(name, f"not supported; supported are {', '.join(DTYPES)}")
    return plain


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file. Raises CheckpointError naming the file."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: cannot be read as JSON ({error}); fetch the model again") from None
    if not isinstance(data, dict):
        raise CheckpointError(f"{path}: expected a JSON object, found {type(data).__name__}")
    return data
