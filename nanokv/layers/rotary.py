"""Rotary position embedding: one table with the cosines and sines of every position."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

ROPE_KINDS = ("default", "linear", "llama3", "yarn")


@dataclass(frozen=True)
class RopeConfig:
    """The rotation angle of each position.

    dim         rotated dimensions of a head
    theta       base of the geometric series of frequencies
    kind        "default"; "linear" divides every frequency by `factor` (Chen et al. 2023); "llama3" divides only the
                low ones, with wavelengths above original_max_positions / low_freq_factor, keeps those with wavelengths
                below original_max_positions / high_freq_factor and interpolates between (Llama 3.1); "yarn" does the
                same but interpolates over the pairs of dimensions instead of their wavelengths (Peng et al. 2023; the
                two factors are called beta_slow and beta_fast there)
    amplitude   factor of cosines and sines (yarn)
    """

    dim: int
    theta: float
    kind: str = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_positions: int = 8192
    amplitude: float = 1.0


def frequencies(rope: RopeConfig) -> torch.Tensor:
    """Radians per position of each pair of dimensions: float32 [dim / 2]. Su et al. 2021."""
    plain = 1.0 / rope.theta ** (torch.arange(0, rope.dim, 2, dtype=torch.float32) / rope.dim)
    if rope.kind == "default":
        return plain
    if rope.kind == "linear":
        return plain / rope.factor
    if rope.kind == "yarn":
        kept = _yarn_kept(rope)
        return (1 - kept) * plain / rope.factor + kept * plain
    wavelengths = 2 * math.pi / plain
    turns = rope.original_max_positions / wavelengths
    kept = (turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
    kept = kept.clamp(0, 1)
    return (1 - kept) * plain / rope.factor + kept * plain


def _yarn_kept(rope: RopeConfig) -> torch.Tensor:
    """The kept share of each pair's frequency: 1 for the fast pairs, 0 for the slow ones; float32 [dim / 2]."""

    def pair(turns: float) -> float:
        """The pair, as a real number, that makes this many turns over the original positions."""
        return rope.dim * math.log(rope.original_max_positions / (turns * 2 * math.pi)) / (2 * math.log(rope.theta))

    first = max(math.floor(pair(rope.high_freq_factor)), 0)
    last = min(math.ceil(pair(rope.low_freq_factor)), rope.dim - 1)
    ramp = (torch.arange(rope.dim // 2, dtype=torch.float32) - first) / max(last - first, 0.001)
    return 1 - ramp.clamp(0, 1)


def cos_sin_table(rope: RopeConfig, num_positions: int, device: torch.device | str = "cpu") -> torch.Tensor:
    """Row p: the cosines, then the sines of the angles at position p; float32 [num_positions, dim]."""
    angles = torch.outer(torch.arange(num_positions, dtype=torch.float32), frequencies(rope))
    return (torch.cat((angles.cos(), angles.sin()), dim=1) * rope.amplitude).to(device)
