# %% [markdown]
# # 5. Smaller by design
#
# > *"DeepSeek-V3 has 671 billion parameters, Llama-3.1-8B has 8 billion. So why does a token take half as much room in
# > DeepSeek's cache as in the little Llama's?"*
#
# The size of a cache does not depend on the number of parameters. It depends on what each layer *keeps* of a token, and
# designers of models have become very good at keeping less. This lesson goes through four designs in the order of their
# invention, and takes the last one apart by hand.
#
# **What to expect.** Some counting, then one piece of algebra, two lines long, which we check against the engine's own
# weights. You need to know what attention does: a query is compared with keys, and the resulting weights mix the
# values.

# %%
from dataclasses import replace
from inspect import getsource

import figures
import tiny
import torch

from nanokv import SamplingParams
from nanokv.codecs.latents import RawLatentPages
from nanokv.codecs.raw import RawCodec
from nanokv.core.request import Request
from nanokv.core.spec import PageLayout
from nanokv.engine.inputs import arrays_of, batch_of, on_device
from nanokv.hub.catalog import CATALOG
from nanokv.kernels import reference
from nanokv.kernels.linear import head_linear
from nanokv.layers.mla import MLA, expands
from nanokv.models.config import ModelConfig
from nanokv.models.decoder import layer_specs


def config_of(name: str) -> ModelConfig:
    return ModelConfig.from_dict(CATALOG[name].config)


def bytes_per_token(config: ModelConfig) -> int:
    """Bytes of a token in bfloat16, from the same specs that the engine allocates by."""
    return PageLayout(layer_specs(config, RawCodec(torch.bfloat16), 16), 16).bytes_per_token


# %% [markdown]
# ## Heads that share
#
# Attention has many **heads**, each with queries, keys and values of its own. At first every head also had its own
# entry in the cache: **MHA**, multi-head attention. In 2019 Noam Shazeer proposed that all heads share one key and one
# value: **MQA**, multi-query attention. In 2023 came the compromise, **GQA**, grouped-query attention: a few heads
# share.
#
# In the engine this is one number of the layer's spec.

# %%
print(getsource(RawCodec.planes))

llama = config_of("llama-3.1-8b")
kib = {kv_heads: bytes_per_token(replace(llama, num_kv_heads=kv_heads)) / 1024 for kv_heads in (32, 8, 1)}
assert (llama.num_layers, llama.num_heads, llama.num_kv_heads, llama.head_dim) == (32, 32, 8, 128)
assert kib == {32: 512, 8: 128, 1: 16}
assert 32 * 8 * 128 * 2 * 2 == 128 * 1024  # layers, KV heads, dimensions, key and value, bytes

# %% [markdown]
# Llama-3.1-8B has 32 heads in 32 layers. As MHA a token would take 512 KiB, as MQA 16 KiB. It was released with 8 KV
# heads, at 128 KiB. MQA costs quality, so few models go that far. Can a model keep little *and* give every head a key
# of its own?
#
# ## One latent for all
#
# **MLA**, multi-head latent attention (DeepSeek-V2, 2024), compresses a token into one short vector, the **latent**,
# and keeps that. Each head has two matrices that turn the latent *c* into its own key and value:
#
# $$k_h = W^{UK}_h c \qquad v_h = W^{UV}_h c$$
#
# Beside the latent, MLA keeps one small key that carries the position; a later section explains it.

# %%
print(getsource(MLA.spec))

deepseek = config_of("deepseek-v3")
mla = deepseek.mla
kept = mla.kv_rank + mla.rope_dim
assert (mla.kv_rank, mla.rope_dim, kept) == (512, 64, 576)
assert bytes_per_token(deepseek) == 61 * 576 * 2 == 70_272
assert round(70_272 / 1024, 1) == 68.6
assert round(bytes_per_token(llama) / bytes_per_token(deepseek), 2) == 1.87

# %% [markdown]
# 576 numbers a token and layer, 61 layers, 68.6 KiB in all. This answers the question at the top: the little Llama
# takes 1.87 times as much.
#
# How much does MLA save? You will read "28 times", and it is a nice exercise to find out where that comes from.

# %%
heads = deepseek.num_heads
one_side = heads * mla.value_dim
keys_and_values = heads * (mla.nope_dim + mla.rope_dim) + heads * mla.value_dim
assert (heads, one_side, keys_and_values) == (128, 16_384, 40_960)
assert round(one_side / kept) == 28
assert round(keys_and_values / kept) == 71
assert round(61 * keys_and_values * 2 / 2**20, 2) == 4.77  # MiB a token

# %% [markdown]
# 128 heads of 128 dimensions are 16,384 numbers, and 16,384 / 576 is 28. But that counts keys *or* values. A cache
# holds both, and DeepSeek's keys have 192 dimensions. Written out as MHA, a token would take 40,960 numbers a layer,
# 4.77 MiB in all. The factor is 71.
#
# Another popular mistake: "MLA keeps even less than MQA". MQA keeps one key and one value of 128 dimensions, 256
# numbers. MLA keeps 576, as much as GQA with 2.25 KV heads. It is not the smallest. It is the smallest in which every
# head still has a key of its own.

# %%
assert (mla.nope_dim + mla.rope_dim, 2 * 128, 576 / 256) == (192, 256, 2.25)

designs = [
    ("DeepSeek-V3, as MHA", 61 * keys_and_values * 2 / 1024, figures.GREY),
    ("Llama-3.1-8B, as MHA", kib[32], figures.GREY),
    ("Llama-3.1-70B, GQA with 8 KV heads", bytes_per_token(config_of("llama-3.1-70b")) / 1024, figures.ORANGE),
    ("Llama-3.1-8B, GQA with 8 KV heads", kib[8], figures.ORANGE),
    ("Qwen3-0.6B, GQA with 8 KV heads", bytes_per_token(config_of("qwen3-0.6b")) / 1024, figures.ORANGE),
    ("DeepSeek-V3, MLA", bytes_per_token(deepseek) / 1024, figures.BLUE),
    ("Llama-3.1-8B, as MQA", kib[1], figures.GREY),
]
assert [round(size, 1) for _, size, _ in designs] == [4880.0, 512.0, 320.0, 128.0, 112.0, 68.6, 16.0]
figure, axes = figures.new(8, 3.2)
names, values, colours = zip(*designs, strict=True)
bars = axes.barh(names, values, color=colours)
axes.bar_label(bars, [f" {size:,.4g} KiB" for size in values])
axes.invert_yaxis()
axes.set_xscale("log")
axes.set(xlim=(8, 20000), xticks=[], title="The cache of one token in bfloat16, logarithmic")
axes.minorticks_off()
axes.spines["bottom"].set_visible(False)
figures.save(figure, "05_smaller_by_design-1")

# %% [markdown]
# ![Cache of one token for seven designs](img/05_smaller_by_design-1.svg)
#
# Grey bars are thought experiments; these models do not exist. Look at Qwen3-0.6B: 112 KiB, nearly as much as an 8B
# model. The size is layers times KV heads times dimensions; the number of parameters does not occur.
#
# ## Reading without unpacking
#
# A short latent is cheap to keep. But attention needs keys and values, for each of 128 heads, for each token of the
# context. Must a decode step unpack the whole cache? That would be a disaster: 40,960 numbers computed for every old
# token, in every step.
#
# Here is the piece of algebra. The score of query *q* against the key of a token is
#
# $$q \cdot (W^{UK} c) = (W^{UK\,T} q) \cdot c$$
#
# Put the brackets elsewhere, and the matrix moves from the *keys*, of which there are thousands, to the *query*, of
# which there is one. The same holds for the values, where $p_t$ are the weights after the softmax:
#
# $$\sum_t p_t \, (W^{UV} c_t) = W^{UV} \Big( \sum_t p_t \, c_t \Big)$$
#
# Mix the latents first, then unpack the mixture once. The matrices are **absorbed** into query and result, and all
# heads read the latents as they lie in the pages. Does the engine's own layer agree with these two lines? We take a toy
# with DeepSeek's structure, and 50 tokens in its cache:

# %%
TINY_MLA = {
    **CATALOG["deepseek-v3"].config, "vocab_size": 512, "hidden_size": 64, "intermediate_size": 128,
    "num_hidden_layers": 2, "num_attention_heads": 8, "num_key_value_heads": 8, "q_lora_rank": 48, "kv_lora_rank": 32,
    "qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 16, "n_routed_experts": 4, "num_experts_per_tok": 2,
    "moe_intermediate_size": 32, "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1,
    "num_nextn_predict_layers": 0, "max_position_embeddings": 4096, "eos_token_id": 2, "bos_token_id": 1,
}  # fmt: skip
llm = tiny.engine(TINY_MLA, num_pages=64)
request = Request(list(range(3, 53)), SamplingParams(max_tokens=8, temperature=0, ignore_eos=True))
llm.engine.add_request(request)
llm.loop.step()
assert request.num_computed == 50 and llm.stats()["bytes_per_token"] == 2 * (32 + 8) * 4

layer, store = llm.engine.model.layers[1].mixer, llm.engine.store
pages = torch.tensor(request.held.pages, dtype=torch.int64)
latents, rope_keys = reference.read_latents(store.pages.data, layer.pages.planes, pages, 50)
assert latents.shape == (50, 32) and rope_keys.shape == (50, 8)

# %% [markdown]
# The long way first, by hand: get the matrices out of the layer, unpack every token for every head, attend.

# %%
torch.manual_seed(0)
q, q_rope = torch.randn(1, 8, 16), torch.randn(1, 8, 8)

unit_q, unit_c = torch.eye(16).unsqueeze(1).expand(16, 8, 16), torch.eye(32).unsqueeze(1).expand(32, 8, 32)
w_uk = head_linear(unit_q, layer.w_uk).permute(1, 0, 2)  # [heads, nope, rank]
w_uv = head_linear(unit_c, layer.w_uv).permute(1, 2, 0)  # [heads, value, rank]

keys = torch.einsum("hnr,tr->htn", w_uk, latents)
values = torch.einsum("hvr,tr->htv", w_uv, latents)
scores = torch.einsum("hn,htn->ht", q[0], keys) + torch.einsum("hr,tr->ht", q_rope[0], rope_keys)
by_hand = torch.einsum("ht,htv->hv", (scores * layer.scale).softmax(-1), values).flatten()
assert keys.numel() + values.numel() == 50 * 8 * (16 + 16)  # unpacked numbers

# %% [markdown]
# And now the engine's way, which never unpacks anything:

# %%
print(getsource(RawLatentPages.absorbed))

request.num_scheduled = 1
batch = batch_of(on_device(arrays_of([request], 16), store.device), 16)
batch = replace(batch, positions=batch.positions - 1)  # read the 50 tokens that are in the cache
absorbed = layer.pages.absorbed(q, q_rope, store.pages.data, batch)[0]

difference = (absorbed - by_hand).abs().max().item()
print(f"largest difference {difference:.1e}, largest value {by_hand.abs().max():.3f}")
assert difference < 1e-5 * max(1.0, by_hand.abs().max().item())
request.num_scheduled = 0
while llm.engine.has_work:
    llm.loop.step()

# %% [markdown]
# The same numbers, up to rounding in the last places of float32. In the absorbed form MLA looks to the kernel like MQA
# with one wide head: keys of 576 numbers, values that are the first 512 of the same numbers. It is the kernel of lesson
# 2, called with other sizes.
#
# ## Why a second key?
#
# Positions enter attention by *rotating* queries and keys (RoPE): a key at position *t* is rotated by an angle that
# depends on *t*. Put the rotation $R_t$ between the matrices, and absorption no longer works:
#
# $$q \cdot (R_t \, W^{UK} c_t) = (W^{UK\,T} R_t^T q) \cdot c_t$$
#
# The matrix to absorb now depends on *t*, so each old token needs another one. DeepSeek therefore splits the key in
# two. The latent part carries no position at all. A separate key of 64 numbers, shared by all heads, is rotated
# *before* it is kept, and its score is added. That is the `k_rope` plane.
#
# ## The surprise: absorbing is not always cheaper
#
# Absorbed, a pair of query and token costs 576 + 512 multiplications a head. Unpacked it costs only 192 + 128. For one
# query over thousands of tokens, absorb: unpacking would cost far more. For a prompt of thousands of queries over the
# same tokens, unpack once and use the result thousands of times. The two forms cost the same somewhere in between. The
# engine decides by this function, whose docstring derives it:

# %%
print(getsource(expands))

assert (512 + 64 + 512, 128 + 64 + 128, 1088 / 320) == (1088, 320, 3.4)
turning, in_the_limit = (next(n for n in range(1, 1000) if expands(mla, cached, n)) for cached in (8192, 1_000_000))
assert (turning, in_the_limit) == (169, 171)
assert expands(mla, 0, 1) and not expands(mla, 8192, 1)


def multiplications(cached: int, rows: int) -> tuple[float, float]:
    """A head's multiply-adds for a row: unpacked, and absorbed."""
    pairs, inner = rows * (cached + rows / 2), mla.nope_dim + mla.value_dim
    unpacked = (cached + rows) * mla.kv_rank * inner + pairs * (inner + mla.rope_dim)
    absorbed = rows * mla.kv_rank * inner + pairs * (2 * mla.kv_rank + mla.rope_dim)
    return unpacked / rows, absorbed / rows


counts = [2**i for i in range(13)]
costs = [multiplications(8192, rows) for rows in counts]
assert [unpacked < absorbed for unpacked, absorbed in costs] == [expands(mla, 8192, rows) for rows in counts]
assert round(costs[0][0] / costs[0][1]) == 119 and round(costs[-1][1] / costs[-1][0], 1) == 3.1

figure, axes = figures.new(7, 3.6)
axes.plot(counts, [cost[0] / 1e6 for cost in costs], "o-", color=figures.ORANGE, markersize=4)
axes.plot(counts, [cost[1] / 1e6 for cost in costs], "o-", color=figures.BLUE, markersize=4)
axes.text(3, 500, "unpack the context", color=figures.RED)
axes.text(1.2, 11, "absorb", color=figures.BLUE, va="bottom")
axes.axvline(turning, color=figures.BLACK, linestyle="--", linewidth=1)
axes.text(turning * 1.15, 700, f"from {turning} rows on,\nunpacking is cheaper", va="top")
axes.set_xscale("log", base=2)
axes.set_yscale("log")
axes.set_xticks(counts[::2], [f"{rows:,}" for rows in counts[::2]])
axes.set_yticks([1, 10, 100, 1000], ["1", "10", "100", "1,000"])
axes.set(ylim=(1, 2000), xlabel="new rows of one request in the step", ylabel="million multiply-adds a row and head")
axes.set_title("DeepSeek-V3 over a cached prefix of 8,192 tokens")
figures.save(figure, "05_smaller_by_design-2")

# %% [markdown]
# ![Multiply-adds of the two forms over the number of new rows](img/05_smaller_by_design-2.svg)
#
# For one row over 8,192 tokens, unpacking costs 119 times as much. From 169 rows on it is cheaper (171 over very long
# prefixes), and for 4,096 rows absorbing costs 3.1 times as much. So prefill and decode of the *same layer* want
# different arithmetic over the *same bytes*. (In float32, where this engine promises equal bits, it always absorbs: the
# two forms round differently.)
#
# ## Many operations for each byte
#
# Lesson 1 introduced a second measure, FLOP per byte. A byte of the cache that many heads read is a byte well used.
# Count for one cached token in bfloat16: two operations a multiplication, all heads, divided by the bytes read.


# %%
def intensity(heads: int, multiplications: int, numbers: int) -> float:
    """FLOP per byte of attention in decode."""
    return 2 * heads * multiplications / (2 * numbers)


points = {
    "MHA": (2 * 32 * 128, intensity(32, 2 * 128, 2 * 32 * 128)),
    "GQA, 8 KV heads": (2 * 8 * 128, intensity(32, 2 * 128, 2 * 8 * 128)),
    "MQA": (2 * 128, intensity(32, 2 * 128, 2 * 128)),
    "MLA (128 heads)": (576, intensity(128, 576 + 512, 576)),
}
assert [round(density) for _, density in points.values()] == [1, 4, 32, 242]

figure, axes = figures.new(6.8, 3.6)
for (name, (numbers, density)), colour in zip(
    points.items(), (figures.GREY, figures.ORANGE, figures.GREEN, figures.BLUE), strict=True
):
    axes.plot([numbers], [density], "o", color=colour, markersize=10)
    axes.annotate(name, (numbers, density), (9, -4), textcoords="offset points", va="center")
axes.axhline(295, color=figures.BLACK, linestyle="--", linewidth=1)
axes.text(11000, 310, "ridge of an H100", ha="right", va="bottom")
axes.set_xscale("log", base=2)
axes.set_yscale("log")
axes.set_xticks([256, 1024, 4096, 8192], ["256", "1,024", "4,096", "8,192"])
axes.set_yticks([1, 10, 100], ["1", "10", "100"])
axes.set(
    xlim=(180, 24000), ylim=(0.6, 700), xlabel="numbers kept of a token in a layer", ylabel="FLOP per byte, decode"
)
figures.save(figure, "05_smaller_by_design-3")

# %% [markdown]
# ![FLOP per byte over the numbers kept, for four designs](img/05_smaller_by_design-3.svg)
#
# For grouped queries the result is the size of the group: 1 for MHA, 4 for Llama's GQA, 32 for MQA. MLA reaches 242,
# near the ridge of an H100 at 295. It reads little and computes much, which suits such a machine. On a machine with a
# low ridge, computing limits the same layer.
#
# ## What changes in the cache?
#
# What had to change in pages, tree and scheduler for all that? Run the toy and see.

# %%
twice = [
    llm.generate([list(range(3, 103))], SamplingParams(max_tokens=4, temperature=0, ignore_eos=True))[0] for _ in "ab"
]
assert [one.cached_tokens for one in twice] == [48, 96]
assert twice[0].token_ids == twice[1].token_ids
llm.engine.cache.check()

# %% [markdown]
# Nothing. The second time 96 of 100 tokens are found (and 48 the first time, left from the request above, which begins
# with the same tokens). The cache handles page ids. Only the layer knows the content of a page: two planes called
# `latent` and `k_rope` here, `k` and `v` there.
#
# ## Read now
#
# 1. [`nanokv/core/spec.py`](../nanokv/core/spec.py): `Plane`, `LayerSpec`, and how the bytes follow.
# 2. [`nanokv/codecs/raw.py`](../nanokv/codecs/raw.py): what grouped-query attention keeps.
# 3. [`nanokv/layers/mla.py`](../nanokv/layers/mla.py): the docstring, `expands`; and
#    [`nanokv/codecs/latents.py`](../nanokv/codecs/latents.py), `RawLatentPages`: `absorbed`, `expanded`.
# 4. [`nanokv/kernels/planes.py`](../nanokv/kernels/planes.py), `KVPlanes`: three layouts for one kernel.
# 5. [`nanokv/bench/size.py`](../nanokv/bench/size.py): try `nanokv size deepseek-v3 llama-3.1-8b`.
#
# ## Exercises
#
# - `nanokv.codecs.raw.RawCodec.planes`: what grouped-query attention keeps
# - `nanokv.layers.mla.MLA.spec`: what MLA keeps
# - `nanokv.layers.mla.expands`: which form is cheaper
# - `nanokv.layers.rotary.frequencies`: the angles of the rotation
# - `nanokv.kernels.reference.store._rotate`: the rotation itself
# - `nanokv.layers.moe.Router._close_groups`: which groups of experts are open
#
# ## What you can now explain
#
# - Bytes per token of any model from its config, and why the number of parameters does not occur.
# - Absorption, on a whiteboard, and why RoPE needs a key of its own.
# - Why "28 times" is 71, and why MLA is not smaller than MQA.
# - When it is cheaper to unpack the latents.
#
# ## Where it loses
#
# - None of this can be switched on later. A model is trained this way or it is not.
# - MLA computes 3.4 times as much for a pair in decode. Where computing is expensive, GQA may be faster.
# - The cache still grows with every token. The next lesson changes that.

# %%
llm.close()
