"""How long threads of OpenMP wait for each other in a loop before they sleep; decided before torch is imported.

libgomp, the OpenMP of torch on Linux, reads its settings when it is loaded: in a process that has imported torch they
are final.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Mapping, MutableMapping
from functools import cache
from pathlib import Path

SPINS = 10_000
"""Rounds of that loop, where libgomp takes about 300,000 at each of a hundred joins a token. Beside other programs the
thread that could end the wait gets no processor meanwhile."""
CHOICES = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY", "KMP_BLOCKTIME")

logger = logging.getLogger("nanokv")


def bounded(environment: Mapping[str, str]) -> dict[str, str]:
    """The environment of a process to start: with a bound, unless the user has chosen."""
    return {**environment, **_bound(environment)}


def bound_spins(environment: MutableMapping[str, str] = os.environ) -> None:
    """Bounds the loop of this process. Where the user has chosen, or torch is imported already, nothing changes."""
    if "torch" not in sys.modules:
        environment.update(_bound(environment))


@cache
def warn_of_spins() -> None:
    """Warns, once in a process, where torch was imported first and libgomp runs without a bound or a choice."""
    if _bound(os.environ) and _has_libgomp():
        logger.warning(
            "torch was imported before nanokv: beside other programs a token may take many times as long; set "
            "GOMP_SPINCOUNT=%d before Python starts, or import LLM from nanokv before torch", SPINS,
        )  # fmt: skip


def _bound(environment: Mapping[str, str]) -> dict[str, str]:
    """The bound as a variable; none where the user has chosen."""
    return {} if any(name in environment for name in CHOICES) else {"GOMP_SPINCOUNT": str(SPINS)}


def _has_libgomp() -> bool:
    """Whether this process has loaded libgomp; Linux alone tells."""
    try:
        return "libgomp" in Path("/proc/self/maps").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return False
