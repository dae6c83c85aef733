# %% [markdown]
# # 3. One step
#
# > *"My chat was writing nicely, word after word. Then another user pasted a long document into* their *chat, and* mine
# > *froze for two seconds. What caused that, and can it be avoided?"*
#
# One long step caused it, and it can be avoided. An engine works in **steps**. In each step it decides anew which
# request may compute how many tokens. All fairness lies in that decision, and the decision is one short function.
#
# **What to expect.** The function fits on your screen. We run it on a toy model, read the event log, and draw which
# request ran when. No stopwatch: we count steps and rows. (A row is one token on its way through the model in one step,
# lesson 1.)

# %%
import json
import random
import tempfile
from inspect import getsource
from pathlib import Path

import figures
import tiny

from nanokv import LLM, SamplingParams
from nanokv.core.request import Request
from nanokv.engine.scheduler import Scheduler

folder = Path(tempfile.mkdtemp())


def prompt(length: int, seed: int) -> list[int]:
    generator = random.Random(seed)
    return [generator.randrange(3, 512) for _ in range(length)]


def request(name: str, prompt_tokens: int, answer_tokens: int, seed: int) -> Request:
    params = SamplingParams(max_tokens=answer_tokens, temperature=0, ignore_eos=True)
    return Request(prompt(prompt_tokens, seed), params, name)


def drain(llm: LLM) -> dict[str, list[int]]:
    """Runs steps until no work is left. Returns the answers by name."""
    answers = {}
    while llm.engine.has_work:
        answers |= {output.request_id: output.token_ids for output in llm.loop.step() if output.finished}
    return answers


def steps_of(llm: LLM) -> list[dict[str, int]]:
    """The rows of each step so far, by request name. Read from the event log."""
    events = map(json.loads, Path(llm.config.event_log).read_text().splitlines())
    return [{name: rows for name, _, rows in event["requests"]} for event in events if event["event"] == "step"]


def engine(name: str, **fields) -> LLM:
    return tiny.engine(event_log=str(folder / f"{name}.jsonl"), **fields)


# %% [markdown]
# ## The bus and the moving walkway
#
# Twelve requests, room for four at a time, answers between 4 and 40 tokens. The old way is a bus: four passengers get
# in, and all of them leave when the last one has arrived. This is **static batching**. The other way is a moving
# walkway: each passenger steps off on arrival, and the next one steps on at once. This is **continuous batching**
# (Orca, Yu et al. 2022).

# %%
ANSWERS = [4, 30, 6, 25, 8, 40, 5, 12, 33, 7, 20, 10]
assert (len(ANSWERS), min(ANSWERS), max(ANSWERS), sum(ANSWERS)) == (12, 4, 40, 200)
riders = [(f"r{i:02}", 8, answer, i) for i, answer in enumerate(ANSWERS)]

bus = engine("bus", max_requests=4)
answers_bus = {}
for group in (riders[:4], riders[4:8], riders[8:]):
    for rider in group:
        bus.engine.add_request(request(*rider))
    answers_bus |= drain(bus)

walkway = engine("walkway", max_requests=4)
for rider in riders:
    walkway.engine.add_request(request(*rider))
answers_walkway = drain(walkway)

bus_steps, walkway_steps = steps_of(bus), steps_of(walkway)
assert len(bus_steps) == 30 + 40 + 33 == 103
assert len(walkway_steps) == 58
assert answers_bus == answers_walkway


def used(steps: list[dict[str, int]]) -> int:
    """Percent of the places that were used."""
    return round(100 * sum(len(step) for step in steps) / (4 * len(steps)))


assert (used(bus_steps), used(walkway_steps)) == (49, 86)


# %%
def lanes(steps: list[dict[str, int]]) -> list[tuple[int, int, int, str]]:
    """(lane, first step, steps, name) of each request. A request takes the first lane that is free."""
    spans: dict[str, list[int]] = {}
    for number, step in enumerate(steps):
        for name in step:
            spans.setdefault(name, [number, number])[1] = number
    ends: list[int] = []
    drawn = []
    for name, (first, last) in sorted(spans.items(), key=lambda item: (item[1][0], item[0])):
        lane = next((i for i, end in enumerate(ends) if end < first), len(ends))
        ends[lane : lane + 1] = [last]
        drawn.append((lane, first, last - first + 1, name))
    return drawn


figure, panels = figures.new(9, 3.4, 1, squeeze=False)
axes = panels[0][0]
for offset, title, steps in ((5.6, "static: the bus", bus_steps), (0, "continuous: the walkway", walkway_steps)):
    figures.box(axes, 0, offset, len(steps), 4, figures.PALE)
    for lane, first, length, name in lanes(steps):
        colour = figures.CYCLE[int(name[1:]) % 6]
        figures.box(axes, first, offset + 3 - lane, length, 0.92, colour, int(name[1:]) + 1 if length > 3 else "")
    axes.text(0, offset + 4.15, f"{title}: {len(steps)} steps, {used(steps)} % of the places used", va="bottom")
figures.bare(axes, (-0.5, 104), (-0.2, 10.8))
figures.save(figure, "03_one_step-1")

# %% [markdown]
# ![Twelve requests in four places, by static and by continuous batching](img/03_one_step-1.svg)
#
# The bus needs 103 steps and drives half empty: 49 percent of the places are used. The walkway needs 58, at 86 percent.
# No request is computed faster, but no request waits for the slowest of its group any more. No scheduler can fill the
# grey at the right end: the last requests have no successors.
#
# What makes this possible? A batch lives for one step only. The engine builds it anew for each step, as a flat list of
# rows, and requests that are in it together do not depend on each other. The answers are the same to the bit.
#
# ## The whole scheduler
#
# Here is the function. **Budget** is the number of rows that one step may have.

# %%
print(getsource(Scheduler.plan))

# %% [markdown]
# There is no prefill mode and no decode mode. A request has known tokens, and some of them are computed. Requests
# differ only in how many tokens are left to compute: 1 when a request decodes, many when it has just arrived. Running
# requests come first, those that decode before those that still read their prompt. Waiting requests follow, while
# budget, places and pages last.
#
# ## The pasted document
#
# Now the question at the top. Three chats are decoding. A prompt of 600 tokens arrives. With a budget of 2,048, all of
# it fits into one step. With a budget of 64, it is computed in pieces: **chunked prefill** (Sarathi, Agrawal et al.
# 2023).


# %%
def paste(budget: int) -> tuple[list[dict[str, int]], dict[str, list[int]]]:
    """Three chats decode; after their fifth token a prompt of 600 tokens arrives."""
    with engine(f"paste-{budget}", max_step_tokens=budget) as llm:
        for i in range(3):
            llm.engine.add_request(request(f"chat {i}", 4, 60, 100 + i))
        for _ in range(5):
            llm.loop.step()
        llm.engine.add_request(request("document", 600, 4, 200))
        answers = drain(llm)
        return steps_of(llm), answers


whole, answers_whole = paste(2048)
pieces, answers_pieces = paste(64)

assert max(sum(step.values()) for step in whole) == 603
assert max(sum(step.values()) for step in pieces) == 64
assert [step["document"] for step in whole if "document" in step] == [600, 1, 1, 1]
assert [step["document"] for step in pieces if "document" in step] == [61] * 9 + [51] + [1] * 3
assert answers_whole == answers_pieces

# %%
figure, panels = figures.new(8.6, 3.2, 2, sharey=True)
for axes, steps, title in ((panels[0], whole, "budget 2,048"), (panels[1], pieces, "budget 64")):
    shown = steps[:22]
    chats = [sum(rows for name, rows in step.items() if name != "document") for step in shown]
    document = [step.get("document", 0) for step in shown]
    axes.bar(range(1, 23), document, bottom=chats, width=0.9, color=figures.ORANGE, label="the document")
    axes.bar(range(1, 23), chats, width=0.9, color=figures.BLUE, label="three chats")
    axes.set(title=title, xlabel="step")
panels[0].set_ylabel("rows in the step")
panels[0].annotate("three chats wait\nfor 603 rows", (6.6, 560), (9, 480), arrowprops={"arrowstyle": "->"})
panels[1].annotate(
    "ten steps of at most 64:\nthe chats go on in each", (10, 70), (5, 250), arrowprops={"arrowstyle": "->"}
)
panels[1].legend(loc="upper right")
figures.save(figure, "03_one_step-2")

# %% [markdown]
# ![Rows of each step with a budget of 2,048 and of 64](img/03_one_step-2.svg)
#
# Left: all three chats wait for one step of 603 rows, and their text freezes. Right: no step has more than 64 rows, and
# in each of the ten steps that the document takes, every chat gets its next token.
#
# Is that free? No. The document now takes ten steps instead of one. We need a price: a step costs what its rows cost,
# but never less than reading the weights, which we set to the price of 32 rows (the real number depends on the machine,
# lesson 1). Now sweep the budget.

# %%
READ_WEIGHTS = 32


def price(step: dict[str, int]) -> int:
    """The cost of a step in rows: the time to compute, or the time to read the weights."""
    return max(READ_WEIGHTS, sum(step.values()))


budgets = [16, 32, 64, 128, 256, 512, 1024]
longest_gap, first_token = [], []
for budget in budgets:
    steps, answers = paste(budget)
    assert answers == answers_whole
    own = [number for number, step in enumerate(steps) if "document" in step]
    reading = [number for number in own if steps[number]["document"] > 1]
    longest_gap.append(max(price(step) for step in steps))
    first_token.append(sum(price(steps[number]) for number in range(5, reading[-1] + 1)))
print(dict(zip(budgets, zip(longest_gap, first_token, strict=True), strict=True)))
assert longest_gap == [32, 32, 64, 128, 256, 512, 603]
assert first_token == [1504, 672, 630, 615, 609, 606, 603]

# %%
figure, axes = figures.new(7, 3.8)
axes.plot(longest_gap, first_token, color=figures.GREY, linewidth=1, zorder=1)
axes.scatter(longest_gap, first_token, color=figures.BLUE, s=45, zorder=2)
for budget, x, y in zip(budgets, longest_gap, first_token, strict=True):
    axes.annotate(f"{budget:,}", (x, y), (2, 7 if budget < 1024 else -16), textcoords="offset points")
axes.set_xscale("log", base=2)
axes.set_xticks([32, 64, 128, 256, 512], [32, 64, 128, 256, 512])
axes.set(xlim=(26, 900), ylim=(0, 1700), title="Each point is a budget")
axes.set(xlabel="longest gap in a chat's text (rows)", ylabel="time to the document's first token (rows)")
figures.save(figure, "03_one_step-3")

# %% [markdown]
# ![Longest gap of the chats against the first token of the document, for seven budgets](img/03_one_step-3.svg)
#
# **The surprise**: the longest gap of the chats shrinks from 603 to 64 rows, and the document pays 630 instead of 603,
# less than 5 percent more. Chunking is nearly free as long as the rows of a chunk cost more than reading the weights. A
# budget of 32 is still fine. A budget of 16 is far too small: the document pays 1,504. Each step now has 16 rows and
# costs as much as 32, because it reads all weights.
#
# So the budget may be as small as the chats need, but not below the machine's ridge.

# %%
assert round(630 / 603, 3) == 1.045
assert budgets[longest_gap.index(64)] == 64

# %% [markdown]
# ## When the pages run out
#
# Answers grow, and their final length is not known. So the scheduler admits requests optimistically: the known tokens
# must fit, plus a page more for each request. Sooner or later four growing texts need more pages than there are. Then
# one request has to give up its pages: **preemption**. Which one, and what happens to its work?

# %%
print(getsource(Scheduler._make_room))
print(getsource(Scheduler.preempt))


def crowd(name: str, **fields) -> tuple[LLM, dict[str, list[int]]]:
    """Four prompts of 40 tokens; one text grows to 100 tokens, three grow to 120."""
    llm = engine(name, **fields)
    for i, answer in enumerate((60, 80, 80, 80)):
        llm.engine.add_request(request(f"r{i}", 40, answer, 300 + i))
    return llm, drain(llm)


roomy, answers_roomy = crowd("roomy")
tight, answers_tight = crowd("tight", num_pages=24)
bare, answers_bare = crowd("bare", num_pages=24, prefix_cache=False)

rows_roomy, rows_tight, rows_bare = (sum(sum(step.values()) for step in steps_of(one)) for one in (roomy, tight, bare))
assert answers_roomy == answers_tight == answers_bare
assert roomy.stats()["preemptions"] == 0 and rows_roomy == 99 + 3 * 119
assert (tight.stats()["preemptions"], rows_tight) == (1, 504)
assert (bare.stats()["preemptions"], rows_bare) == (1, 552)
assert (len(steps_of(roomy)), len(steps_of(tight))) == (80, 83)

# %%
steps = steps_of(tight)
figure, axes = figures.new(8.6, 2.5)
for row, name in enumerate(("r3", "r2", "r1", "r0")):
    for number, step in enumerate(steps):
        if name in step:
            figures.box(axes, number, row, 1.02, 0.8, figures.BLUE if step[name] == 1 else figures.ORANGE)
    axes.text(-1.5, row + 0.4, f"request {name[1]}", ha="right", va="center")
gap = [number for number in range(len(steps)) if "r3" not in steps[number] and number < len(steps) - 1]
assert len(gap) == 3
middle = (gap[0] + gap[-1] + 1) / 2
axes.annotate("preempted for three steps", (middle, 0), (middle, -0.5), ha="center", arrowprops={"arrowstyle": "->"})
figures.bare(axes, (-13, len(steps) + 1), (-0.7, 4.1))
axes.text(0, -0.5, "step 1")
axes.text(len(steps), -0.5, f"step {len(steps)}", ha="right")
figures.save(figure, "03_one_step-4")

# %% [markdown]
# ![Four requests over the steps; one is preempted and comes back](img/03_one_step-4.svg)
#
# The scheduler preempts the newest request, because it has done the least and waited the least. Its *tokens* are kept:
# they are a few bytes. Its *pages* are released: they can be computed again from the tokens. When there is room, the
# request comes back, reads its own text like a prompt (orange, in one step), and then goes on where it was. The answers
# are the same to the bit.
#
# How much is computed twice? Without a prefix cache 96 rows, everything the request had. With it, 48 rows. The engine
# *published* the full pages before it released them. They stay in the tree until their room is needed, and three of the
# six were still there when the request came back. Preemption costs what was evicted in the meantime, not what was
# computed.

# %%
assert rows_bare - rows_roomy == 96
assert rows_tight - rows_roomy == 48

# %% [markdown]
# Could it go on for ever, with two requests that preempt each other? No. The oldest running request is never preempted
# for another, and a request that could not fit in the pool alone is refused on arrival. So the oldest request always
# finishes.
#
# ## Which request waits?
#
# One more experiment, and not a flattering one. `old` runs and holds nearly half of the pool. Then come `big`, which
# needs more than the rest, and `small`, which needs a single page. There is room for `small` right now.

# %%
queue = engine("queue", num_pages=24)
queue.engine.add_request(request("old", 150, 40, 400))
queue.loop.step()
queue.engine.add_request(request("big", 250, 4, 401))
queue.engine.add_request(request("small", 8, 4, 402))
drain(queue)
first = {name: min(i + 1 for i, step in enumerate(steps_of(queue)) if name in step) for name in ("old", "big", "small")}
print(first)
assert first == {"old": 1, "big": 41, "small": 41}
assert queue.engine.layout.pages_for(150) == 10 and queue.engine.layout.pages_for(251) == 16

# %% [markdown]
# `small` waits 40 steps behind `big`. The queue is first come, first served, and its head blocks it: **head-of-line
# blocking**. Letting `small` pass is easy to write, but then a stream of small requests starves `big` for ever.
# Continuous batching did not remove waiting. It moved waiting to one place, the queue, where a policy can choose which
# request waits.
#
# ## Read now
#
# 1. [`nanokv/core/request.py`](../nanokv/core/request.py), the docstring: known, computed and scheduled tokens, and the
#    laws.
# 2. [`nanokv/engine/scheduler.py`](../nanokv/engine/scheduler.py), `plan`, `_admit`, `_has_room`, `_make_room`.
# 3. [`nanokv/engine/inputs.py`](../nanokv/engine/inputs.py), `arrays_of`: the plan becomes flat arrays.
# 4. [`nanokv/core/batch.py`](../nanokv/core/batch.py): the arrays of a step, documented.
# 5. [`nanokv/engine/step.py`](../nanokv/engine/step.py), `launch` and `resolve`: the two halves of a step.
#
# ## Exercises
#
# - `nanokv.engine.inputs.num_logit_rows`: which rows need logits
# - `nanokv.engine.inputs.arrays_of`: one step as flat arrays
# - `nanokv.engine.scheduler.Scheduler._has_room`: admit or not
# - `nanokv.engine.scheduler.Scheduler._make_room`: which request to preempt
# - `nanokv.engine.scheduler.Scheduler.plan`: the step itself
# - `nanokv.bench.measure.percentile`: the value below which a given share of the values lies
#
# ## What you can now explain
#
# - What is decided in each step, and why there is no prefill mode.
# - What chunked prefill gains, what it costs, and how to choose the budget.
# - Preemption by recomputation: which request, what is kept, why it ends.
# - Where head-of-line blocking comes back.
#
# ## Where it loses
#
# - One request alone gains nothing from any of this.
# - A budget protects the chats from one long prompt. It does not make the prompt cheaper; lesson 4 does.
# - Recomputation is one answer to preemption. Moving the pages to host memory is another, and better where prefill is
#   expensive and the link is fast.

# %%
for llm in (bus, walkway, roomy, tight, bare, queue):
    llm.close()
