"""build: sizes the pool of pages and states, and makes the store, cache and runner of an engine."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from nanokv.cache.manager import CacheManager
from nanokv.cache.observers import Observers
from nanokv.cache.states import MAX_RESERVED
from nanokv.cache.store import CacheStore
from nanokv.core.config import EngineConfig
from nanokv.core.errors import ConfigError
from nanokv.core.event_log import EventLog
from nanokv.core.events import Events
from nanokv.core.spec import PageLayout
from nanokv.engine.calibrate import measure_key_means, warn_of_offsets
from nanokv.engine.device import current
from nanokv.engine.interrupts import Interrupts
from nanokv.engine.memory import memory_for_pages, pool_size
from nanokv.engine.runner import Runner
from nanokv.models.decoder import Decoder

Allocate = Callable[[int, torch.device], torch.Tensor]
"""(bytes, device) -> zeroed uint8 [bytes] for pages and states: shared memory instead of an allocation."""


@dataclass(frozen=True)
class Parts:
    """The parts of an engine.

    config        with max_requests cut to the states of the pool
    log           the event log, or None
    pool_tokens   tokens that the pool holds
    max_length    tokens that a request may reach, prompt and answer together
    """

    config: EngineConfig
    layout: PageLayout
    events: Events
    log: EventLog | None
    store: CacheStore
    cache: CacheManager
    runner: Runner
    interrupts: Interrupts
    pool_tokens: int
    max_length: int


def build(
    model: Decoder,
    config: EngineConfig,
    device: torch.device,
    has_transfers: bool = False,
    allocate: Allocate | None = None,
    observers: Observers | None = None,
) -> Parts:
    """Binds the model to the layout of its pages; sizes and allocates its pool.

    has_transfers   a connector brings pages, so recurrent states are reserved for the checkpoints that it writes
    allocate        makes the memory of pages and states; None: the store allocates
    observers       receive the changes of the prefix tree
    Raises          ConfigError when the pool does not fit in memory, or max_model_len is beyond the model's
    """
    longest = model.config.max_positions
    if config.max_model_len is not None and config.max_model_len > longest:
        raise ConfigError(f"max_model_len={config.max_model_len}: this model reaches {longest} tokens at most")
    layout = PageLayout(model.specs, config.page_size)
    model.bind(layout)
    with current(device):
        memory = memory_for_pages(config, model, layout, device)
    num_pages, num_states = pool_size(config, layout, memory)
    if num_states:
        # A running request needs a state; where layers are recurrent, another one for its checkpoint, and those that a
        # connector writes.
        each = layout.states_per_request + (MAX_RESERVED if has_transfers and layout.is_recurrent else 0)
        config = replace(config, max_requests=min(config.max_requests, max(1, num_states // each)))
    # Decode steps that are padded to a fixed size write their padding to a page and a state without an owner.
    spare = int((device.type != "cpu" if config.graphs is None else config.graphs) and model.is_recordable)
    pages, states = num_pages + spare, num_states and num_states + spare
    buffer = None if allocate is None else allocate(pages * layout.page_bytes + states * layout.state_bytes, device)
    store = CacheStore(layout, pages, device, buffer, states)
    events = Events()
    log = EventLog(config.event_log) if config.event_log is not None else None
    if log is not None:
        events.subscribe(log)
    cache = CacheManager(layout, num_pages, config.prefix_cache, events, num_states, config.state_interval, observers)
    if config.center_keys:
        measure_key_means(model, store, config, longest)
    elif config.codec != "raw":
        warn_of_offsets(model, store, config, longest)
    # Any request must fit in the pool alone; its last token is sampled and never written.
    pool_tokens = num_pages * config.page_size
    max_length = min(config.max_model_len or longest, pool_tokens + 1)
    interrupts = Interrupts()
    runner = Runner(model, store, config.page_size, config.codec, interrupts=interrupts)
    if spare:
        with current(device):
            runner.pad_decodes(config.max_requests, cache.pages_for(max_length))
    elif config.graphs is None and device.type == "cpu" and model.is_recordable:
        runner.replay_decodes(config.max_requests, cache.pages_for(max_length))
    return Parts(config, layout, events, log, store, cache, runner, interrupts, pool_tokens, max_length)
