"""DisaggCluster: one decode process with its prefill processes, from start to end. The entry point of this package."""

from __future__ import annotations

import sys
import threading
from contextlib import ExitStack
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import torch

from nanokv.cache.store import CacheStore
from nanokv.core.config import EngineConfig
from nanokv.core.errors import ConfigError
from nanokv.disagg.config import DisaggConfig
from nanokv.disagg.dispatcher import Dispatcher
from nanokv.disagg.link import HostLink, connect
from nanokv.disagg.messages import VERSION, PoolMemory
from nanokv.disagg.process import LocalWorker
from nanokv.disagg.secret import read_secret
from nanokv.disagg.worker import WorkerSpec
from nanokv.engine.engine import Engine
from nanokv.models.config import ModelConfig
from nanokv.models.identity import model_identity


class DisaggCluster:
    """Starts the prefill processes at once: they load the model while the decode process loads it, too.

    disagg         DisaggConfig
    folder         of the model
    config         EngineConfig of the decode process
    device, dtype  as the decode process has resolved them
    dispatcher     the connector of the decode process's engine
    Raises         ConfigError for a configuration that two processes cannot share, a secret that cannot be read, or an
                   address that does not answer
    """

    def __init__(
        self, disagg: DisaggConfig, folder: Path, config: EngineConfig, device: torch.device, dtype: torch.dtype
    ) -> None:
        if not sys.platform.startswith("linux"):
            raise ConfigError("disagg: processes that share pages need Linux (memfd, pidfd)")
        if config.center_keys:
            raise ConfigError("center_keys=True: the means are measured in one process; with disagg allowed is False")
        self.dispatcher = Dispatcher(disagg)
        self._store: CacheStore | None = None
        self._dtype = str(dtype).removeprefix("torch.")
        threads = config.threads if disagg.worker_cores is None else len(disagg.worker_cores)
        fields = asdict(replace(config, event_log=None, threads=threads))
        self._folder, self._config = folder, config
        self._secret = None if disagg.secret_file is None else read_secret(disagg.secret_file)
        for address in disagg.connect:  # first: a wrong address is an error before anything is started
            connect(address, disagg.heartbeat_s, self._secret).close()
        with ExitStack() as stack:
            stack.callback(self.close)
            for number in range(disagg.prefill_workers or 0):
                spec = WorkerSpec(
                    name=f"prefill {number}", folder=str(folder.resolve()), device=str(device), dtype=self._dtype,
                    config=fields, cores=disagg.worker_cores,
                )  # fmt: skip
                self.dispatcher.workers.add(partial(LocalWorker, spec))
            for address in disagg.connect:
                self._reach(address, disagg.heartbeat_s)
            stack.pop_all()

    def _reach(self, address: str, seconds: float) -> None:
        """Adds a prefill process of another host."""

        def store() -> CacheStore:
            assert self._store is not None
            return self._store

        def start() -> HostLink:
            return HostLink(address, store, seconds, self._secret)

        self.dispatcher.workers.add(start, PoolMemory(kind="sent", num_bytes=0))

    def open(self, engine: Engine, model: ModelConfig) -> None:
        """Sends HELLO to every worker and waits for the answers. Raises ConfigError where a worker refuses, is not
        started again, or takes too long."""
        self._store = engine.store
        digest = model_identity(self._folder, model, self._config, self._dtype, engine.layout, VERSION)
        self.dispatcher.open(model.vocab_size, len(engine.store.pages), len(engine.store.states), digest)

    def close(self) -> None:
        """Ends the prefill processes. Safe to call twice."""
        self.dispatcher.close()

    def abandon(self) -> None:
        """close() for a garbage collection, which may run in a thread that close() would wait for."""
        if threading.current_thread() is threading.main_thread():
            self.close()
        else:
            threading.Thread(target=self.close, name="close", daemon=True).start()
