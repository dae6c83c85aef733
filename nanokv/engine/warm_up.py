"""warm_up: runs the kernels of an engine once, so that no request waits for a compiler."""

from __future__ import annotations

from nanokv.engine.device import current
from nanokv.engine.engine import Engine
from nanokv.engine.profile_run import run_reading_step, run_small_step


def warm_up(engine: Engine) -> None:
    """Runs a short prompt and one decode step over stores of their own.

    It reads the engine's model and changes nothing in the engine, so it may run in another thread. Until it returns,
    the engine must not compute a step.
    """
    with current(engine.device):
        run_small_step(engine.model, engine.layout, engine.device)
        run_reading_step(1, 1, engine.config, engine.model, engine.layout, engine.device)
