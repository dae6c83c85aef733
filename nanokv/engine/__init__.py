"""The engine: plans, runs and resolves steps, and drives them for any number of callers."""

from nanokv.engine.engine import Engine

__all__ = ["Engine"]
