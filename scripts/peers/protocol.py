"""The protocol between a worker and scripts/bench_peers.py: one JSON object a line. It runs in the environment of
every peer, so it imports the standard library only.

A worker is started as `python NAME_worker.py SETTINGS`. It loads its engine once and writes

    {"ready": true, "load_s": ..., "about": {"versions": {...}, "flags": {...}}}

Then each line on stdin is a job, answered by one line on stdout, in order. Between jobs a worker sleeps:

    {"prompts": [[token ids]...], "output_tokens": N, "concurrency": C, "before": [[token ids]...]}
        drops every cached prefix; computes `before` (one output token each, untimed); then answers `prompts` with
        exactly N greedy tokens each, C at a time: {"wall_s", "requests": [{"ttft_s", "latency_s", "cached_tokens"}]}
    {"call": NAME, ...}
        a measurement of this engine alone

An exception is answered as {"error": TEXT}, and the worker goes on.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from typing import Any


def serve(load: Callable[[dict], Any]) -> None:
    """Runs a worker. `load(settings)` makes an engine with

    about                                            dict: versions and flags, for the report
    run(prompts, output_tokens, concurrency)         list of (ttft_s, latency_s, cached_tokens), one for each prompt
    forget()                                         drops cached prefixes
    """
    settings = json.loads(sys.argv[1])
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # the output of the engine must not mix with the answers
    begin = time.perf_counter()
    engine = load(settings)
    answers.write(json.dumps({"ready": True, "load_s": time.perf_counter() - begin, "about": engine.about}) + "\n")
    for line in sys.stdin:
        try:
            answer = _answer(engine, json.loads(line))
        except Exception as error:
            answer = {"error": f"{type(error).__name__}: {error}"}
        answers.write(json.dumps(answer) + "\n")


def _answer(engine: Any, job: dict) -> dict:
    if "call" in job:
        return getattr(engine, job.pop("call"))(**job)
    engine.forget()
    for prompt in job["before"]:
        engine.run([prompt], 1, 1)
    begin = time.perf_counter()
    times = engine.run(job["prompts"], job["output_tokens"], job["concurrency"])
    wall = time.perf_counter() - begin
    names = ("ttft_s", "latency_s", "cached_tokens")
    return {"wall_s": wall, "requests": [dict(zip(names, one, strict=True)) for one in times]}
