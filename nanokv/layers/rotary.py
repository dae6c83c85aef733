"""Rotary position embedding: one table with the cosines and sines of every position."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

ROPE_KINDS = ("default", "linear", "llama3", "yarn")
FIRST_POSITIONS = 1 << 17
"""Rows of a new model's table on a CPU; it grows with the positions in use, because a context of 10 million would take
gigabytes."""
_ROWS_AT_ONCE = 1 << 14


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
    truncate    whether the first and the last pair between which "yarn" interpolates are whole numbers
    """

    dim: int
    theta: float
    kind: str = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_positions: int = 8192
    amplitude: float = 1.0
    truncate: bool = True


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

    first, last = pair(rope.high_freq_factor), pair(rope.low_freq_factor)
    if rope.truncate:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, rope.dim - 1)
    ramp = (torch.arange(rope.dim // 2, dtype=torch.float32) - first) / ((last - first) or 0.001)
    return 1 - ramp.clamp(0, 1)


def cos_sin_table(rope: RopeConfig, num_positions: int, device: torch.device | str = "cpu") -> torch.Tensor:
    """Row p: the cosines, then the sines of the angles at position p; float32 [num_positions, dim]."""
    table = torch.empty(num_positions, rope.dim, device=device)
    if not table.is_meta:
        _fill(table, rope, 0)
    return table


def first_positions(max_positions: int, device: torch.device) -> int:
    """Rows of the table of a new model. A CUDA graph records where the table lies, so that on a GPU it is whole."""
    return max_positions if device.type == "cuda" else min(max_positions, FIRST_POSITIONS)


def extend(table: torch.Tensor, rope: RopeConfig, num_positions: int, max_positions: int) -> None:
    """Extends a table IN PLACE to at least num_positions rows: all layers share it."""
    rows = len(table)
    if num_positions > rows:
        table.resize_(min(max(num_positions, 2 * rows), max_positions), rope.dim)
        _fill(table, rope, rows)


def _fill(table: torch.Tensor, rope: RopeConfig, first: int) -> None:
    """Writes the rows from `first` on, some at a time: intermediate results are as large as the rows."""
    per_position, half = frequencies(rope), rope.dim // 2
    for start in range(first, len(table), _ROWS_AT_ONCE):
        rows = table[start : start + _ROWS_AT_ONCE]
        angles = torch.outer(torch.arange(start, start + len(rows), dtype=torch.float32), per_position)
        rows[:, :half] = angles.cos() * rope.amplitude
        rows[:, half:] = angles.sin() * rope.amplitude
