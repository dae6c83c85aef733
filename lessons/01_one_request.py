# %% [markdown]
# # 1. One request
#
# > *"Every guide says that the KV cache makes LLMs fast. Then a measurement shows that a perfect cache hit saves 4
# > percent. Which of the two is right?"*
#
# Both are. They speak of one cache with two lifetimes: during a request, and after it. In this lesson we send one
# request through the engine and count what it computes. You need no GPU. You need to know what a matrix product is.
#
# **What to expect.** Within one request the cache saves most of the work, and the share it saves grows with every
# token. Kept *after* the request, for the next one, it can save at most the time that went into the prompt. That is a
# ceiling, and we will measure it.

# %%
import json
import tempfile
from inspect import getsource
from pathlib import Path

import figures

from nanokv import LLM, SamplingParams
from nanokv.bench.decode import bytes_per_step
from nanokv.bench.measure import bandwidth, decode_speed, weight_bytes
from nanokv.bench.request import measure_request, prefill_share
from nanokv.core.metrics import RequestMetrics
from nanokv.hub.catalog import CATALOG
from nanokv.hub.pull import pull
from nanokv.models.loader import tensors
from nanokv.models.read import read_config

pull("smollm2-135m-instruct")  # 93 MB the first time, nothing after that
log = Path(tempfile.mkdtemp(), "events.jsonl")
llm = LLM("smollm2-135m-instruct", dtype="float32", device="cpu", kv_memory="256MiB", event_log=str(log))


def rows_of_steps(first_step: int) -> list[int]:
    """The number of rows of each step after `first_step`, read from the event log."""
    events = [json.loads(line) for line in log.read_text().splitlines()]
    return [event["tokens"] for event in events if event["event"] == "step" and event["step"] > first_step]


# %% [markdown]
# ## Without a cache
#
# A language model is a function: the text so far goes in, the next **token** comes out. A token is a word or a piece of
# a word. So the simplest way to write a text is a loop. Ask for *one* token, append it, and ask again with the longer
# text.
#
# A **row** is one token on its way through the model in one step. The rows computed are the work done, so we count
# rows. `reset_prefix_cache` empties the cache, so that each call starts from nothing.

# %%
PROMPT = "A short list of the largest planets of our solar system, from the largest to the smallest: 1."
NEW = 16

prompt = llm.tokenizer.encode(PROMPT, add_special=True)
one_token = SamplingParams(max_tokens=1, temperature=0, ignore_eos=True)

text = list(prompt)
before = llm.stats()["steps"]
for _ in range(NEW):
    llm.reset_prefix_cache()
    text += llm.generate([text], one_token)[0].token_ids
recomputed = rows_of_steps(before)

assert len(prompt) == 22
assert recomputed == [22 + i for i in range(16)]
assert sum(recomputed) == 472
print(llm.tokenizer.decode(text[len(prompt) :]))

# %% [markdown]
# The prompt has 22 tokens. The first answer token cost 22 rows, the second 23, the third 24, and so on: 472 rows for 16
# tokens. Write an essay this way, and you reread it from the start before every word.
#
# ## With a cache
#
# Why is that wasteful? In each layer of the model, a token reads two vectors of each earlier token: a **key** (what the
# token is about) and a **value** (what the token has to say). Both depend on their own token and on the tokens before
# it, never on those after it. So they never change. Keep them, and an old token need not be computed again. This store
# of keys and values is the **KV cache**.
#
# Now the same request in one call. The engine keeps the keys and values while the request runs.

# %%
llm.reset_prefix_cache()
before = llm.stats()["steps"]
answer = llm.generate([prompt], SamplingParams(max_tokens=NEW, temperature=0, ignore_eos=True))[0]
cached = rows_of_steps(before)

assert answer.token_ids == text[len(prompt) :]  # the same 16 tokens
assert cached == [22] + [1] * 15
assert sum(cached) == 37
assert round(sum(recomputed) / sum(cached)) == 13

# %%
figure, (left, right) = figures.new(8.4, 3.6, 2, sharey=True)
steps = range(1, NEW + 1)
left.bar(steps, recomputed, width=0.85, color=figures.ORANGE)
left.set(title=f"no cache: {sum(recomputed)} rows", xlabel="answer token", ylabel="position in the text")
ends = [sum(cached[: i + 1]) for i in range(NEW)]
right.bar(
    steps, cached, width=0.85, bottom=[end - rows for end, rows in zip(ends, cached, strict=True)], color=figures.BLUE
)
right.set(title=f"KV cache: {sum(cached)} rows", xlabel="answer token")
right.annotate("prefill: the prompt, once", (1.6, 11), (4, 8), arrowprops={"arrowstyle": "->"}, va="center")
right.annotate("decode: one new row a step", (9, 30), (1.5, 35), arrowprops={"arrowstyle": "->"}, va="center")
figures.save(figure, "01_one_request-1")

# %% [markdown]
# ![Rows computed for each answer token, without and with a cache](img/01_one_request-1.svg)
#
# A bar shows which positions of the text were computed for one answer token. The coloured area is the work. With the
# cache it is 37 rows, 13 times less, and all 16 tokens are the same. (The answer may get the planets wrong, as models
# of this size do. It gets them wrong in the same way both times.)
#
# The two phases have names that you will meet everywhere. **Prefill** computes the prompt: many rows at once.
# **Decode** computes one row a step. In nanokv these are not two modes but two shapes of the same step; lesson 3 shows
# why that matters.
#
# ## Two clocks
#
# A user notices two times. **TTFT**, time to first token, is the wait before the text begins. **TPOT**, time per output
# token, is the pace of the text from then on. Here is how the engine defines them. Read such definitions before you
# compare two benchmarks: some count the first token, others do not.

# %%
print(getsource(RequestMetrics.ttft.fget))
print(getsource(RequestMetrics.tpot.fget))

clock = answer.metrics
total = clock.ttft + clock.tpot * (NEW - 1)
assert abs(total - clock.latency) < 1e-6
print(f"TTFT {clock.ttft * 1e3:.0f} ms, TPOT {clock.tpot * 1e3:.0f} ms, in all {clock.latency:.2f} s")

# %% [markdown]
# ## Why is a decode step so slow?
#
# Look at the two times above. The prefill computed 22 rows, a decode step computes 1. Is a decode step 22 times faster?
# We measure three things: a step with one row, a step with sixteen rows (sixteen requests at once), and the price of a
# row in a long prefill.

# %%
step_1 = min(1 / decode_speed(llm, batch=1, context=64, steps=5) for _ in range(4))  # the least disturbed run
step_16 = min(16 / decode_speed(llm, batch=16, context=64, steps=5) for _ in range(4))
small = measure_request(llm, prompt_tokens=32, output_tokens=16)
large = measure_request(llm, prompt_tokens=512, output_tokens=16)
prefill_row = 1 / large["prefill_tokens_per_s"]
weights = weight_bytes(llm, 1)
limit = max(bandwidth(llm.device), bandwidth(llm.device))

assert weights == 538_060_032  # 134,515,008 numbers of 4 bytes
assert step_16 < 8 * step_1  # sixteen rows, but far from sixteen times the price
assert prefill_row < step_1 / 2  # a row of a long prefill is cheaper than a row alone
assert 0.05 < weights / step_1 / limit < 5  # a step of one row runs near the speed of memory
ms = [round(1e3 * seconds, 1) for seconds in (step_1, step_16, prefill_row)]
print(f"a step of 1 row takes {ms[0]} ms, one of 16 rows {ms[1]} ms, a row of a long prefill {ms[2]} ms")
print(f"a step of one row moves {weights / step_1 / 1e9:.1f} GB/s of weights; memory gives {limit / 1e9:.1f} GB/s")

# %% [markdown]
# **The surprise.** Sixteen rows cost much less than sixteen times one row (less than 8 times here, on most machines
# about twice), and a row in a long prefill costs less than half of a row alone. A single row pays for something else:
# to multiply by a matrix, the processor has to *read* the matrix. SmolLM2 has 538,060,032 bytes of weights in float32,
# and every step reads all of them, for one row or for a thousand.
#
# So there are two limits, and the slower one decides. This is the **roofline** model (Williams et al. 2009):
#
# - time to compute: operations / operations per second
# - time to read: bytes / bytes per second
#
# The ratio of operations to bytes, **FLOP per byte**, tells which limit applies. Every machine has a **ridge**, the
# FLOP per byte at which both limits take the same time. An H100 does 989 TFLOP/s in bfloat16 and reads 3.35 TB/s, so
# its ridge is at 295. Below the ridge, reading takes the time, and computing is free.
#
# What does a decode step read? The engine's own formula:

# %%
print(getsource(bytes_per_step))

config = llm.model_config
numbers = sum(size[0] * (size[1] if len(size) > 1 else 1) for size in tensors(config).values())
kv_bytes = 2 * 2 * config.num_layers * config.num_kv_heads * config.head_dim  # key and value, 2 bytes each
assert numbers == 134_515_008
assert kv_bytes == 23_040 and llm.stats()["bytes_per_token"] == 2 * kv_bytes  # the engine here runs 4-byte numbers


def flop_per_byte(batch: int, context: int) -> float:
    """One decode step in bfloat16: two operations a weight and row, four a cached token, head and dimension."""
    attention = 4 * config.num_layers * config.num_heads * config.head_dim * context
    return batch * (2 * numbers + attention) / bytes_per_step(2 * numbers, batch, context, kv_bytes)


RIDGE = 989e12 / 3.35e12
assert round(RIDGE) == 295
assert 0.99 < flop_per_byte(1, 0) <= 1
assert flop_per_byte(64, 256) > 25 and flop_per_byte(4096, 256) < 60
assert flop_per_byte(4096, 8192) < 5

batches = [2**i for i in range(13)]
figure, axes = figures.new(7.2, 3.8)
for context, colour in ((16, figures.SKY), (256, figures.BLUE), (8192, figures.ORANGE)):
    axes.plot(batches, [flop_per_byte(n, context) for n in batches], color=colour, marker="o", markersize=4)
    axes.text(4600, flop_per_byte(4096, context), f"context {context:,}", color=figures.BLACK, va="center")
axes.axhline(RIDGE, color=figures.BLACK, linestyle="--", linewidth=1)
axes.text(1, RIDGE * 1.12, "ridge of an H100: 295 FLOP per byte", va="bottom")
axes.set_xscale("log", base=2)
axes.set_yscale("log")
axes.set_yticks([1, 10, 100], ["1", "10", "100"])
axes.set(xlim=(0.9, 22000), ylim=(0.7, 900), xlabel="requests that decode together", ylabel="FLOP per byte read")
axes.set_xticks(batches[::2], [f"{n:,}" for n in batches[::2]])
axes.set_title("One decode step of SmolLM2-135M in bfloat16")
figures.save(figure, "01_one_request-2")

# %% [markdown]
# ![FLOP per byte of a decode step over the number of requests, for three contexts](img/01_one_request-2.svg)
#
# A single request does about 1 FLOP per byte; an H100 needs 295. Batching helps, because the whole batch shares one
# reading of the weights. Then the lines bend. Each request brings a cache of its own, and the step reads all these
# caches, too. At a context of 256, even 4,096 requests stay below 60 FLOP per byte. At 8,192 they stay below 5. From
# there on, the price of a token is the time to read the *cache*.
#
# That is why this engine has one subject, the KV cache. Later lessons waste less of it (2), share it (4), and make it
# smaller (5, 6, 7).
#
# For a bigger model the same calculation is a well-known interview question: at how many cached tokens does
# Llama-3.1-8B read more cache than weights?

# %%
llama = read_config(CATALOG["llama-3.1-8b"].config)
llama_weights = 2 * sum(size[0] * (size[1] if len(size) > 1 else 1) for size in tensors(llama).values())
llama_token = 2 * 2 * llama.num_layers * llama.num_kv_heads * llama.head_dim
assert llama_token == 131_072  # 128 KiB a token
assert round(llama_weights / 1e9, 1) == 16.1
assert round(llama_weights / llama_token, -2) == 122_500

# %% [markdown]
# At 122,500: 16.1 GB of weights, 128 KiB a token.
#
# ## The ceiling of a perfect hit
#
# Now the 4 percent. When a request is done, the engine can discard its keys and values, or keep them for a later
# request that begins with the same text. What can that save at most? A **perfect hit** finds the whole prompt. Then the
# prefill disappears, except for the last token of the prompt: the cache holds keys and values, not the next token, so
# one row is always computed.

# %%
print(getsource(prefill_share))

assert round(0.100 / 2.5, 2) == 0.04  # 1K in, 512 out: about 100 ms of prefill in 2.5 s
assert round(0.769 / 3.200, 2) == 0.24  # 16K in, 512 out
for row in (small, large):
    print(
        f"{row['prompt_tokens']:5} in, {row['output_tokens']} out: a hit can save {row['prefill_share']:.0%}, "
        f"and saved {row['hit_saved_share']:.0%} ({row['hit_cached_tokens']} tokens were found)"
    )
assert small["hit_cached_tokens"] == 16 and large["hit_cached_tokens"] == 496
assert 0.02 < small["prefill_share"] < 0.40
assert 0.35 < large["prefill_share"] < 0.95
assert large["prefill_share"] > small["prefill_share"]
assert large["hit_ttft_s"] < large["ttft_s"] / 4

# %% [markdown]
# The article that started this project measured Qwen3-30B-A3B on GPUs. With 1K tokens in and 512 out, a hit can save 4
# percent; with 16K in and 512 out, 24 percent. Those requests have 2 and 32 prompt tokens for each answer token. Ours
# have the same proportions, 32 in, 16 out and 512 in, 16 out, and on a CPU the ceiling is much higher: between 2 and 40
# percent for the first (it depends on your machine), between 35 and 95 percent for the second.
#
# Why is it higher? The model is not the reason. Call $r$ the price of a prefill row, measured in decode steps. The
# share is
#
# $$\text{ceiling} = \frac{r \cdot \text{in}}{r \cdot \text{in} + \text{out}}$$
#
# A GPU computes hundreds of rows in the time that it takes to read the weights once, so its $r$ is about a hundredth. A
# CPU computes a few, so its $r$ is a large fraction. Put the article's times into the formula and read $r$ off.

# %%
r_gpu = (0.100 / 1024) / ((2.5 - 0.135) / 511), (0.769 / 16384) / ((3.200 - 0.769) / 511)
assert [round(r, 3) for r in r_gpu] == [0.021, 0.01]
r_here = prefill_row / step_1
assert 0.01 < r_here < 1 / 2
print(f"here a prefill row costs {r_here:.2f} of a decode step")


def ceiling(ratio: float, r: float) -> float:
    """The most that a perfect hit saves, if the prompt has `ratio` times as many tokens as the answer."""
    return r * ratio / (r * ratio + 1)


ratios = [2 ** (i / 4) for i in range(-12, 41)]
figure, axes = figures.new(7.2, 3.8)
axes.fill_between(
    ratios, [100 * ceiling(x, 0.01) for x in ratios], [100 * ceiling(x, 1 / 2) for x in ratios], color=figures.PALE,
)  # fmt: skip
axes.text(1.1, 21, "a CPU: anywhere in here")
axes.plot(ratios, [100 * ceiling(x, 0.01) for x in ratios], color=figures.BLUE)
axes.text(190, 55, "r = 1/100\na large GPU", color=figures.BLUE)
axes.plot(ratios, [100 * ceiling(x, 1 / 2) for x in ratios], color=figures.GREEN)
axes.text(0.75, 36, "r = 1/2", color=figures.GREEN, ha="right")
for x, share in ((2, 4), (32, 24)):
    axes.plot([x], [share], "o", color=figures.RED)
    axes.text(x * 1.25, share, f"article: {share} %", color=figures.RED, va="center")
axes.set_xscale("log", base=2)
axes.set_xticks([1 / 8, 1 / 2, 2, 8, 32, 128, 512], ["1/8", "1/2", "2", "8", "32", "128", "512"])
axes.set(xlim=(1 / 8, 1024), ylim=(0, 100), xlabel="prompt tokens for each answer token", ylabel="% of the time")
axes.set_title("What a perfect cache hit can save of one request")
figures.save(figure, "01_one_request-3")

# %% [markdown]
# ![The ceiling of a perfect hit over the ratio of prompt to answer](img/01_one_request-3.svg)
#
# So both claims at the top are right. Within a request the cache is indispensable. Across requests it saves, for *one*
# request, what the curve says: little for a short question with a long answer, nearly everything for a long document
# with a short answer. But one request is the wrong unit. A prefill that is not computed leaves machine time for other
# requests, and under load that changes the picture: lesson 4.
#
# ## Read now
#
# Five stops, each at most a page of code.
#
# 1. [`nanokv/llm.py`](../nanokv/llm.py), `LLM.generate`: a text becomes a request.
# 2. [`nanokv/engine/engine.py`](../nanokv/engine/engine.py), `Engine.advance`: plan, move, launch, resolve.
# 3. [`nanokv/core/request.py`](../nanokv/core/request.py), the docstring and `Request.advance`: how far a request is.
# 4. [`nanokv/models/decoder.py`](../nanokv/models/decoder.py), `Decoder.forward`: the model in six lines.
# 5. [`nanokv/bench/decode.py`](../nanokv/bench/decode.py): the roofline of a step as a benchmark.
#
# ## Exercises
#
# `nanokv learn list` shows them with their ids.
#
# - `nanokv.core.spec.LayerSpec.bytes_per_token`: the bytes that a token takes
# - `nanokv.core.metrics.RequestMetrics.tpot`: time per output token
# - `nanokv.bench.request.prefill_share`: the ceiling
# - `nanokv.bench.decode.bytes_per_step`: the bytes that a decode step moves
# - `nanokv.engine.text_stream.TextStream._take`: a stop text that arrives in pieces
# - `nanokv.engine.sampler._draw`: from probabilities to one token
#
# ## What you can now explain
#
# - Why keys and values of old tokens never change, and what follows from it.
# - Prefill and decode, TTFT and TPOT, and why memory bandwidth limits a single decode step.
# - Why batching helps only until the step reads mostly cache.
# - Where the 4 and the 24 percent come from, and why your laptop shows a higher number.
#
# ## Where it loses
#
# - The cache takes memory, 22.5 KiB a token here in bfloat16 and 128 KiB for an 8B model. More of it per request means
#   fewer requests in a batch.
# - A long answer to a short question gains next to nothing from a kept cache.
# - Counting rows flatters the cache a little: a row far down a long text costs more attention than a row at its start.

# %%
assert kv_bytes / 1024 == 22.5
llm.close()
