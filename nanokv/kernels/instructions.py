"""The vector instructions of this CPU that the kernels were compiled for."""

from __future__ import annotations

import platform

from llvmlite import binding

from nanokv.kernels.cpu.amx import has_tiles

_NAMES = {"avx2": "AVX2", "avx512f": "AVX-512", "avx512bf16": "AVX-512 bf16"}


def instructions() -> list[str]:
    """Such as ["AVX-512", "AVX-512 bf16", "AMX"], the widest last; empty where none is known. AMX counts where the
    system grants it."""
    if platform.machine().lower() in ("arm64", "aarch64"):
        return ["NEON"]
    features = binding.get_host_cpu_features()
    found = [name for feature, name in _NAMES.items() if features.get(feature, False)]
    return (found[1:] if "AVX-512" in found else found) + ["AMX"] * has_tiles()
