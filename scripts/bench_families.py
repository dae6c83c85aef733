"""Times the special feature of each model family on this machine, and writes docs/benchmarks/families.json.

    python scripts/bench_families.py [--json FILE] [--only NAME]

    absorbed    one decode row over 4,096 cached tokens, DeepSeek-V2-Lite's attention: absorbed against expanded
    context     a decode step of a Gated DeltaNet layer after 16K tokens against after 1K
    prefill     a Gated DeltaNet layer over 2,048 tokens, Qwen3.5-0.8B's shape, float32, against the torch path of
                transformers: convolution, delta rule and norm alone, then with the projections
    decode      one request in bfloat16, dummy weights of Qwen3-0.6B and Qwen3.5-0.8B, against transformers

Each row compares two implementations, run in turn on the same threads. The JSON holds every time, in seconds.
transformers is in the `test` extra.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import bounded_spins  # noqa: F401
import torch
import transformers

from nanokv import LLM
from nanokv.bench.measure import decode_speed
from nanokv.cache.store import CacheStore
from nanokv.cli.common import hardware
from nanokv.codecs import RawCodec
from nanokv.core.batch import Batch
from nanokv.core.spec import PageLayout
from nanokv.hub.catalog import CATALOG
from nanokv.models.decoder import Decoder
from nanokv.models.loader import load_model
from nanokv.models.read import read_config

JSON = Path(__file__).resolve().parents[1] / "docs/benchmarks/families.json"
PAGE = 16
Timed = Callable[[], None]


def in_turns(first: Timed, second: Timed, repeats: int, calls: int = 1) -> tuple[list[float], list[float]]:
    """Seconds of a call of each function, `repeats` times in alternating order, after one warm-up each."""
    times: tuple[list[float], list[float]] = ([], [])
    first()
    second()
    for repeat in range(repeats):
        for place in (0, 1) if repeat % 2 == 0 else (1, 0):
            begin = time.perf_counter()
            for _ in range(calls):
                (first, second)[place]()
            times[place].append((time.perf_counter() - begin) / calls)
    return times


def row(name: str, shape: str, ours: str, theirs: str, times: tuple[list[float], list[float]], least: float) -> dict:
    """One comparison. `ratio` is the median of theirs / ours, paired run by run; `least` is its target."""
    ratios = [b / a for a, b in zip(*times, strict=True)]
    return {
        "name": name, "shape": shape, "ours": ours, "theirs": theirs, "ours_s": times[0], "theirs_s": times[1],
        "ratio": statistics.median(ratios), "ratios": ratios, "least": least,
    }  # fmt: skip


def one_layer(config: dict, dtype: torch.dtype, tokens: int, folder: Path | None = None) -> tuple[Decoder, CacheStore]:
    """A model of these fields (dummy weights without a folder), bound to a store for one request of `tokens`."""
    model, codec = read_config(config), RawCodec(dtype)
    load = "auto" if folder is not None else "dummy"
    decoder = load_model(folder or ".", model, dtype, "cpu", codec, PAGE, load=load)
    layout = PageLayout(decoder.specs, PAGE)
    decoder.bind(layout)
    states = 1 if layout.state_bytes else 0
    return decoder, CacheStore(layout, -(-tokens // PAGE), num_states=states)


def batch_of(first: int, rows: int) -> Batch:
    """A step with positions first .. first + rows - 1 of the only request. Its pages are 0, 1, 2, ..."""
    positions = torch.arange(first, first + rows, dtype=torch.int32)
    return Batch(
        token_ids=torch.zeros(rows, dtype=torch.int64),
        positions=positions,
        write_pages=positions // PAGE,
        write_slots=positions % PAGE,
        request_starts=torch.tensor([0, rows], dtype=torch.int32),
        page_tables=torch.arange(-(-(first + rows) // PAGE), dtype=torch.int32).unsqueeze(0),
        logit_rows=torch.zeros(0, dtype=torch.int64),
        state_ids=torch.zeros(1, dtype=torch.int32),
        page_size=PAGE,
    )


def absorbed() -> dict:
    config = {**CATALOG["deepseek-v2-lite"].config, "num_hidden_layers": 1, "vocab_size": 256, "intermediate_size": 256}
    config = {**config, "eos_token_id": 2, "bos_token_id": 1}
    tokens = 4096
    decoder, store = one_layer(config, torch.bfloat16, tokens)
    store.pages.data.view(torch.bfloat16).normal_()
    mla, batch = decoder.layers[0].mixer, batch_of(tokens - 1, 1)
    heads, shape = mla.num_heads, mla.shape
    nope, rope = torch.randn(1, heads, shape.nope_dim), torch.randn(1, heads, shape.rope_dim)
    given = nope, rope, store.pages.data, batch
    times = in_turns(lambda: mla.pages.absorbed(*given), lambda: mla.pages.expanded(*given), 15)
    shape_text = "16 heads, latent 512, bfloat16 pages, 4,096 tokens"
    return row("absorbed", shape_text, "absorbed decode", "expanding the whole cache", times, 20)


def _hybrid(layer_types: list[str]) -> dict:
    text = CATALOG["qwen3.5-0.8b"].config["text_config"]
    small = {"num_hidden_layers": len(layer_types), "layer_types": layer_types, "vocab_size": 256, "eos_token_id": 2}
    return {**text, **small, "architectures": ["Qwen3_5ForCausalLM"], "intermediate_size": 256}


def context() -> dict:
    decoder, store = one_layer(_hybrid(["linear_attention"]), torch.bfloat16, 16_384)
    layer, x = decoder.layers[0].mixer, torch.randn(1, 1024)
    near, far = batch_of(1023, 1), batch_of(16_383, 1)
    times = in_turns(lambda: layer(x, store, far), lambda: layer(x, store, near), 15, calls=50)
    return row("context", "Qwen3.5-0.8B, one layer, bfloat16", "after 16K tokens", "after 1K tokens", times, 0.95)


class Given(torch.nn.Module):
    """A stand-in for a projection: returns a fixed result, or its input where there is none."""

    def __init__(self, result: torch.Tensor | None = None) -> None:
        super().__init__()
        self.result = result
        self.handed = None if result is None else torch.empty_like(result)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x if self.result is None else self.handed.copy_(self.result)  # a copy: the caller may work in place


def prefill(whole: bool) -> dict:
    config, rows = _hybrid(["linear_attention"]), 2048
    with tempfile.TemporaryDirectory() as folder:
        torch.manual_seed(0)
        theirs = transformers.Qwen3_5ForCausalLM(transformers.Qwen3_5TextConfig(**config)).eval()
        theirs.save_pretrained(folder)
        saved = json.loads((Path(folder) / "config.json").read_text())
        decoder, store = one_layer(saved, torch.float32, rows, Path(folder))
    ours, module = decoder.layers[0].mixer, theirs.model.layers[0].linear_attn
    x, batch = torch.randn(rows, 1024), batch_of(0, rows)
    torch.testing.assert_close(ours(x, store, batch), module(x.unsqueeze(0))[0], rtol=1e-3, atol=1e-4)
    if not whole:
        ours.in_proj, ours.out = Given(ours.in_proj(x)), Given()
        for name in ("in_proj_qkv", "in_proj_z", "in_proj_b", "in_proj_a"):
            setattr(module, name, Given(getattr(module, name)(x.unsqueeze(0))))
        module.out_proj = Given()
    times = in_turns(lambda: ours(x, store, batch), lambda: module(x.unsqueeze(0)), 11)
    what = "prefill, whole layer" if whole else "prefill, between the projections"
    return row(what, "Qwen3.5-0.8B, one layer, float32, 2,048 tokens", "nanokv", "transformers", times, 2)


def decode(name: str, architecture: str) -> dict:
    """Seconds a token of one request of 256 tokens, with dummy weights of the whole model on both sides."""
    known, tokens, steps = CATALOG[name].config, 256, 12
    config_class = getattr(transformers, f"{architecture}Config")
    config = config_class(**known.get("text_config", known))
    model = getattr(transformers, f"{architecture.removesuffix('Text')}ForCausalLM")._from_config(
        config, dtype=torch.bfloat16
    )
    model.eval()
    cache = transformers.DynamicCache(config=config)
    model(torch.ones(1, tokens, dtype=torch.int64), past_key_values=cache, use_cache=True, logits_to_keep=1)
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "config.json").write_text(json.dumps(known), encoding="utf-8")
        with LLM(folder, load="dummy", dtype="bfloat16", kv_memory="1GiB") as llm:
            ours, theirs = [], []
            for _ in range(6):
                ours.append(1 / decode_speed(llm, 1, tokens, steps))
                begin = time.perf_counter()
                for _ in range(steps):
                    model(torch.ones(1, 1, dtype=torch.int64), past_key_values=cache, use_cache=True)
                theirs.append((time.perf_counter() - begin) / steps)
    times = ours[1:], theirs[1:]  # the first run of each loads its weights into memory
    return row(f"decode {name}", "1 request, 256 tokens, bfloat16", "nanokv", "transformers", times, 2)


MEASURES: dict[str, Callable[[], dict]] = {
    "absorbed": absorbed,
    "context": context,
    "prefill": lambda: prefill(whole=False),
    "prefill-layer": lambda: prefill(whole=True),
    "decode-qwen3": lambda: decode("qwen3-0.6b", "Qwen3"),
    "decode-qwen3.5": lambda: decode("qwen3.5-0.8b", "Qwen3_5Text"),
}


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, default=JSON, help="(%(default)s)")
    parser.add_argument(
        "--only", choices=sorted(MEASURES), action="append", help="this row alone; the JSON is not written"
    )
    options = parser.parse_args()
    rows = []
    for name in options.only or MEASURES:
        rows.append(MEASURES[name]())
        ours, theirs = (statistics.median(rows[-1][side]) for side in ("ours_s", "theirs_s"))
        print(f"{rows[-1]['name']:32} {ours * 1e3:9.2f} ms against {theirs * 1e3:9.2f} ms: {rows[-1]['ratio']:.2f} x")
    if options.only is None:
        versions = {"torch": torch.__version__, "transformers": transformers.__version__}
        about = {"hardware": hardware(), "threads": torch.get_num_threads(), "versions": versions}
        options.json.write_text(json.dumps({**about, "rows": rows}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
