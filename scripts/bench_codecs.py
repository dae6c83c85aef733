"""All numbers of docs/benchmarks/codecs.json, with one command; a run that was broken off goes on where it stopped.

    python scripts/bench_codecs.py                   measure what is missing, then draw codecs.svg
    python scripts/bench_codecs.py --fresh           forget what was measured
    python scripts/bench_codecs.py --quick --output build/codecs.json

In this order: every codec of `nanokv bench codecs` on the model; each on keys alone and on values alone; prefill both
ways of some; then on the tiny shipped checkpoints the quality on held-out text of their corpus, and recall: a key told
once and asked for later, with so many tokens between (scripts/make_corpus.py), answered greedily through the cache.

Each row is written when it is measured. A failure is named in the JSON and on stderr, is tried again by the next run,
and makes the exit code 1; a codec that cannot serve a model (ConfigError) is left out and named, which is no failure.
Both are named anew by each run, which tries whatever has no rows.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from statistics import median
from typing import Any

import bounded_spins  # noqa: F401
import codecs_report
import torch

from nanokv import LLM, SamplingParams
from nanokv.bench.codecs import ALL, FULL, QUICK, CodecBench, Plan, page_size_of, swept
from nanokv.bench.codecs import key as key_of
from nanokv.bench.measure import check_length, greedy
from nanokv.bench.workloads import random_prompts
from nanokv.cli.common import hardware
from nanokv.core.errors import ConfigError

ROOT = Path(__file__).resolve().parents[1]
OUTPUT = ROOT / "docs/benchmarks/codecs.json"
TINY = ("tiny-gqa", "tiny-mla", "tiny-hybrid")
PREFILLED = ("int8", "rot4", "tq4", "kivi4")
"""Codecs whose prefill is timed in both modes."""
PREFILL_TOKENS = 1024
DISTANCES = ((64, 40), (256, 40), (1024, 20))
"""Tokens between the key and the question, and how many are asked."""

Row = dict[str, Any]


class Result:
    """The JSON file, written anew with every row.

    settings   of the run, on which the numbers depend
    Raises     SystemExit when the file holds numbers of other settings or another machine
    """

    def __init__(self, path: Path, model: str, settings: dict, fresh: bool) -> None:
        self.path = path
        machine = hardware()
        self.data: dict[str, Any] = {
            "command": "scripts/bench_codecs.py", "date": time.strftime("%Y-%m-%d"), "hardware": machine,
            "model": model, "settings": settings, "rows": [], "left_out": [], "failures": [],
        }  # fmt: skip
        if path.exists() and not fresh:
            old = json.loads(path.read_text(encoding="utf-8"))
            same = ("hardware", "model", "settings")
            differing = [name for name in same if old[name] != json.loads(json.dumps(self.data[name]))]
            if differing:
                sys.exit(f"{path} was measured with another {', '.join(differing)}: --fresh, or another --output")
            self.data |= {"rows": old["rows"], "date": old["date"]}

    @property
    def rows(self) -> list[Row]:
        return self.data["rows"]

    def known(self, model: str) -> set[tuple]:
        return {row_key(row) for row in self.rows if row["model"] == model}

    def add(self, model: str, row: Row) -> None:
        self.rows.append({"model": model, **row})
        self.save()

    def save(self) -> None:
        """Replaces the file at once: an interruption leaves the old one."""
        part = self.path.with_suffix(".part")
        part.write_text(json.dumps(self.data, indent=2, allow_nan=False) + "\n", encoding="utf-8")
        os.replace(part, self.path)

    def measure(self, model: str, codec: str, rows: Callable[[], Iterator[Row]]) -> None:
        """Adds rows until there are no more, or one fails."""
        start = time.perf_counter()
        try:
            for row in rows():
                self.add(model, row)
                _say(f"{time.perf_counter() - start:6.0f} s  {model}  {codec}  {row['part']}")
        except ConfigError as error:
            entry = {"model": model, "codec": codec, "reason": str(error)}
            if entry not in self.data["left_out"]:
                self.data["left_out"].append(entry)
            self.save()
            _say(f"left out  {model}  {codec}: {error}")
        except Exception as error:
            self.fail(model, codec, error)

    def fail(self, model: str, what: str, error: Exception) -> None:
        """Keeps a failure in the file and goes on."""
        self.data["failures"].append({"model": model, "what": what, "error": f"{type(error).__name__}: {error}"})
        self.save()
        _say(f"FAILED  {model}  {what}: {type(error).__name__}: {error}")


def row_key(row: Row) -> tuple:
    return (*key_of(row), row.get("distance"))


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def on_model(result: Result, name: str, plan: Plan) -> None:
    """All codecs on the model, then on one side alone."""
    known = result.known(name)

    def open_llm(**fields: Any) -> LLM:
        return LLM(name, **{"max_requests": 64} | fields)

    with open_llm() as raw:
        bench = CodecBench(open_llm, raw, plan)
        seen = {known_key[:4] for known_key in known}
        for codec in ALL:
            result.measure(name, codec, lambda codec=codec: bench.rows(codec, known=seen))
        for codec in swept(ALL):
            result.measure(name, codec, lambda codec=codec: bench.rows(codec, with_speed=False, known=seen))
        for codec in PREFILLED:
            if ("prefill", codec, None, None) not in seen:
                result.measure(name, codec, lambda codec=codec: prefill(open_llm, raw, codec, plan.turns))


def prefill(open_llm: Callable[..., LLM], raw: LLM, codec: str, turns: int) -> Iterator[Row]:
    """Prefill in both modes, which is the cost of reading a prompt's own keys and values through the codec.

    Raises ConfigError for a model that is too short.
    """
    check_length(raw, PREFILL_TOKENS, 1)
    fields = {"codec": codec, "page_size": page_size_of(codec)}
    with open_llm(prefill="exact", **fields) as exact, open_llm(prefill="fast", **fields) as fast:
        found = prefill_in_turns({"raw": raw, "exact": exact, "fast": fast}, PREFILL_TOKENS, turns)
    yield {"part": "prefill", "codec": codec, **found}


def prefill_in_turns(llms: Mapping[str, LLM], tokens: int, turns: int) -> dict[str, Any]:
    """Seconds to the first token of a prompt of `tokens` tokens, through each of these engines in turns. Medians."""
    seconds: dict[str, list[float]] = {name: [] for name in llms}
    for turn in range(turns + 1):  # the first turn warms up
        for name, llm in llms.items():
            (prompt,) = random_prompts(1, tokens, llm.model_config.vocab_size, seed=turn)
            llm.reset_prefix_cache()
            seconds[name].append(llm.generate([prompt], greedy(1))[0].metrics.ttft or 0.0)
    return {
        "prompt_tokens": tokens,
        "turns": turns,
        **{f"{name}_s": median(found[1:]) for name, found in seconds.items()},
    }


def on_tiny(result: Result, name: str, plan: Plan, share: float) -> None:
    """Held-out text and recall."""
    from make_corpus import EVERYTHING, LEVEL, items, row

    seen = result.known(name)

    def open_llm(**fields: Any) -> LLM:
        return LLM(name, **fields)

    with open_llm() as raw:
        rng, texts = random.Random("held out"), {}
        while len(texts) < plan.texts:
            told = "".join(text for text, _ in row(rng, EVERYTHING, LEVEL, 2 * plan.text_tokens))
            texts[f"held out {len(texts) + 1}"] = raw.tokenizer.encode(told)[: plan.text_tokens]
        bench = CodecBench(open_llm, raw, replace(plan, points=()), texts)
        asked = {distance: items(f"recall {distance}", max(2, int(share * number))) for distance, number in DISTANCES}
        for codec in ALL:
            missing = {d: told for d, told in asked.items() if ("recall", codec, None, None, d) not in seen}

            def rows(codec: str = codec, missing: dict[int, list] = missing) -> Iterator[Row]:
                yield from bench.rows(codec, known={known_key[:4] for known_key in seen})
                if missing:
                    yield from recall(open_llm, codec, missing)

            result.measure(name, codec, rows)


def recall(open_llm: Callable[..., LLM], codec: str, asked: dict[int, list]) -> Iterator[Row]:
    """Share of answers that are right to the last token, by distance."""
    with open_llm(codec=codec, dtype="float32", page_size=page_size_of(codec)) as llm:
        for distance, items in asked.items():
            answers = [llm.tokenizer.encode(item.answer, add_special=False) for item in items]
            params = [SamplingParams(max_tokens=len(ids), temperature=0.0, ignore_eos=True) for ids in answers]
            outputs = llm.generate([item.prompt for item in items], params, progress=False)
            exact = [out.token_ids == ids for out, ids in zip(outputs, answers, strict=True)]
            yield {
                "part": "recall", "codec": codec, "distance": distance, "items": len(items),
                "exact": sum(exact) / len(exact),
            }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m-instruct", help="(%(default)s)")
    parser.add_argument("--tiny", default=",".join(TINY), metavar="LIST", help="checkpoints for recall (%(default)s)")
    parser.add_argument("--quick", action="store_true", help="less of everything")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="(%(default)s)")
    parser.add_argument("--fresh", action="store_true", help="measure everything again")
    parser.add_argument("--output", type=Path, default=OUTPUT, help="(%(default)s); the figure goes beside it")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    plan = QUICK if options.quick else FULL
    settings = {"quick": options.quick, "plan": asdict(plan), "codecs": list(ALL), "recall": DISTANCES,
                "tiny": options.tiny.split(",")}  # fmt: skip
    result = Result(options.output, options.model, settings, options.fresh)
    parts = [(options.model, lambda: on_model(result, options.model, plan))]
    share = 0.2 if options.quick else 1.0
    tiny_plan = replace(plan, text_tokens=min(plan.text_tokens, 512))
    for name in filter(None, options.tiny.split(",")):
        parts.append((name, lambda name=name: on_tiny(result, name, tiny_plan, share)))
    for name, measure in parts:
        try:
            measure()
        except Exception as error:  # the model is missing, or its raw engine failed: the other models go on
            result.fail(name, "the model", error)
    result.save()
    codecs_report.draw(options.output)
    sys.exit(1 if result.data["failures"] else 0)


if __name__ == "__main__":
    main()
