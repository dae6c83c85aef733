"""The kinds of machines that bench_peers.py distinguishes, and what nanokv should reach on each."""

from __future__ import annotations

KINDS = {
    "amx": "A CPU with AMX",
    "avx512": "A CPU with AVX-512, without AMX",
    "avx2": "A CPU with AVX2",
    "neon": "An ARM CPU",
    "other": "Another CPU",
}
"""Kind -> title of its section in docs/benchmarks.md, in the order of the sections."""
CEILING_LEAST = 0.85


def kind_of(instructions: str) -> str:
    """The kind of a machine, from the instructions that its hardware names, such as "AVX-512, AMX"."""
    found = instructions.lower().replace("-", "")
    return next((kind for kind in KINDS if kind in found), "other")


def least_ratios(kind: str, row: dict, dtype: str) -> dict[str, float]:
    """Peer -> the ratio that nanokv should reach in this row on this kind (for seconds: the highest allowed)."""
    if row["measure"] == "seconds":
        return {"transformers": 0.5}
    return _on_amx(row, dtype) if kind == "amx" else _elsewhere(row)


def _on_amx(row: dict, dtype: str) -> dict[str, float]:
    if dtype == "float32":
        return {"vllm": 1.1}
    if row["measure"] == "requests_per_s":
        return {"vllm": 1.25 if row["shared_tokens"] / row["prompt_tokens"] > 0.75 else 1.1}
    if row["measure"] == "prefill_tokens_per_s":
        return {"vllm": 1.25}
    if row["measure"] == "decode_tokens_per_s":
        return {"vllm": 1.9, "llama": 1.7}
    return {"vllm": 1.25 if row["requests"] == 16 else 1.4}


def _elsewhere(row: dict) -> dict[str, float]:
    if row["measure"] == "requests_per_s":
        part = row["shared_tokens"] / row["prompt_tokens"]
        return {"vllm": 0.9 if part == 0 else 1.0 if part < 0.75 else 1.1}
    if row["measure"] == "prefill_tokens_per_s":
        return {"vllm": 0.9}
    if row["measure"] == "decode_tokens_per_s":
        return {"vllm": 1.3, "llama": 0.7}
    return {"vllm": 1.1} if row["requests"] == 16 else {}
