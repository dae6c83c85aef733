"""The cost of a model's cache: bytes from its config.json and the page layout; its scheme compared with MHA and GQA.

Scalars are counted per token in one attention layer, so that neither dtype nor depth hides the scheme:

    MHA    a key and a value for each query head
    GQA    a key and a value for each KV head: the model's own number of them, or 8 where it has another scheme
    own    the scalars that the model's layers keep

A recurrent state costs the same for every length of a sequence. At `state_equals_kv_tokens` tokens K and V have as many
bytes; None where a model has no such state, or keeps nothing per token.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nanokv.codecs import resolve_codec
from nanokv.core.spec import PageLayout
from nanokv.engine.device import resolve_dtype
from nanokv.hub.catalog import CATALOG, SHIPPED, CatalogEntry
from nanokv.hub.home import resolve_model
from nanokv.models.config import ModelConfig
from nanokv.models.decoder import layer_specs
from nanokv.models.fields import read_json
from nanokv.models.read import read_config, read_folder

USUAL_KV_HEADS = 8


@dataclass(frozen=True)
class CacheSize:
    """The cache of one model, by the layout that the engine itself would allocate.

    name         as the user gave it
    dtype        name of the dtype of K and V
    source       where the catalog has the config from; "" for a config that is not the catalog's
    unverified   fields of the config that only one source states
    """

    name: str
    config: ModelConfig
    dtype: str
    codec: str
    layout: PageLayout
    source: str = ""
    unverified: tuple[str, ...] = ()

    def payload(self, tokens: int) -> int:
        """Bytes of the numbers that a sequence of this length keeps."""
        return tokens * self.layout.bytes_per_token + self.layout.state_payload

    def pages(self, tokens: int) -> int:
        """Pages of a sequence of this length."""
        return self.layout.pages_for(tokens) if self.layout.page_bytes else 0

    def padded(self, tokens: int) -> int:
        """Bytes allocated for a sequence of this length."""
        return self.pages(tokens) * self.layout.page_bytes + self.layout.state_bytes

    def tokens_in(self, memory: int) -> int | None:
        """Tokens of one sequence that fit into `memory` bytes; None where the cache does not grow with the context."""
        room = memory - self.layout.state_bytes
        if not self.layout.page_bytes:
            return None if room >= 0 else 0
        return max(0, room // self.layout.page_bytes) * self.layout.page_size


def measure(model: str, dtype: str, codec: str, page_size: int) -> CacheSize:
    """The cache of a model.

    model      a catalog name, a pulled model, a folder, or a config.json
    dtype      "auto": the checkpoint's own
    codec      a name, or a pair K/V
    page_size  tokens of a page
    Raises     CheckpointError for an unknown model or family, ConfigError for an unknown dtype or codec, or one that
               the model cannot have
    """
    config, entry = _config(model)
    chosen = resolve_dtype(dtype, config)
    layout = PageLayout(layer_specs(config, resolve_codec(codec, chosen), page_size), page_size)
    known = (entry.source, entry.unverified) if entry is not None else ()
    return CacheSize(model, config, str(chosen).removeprefix("torch."), codec, layout, *known)


def _config(model: str) -> tuple[ModelConfig, CatalogEntry | None]:
    """A model's config, and its catalog entry where the config comes from there."""
    path = Path(model).expanduser()
    if path.is_file():
        return read_config(read_json(path), str(path)), None
    if model in CATALOG and not path.is_dir():
        return read_config(CATALOG[model].config), CATALOG[model]
    return read_folder(resolve_model(model, known=(*CATALOG, *SHIPPED))), None


def row(one: CacheSize, tokens: int, memory: int) -> dict[str, Any]:
    """One row of `nanokv size --json`: a context of `tokens` tokens, and `memory` bytes to fill."""
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
    """The keys of a row that compare the model's scheme with MHA and GQA."""
    config, mla, layout = one.config, one.config.mla, one.layout
    own = 2 * config.num_kv_heads * config.head_dim if mla is None else mla.kv_rank + mla.rope_dim
    each = 2 * (config.head_dim if mla is None else mla.value_dim)
    kv_heads = config.num_kv_heads if mla is None else min(USUAL_KV_HEADS, config.num_heads)
    per_token = layout.bytes_per_token
    return {
        "attention_layers": sum(1 for spec in layout.specs if spec.paged),
        "recurrent_layers": sum(1 for spec in layout.specs if spec.state),
        "scalars_per_token_layer": own,
        "scalars_per_token_layer_mha": config.num_heads * each,
        "scalars_per_token_layer_gqa": kv_heads * each,
        "state_equals_kv_tokens": -(-layout.state_payload // per_token) if per_token and layout.is_recurrent else None,
    }
