# %% [markdown]
# # 6. A state instead
#
# > *"A person who reads a novel does not keep every word in mind. Why does a language model?"*
#
# It does not have to. Some layers keep *nothing* per token. They carry one matrix, the **state**, and change it a
# little with every token. The state has the same size after ten tokens and after a million. Models like Qwen3.5 use
# such layers for three quarters of their depth; they are called **hybrids**.
#
# **What to expect.** We fill a memory of 32 by 32 numbers by hand, compute one formula in two ways, and then look at
# the price: a state can be carried forward, but never taken back. That turns the prefix cache of lesson 4 upside down.

# %%
from dataclasses import replace
from inspect import getsource

import figures
import tiny
import torch

from nanokv import SamplingParams
from nanokv.bench.decode import bytes_per_step
from nanokv.cache.states import States
from nanokv.codecs.raw import RawCodec
from nanokv.core.spec import PageLayout
from nanokv.hub.catalog import CATALOG
from nanokv.kernels.reference.delta_rule import CHUNK, _chunk
from nanokv.layers.deltanet import GatedDeltaNet
from nanokv.models.config import ATTENTION, ModelConfig
from nanokv.models.decoder import layer_specs
from nanokv.models.read import read_config

# %% [markdown]
# ## A matrix that remembers
#
# Attention stores pairs of key and value, and looks up a query among the keys. A matrix can do that, too. To write a
# pair, add the outer product of key and value. To read with a query, multiply. If the keys are orthogonal and have
# length one, every value comes back exactly. This is **linear attention** (Katharopoulos et al. 2020).
#
# Adding has a flaw. After a second write under the same key, a read returns the sum of both values. The **delta rule**
# (Widrow and Hoff 1960; for language models Schlag et al. 2021) reads before it writes, and stores only the error of
# what it read. Both rules by hand:

# %%
DIM = 32


def add(state: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    return state + torch.outer(key, value)


def delta(state: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    wrong = value - state.T @ key
    return state + torch.outer(key, wrong)


torch.manual_seed(0)
key = torch.nn.functional.normalize(torch.randn(DIM), dim=0)
old, new = torch.randn(DIM), torch.randn(DIM)
empty = torch.zeros(DIM, DIM)
torch.testing.assert_close(add(add(empty, key, old), key, new).T @ key, old + new)
torch.testing.assert_close(delta(delta(empty, key, old), key, new).T @ key, new)

# %% [markdown]
# The sum returns both values on top of each other; the delta rule returns the new one. It can overwrite.
#
# Now fill the memory beyond its capacity: 64 pairs with random keys, in a matrix that has room for 32 directions. Then
# query each of the 64. How closely does the answer point in the right direction? (A cosine of 1 is perfect, 0 is noise;
# the plot shows the average over 200 memories.)

# %%
MEMORIES, WRITES = 200, 64
keys = torch.nn.functional.normalize(torch.randn(MEMORIES, WRITES, DIM), dim=-1)
values = torch.randn(MEMORIES, WRITES, DIM)


def recall(states: torch.Tensor) -> list[float]:
    """Cosine between what is read for each key and its value; newest first."""
    read = torch.einsum("mkv,mtk->mtv", states, keys)
    return torch.nn.functional.cosine_similarity(read, values, dim=-1).mean(0).flip(0).tolist()


added = torch.stack([torch.zeros(DIM, DIM)] * MEMORIES)
corrected = added.clone()
for t in range(WRITES):
    k, v = keys[:, t], values[:, t]
    added = added + k.unsqueeze(-1) * v.unsqueeze(-2)
    wrong = v - torch.einsum("mkv,mk->mv", corrected, k)
    corrected = corrected + k.unsqueeze(-1) * wrong.unsqueeze(-2)
sums, deltas = recall(added), recall(corrected)
print([round(x, 2) for x in (sums[0], sums[63], deltas[0], deltas[10], deltas[32], deltas[63])])

assert DIM * DIM == 1024
assert all(0.52 < x < 0.64 for x in sums)
assert deltas[0] > 0.999 and deltas[10] > 0.7
assert deltas[63] < 0.25
crossing = next(age for age in range(WRITES) if deltas[age] < sums[age])
assert 15 <= crossing <= 25

# %%
figure, axes = figures.new(7, 3.5)
axes.plot(range(WRITES), [round(x, 2) for x in sums], color=figures.GREY)
axes.plot(range(WRITES), [round(x, 2) for x in deltas], color=figures.BLUE, linewidth=2)
axes.text(40, 0.63, "adding: everything, blurred", color=figures.BLACK)
axes.text(9, 0.9, "delta rule: the new sharp, the old fading", color=figures.BLUE)
axes.set(xlim=(0, 63), ylim=(0, 1.05), xlabel="writes ago", ylabel="how right the answer is")
axes.set_title("64 pairs in a memory of 32 x 32 numbers")
figures.save(figure, "06_a_state_instead-1")

# %% [markdown]
# ![How well each of 64 pairs is recalled, by age](img/06_a_state_instead-1.svg)
#
# Adding recalls everything equally badly, at about 0.58. The delta rule recalls the newest pair exactly and lets the
# oldest fade. It is better than adding for the last 15 writes, and worse beyond 25. That is a good trade for reading a
# text. It is also a hard limit: 1,024 numbers cannot hold 64 pairs of 32 numbers without loss. Attention can, because
# its memory grows. This is why hybrids keep *some* attention layers: they recall the exact word from long ago.
#
# **Gated DeltaNet** (Yang et al. 2024) adds two gates that each token computes for itself: how much to forget first
# (the decay), and how strongly to correct (beta). With both at 1 it is our `delta`.
#
# ## One rule, two forms
#
# One token at a time is fine for decode. For a prompt it would be terrible: thousands of tiny steps, each waiting for
# the one before. But the rule is linear, so many steps can be computed at once, as a few matrix products and one
# triangular system. The engine's reference kernel does it in chunks of 64:

# %%
print(getsource(_chunk))
assert CHUNK == 64

log_decay, beta = -0.1 * torch.rand(MEMORIES, WRITES), torch.rand(MEMORIES, WRITES)
state = torch.zeros(MEMORIES, DIM, DIM)
results = []
for t in range(WRITES):  # one token at a time
    k, v = keys[:, t], values[:, t]
    state = state * log_decay[:, t].exp()[:, None, None]
    wrong = v - torch.einsum("mkv,mk->mv", state, k)
    state = state + k.unsqueeze(-1) * (beta[:, t, None] * wrong).unsqueeze(-2)
    results.append(torch.einsum("mkv,mk->mv", state, k))
at_once, state_at_once = _chunk(torch.zeros(MEMORIES, DIM, DIM), keys, keys, values, log_decay, beta)

difference = max((at_once - torch.stack(results, 1)).abs().max().item(), (state_at_once - state).abs().max().item())
print(f"largest difference between the two forms: {difference:.1e}")
assert difference < 1e-4

# %% [markdown]
# The results and the state are the same, up to rounding. Rounding matters to this engine, though: it promises equal
# bits however a prompt is cut into steps. So its CPU kernel runs the same recurrence in prefill and in decode.
#
# ## What it costs
#
# A layer like this costs no bytes per token. It costs a fixed number per sequence:

# %%
print(getsource(GatedDeltaNet.spec))

qwen = read_config(CATALOG["qwen3.5-9b"].config)


def layout_of(config: ModelConfig) -> PageLayout:
    return PageLayout(layer_specs(config, RawCodec(torch.bfloat16), 16), 16)


hybrid = layout_of(qwen)
only_attention = layout_of(replace(qwen, layer_types=(ATTENTION,) * qwen.num_layers))
assert (qwen.num_layers, qwen.layer_types.count(ATTENTION)) == (32, 8)
assert (hybrid.bytes_per_token, only_attention.bytes_per_token) == (32 * 1024, 128 * 1024)
assert round(hybrid.state_payload / 2**20, 1) == 49.1
assert 32 * 128 * 128 * 4 == 2 * 2**20  # a layer: heads, key and value dimensions, float32


def mib(layout: PageLayout, context: int) -> float:
    return (context * layout.bytes_per_token + layout.state_payload) / 2**20


even = next(n for n in range(1, 10_000) if mib(hybrid, n) <= mib(only_attention, n))
assert even == 524
assert [round(mib(one, 1024)) for one in (hybrid, only_attention)] == [81, 128]
assert [round(mib(one, 262_144) / 1024, 2) for one in (hybrid, only_attention)] == [8.05, 32.0]
assert round(hybrid.state_payload / hybrid.bytes_per_token) == 1572

# %%
contexts = [2**i for i in range(6, 19)]
figure, axes = figures.new(7.2, 3.7)
axes.plot(contexts, [mib(only_attention, n) for n in contexts], color=figures.ORANGE, linewidth=2)
axes.plot(contexts, [mib(hybrid, n) for n in contexts], color=figures.BLUE, linewidth=2)
axes.axhline(hybrid.state_payload / 2**20, color=figures.GREY, linewidth=1, linestyle="--")
axes.text(2500, 30, "the states alone: 49 MiB", va="center")
axes.text(9000, 2600, "32 layers of attention", color=figures.RED, ha="right")
axes.text(24000, 260, "24 of them replaced\nby states", color=figures.BLUE)
axes.plot([even], [mib(hybrid, even)], "o", color=figures.BLACK)
axes.annotate(f"even at {even} tokens", (even, mib(hybrid, even)), (70, 180), arrowprops={"arrowstyle": "->"})
axes.set_xscale("log", base=2)
axes.set_yscale("log")
axes.set_xticks([64, 1024, 16384, 262144], ["64", "1K", "16K", "256K"])
axes.set_yticks([10, 100, 1000, 10000], ["10 MiB", "100 MiB", "1,000 MiB", "10,000 MiB"])
axes.set(
    xlim=(60, 300_000), ylim=(7, 60_000), xlabel="context (tokens)", title="Cache of one sequence, shape of Qwen3.5-9B"
)
figures.save(figure, "06_a_state_instead-2")

# %% [markdown]
# ![Cache over context, all attention and hybrid](img/06_a_state_instead-2.svg)
#
# Qwen3.5-9B has 32 layers, and 8 of them are attention. A token costs 32 KiB instead of 128, and a sequence costs an
# extra 49.1 MiB once. At 256K tokens the cache is 8.05 GiB instead of 32. At 1K it is 81 MiB instead of 128, not a
# great difference. Below 524 tokens the hybrid is *larger*: a short chat pays for a memory that it never fills.
#
# There is a second cost. A decode step only reads the cache of its context, but it reads **and writes** the whole
# state.

# %%
moves_even = next(
    n
    for n in range(1, 10_000)
    if bytes_per_step(0, 1, n, hybrid.bytes_per_token, hybrid.state_payload)
    <= bytes_per_step(0, 1, n, only_attention.bytes_per_token)
)
assert moves_even == 1048

# %% [markdown]
# So in bytes moved, the break-even point is at 1,048 tokens.
#
# ## Only forward
#
# Now the surprise that keeps operators awake. Three users share a system prompt of 48 tokens (three pages of 16) and
# ask three questions. In lesson 4 the second user found 48 tokens. Here is the same on a toy hybrid:

# %%
TINY_HYBRID = {
    "architectures": ["Qwen3_5ForCausalLM"], "model_type": "qwen3_5_text", "vocab_size": 512, "hidden_size": 64,
    "intermediate_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2,
    "head_dim": 16, "linear_conv_kernel_dim": 4, "linear_key_head_dim": 16, "linear_value_head_dim": 16,
    "linear_num_key_heads": 2, "linear_num_value_heads": 4, "full_attention_interval": 4, "rms_norm_eps": 1e-6,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5},
    "max_position_embeddings": 4096, "tie_word_embeddings": True, "eos_token_id": 2, "torch_dtype": "float32",
}  # fmt: skip
llm = tiny.engine(TINY_HYBRID, num_pages=128, num_states=24)
one_token = SamplingParams(max_tokens=1, temperature=0, ignore_eos=True)

generator = torch.Generator().manual_seed(0)
tokens = torch.randint(3, 512, (200,), generator=generator).tolist()
system = tokens[:48]
questions = {"A": tokens[50:80], "B": tokens[90:120], "C": tokens[130:160]}
assert len({question[0] for question in questions.values()}) == 3

users = {name: llm.generate([system + question], one_token)[0] for name, question in questions.items()}
matched = {name: (user.kv_matched_tokens, user.cached_tokens) for name, user in users.items()}
print(matched)
assert matched == {"A": (0, 0), "B": (48, 0), "C": (48, 48)}

# %% [markdown]
# B finds the pages of all 48 tokens, and can use none of them. Why?
#
# After A, the state of each recurrent layer is the one at the end of A's text. The state *at token 48* existed for a
# moment on the way, and is gone. A page can be cut out of the middle of a sequence; a state cannot be taken back to an
# earlier position. And a model cannot start its attention layers at token 48 and its recurrent layers at 0.
#
# So a prefix can be reused only where a copy of the state was kept, a **checkpoint**. The code below decides where this
# engine keeps them. B computes the prompt once more, and leaves a checkpoint at token 48, where its text diverges from
# A's. C finds it.

# %%
print(getsource(States._is_kept))

counts = llm.stats()
print({name: counts[name] for name in ("states_total", "states_held", "states_cached")})
assert counts["states_cached"] == 4  # one where they diverge, and one at the last page boundary of each prompt
repeat = llm.generate([system + questions["A"]], one_token)[0]
assert (len(system + questions["A"]), repeat.cached_tokens) == (78, 64)
llm.engine.cache.check()

# %%
figure, axes = figures.new(7.6, 2.5)
rows = [*users.items(), ("A again", repeat)]
for place, (name, user) in enumerate(rows):
    y = -place
    figures.box(axes, 0, y, user.cached_tokens, 0.8, figures.BLUE, "state found" if user.cached_tokens else "")
    lost = user.kv_matched_tokens - user.cached_tokens
    figures.box(
        axes, user.cached_tokens, y, lost, 0.8, figures.YELLOW, "pages found, no state: recomputed" if lost else ""
    )
    rest = 78 - user.kv_matched_tokens
    figures.box(axes, user.kv_matched_tokens, y, rest, 0.8, figures.ORANGE, "computed")
    axes.text(-1, y + 0.4, name, ha="right", va="center")
axes.plot([48, 48], [-3.1, 0.95], color=figures.BLACK, linestyle="--", linewidth=1)
axes.text(48, 1.0, "the questions diverge here", ha="center", va="bottom")
figures.bare(axes, (-11, 79), (-3.2, 1.5))
figures.save(figure, "06_a_state_instead-3")

# %% [markdown]
# ![What four requests found and computed](img/06_a_state_instead-3.svg)
#
# The *second* user of a prompt pays, the *third* gains. A repeated question finds 64 of its 78 tokens, because the last
# page boundary of each prompt has a checkpoint, too.
#
# Why not keep a checkpoint at every page? Because a checkpoint of Qwen3.5-9B takes as much room as the pages of 1,572
# tokens. The option `state_interval` sets one every so many tokens. Here is what it buys:

# %%
with tiny.engine(TINY_HYBRID, num_pages=128, num_states=24, state_interval=16) as often:
    dense = {name: often.generate([system + question], one_token)[0] for name, question in questions.items()}
    assert {name: user.cached_tokens for name, user in dense.items()} == {"A": 0, "B": 48, "C": 48}
    assert often.stats()["states_cached"] == 6
    assert [dense[name].token_ids for name in "ABC"] == [users[name].token_ids for name in "ABC"]

# %% [markdown]
# With a checkpoint every 16 tokens the second user gains at once. That takes 6 checkpoints instead of 4 here, and one
# for each page of a long prompt. The answers are bitwise the same.
#
# Always look at *two* numbers in such a system: the tokens whose pages were found, and the tokens that could be reused.
# A public issue of vLLM (45238) reports a server whose hits fell from 52 of 64 requests to none because the shared part
# became 100 tokens shorter. No log said a word. nanokv reports both numbers, as `kv_matched_tokens` and
# `cached_tokens`.
#
# ## Read now
#
# 1. [`nanokv/kernels/reference/delta_rule.py`](../nanokv/kernels/reference/delta_rule.py): the rule in three lines,
#    then its two forms.
# 2. [`nanokv/layers/deltanet.py`](../nanokv/layers/deltanet.py): the layer around it.
# 3. [`nanokv/cache/states.py`](../nanokv/cache/states.py), the docstring, then `limit_chunk` and `capture`.
# 4. [`nanokv/cache/manager.py`](../nanokv/cache/manager.py), `_open`: pages found, pages used.
# 5. [`nanokv/engine/memory.py`](../nanokv/engine/memory.py): how memory is divided between pages and states.
#
# ## Exercises
#
# - `nanokv.layers.deltanet.GatedDeltaNet.spec`: what such a layer keeps
# - `nanokv.kernels.reference.delta_rule.short_conv`: the short convolution before the rule
# - `nanokv.kernels.reference.delta_rule.delta_rule_step`: the rule, one token at a time
# - `nanokv.kernels.reference.delta_rule._chunk`: the rule, 64 tokens at once
# - `nanokv.cache.states.States.reachable`, `.limit_chunk`: where to start, where to stop
#
# ## What you can now explain
#
# - Linear attention and the delta rule, and what a memory of fixed size must forget.
# - Why prefill needs the chunked form.
# - From what context length on a hybrid is smaller, and why it is larger below that.
# - Why the second user of a prompt pays, and where checkpoints belong.
#
# ## Where it loses
#
# - Short contexts: below 524 tokens the cache is larger, below 1,048 a step moves more bytes.
# - Exact details from far back: the attention layers must recall them.
# - Prefix reuse becomes coarse, and each checkpoint is expensive. Taking back half an answer means computing it again.

# %%
llm.close()
