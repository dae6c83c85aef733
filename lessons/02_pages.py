# %% [markdown]
# # 2. Pages
#
# > *"My card has room for 40,000 tokens of cache. Ten chats are open, none longer than 1,000 tokens, and the server
# > says it is full. Where did the memory go?"*
#
# It went where parking lots go when every car gets the space of a truck. Nobody knows in advance how long a chat will
# become, so a simple server reserves the longest one for everybody. This lesson counts that waste, and then removes it
# with an idea that operating systems have used since the 1960s.
#
# **What to expect.** Four small machines: a page table, a free list, a count of owners, and a copy at the last possible
# moment. Each is a few lines of engine code. The model is a toy with random weights, because what it says does not
# matter here.

# %%
import json
import random
import tempfile
from array import array
from inspect import getsource
from pathlib import Path

import figures
import tiny
import torch

from nanokv import SamplingParams
from nanokv.cache.manager import CacheManager
from nanokv.cache.pool import PagePool
from nanokv.core.request import Request
from nanokv.core.spec import PageLayout
from nanokv.kernels.reference.attention import plane_view

log = Path(tempfile.mkdtemp(), "events.jsonl")


def greedy(tokens: int, n: int = 1) -> SamplingParams:
    return SamplingParams(max_tokens=tokens, temperature=0, ignore_eos=True, n=n)


def events(*names: str) -> list[dict]:
    """Records of the engine's event log with these names."""
    return [event for event in map(json.loads, log.read_text().splitlines()) if event["event"] in names]


# %% [markdown]
# ## Three kinds of waste
#
# Ten chats with lengths as they come in life: many short ones, a few long ones. The server may serve 4,096 tokens a
# chat, so the simple way reserves 4,096 for each.

# %%
LONGEST, ROOM = 4096, 40_960
lengths = [40, 75, 110, 160, 210, 290, 380, 520, 700, 960]
assert max(lengths) < 1000 and sum(lengths) == 3445

reserved = LONGEST * len(lengths)
assert reserved == ROOM  # the lot is full
assert round(100 * sum(lengths) / reserved, 1) == 8.4

# %% [markdown]
# The ten chats use 3,445 tokens of memory and hold 40,960. Of what is reserved, 8.4 percent is used. The rest is lost
# in three ways that have names:
#
# - **reserved**, for tokens that will come, but not yet;
# - **internal fragmentation**, for tokens that will never come, because the chat ends early;
# - **external fragmentation**, holes between the chats, each too small for a new one.
#
# Now the other way. Cut the memory into **pages** of 16 tokens, and give a chat a page when it has a token to put in
# it. Not before.

# %%
PAGE = 16
llm = tiny.engine(page_size=PAGE, num_pages=ROOM // PAGE, max_step_tokens=4096, event_log=str(log), prefix_cache=False)
assert llm.stats()["pages_total"] == 2560

generator = random.Random(0)
for length in lengths:
    prompt = [generator.randrange(3, 512) for _ in range(length - 1)]
    llm.engine.add_request(Request(prompt, greedy(8)))
while llm.engine.scheduler.waiting or any(one.is_prefilling for one in llm.engine.scheduler.running):
    llm.engine.step()
running = list(llm.engine.scheduler.running)
assert [one.num_tokens for one in running] == lengths  # each prompt, and the first token of its answer

held = llm.stats()["pages_held"]
written = sum(one.num_computed for one in running)  # the newest token is sampled, its keys and values not yet computed
assert held == sum(len(one.pages) for one in running) == 219
assert held * PAGE == 3504
assert round(100 * written / (held * PAGE)) == 98

# %% [markdown]
# The engine holds 219 pages, room for 3,504 tokens, and 98 percent of it is used. The other 2,341 pages are free for
# somebody else. Reserved: nothing. External fragmentation: impossible, since all holes have the same size and any hole
# will do. What is left is the last page of each chat, which is full by half on average.

# %%
assert llm.stats()["pages_free"] == 2341
figure, axes = figures.new(8.4, 3.2)
for row, one in enumerate(reversed(running)):
    figures.box(axes, 0, row, LONGEST, 0.8, figures.PALE)
    figures.box(axes, 0, row, len(one.pages) * PAGE, 0.8, figures.ORANGE)
    figures.box(axes, 0, row, one.num_computed, 0.8, figures.BLUE)
figures.bare(axes, (-20, LONGEST), (-0.2, 11))
axes.text(0, 10.1, "blue: tokens in the cache.", color=figures.BLUE, va="bottom")
axes.text(950, 10.1, "orange: rest of the last page.", va="bottom")
axes.text(2050, 10.1, "grey: what the simple way reserves as well.", va="bottom")
figures.save(figure, "02_pages-1")

# %% [markdown]
# ![Ten chats: used, left in the last page, and reserved by the simple way](img/02_pages-1.svg)
#
# If you cannot see the orange, that is the point.
#
# ## A page table, read by hand
#
# A chat now lives in pages that lie anywhere. Its **page table** says where: entry *i* is the page that holds tokens
# 16 *i* to 16 *i* + 15. Here is the longest of the ten, and what the engine hands to its kernels.

# %%
one = running[-1]
print("page table:", list(one.pages))
assert len(one.pages) == 60

# %% [markdown]
# Find one number in there. Token 500, layer 1, key of head 1, dimension 5. Which byte of the pool is it? Page table
# entry 500 // 16 = 31, slot 500 % 16 = 4. A page is one block of bytes, with a fixed place for each layer's keys and
# values. `PageLayout` knows the places.

# %%
print(getsource(PageLayout._place))

position, layer, head, dim = 500, 1, 1, 5
entry, slot = divmod(position, PAGE)
assert (entry, slot) == (31, 4)

layout, pool = llm.engine.layout, llm.engine.store.pool
key = layout.paged(layer, "k")
assert key.plane.shape == (2, 16, 16)  # heads, tokens of the page, dimensions
byte = one.pages[entry] * layout.page_bytes + key.offset + 4 * ((head * PAGE + slot) * 16 + dim)
by_hand = pool.flatten()[byte : byte + 4].view(torch.float32)

planes = llm.engine.model.layers[layer].mixer.pages.planes
by_engine = plane_view(pool, planes, planes.k_offset, planes.head_dim)[one.pages[entry], head, slot, dim]
assert by_hand.item() == by_engine.item() != 0
while llm.engine.has_work:
    llm.engine.step()

# %% [markdown]
# That is the whole cost of the indirection: one division, one lookup, one multiplication. It is called PagedAttention
# (Kwon et al. 2023), after the paging of operating systems. It is a friendly cousin, not a twin. There are no page
# faults, nothing is swapped in behind your back, and each request has a table of its own that software reads.
#
# ## Who owns a page? Count.
#
# One question, three different answers: `n=3` asks for three samples of the same prompt. Their first pages are the
# same, so why keep three copies? A page gets a **reference count**: how many own it. It is free when the count is 0.
# This is all there is to it:

# %%
print(getsource(PagePool.share))
print(getsource(PagePool.release))

pages = PagePool(4)
(shared,) = pages.allocate(1)
pages.share([shared])
assert pages.count(shared) == 2
assert pages.release([shared]) == []  # the other owner still needs it
assert pages.release([shared]) == [shared]  # now it is free

# %% [markdown]
# Sharing is easy while everybody reads. Trouble starts with the first write. A prompt of 40 tokens fills two pages and
# half of a third. All three samples want to write their next token into that third page, at the same slot. The rule is
# **copy-on-write**: who wants to write into a shared page copies it first. Ask yourself, before you read on: how many
# copies do three samples need?

# %%
print(getsource(CacheManager._copy_on_write))

generator = random.Random(1)
prompt = [generator.randrange(3, 512) for _ in range(40)]
first_step = llm.stats()["steps"]
samples = llm.generate([prompt], SamplingParams(max_tokens=4, temperature=1.0, seed=7, ignore_eos=True, n=3))

assert llm.stats()["copies"] == 2
copies = [event for event in events("copy") if event["step"] >= first_step]
assert len(copies) == 2 and copies[0]["pages"][0] == copies[1]["pages"][0]  # the same source twice
assert len({tuple(sample.token_ids) for sample in samples}) == 3  # three different answers

# %% [markdown]
# Two. The third sample finds that it is the only owner left, and writes in place. Draw it, from the event log. Each
# column is a page, each row a moment, and the number is the count of owners.

# %%
moments: list[tuple[str, dict[int, int]]] = []
owners: dict[int, int] = {}
for event in events("alloc", "share", "copy", "free"):
    if event.get("request") != samples[0].request_id:
        continue
    if event["event"] == "alloc":
        owners |= dict.fromkeys(event["pages"], 1)
        caption = f"pages for sample {event['index']}"
    elif event["event"] == "share":
        for page in event["pages"]:
            owners[page] += 1
        caption = f"sample {event['index']} shares them"
    elif event["event"] == "copy":
        source, own = event["pages"]
        owners[source] -= 1
        owners[own] = 1
        caption = f"sample {event['index']} copies {source} to {own}"
    else:
        break  # the first of them is done
    moments.append((caption, dict(owners)))

columns = list(owners)
assert len(moments) == 5 and len(columns) == 5
colours = {0: figures.PALE, 1: figures.SKY, 2: figures.ORANGE, 3: figures.RED}
figure, axes = figures.new(7.6, 2.9)
for row, (caption, counts) in enumerate(moments):
    axes.text(-0.15, -row + 0.4, caption, ha="right", va="center")
    for column, page in enumerate(columns):
        count = counts.get(page, 0)
        figures.box(axes, column, -row, 0.94, 0.82, colours[count], count or "", size=10)
for column, page in enumerate(columns):
    axes.text(column + 0.47, 1.1, f"page {page}", ha="center", va="bottom", fontsize=9)
figures.bare(axes, (-3.2, 5), (-4.1, 1.6))
figures.save(figure, "02_pages-2")

# %% [markdown]
# ![Owners of each page while three samples begin](img/02_pages-2.svg)
#
# Five pages instead of nine. **The surprise**: with the prefix cache on, which is the default, full pages never need a
# copy at all. They stand in a tree, and nobody writes there (lesson 4). So copy-on-write concerns one page a fork, the
# unfinished last one, and the count of copies is at most the samples less one, however long the prompt.

# %%
assert 3 * layout.pages_for(40) == 9
print(f"copying a page moves {layout.page_bytes:,} bytes here")
assert layout.page_bytes == 2 * 2 * 2 * 16 * 16 * 4  # layers, k and v, heads, tokens, dimensions, bytes
assert layout.bytes_per_token == 512

# %% [markdown]
# ## What page size trades
#
# Why 16? Run the same ten requests with every page size that nanokv allows, plus one that shares 100 tokens with the
# longest. Count three things: slots left empty, entries in the tables, and tokens that the late one found.

# %%
llm.close()
sizes = [1, 2, 4, 8, 16, 32, 64]
empty, entries, found, answers = [], [], [], []
for size in sizes:
    with tiny.engine(page_size=size, num_pages=8192 // size, max_step_tokens=4096) as other:
        generator = random.Random(0)
        prompts = [[generator.randrange(3, 512) for _ in range(length)] for length in lengths]
        for prompt in prompts:
            other.engine.add_request(Request(prompt, greedy(4)))
        while other.engine.scheduler.waiting or any(one.is_prefilling for one in other.engine.scheduler.running):
            other.engine.step()
        running = other.engine.scheduler.running
        empty.append(sum(len(one.pages) * size - one.num_computed for one in running) / len(running))
        entries.append(sum(len(one.pages) for one in running))
        tokens: dict[str, list[int]] = {}
        while other.engine.has_work:
            tokens |= {output.request_id: output.token_ids for output in other.engine.step()}
        answers.append([tokens[name] for name in sorted(tokens)])
        late = other.generate([[*prompts[-1][:100], 3, 4, 5]], greedy(1))[0]
        found.append(late.cached_tokens)

assert empty == [0.0, 0.1, 0.7, 2.7, 5.9, 13.9, 26.7]
assert entries == [3445, 1723, 863, 434, 219, 112, 58]
assert found == [100, 100, 100, 96, 96, 96, 64]
assert all(answer == answers[0] for answer in answers)  # and nothing else changes

# %%
figure, panels = figures.new(9, 2.8, 3)
for axes, values, colour, title in (
    (panels[0], empty, figures.ORANGE, "empty slots a request"),
    (panels[1], entries, figures.BLUE, "page table entries"),
    (panels[2], found, figures.GREEN, "found of 100 shared tokens"),
):
    bars = axes.bar(range(len(sizes)), values, color=colour)
    axes.bar_label(bars, [f"{value:,g}" for value in values], fontsize=8, padding=1)
    axes.set_xticks(range(len(sizes)), sizes)
    axes.set(title=title, xlabel="tokens in a page", ylim=(0, max(values) * 1.12), yticks=[])
    axes.spines["left"].set_visible(False)
figures.save(figure, "02_pages-3")

# %% [markdown]
# ![What page size trades: empty slots, table entries, shared tokens found](img/02_pages-3.svg)
#
# A page of *P* tokens leaves *(P - 1) / 2* slots empty on average: 7.5 for 16, and our ten chats came to 5.9. Large
# pages waste room, and they are the smallest thing that can be shared: with 64, the late request finds 64 of its 100
# tokens. Small pages need long tables, and a kernel that changes page at every token has no runs to read. Between 8
# and 32 nobody is hurt.
#
# One thing did not change: the answers. With page size 1 and with 64, every request gets the same tokens. In float32 on
# a CPU they have the same *bits*, which is a law of this engine and takes some care (`docs/design.md`, Exactness).

# %%
assert [(size - 1) / 2 for size in sizes][4] == 7.5
assert empty[4] == 5.9 and found[6] == 64

# %% [markdown]
# ## Proof by recount
#
# How do you trust such bookkeeping? Every page is in exactly one of four states: free, held, cached, cached and locked.
# `CacheManager.check` counts all of it again from the requests and compares. The tests call it after every step. Let us
# break the books on purpose, and see it notice.

# %%
cache = CacheManager(layout, num_pages=8)
request = Request(list(range(3, 43)))
request.tokens, request.num_prompt = array("i", request.prompt_token_ids), 40
cache.match(request)
assert cache.reserve(request, 40) and len(request.pages) == 3
cache.check()

request.pages.pop()  # a page is lost: counted as owned, but nobody has it
complaint = ""
try:
    cache.check()
except Exception as error:
    complaint = str(error)
print(complaint)
assert complaint == "page 2 counts 1 owners and has 0"

# %% [markdown]
# ## Read now
#
# 1. [`nanokv/core/spec.py`](../nanokv/core/spec.py): a layer says what it keeps, `PageLayout` gives it a place.
# 2. [`nanokv/cache/pool.py`](../nanokv/cache/pool.py), `PagePool`: two books that must agree.
# 3. [`nanokv/cache/manager.py`](../nanokv/cache/manager.py), the picture at the top, then `reserve`, `fork`, `check`.
# 4. [`nanokv/engine/inputs.py`](../nanokv/engine/inputs.py), `arrays_of`: page tables become an array.
# 5. [`nanokv/kernels/reference/attention.py`](../nanokv/kernels/reference/attention.py): a kernel that reads them.
#
# ## Exercises
#
# - `nanokv.core.spec.PageLayout.pages_for`, `._place`: how many pages, and what lies where in one
# - `nanokv.cache.pool.PagePool.allocate`, `.release`: the free list and the counts
# - `nanokv.cache.store.CacheStore.copy_pages`: bytes behind the ids
# - `nanokv.cache.manager.CacheManager._copy_on_write`: the copy at the last moment
#
# ## What you can now explain
#
# - Three kinds of waste, and which of them pages remove.
# - The address of (layer, position, head) from a page table.
# - When a copy-on-write happens, how often, and who frees what.
# - Why 16, and what 1 and 64 would cost.
#
# ## Where it loses
#
# - If all requests have the same known length, one block each wastes nothing either, and its kernels are simpler.
# - A kernel must look a page up for every 16 tokens. Ours works on tiles of 64 tokens for that reason.
# - Pages do not make the cache smaller. They only stop wasting it: 8.4 percent used became 98, once.
