"""How long threads of OpenMP wait for each other in a loop before they sleep; decided before torch is imported."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import MutableMapping

SPINS = 10_000
"""Rounds of that loop, where libgomp takes about 300,000 at each of a hundred joins a token. Beside other programs the
thread that could end the wait gets no processor meanwhile."""
CHOICES = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY", "KMP_BLOCKTIME")

logger = logging.getLogger("nanokv")


def bound_spins(environment: MutableMapping[str, str] = os.environ) -> None:
    """Bounds the loop for libgomp, the OpenMP of torch on Linux. Where the user has chosen, or torch is imported
    already, nothing changes; the latter is logged."""
    if any(name in environment for name in CHOICES):
        return
    if "torch" in sys.modules:
        logger.info("torch is imported before nanokv: beside other programs, GOMP_SPINCOUNT=%d is faster", SPINS)
        return
    environment["GOMP_SPINCOUNT"] = str(SPINS)
