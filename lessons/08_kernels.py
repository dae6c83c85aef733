# %% [markdown]
# # 8. Kernels
#
# > *"In the paper, attention is one line. In the engine I find it three times, and each time it is longer. What is all
# > that code for, and how do I dare to touch it?"*
#
# The formula says what the result is. It does not say in which order memory is read, what runs in parallel, or what
# fits where. A **kernel** is a function that decides these things. This engine has each kernel in three versions with
# one signature, its **twins**: one to read, one for CPUs, one for GPUs. We follow the most important one, attention
# over pages, through all three, and use the first to check the others.
#
# **What to expect.** A pool that we fill by hand, softmax without seeing all the numbers, and a GPU kernel that runs on
# your CPU, slowly and faithfully. If the package `triton` is missing, those cells say so and continue.

# %%
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import time
from inspect import getsource
from pathlib import Path
from statistics import median

import figures
import torch

from nanokv.core.batch import Batch
from nanokv.kernels import cpu, reference
from nanokv.kernels.planes import KVPlanes
from nanokv.kernels.reference.attention import paged_attention, plane_view

torch.manual_seed(0)
HEADS, KV_HEADS, DIM, NUM_PAGES = 4, 2, 16, 12
LENGTHS, TABLES = [40, 23], [[7, 2, 9], [4, 11, 0]]
"""Two requests, and the pages that hold their tokens."""


def planes_for(page_size: int) -> KVPlanes:
    """K and V of one layer in float32: all of K, then all of V, as [kv_heads, page_size, dim] each."""
    side = KV_HEADS * page_size * DIM * 4
    return KVPlanes(
        k_offset=0, v_offset=side, rope_offset=0, page_bytes=2 * side, page_size=page_size, token_stride=DIM * 4,
        head_stride=page_size * DIM * 4, rope_stride=0, kv_heads=KV_HEADS, head_dim=DIM, value_dim=DIM, rope_dim=0,
        dtype=torch.float32,
    )  # fmt: skip


def batch_of(rows: dict[int, list[int]], tables: list[list[int]], page_size: int) -> Batch:
    """A step that computes these positions of each request."""
    positions = torch.tensor([position for row in rows.values() for position in row], dtype=torch.int32)
    starts = torch.tensor([0, *torch.tensor([len(row) for row in rows.values()]).cumsum(0).tolist()]).int()
    own = torch.tensor([tables[request] for request in rows], dtype=torch.int32)
    return Batch(
        token_ids=positions.long(), positions=positions, write_pages=positions * 0, write_slots=positions % page_size,
        request_starts=starts, page_tables=own, logit_rows=positions[:0].long(), state_ids=starts[:0],
        page_size=page_size,
    )  # fmt: skip


def filled(keys: list[torch.Tensor], values: list[torch.Tensor], tables: list[list[int]], planes: KVPlanes):
    """A pool that holds keys and values [kv_heads, length, dim] of each request in its pages."""
    pool = torch.zeros((NUM_PAGES * 16 // planes.page_size + 1, planes.page_bytes), dtype=torch.uint8)
    for offset, side in ((planes.k_offset, keys), (planes.v_offset, values)):
        view = plane_view(pool, planes, offset, DIM)
        for table, x in zip(tables, side, strict=True):
            for position in range(x.shape[1]):
                page, slot = divmod(position, planes.page_size)
                view[table[page], :, slot] = x[:, position]
    return pool


# %% [markdown]
# ## The problem
#
# Two requests have 40 and 23 tokens. Their keys and values lie in pages, anywhere in the pool. In this step the first
# request computes one row, its newest token: a decode. The second computes 7 rows at once: a chunk of prefill.

# %%
keys, values = ([torch.randn(KV_HEADS, length, DIM) for length in LENGTHS] for _ in "kv")
planes = planes_for(16)
pool = filled(keys, values, TABLES, planes)
batch = batch_of({0: [39], 1: list(range(16, 23))}, TABLES, 16)
q = torch.randn(8, HEADS, DIM)

figure, axes = figures.new(7.6, 2.2)
for page in range(NUM_PAGES):
    figures.box(axes, page, 0, 0.94, 0.8, figures.PALE)
    axes.text(page + 0.47, -0.1, page, ha="center", va="top", color=figures.GREY)
    for request, (table, colour) in enumerate(zip(TABLES, (figures.BLUE, figures.ORANGE), strict=True)):
        if page in table:
            place = table.index(page)
            tokens = min(16, max(0, LENGTHS[request] - 16 * place))
            figures.box(axes, page, 0, 0.94 * tokens / 16, 0.8, colour, place if tokens else "")
axes.text(0, 1.0, "blue: 40 tokens in pages 7, 2, 9      orange: 23 tokens in pages 4, 11")
figures.bare(axes, (-0.1, 12), (-0.5, 1.4))
axes.set_title("A pool of 12 pages; inside: which page of its request it is")
figures.save(figure, "08_kernels-1")


def dense(row: torch.Tensor, request: int, position: int) -> torch.Tensor:
    """The formula: softmax(q K^T / sqrt(d)) V over all tokens up to a position."""
    k, v = (x[request][:, : position + 1].repeat_interleave(HEADS // KV_HEADS, 0) for x in (keys, values))
    weights = torch.einsum("hd,htd->ht", row, k).mul(DIM**-0.5).softmax(-1)
    return torch.einsum("ht,htd->hd", weights, v).flatten()


truth = torch.stack([dense(q[0], 0, 39), *(dense(q[1 + i], 1, 16 + i) for i in range(7))])

# %% [markdown]
# ![The pages of two requests in the pool](img/08_kernels-1.svg)
#
# ## Twin 1: to read
#
# The `reference` twin is plain torch. It gathers the pages of each request, puts them in order, and applies the
# formula.

# %%
print(getsource(paged_attention))
first = reference.paged_attention(q, pool, planes, batch, DIM**-0.5)
assert first.shape == (8, HEADS * DIM) and (first - truth).abs().max() < 1e-5
assert 2048 * 2048 * 32 * 4 == 512 * 2**20

# %% [markdown]
# It is right, and easy to check. It exists to be trusted. But it copies every page that it reads, and it writes the
# scores of all rows and tokens to memory: for a prompt of 2,048 tokens and 32 heads, 512 MiB.
#
# ## Softmax without seeing all of it
#
# Softmax divides by a sum over *all* tokens, and to be safe against overflow it subtracts the largest score of *all*.
# So it seems to need all scores first. It does not. Walk over the tokens in blocks, called tiles here, and keep three
# things: the largest score so far, the sum of weights so far, and the weighted sum of values so far. If a tile brings
# a larger score, scale down the two sums by the right factor, and go on. This **online softmax** (Milakov and
# Gimelshein 2018) is the heart of FlashAttention (Dao et al. 2022).


# %%
def online(row: torch.Tensor, k: torch.Tensor, v: torch.Tensor, tile: int) -> tuple[torch.Tensor, list[float]]:
    """Attention of one query over k, v [tokens, dim], a tile at a time; and the factors that shrank the sums."""
    best, total, acc, fades = torch.tensor(-torch.inf), torch.tensor(0.0), torch.zeros(DIM), []
    for start in range(0, len(k), tile):
        scores = k[start : start + tile] @ row * DIM**-0.5
        highest = torch.maximum(best, scores.max())
        fade, weights = (best - highest).exp(), (scores - highest).exp()
        acc, total, best = acc * fade + weights @ v[start : start + tile], total * fade + weights.sum(), highest
        fades.append(fade.item())
    return acc / total, fades


results = {tile: online(q[0, 0], keys[0][0], values[0][0], tile) for tile in (1, 8, 16, 40)}
for result, _ in results.values():
    assert (result - truth[0, :DIM]).abs().max() < 1e-5
fades = results[1][1]
assert fades[0] == 0 and all(0 < fade <= 1 for fade in fades[1:])
shrunk = sum(fade < 1 for fade in fades[1:])
print(f"{shrunk} of {len(fades) - 1} tiles brought a larger score")
assert 1 <= shrunk <= 10

# %%
figure, axes = figures.new(7.2, 3.2)
scores = (keys[0][0] @ q[0, 0] * DIM**-0.5).tolist()
axes.bar(range(40), [round(score, 2) for score in scores], color=figures.SKY)
axes.step(range(40), [round(max(scores[: i + 1]), 2) for i in range(40)], where="mid", color=figures.RED, linewidth=2)
axes.set(xlabel="token", ylabel="score", xlim=(-1, 40))
axes.set_title("Scores of one query, and the largest so far")
figures.save(figure, "08_kernels-2")

# %% [markdown]
# ![Scores of a query and their running maximum](img/08_kernels-2.svg)
#
# Tiles of 1, 8, 16 or 40 tokens give one result. Only a few tokens bring a new maximum. The scores of a tile are used
# at once and never written to memory. You will find `best`, `total`, `acc` and `fade` again in both fast twins.
#
# ## Twin 2: for a CPU
#
# `nanokv/kernels/cpu/attention.py` is Python compiled by numba. It reads pages in place, in tiles of 64 keys. It has
# one more property: the order of every sum depends on the *position* of a token, and on nothing else.

# %%
second = cpu.paged_attention(q, pool, planes, batch, DIM**-0.5)
assert (second - first).abs().max() < 1e-5

alone = cpu.paged_attention(q[:1], pool, planes, batch_of({0: [39]}, TABLES, 16), DIM**-0.5)
assert torch.equal(alone[0], second[0])

small, small_tables = planes_for(8), [[3, 14, 5, 20, 8], [1, 0, 17, 9, 2]]
pages_of_8 = filled(keys, values, small_tables, small)
elsewhere = batch_of({0: [39], 1: list(range(16, 23))}, small_tables, 8)
assert torch.equal(cpu.paged_attention(q, pages_of_8, small, elsewhere, DIM**-0.5), second)

# %% [markdown]
# Look at the second and third check: `equal`, not "close". Alone or in a batch, in pages of 16 or of 8 in other places:
# the same *bits*. Floating-point sums depend on their order, since (a + b) + c is not always a + (b + c), so this takes
# deliberate work. Most fast kernels choose the order by the size of the batch. Then the same request may get another
# answer when the server is busy. Here it cannot, on a CPU in float32.
#
# How fast are they? Sixteen decodes over 512 tokens, both twins in turn:

# %%
many = torch.randn(16, HEADS, DIM)
big = planes_for(16)
big_pool = torch.randn(16 * 32 * big.page_bytes // 4).view(torch.uint8).view(-1, big.page_bytes)
big_tables = torch.randperm(512).view(16, 32).tolist()
decodes = batch_of({request: [511] for request in range(16)}, big_tables, 16)
times: dict[str, list[float]] = {"reference": [], "cpu": []}
for _ in range(15):
    for name, twin in (("reference", reference.paged_attention), ("cpu", cpu.paged_attention)):
        start = time.perf_counter()
        twin(many, big_pool, big, decodes, DIM**-0.5)
        times[name].append(time.perf_counter() - start)
ratio = median(times["reference"]) / median(times["cpu"])
print(f"the reference takes {ratio:.1f} times as long")
assert ratio > 2

# %% [markdown]
# The CPU twin is more than twice as fast, and often ten times. This is why there are two. Reading the fast twin does
# not tell you whether it is right. Reading the slow one does, and the tests compare the two on every shape that
# matters.
#
# ## Twin 3: for a GPU
#
# A GPU has over a hundred processors, each of which runs many **programs** at once. You write one program, and say how
# many instances of it to start. In Triton, a program works on small blocks of numbers instead of single ones. RMS norm
# is the simplest kernel of this engine that has all the parts. The cell prints its source from the file, so you can
# read it without triton:

# %%
kernels = Path(reference.__file__).parents[1] / "cuda"
source = (kernels / "elementwise.py").read_text(encoding="utf-8")
begin = source.index("@triton.jit\ndef rms_norm_kernel")
print(source[begin : source.index("\n\n\n", begin)])

attention = (kernels / "attention.py").read_text(encoding="utf-8")
begin = attention.index("    best = tl.full")
print(attention[begin : attention.index("    return acc, total, best", begin)])
assert all(word in attention for word in ("best", "total", "acc", "fade"))

# %% [markdown]
# Read the first kernel line by line. `program_id`: which row is mine? `arange`: the numbers from 0 to BLOCK - 1, as a
# block. BLOCK must be a power of two, so `mask` switches off the excess. `load`, compute in float32, `store`. There is
# no loop over the row and there are no threads: the compiler assigns the numbers to threads.
#
# The second holds nothing new. The page is looked up (`table + tokens // page_size`), the address is computed in bytes,
# and then comes your online softmax, with powers of 2 because a GPU has an instruction for them.
#
# ## A GPU kernel without a GPU
#
# Triton has an **interpreter**: with `TRITON_INTERPRET=1` set before the import, a kernel runs in Python, program after
# program, on ordinary tensors. The choice is made at import, so we run it in a process of its own.

# %%
has_triton = importlib.util.find_spec("triton") is not None
folder = Path(tempfile.mkdtemp())
torch.save((q, pool, planes, batch, DIM**-0.5), folder / "problem.pt")
root = Path(reference.__file__).parents[3]


def own_process(program: str, **environment: str) -> str:
    """Runs Python code in the repository with these environment variables. Returns what it printed."""
    paths = os.pathsep.join([str(root), str(root / "scripts"), *filter(None, sys.path)])
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", program, str(folder)], capture_output=True, text=True,
        env={**os.environ, "PYTHONPATH": paths, **environment},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


INTERPRETED = """
import sys, torch
from pathlib import Path
from nanokv.kernels import cuda
problem = torch.load(Path(sys.argv[1], "problem.pt"), weights_only=False)
torch.save(cuda.paged_attention(*problem), Path(sys.argv[1], "third.pt"))
"""
if has_triton:
    own_process(INTERPRETED, TRITON_INTERPRET="1")
    third = torch.load(folder / "third.pt")
    print(f"largest difference to the reference: {(third - first).abs().max():.1e}")
    assert third.shape == first.shape and (third - first).abs().max() < 1e-5
else:
    print("triton is not installed here: this kernel was not run")

# %% [markdown]
# The GPU kernel gives the numbers of the reference, on this CPU. You can put a `print` into it, or a breakpoint. Change
# something: remove a mask, and see what the comparison says. That is how to dare to touch it.
#
# The interpreter cannot tell how fast a kernel is, nor whether two programs disturb each other, because it runs one
# after another. And a few operations differ: its products of bfloat16 are wrong in triton 3.9, which is why `dot`
# widens them there, and only there.
#
# ## What the compiler reports
#
# The compiler can tell more, and it needs no GPU either. A program has two kinds of fast memory: **registers**, at most
# 255 for each thread, and **shared memory**, at most 227 KiB on an H100. If the registers do not suffice, numbers are
# moved to slow memory: they **spill**, and a kernel that spills in its inner loop is slow. `scripts/compile_kernels.py`
# builds every kernel for every shape, which takes minutes. We build one.

# %%
COMPILED = """
import json
import compile_kernels as report
from nanokv.kernels.cuda.launch import recording
import torch
with recording() as found:
    report._grouped(report.GROUPED["Llama-3.1-8B"], torch.bfloat16, report.batch_like(32, 32))
one = next(launch for launch in found if launch.kernel.__name__.startswith("attention"))
print(json.dumps(report.build(one, "sm_90").row))
"""
if has_triton and (root / "scripts" / "compile_kernels.py").is_file():
    row = json.loads(own_process(COMPILED).splitlines()[-1])
    print(row)
    assert row["registers"] <= 255 and row["local_bytes"] == 0 and row["shared_bytes"] <= 227 << 10
else:
    print("no triton or no scripts/compile_kernels.py here: nothing was compiled")

# %% [markdown]
# This is the attention of Llama-3.1-8B for 32 decodes on an H100. It uses no local bytes, so nothing spills. A program
# with a larger block loads the same data less often, but needs more registers and more shared memory, so fewer programs
# fit on each processor. Choosing block sizes is this trade-off, and the report shows it.
#
# The report is not a measurement. A kernel may need few registers and still wait for memory most of the time. Only a
# GPU says how fast it is.
#
# ## Read now
#
# 1. [`nanokv/kernels/ops.py`](../nanokv/kernels/ops.py): one signature, and the choice of the twin.
# 2. [`nanokv/kernels/reference/attention.py`](../nanokv/kernels/reference/attention.py): the twin to trust.
# 3. [`nanokv/kernels/cpu/kv_tile.py`](../nanokv/kernels/cpu/kv_tile.py): 64 keys at a time, in a fixed order.
# 4. [`nanokv/kernels/cuda/attention.py`](../nanokv/kernels/cuda/attention.py): `attend`, then how decodes are split.
# 5. [`nanokv/kernels/cuda/launch.py`](../nanokv/kernels/cuda/launch.py): a launch, run or recorded for the report.
#
# ## Exercises
#
# - `nanokv.kernels.reference.elementwise.rms_norm`: the place where a norm is rounded
# - `nanokv.kernels.reference.elementwise.silu_mul`: a gated product
# - `nanokv.kernels.reference.attention.plane_view`: a view into every page at once
# - `nanokv.kernels.reference.attention.paged_attention`: attention over pages
# - `nanokv.kernels.reference.store.rope_and_store`: rotate keys, and write them to pages
#
# ## What you can now explain
#
# - Online softmax, on a whiteboard, and why it saves memory.
# - What a twin is for, and how to check a kernel that is hard to read.
# - Why the same request may get other bits in another batch, and what it takes to prevent that.
# - A Triton kernel: programs, blocks, masks.
# - Registers, shared memory, spills, and what a compile report cannot say.
#
# ## Where it loses
#
# - Three twins are three times the work for each new kernel.
# - A fixed order of sums rules out tricks such as splitting a context wherever it suits the number of cores.
# - The vendors' own kernels are faster on their newest GPUs than what fits into 300 lines.
