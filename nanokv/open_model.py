"""Opening a model: from its name to an engine that runs, beside the processes that compute its prompts."""

from __future__ import annotations

import weakref
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from nanokv.codecs import codec_of
from nanokv.core.arguments import check_optional
from nanokv.core.config import EngineConfig
from nanokv.core.errors import ConfigError
from nanokv.core.spin import warn_of_spins
from nanokv.disagg.config import DisaggConfig
from nanokv.engine.device import choose_device, resolve_dtype
from nanokv.engine.engine import Engine
from nanokv.engine.limits import set_threads
from nanokv.engine.loop import EngineLoop
from nanokv.hub.home import resolve_model
from nanokv.models.config import ModelConfig
from nanokv.models.loader import load_model
from nanokv.models.read import read_folder
from nanokv.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    from nanokv.disagg.cluster import DisaggCluster


@dataclass(frozen=True)
class OpenModel:
    """A model in memory and the loop that drives its engine. `cluster`: its prefill processes, or None."""

    config: EngineConfig
    folder: Path
    model_config: ModelConfig
    device: torch.device
    device_reason: str
    dtype: torch.dtype
    tokenizer: Tokenizer | None
    loop: EngineLoop
    cluster: DisaggCluster | None


def open_model(
    model: str | Path, config: EngineConfig | None, disagg: DisaggConfig | None, fields: dict[str, Any]
) -> OpenModel:
    """Loads a model and starts what serves it; arguments as of `LLM`.

    Raises ConfigError, CheckpointError. Then no process is left.
    """
    check_optional(ConfigError, "config", config, EngineConfig)
    check_optional(ConfigError, "disagg", disagg, DisaggConfig)
    if config is None:
        config = EngineConfig(**fields)
    elif fields:
        raise ConfigError(f"{', '.join(fields)}: give a config or fields, not both")
    folder = resolve_model(model)
    chosen = choose_device(config.device)
    device = chosen.device
    set_threads(config.threads)
    if device.type == "cpu" and torch.get_num_threads() > 1:
        warn_of_spins()
    model_config = read_folder(folder)
    dtype = resolve_dtype(config.dtype, model_config)
    codec = codec_of(config, dtype, model_config.attention_layers)
    tokenizer = Tokenizer.from_folder(folder)
    with ExitStack() as stack:
        cluster = None
        if disagg is not None:
            from nanokv.disagg.cluster import DisaggCluster  # needs POSIX, so only where it is asked for

            cluster = DisaggCluster(disagg, folder, config, device, dtype)
            stack.callback(cluster.close)
        decoder = load_model(
            folder, model_config, dtype=dtype, device=device, codec=codec, page_size=config.page_size,
            load=config.load, seed=config.seed, kernels=config.kernels, weights=config.weights,
        )  # fmt: skip
        connectors = () if cluster is None else (cluster.dispatcher,)
        allocate = None if cluster is None else cluster.dispatcher.allocate
        engine = Engine(decoder, config, tokenizer, device, connectors, allocate)
        loop = EngineLoop(engine)  # streams keep it, and with it the processes, though the LLM is dropped
        if cluster is not None:
            cluster.open(engine, model_config)
            weakref.finalize(loop, cluster.abandon)  # where close() was not called
        stack.pop_all()
    return OpenModel(config, folder, model_config, device, chosen.reason, dtype, tokenizer, loop, cluster)
