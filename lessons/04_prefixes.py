# %% [markdown]
# # 4. Prefixes
#
# > *"All my users get the same system prompt, 2,000 tokens of it. Does the server really compute it again for each
# > question? And if it keeps the prompt: what exactly, for how long, and can one user find out what another one
# > asked?"*
#
# Keys and values of a token depend on that token and on everything before it, and on nothing after it (lesson 1). So
# two requests that *begin* with the same tokens have the same keys and values there, bit for bit. Keep the pages of the
# first, and the second can start where the two diverge. This is **prefix caching**. The engine does it by default.
#
# **What to expect.** A tree. Its nodes are split, locked and evicted, and each of these takes a few lines. At the end
# we put the tree under load and see why a saving of a few percent for one request becomes a factor for a busy machine.

# %%
import json
import random
import tempfile
from inspect import getsource
from io import StringIO
from pathlib import Path
from typing import TextIO

import figures
import tiny

from nanokv import SamplingParams
from nanokv.bench.prefix import run_point
from nanokv.bench.workloads import shared_prefix_prompts
from nanokv.cache.manager import CacheManager
from nanokv.cache.radix import Node, RadixTree
from nanokv.core.request import Request
from nanokv.engine.admission_policy import MIN_SHARED, AdmissionPolicy

PAGE = 16


def tokens(count: int, seed: int) -> list[int]:
    generator = random.Random(seed)
    return [generator.randrange(3, 512) for _ in range(count)]


def params(answer: int, **more) -> SamplingParams:
    return SamplingParams(max_tokens=answer, temperature=0, ignore_eos=True, **more)


llm = tiny.engine(page_size=PAGE, num_pages=256)
system, question_a, question_b = tokens(48, 1), tokens(40, 2), tokens(24, 3)

# %% [markdown]
# ## The second user
#
# A system prompt of 48 tokens, which is three pages, then a question.

# %%
first = llm.generate([system + question_a], params(8))[0]
again = llm.generate([system + question_b], params(8))[0]
assert (first.cached_tokens, again.cached_tokens) == (0, 48)

whole = llm.generate([system + question_a], params(8))[0]
assert len(system + question_a) == 88
assert whole.cached_tokens == 80  # five whole pages of the 88 tokens
assert whole.token_ids == first.token_ids

only = llm.generate([system], params(8))[0]
assert only.cached_tokens == 32  # and not 48

# %% [markdown]
# The second user starts at token 48. A repeated question finds 80 of its 88 tokens, because only whole pages are
# shared. Both are as expected. The last line is not. The system prompt alone is 48 tokens, all of them are in the
# cache, and the engine finds 32. A bug?
#
# No, a law. The cache holds keys and values. It does not hold the *next token*, and to get that, at least one token has
# to go through the model. So the match is cut to one token less than the prompt has, and then to whole pages. Here are
# the two functions:

# %%
print(getsource(CacheManager._matchable))
print(getsource(CacheManager.match))

# %% [markdown]
# ## A tree that splits
#
# Computed prefixes are kept in a **radix tree**. A node holds a sequence of tokens and the pages for them. Its children
# are the different continuations. Start with an empty tree, and look at it three times.


# %%
def layout(node: Node, left: float = 0.0, depth: int = 0) -> tuple[list, float]:
    """[(node, x, depth)] of a subtree, leaves side by side, parents in the middle of their children; and its width."""
    if not node.children:
        return [(node, left + 0.5, depth)], 1.0
    placed, width, middles = [], 0.0, []
    for child in node.children.values():
        part, own = layout(child, left + width, depth + 1)
        placed += part
        middles.append(next(x for one, x, _ in part if one is child))
        width += own
    return [(node, sum(middles) / len(middles), depth), *placed], width


def draw_tree(axes, tree: RadixTree, title: str, width: float = 2.2) -> None:
    """One card for each node; orange nodes are locked by a running request. Numbers are pages."""
    root = next(node for node in tree.nodes() if node.parent is None)
    places = {node: (x * width, -depth) for node, x, depth in layout(root)[0]}
    for node, (x, y) in places.items():
        if node.parent is not None:
            axes.plot([x, places[node.parent][0]], [y, y + 1], color=figures.GREY, linewidth=1, zorder=0)
        colour = figures.PALE if node.parent is None else figures.ORANGE if node.ref_count else figures.SKY
        figures.card(axes, x, y, 1.9, 0.5, colour, "root" if node.parent is None else " ".join(map(str, node.pages)))
    xs = [x for x, _ in places.values()]
    figures.bare(axes, (min(xs) - 1.1, max(xs) + 1.1), (-3.4, 0.4))
    axes.set_title(title, loc="center")


llm.reset_prefix_cache()
tree = llm.engine.cache.tree
figure, panels = figures.new(9.2, 3.1, 3, width_ratios=[1, 2, 2.9])

llm.generate([system + question_a], params(8))
draw_tree(panels[0], tree, "A is answered")
runs = [len(node.pages) for node in tree.nodes() if node.parent is not None]
assert runs == [5]

llm.engine.add_request(Request(system + question_b, params(40), "B"))
llm.loop.step()
draw_tree(panels[1], tree, "B diverges from A")
assert sorted(len(node.pages) for node in tree.nodes()) == [0, 1, 2, 3]

llm.engine.add_request(Request(system + question_a[:16] + tokens(20, 4), params(40), "C"))
llm.loop.step()
draw_tree(panels[2], tree, "C shares a page of A's question")
assert sorted(len(node.pages) for node in tree.nodes()) == [0, 1, 1, 1, 1, 3]
figures.save(figure, "04_prefixes-1")

# %% [markdown]
# ![The prefix tree at three moments](img/04_prefixes-1.svg)
#
# The numbers are pages. After A there is one node of five pages, the full ones of its prompt. B shares the first three,
# so the node is **split** there; a split moves no bytes, it only cuts a list in two. C shares one page more, so A's
# rest is split again. Orange nodes are in use by a running request. Here is all of the split:

# %%
print(getsource(RadixTree._split))

# %% [markdown]
# ## Locks and eviction
#
# Pages in the tree cost nothing until their room is needed. Then a node may be **evicted**, but never one that a
# running request reads. So a request **locks** the node where its match ends, and every node above it. Unlocked nodes
# are evicted from the leaves, the least recently used first, and each leaf from its tail.

# %%
print(getsource(RadixTree.lock))
held = llm.stats()
assert (held["pages_cached"], held["pages_locked"]) == (7, 6)  # no running request reads A's last page
for name in ("B", "C"):
    llm.engine.abort(name)
llm.engine.cache.check()
assert llm.stats()["pages_locked"] == 0 and llm.stats()["pages_cached"] == 7

# %% [markdown]
# Why from the tail? Because a prefix without its end is still a prefix, and an end without its beginning is useless.
#
# *Least recently used* (LRU) sounds like common sense. We look for a case in which it fails. A pool has 32 pages. Users
# ask about *n* documents of four pages each, one after the other, round and round.


# %%
def rounds(documents: int) -> float:
    """Percent of the prompt tokens that were found in the cache, in the third and fourth round."""
    with tiny.engine(page_size=PAGE, num_pages=32) as small:
        prompts = [tokens(65, 10 + i) for i in range(documents)]
        for prompt in prompts * 2:
            small.generate([prompt], params(1))
        found = [small.generate([prompt], params(1))[0].cached_tokens for prompt in prompts * 2]
    return 100 * sum(found) / (64 * len(found))


counts = [5, 6, 7, 8, 9, 10, 11, 12]
lru = [rounds(count) for count in counts]
keep_seven = [100 * min(7, count) / count for count in counts]
assert lru == [100.0, 100.0, 100.0, 75.0, 0.0, 0.0, 0.0, 0.0]
assert round(keep_seven[counts.index(9)]) == 78

# %%
figure, axes = figures.new(6.6, 3.3)
axes.plot(range(len(counts)), keep_seven, "o--", color=figures.GREY, label="keep seven, whatever comes")
axes.plot(range(len(counts)), lru, "o-", color=figures.RED, label="least recently used")
axes.set_xticks(range(len(counts)), counts)
axes.set(ylim=(-4, 108), xlabel="documents, asked in turn", ylabel="% of the tokens found")
axes.set_title("A cache with room for seven documents")
axes.legend(loc="lower left")
figures.save(figure, "04_prefixes-2")

# %% [markdown]
# ![Hit ratio over the number of documents in a cycle](img/04_prefixes-2.svg)
#
# **The surprise**: with seven documents, 100 percent of the tokens are found. With eight, which fill the pool to the
# last page, 75 percent. With nine, 0 percent. Not a little less: nothing. The document that is needed next is always
# the one that was used longest ago, and it has just been evicted. A policy that kept any seven of the nine would find
# 78 percent. Real workloads are not round robins, and there LRU is hard to beat, but remember the cliff when a hit
# ratio collapses overnight.
#
# ## Eight at once
#
# Here is a case that a naive cache misses. Eight requests with the same long beginning arrive at the same moment. None
# of it is in the cache yet. Do all eight compute it?

# %%
print(getsource(AdmissionPolicy.waits_for_prefix))

folder = Path(tempfile.mkdtemp())


def rows_of(log: TextIO) -> list[int]:
    """Rows of each step logged since the last call."""
    return [event["tokens"] for event in map(json.loads, log.readlines()) if event["event"] == "step"]


crowd = shared_prefix_prompts(8, 528, 512, 512)
with tiny.engine(event_log=str(folder / "shared.jsonl")) as shared:
    answers = [output.token_ids for output in shared.generate(crowd, params(4))]
    rows = rows_of(StringIO(Path(shared.config.event_log).read_text()))
with tiny.engine(event_log=str(folder / "alone.jsonl"), prefix_cache=False) as alone:
    assert answers == [output.token_ids for output in alone.generate(crowd, params(4))]
    rows_alone = rows_of(StringIO(Path(alone.config.event_log).read_text()))

assert MIN_SHARED == 32
assert rows[:2] == [528, 1 + 7 * 16]  # the first computes all of it, then seven compute their last page
assert (sum(rows), sum(rows_alone)) == (664, 4248)

# %% [markdown]
# One request computes, seven wait for a step: 664 rows instead of 4,248. A request that would share at least 32 tokens
# with a prefix that is **being computed** stays in the queue until the prefix is there. It looks like a delay, but it
# is a saving: otherwise each of the seven would have computed those rows itself.
#
# ## What breaks a hit
#
# The rule is strict: the same tokens from the very first on, or no hit. Put the time of day in front of the system
# prompt, as many products do, and look.

# %%
stamped = llm.generate([[7, *system, *question_a]], params(1))[0]
same = llm.generate([[*system, *question_a, 7]], params(1))[0]
assert (stamped.cached_tokens, same.cached_tokens) == (0, 80)

# %% [markdown]
# One token in front, 0 found. The same token at the end, 80 found. So put the stable parts of a prompt first, and the
# changing parts last: tools in a fixed order, no clock at the top.
#
# And can one user find out what another one asked? Yes! A hit is faster, and time can be measured. A user who guesses a
# secret beginning can tell from the TTFT that another user has sent it. The cure is a **salt**, the name of a separate
# tree. Requests with different salts share nothing.

# %%
mine = llm.generate([system + question_a], params(1, cache_salt="alice"))[0]
mine_again = llm.generate([system + question_a], params(1, cache_salt="alice"))[0]
yours = llm.generate([system + question_a], params(1, cache_salt="bob"))[0]
assert [one.cached_tokens for one in (mine, mine_again, yours)] == [0, 80, 0]
assert len([node for node in llm.engine.cache.tree.nodes() if node.parent is None]) == 3

# %% [markdown]
# ## Under load
#
# Now the experiment of the article that started this project. The prompts have a fixed length, and a growing part of it
# is shared. One, four or sixteen clients send them. Each client sends its next request when the last is answered.
#
# Pictures in a lesson should not depend on how busy your machine is, so time here is a **row clock**. A step takes as
# long as its rows, but at least as long as reading the weights, the price of 32 rows. The steps are real; only the
# seconds are replaced. A measurement on the wall clock follows below.

# %%
READ_WEIGHTS, PROMPT, ANSWER = 32, 256, 8


def load(shared: int, clients: int) -> tuple[float, float, float]:
    """Hit ratio, requests per 1,000 units of the row clock, and mean latency in units."""
    prompts = shared_prefix_prompts(max(8, 2 * clients) + 2, PROMPT, shared, 512, seed=shared + clients)
    busy.reset_prefix_cache()
    if shared:
        busy.generate(prompts[:2], params(1))
    rows_of(log)  # skips the steps before
    waiting, live = prompts[2:], {}
    clock, latencies, found = 0, [], 0
    while waiting or live:
        while waiting and len(live) < clients:
            live[busy.engine.add_request(Request(waiting.pop(), params(ANSWER)))] = clock
        outputs = busy.loop.step()
        clock += max(READ_WEIGHTS, sum(rows_of(log)))
        for output in outputs:
            if output.finished:
                latencies.append(clock - live.pop(output.request_id))
                found += output.cached_tokens
    count = len(latencies)
    return found / (PROMPT * count), 1000 * count / clock, sum(latencies) / count


parts, clients = [0, 64, 128, 192, 256], [1, 4, 16]
busy = tiny.engine(event_log=str(folder / "busy.jsonl"), num_pages=1024)
log = open(busy.config.event_log)  # noqa: SIM115, closed at the end of the lesson
points = {(n, shared): load(shared, n) for n in clients for shared in parts}

# %%
figure, panels = figures.new(9.4, 3.1, 3)
titles = ("prefix cache hit ratio", "requests per 1,000 units", "mean latency (units)")
for place, (axes, title) in enumerate(zip(panels, titles, strict=True)):
    for n, colour, marker in zip(clients, (figures.BLUE, figures.ORANGE, figures.GREEN), "os^", strict=True):
        values = [points[n, shared][place] for shared in parts]
        axes.plot(parts, values, marker=marker, color=colour, label=f"{n} client{'s' * (n > 1)}")
    axes.set(title=title, xlabel="shared tokens of 256", ylim=(0, None))
    axes.set_xticks(parts)
panels[1].legend()
figures.save(figure, "04_prefixes-3")

# %% [markdown]
# ![Hit ratio, throughput and latency over the shared part, for three loads](img/04_prefixes-3.svg)
#
# Left, three lines lie on each other: the hit ratio does not depend on the load. It ends below 1, at 0.94, because of
# the token that must be computed, and the page that holds it. In the middle the lines fan out.

# %%
gain = {n: points[n, 256][1] / points[n, 0][1] for n in clients}
assert [round(points[n, 256][0], 2) for n in clients] == [0.94, 0.94, 0.94]
assert [round(gain[n], 1) for n in clients] == [1.9, 4.3, 9.0]
assert round(points[16, 0][2] / points[16, 256][2], 1) == 9.0

none, full, none_again, full_again = (
    run_point(busy, PROMPT, ANSWER, shared, 16, 32, seed).requests_per_s for seed in (1, 2) for shared in (0, PROMPT)
)
none, full = max(none, none_again), max(full, full_again)  # the least disturbed run
print(f"on the wall clock, 16 clients: {none:.0f} requests/s without sharing, {full:.0f} with")
assert 1.1 < full / none < 40

# %% [markdown]
# One client gains a factor of 1.9 from a full hit, four gain 4.3, sixteen gain 9.0. Same cache, same hits. Why?
#
# Look at what one request costs the machine. The prompt is 256 rows for every request. The answer is eight steps, and a
# step costs 32 whether it holds one request or sixteen. A single client pays for its steps in full, and the hit removes
# the smaller half of the bill. Sixteen clients share the steps, so each pays little for them, and the prompt is nearly
# the whole bill. And the hit removes the prompt.
#
# So a hit is worth little to one request, and much to a machine that is busy. The wall clock of your machine agrees in
# direction (between 1.1 and 40 times for sixteen clients), though a toy model spends much of its time on other things.
#
# ## Read now
#
# 1. [`nanokv/cache/radix.py`](../nanokv/cache/radix.py), the docstring, then `match_prefix`, `_walk`, `_split`.
# 2. The same file: `lock`, `unlock`, `evict`. Then `check`, which verifies the tree.
# 3. [`nanokv/cache/manager.py`](../nanokv/cache/manager.py), `match`, `commit` and `_publish`: which pages belong to a
#    request, and which to the tree.
# 4. [`nanokv/engine/admission_policy.py`](../nanokv/engine/admission_policy.py), `waits_for_prefix`: a prefix that is
#    being computed.
# 5. [`nanokv/bench/prefix.py`](../nanokv/bench/prefix.py): the three panels in seconds. Try `nanokv bench prefix`.
#
# ## Exercises
#
# - `nanokv.cache.radix.RadixTree._common_pages`, `._walk`, `._split`: find a prefix, split a node
# - `nanokv.cache.radix.RadixTree.lock`, `.evict`: hold pages, evict pages
# - `nanokv.engine.admission_policy.common_prefix`: the tokens that two requests share
#
# ## What you can now explain
#
# - Why a full hit still computes a token, and why hits come in whole pages.
# - Split, lock, evict, and why eviction takes leaves first, from their tails.
# - The worst workload for LRU, and what a salt protects.
# - Why a hit ratio of 0.94 means 1.9 times for one client and 9.0 times for sixteen.
#
# ## Where it loses
#
# - No shared beginning, no hit. Retrieved documents in another order share all their text and find nothing.
# - Kept pages are a bet on a later hit. When the pool is full, they are the first to be evicted.
# - Below 32 shared tokens no request waits for another, and the same rows are computed twice.

# %%
llm.close()
busy.close()
log.close()
