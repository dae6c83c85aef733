"""Q8: weights as int8 codes with one float16 scale for 32 neighbours of a row, w = code * scale.

These are the numbers of GGUF's blocks Q8_0. A block of such a file has a code 127 or -127, so decoding and quantising
it again gives the same codes and the same scale: no path of its own is needed to take them over.
Source: ggml, quantize_row_q8_0_ref.
"""

from __future__ import annotations

import torch

GROUP = 32
"""Neighbouring numbers of a row that share a scale."""
LARGEST = 127
"""The largest code."""


def quantise(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The codes and the scales of a weight: scale = max |w| / 127 in float16, code = round(w / scale).

    weight   [out, in], float; in is a multiple of GROUP
    Returns  int8 [out, in]; float16 [out, in / 32]. A group with a number that is not finite, or too large for a
             float16 scale, decodes to numbers that are not finite either
    """
    groups = weight.float().unflatten(1, (-1, GROUP))
    scales = (groups.abs().amax(2) / LARGEST).half()
    codes = (groups / scales.float().unsqueeze(2)).nan_to_num_(0, 0, 0).round_().clamp_(-LARGEST, LARGEST)
    return codes.to(torch.int8).flatten(1), scales


def dequantise(codes: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """code * scale, float32 [out, in]: exact, because 8 and 11 bits fit into 24."""
    return (codes.float().unflatten(1, (-1, GROUP)) * scales.float().unsqueeze(2)).flatten(1)
