"""One step: plan, run, sample, commit."""

from nanokv.engine.engine import Engine

__all__ = ["Engine"]
