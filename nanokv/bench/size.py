"""What the cache of a model costs: bytes from its config.json and the page layout, and its scheme beside MHA and GQA.

Scalars are counted per token in one attention layer, so that neither dtype nor depth hides the scheme:

    MHA    a key and a value for each query head
    GQA    a key and a value for each KV head: the model's own number of them, or 8 where it has another scheme
    own    what the model's layers keep, read off the same layout as the bytes

A recurrent state is paid once a sequence. At `state_equals_kv_tokens` it weighs as much as all that is kept per token;
None where a model has no such state, or keeps nothing per token.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nanokv.codecs import resolve_codec
from nanokv.core.spec import PageLayout
from nanokv.hub.catalog import CATALOG, SHIPPED, CatalogEntry
from nanokv.hub.home import resolve_model
from nanokv.llm import resolve_dtype
from nanokv.models.config import ModelConfig
from nanokv.models.decoder import layer_specs
from nanokv.models.fields import read_json

USUAL_KV_HEADS = 8


@dataclass(frozen=True)
class CacheSize:
    """One model's cache: everything below is read off the layout that the engine itself would allocate."""

    name: str
    config: ModelConfig
    dtype: str
    codec: str
    layout: PageLayout
    source: str = ""
    unverified: tuple[str, ...] = ()

    def payload(self, tokens: int) -> int:
        return tokens * self.layout.bytes_per_token + self.layout.state_payload

    def pages(self, tokens: int) -> int:
        return self.layout.pages_for(tokens) if self.layout.page_bytes else 0

    def padded(self, tokens: int) -> int:
        return self.pages(tokens) * self.layout.page_bytes + self.layout.state_bytes

    def tokens_in(self, memory: int) -> int | None:
        """Tokens of one sequence that fit; None where no memory grows with the context."""
        room = memory - self.layout.state_bytes
        if not self.layout.page_bytes:
            return None if room >= 0 else 0
        return max(0, room // self.layout.page_bytes) * self.layout.page_size


def measure(model: str, dtype: str, codec: str, page_size: int) -> CacheSize:
    """Raises CheckpointError for an unknown model or family, ConfigError for an unknown dtype or codec."""
    config, entry = _config(model)
    chosen = resolve_dtype(dtype, config)
    layout = PageLayout(layer_specs(config, resolve_codec(codec, chosen), page_size), page_size)
    known = (entry.source, entry.unverified) if entry is not None else ()
    return CacheSize(model, config, str(chosen).removeprefix("torch."), codec, layout, *known)


def _config(model: str) -> tuple[ModelConfig, CatalogEntry | None]:
    """A model's config, and where the catalog has it from if it is the catalog's."""
    path = Path(model).expanduser()
    if path.is_file():
        return ModelConfig.from_dict(read_json(path)), None
    if model in CATALOG and not path.is_dir():
        return ModelConfig.from_dict(CATALOG[model].config), CATALOG[model]
    return ModelConfig.from_folder(resolve_model(model, known=(*CATALOG, *SHIPPED))), None


def row(one: CacheSize, tokens: int, memory: int) -> dict[str, Any]:
    """One row of --json."""
    layout = one.layout
    return {
        "model": one.name,
        "dtype": one.dtype,
        "layers": layout.num_layers,
        "context_tokens": tokens,
        "within_trained_context": tokens <= one.config.max_positions,
        "bytes_per_token": layout.bytes_per_token,
        "bytes_per_token_by_layer": [spec.bytes_per_token for spec in layout.specs],
        "state_bytes_per_sequence": layout.state_payload,
        "state_padded_bytes_per_sequence": layout.state_bytes,
        "page_payload_bytes": layout.page_payload,
        "page_padded_bytes": layout.page_bytes,
        "pages": one.pages(tokens),
        "payload_bytes": one.payload(tokens),
        "padded_bytes": one.padded(tokens),
        "memory_bytes": memory,
        "tokens_in_memory": one.tokens_in(memory),
        **scalars(one),
        "source": one.source,
        "unverified_fields": list(one.unverified),
    }


def scalars(one: CacheSize) -> dict[str, Any]:
    """The comparison of one model, as keys of a row of --json."""
    config, layout = one.config, one.layout
    own = (
        config.mla.kv_rank + config.mla.rope_dim
        if config.mla is not None
        else 2 * config.num_kv_heads * config.head_dim
    )
    each = 2 * _value_dim(config)
    kv_heads = min(USUAL_KV_HEADS, config.num_heads) if config.mla is not None else config.num_kv_heads
    per_token = layout.bytes_per_token
    return {
        "attention_layers": sum(1 for spec in layout.specs if spec.paged),
        "recurrent_layers": sum(1 for spec in layout.specs if spec.state),
        "scalars_per_token_layer": own,
        "scalars_per_token_layer_mha": config.num_heads * each,
        "scalars_per_token_layer_gqa": kv_heads * each,
        "state_equals_kv_tokens": -(-layout.state_payload // per_token) if per_token and layout.is_recurrent else None,
    }


def _value_dim(config: ModelConfig) -> int:
    return config.mla.value_dim if config.mla is not None else config.head_dim
