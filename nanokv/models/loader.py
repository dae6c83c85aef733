"""Builds the Decoder of a folder: lists the tensors of the model, checks all of them, then reads and packs them.

Every fault of a folder is a CheckpointError whose single line names all faults. No tensor is silently zero, converted
or skipped. FP8 and NVFP4 matrices are decoded one by one: beside the model, memory holds a chunk of one of them.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch

from nanokv.codecs import Codec, RawCodec
from nanokv.core.errors import CheckpointError, ConfigError
from nanokv.hub.home import Q8_FILE
from nanokv.kernels.linear import activation_dtype
from nanokv.kernels.ops import Ops
from nanokv.models.checkpoint import Checkpoint
from nanokv.models.config import ModelConfig
from nanokv.models.decoder import Decoder
from nanokv.models.parts import decoder
from nanokv.models.quantized import DECODED
from nanokv.models.weights import Weights, dummy, recorded


def load_model(
    folder: str | Path,
    config: ModelConfig,
    dtype: torch.dtype,
    device: torch.device | str,
    codec: Codec,
    page_size: int,
    load: str = "auto",
    seed: int = 0,
    kernels: str = "auto",
    weights: str = "auto",
    progress: Callable[[int, int], None] | None = None,
) -> Decoder:
    """The model of a folder; the caller binds it to a PageLayout.

    folder     holds *.safetensors; not touched when load is "dummy"
    dtype      of the weights; activations have activation_dtype(device, dtype)
    codec      Codec of pages: it and page_size determine the planes of each layer
    load       "auto" reads the checkpoint; "dummy" fills the model with noise that `seed` determines
    kernels    "auto" or "reference", see `Ops`
    weights    "auto", or "q8": 8 bits for a number of a projection
    progress   called with (tensors taken, tensors in all) while the model is built
    Raises     ConfigError for q8 on another device than a CPU;
               CheckpointError naming the file, or every tensor that is missing, unexpected, misshapen or of a dtype or
               quantisation that is not decoded
    """
    device, q8 = torch.device(device), weights == "q8"
    if q8 and device.type != "cpu":
        raise ConfigError(f"weights='q8': 8-bit weights are for CPUs, and the device is {device}")
    shapes = tensors(config)
    if load == "dummy":
        read = dummy(dtype, seed)
    else:
        method = None if config.quantization is None else config.quantization.method
        if method is not None and method not in DECODED:
            remedy = "not decoded here; use the plain, FP8 or NVFP4 checkpoint"
            raise CheckpointError(f"{Path(folder).name}/config.json: weights in {method[:40]!r}: {remedy}")
        codes = Path(folder) / Q8_FILE if q8 else None
        checkpoint = Checkpoint(Path(folder), config, torch.float32 if q8 else dtype, codes)
        checkpoint.check(shapes)
        read = checkpoint.read
    count = None if progress is None else lambda taken: progress(taken, len(shapes))
    taken = Weights(read, dtype, activation_dtype(device, dtype), device, Ops(kernels), count, q8=q8)
    return decoder(config, taken, codec, page_size)


def tensors(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor in a checkpoint of this model, found by building the model without numbers."""
    shapes: dict[str, tuple[int, ...]] = {}
    decoder(config, recorded(shapes), RawCodec(torch.float32), 1)
    return shapes
