"""quantization_config in one vocabulary: how the matrices of a checkpoint are stored. Parses, decodes nothing.

Three writers describe the same two formats: the "fp8" of transformers (DeepSeek, Qwen), NVIDIA's ModelOpt, also in a
file of its own (hf_quant_config.json), and compressed-tensors. A format that is neither keeps the name that the file
gives it: the loader refuses what it cannot decode, and `nanokv size`, which needs no weights, refuses none.
"""

from __future__ import annotations

from dataclasses import dataclass

from nanokv.models.fields import Fields

FP8, NVFP4 = "fp8", "nvfp4"
_ALGORITHMS = {"FP8": FP8, "FP8_PB_WO": FP8, "FP8_PER_CHANNEL_PER_TOKEN": FP8, "NVFP4": NVFP4}
"""quant_algo of ModelOpt -> method. Others, such as "MIXED_PRECISION", keep their name in lower case."""
BLOCKS = "FP8_PB_WO"
_FORMATS = {"float-quantized": FP8, "naive-quantized": FP8, "nvfp4-pack-quantized": NVFP4}
"""format of compressed-tensors -> method."""


@dataclass(frozen=True, kw_only=True)
class Quantization:
    """How the matrices of a checkpoint are stored."""

    method: str
    """"fp8", "nvfp4", or the file's own name of another format, such as "gptq" or "mixed_precision"."""
    block: tuple[int, int] | None = None
    """Rows and columns that share a scale; None: the tensor or a row does, as the shape of the scales says."""
    group_size: int | None = None
    """Neighbouring numbers of a row that share a scale (nvfp4)."""


def quantization(fields: Fields) -> Quantization | None:
    """The quantisation that an object describes; None for an empty one.

    fields    quantization_config, or `quantization` in hf_quant_config.json
    Raises    CheckpointError where it is malformed
    """
    if not fields.data:
        return None
    weights = _weights(fields)
    algorithm, writer = fields.text("quant_algo"), fields.text("quant_method")
    if algorithm is not None:
        method = _ALGORITHMS.get(algorithm.upper(), algorithm.lower())
    elif writer == "compressed-tensors":
        form = fields.text("format") or writer
        method = _FORMATS.get(form, form)
        if method == FP8 and (weights.get("type"), weights.get("num_bits")) != ("float", 8):
            method = form  # integers are stored the same way
    elif writer is not None:
        method = writer.lower()
    else:
        raise fields.error("quant_method", "is missing, and quant_algo as well")
    block = fields.integers("weight_block_size") or weights.integers("block_structure")
    if not block and (algorithm or "").upper() == BLOCKS:
        block = (128, 128)  # the only size of that algorithm, which its files do not repeat
    if block and (len(block) != 2 or 0 in block):
        raise fields.error("weight_block_size", "expected two integers of at least 1")
    grouped = fields if fields.get("group_size") is not None else weights
    return Quantization(
        method=method,
        block=(block[0], block[1]) if block else None,
        group_size=max(0, grouped.integer("group_size", default=0, least=-1)) or None,  # GPTQ: -1, a whole row
    )


def _weights(fields: Fields) -> Fields:
    """The description of the weights in the first of config_groups; empty without one."""
    groups = fields.inside("config_groups")
    return groups.inside(next(iter(groups.data))).inside("weights") if groups.data else groups
