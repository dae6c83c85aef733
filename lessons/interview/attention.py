"""Attention variants: MHA, MQA, GQA, MLA. Their memory, their work, and common errors about them."""

from nanokv.learn.cards import card


def mla(model: str = "deepseek-v3"):
    from nanokv.bench.size import measure

    return measure(model, "bfloat16", "raw", 16)


@card(
    question="Derive the arithmetic intensity of decode attention in bf16 with g query heads for each KV head.",
    answer="A token's key and value are two times d numbers of two bytes, so four d bytes. Each of g query heads does "
    "a dot product and a weighted sum with them: four d operations a head. So the intensity is g operations a byte, "
    "whatever the context and batch. Llama-3.1-8B has 4; MQA, with all 32 heads on one pair, would have 32. An H100 "
    "needs 295, so decode attention is bound by memory in all of these. Absorbed MLA, with 128 heads on one latent, "
    "reaches 242, which is nearly balanced.",
    follow_ups=(
        "Why does batching raise the intensity of linear layers but not of attention?",
        "Which shapes do tensor cores need?",
    ),
    file="nanokv/kernels/reference/attention.py",
    command="nanokv bench decode --batch 1,16 --context 256,4096",
)
def intensity():
    config, v3 = mla("llama-3.1-8b").config, mla().config
    group, d = config.num_heads // config.num_kv_heads, config.head_dim
    rank, rope = v3.mla.kv_rank, v3.mla.rope_dim
    operations = 2 * v3.num_heads * ((rank + rope) + rank)
    return {
        "4": group * (4 * d) / (2 * d * 2),
        "32": config.num_heads,
        "295": 989 / 3.35,
        "128": v3.num_heads,
        "242": operations / ((rank + rope) * 2),
    }


@card(
    question="MLA: what exactly is cached, how many bytes does DeepSeek-V3 keep for a token, and how many would plain "
    "MHA of the same shape keep?",
    answer="One latent of 512 numbers, from which the keys and values of all heads can be computed, and one rotated "
    "key of 64 for all heads: 576 numbers a layer. With 61 layers in bf16 that is 70,272 bytes a token, or 68.6 KiB. "
    "Plain MHA with 128 heads of 128 for keys and values would take 3.81 MiB; with the model's own keys of 192, 4.77. "
    "The rotated part is separate because a rotation depends on the position, so it cannot be absorbed into a weight.",
    follow_ups=("Which matrix is absorbed into which?", "How do you shard it over eight GPUs?"),
    file="nanokv/layers/mla.py",
    command="nanokv size deepseek-v3",
)
def what_mla_keeps():
    one = mla()
    shape, heads, layers = one.config.mla, one.config.num_heads, one.config.num_layers
    own = heads * (shape.nope_dim + shape.rope_dim + shape.value_dim)
    return {
        "512": shape.kv_rank,
        "64": shape.rope_dim,
        "576": one.layout.specs[0].bytes_per_token / 2,
        "61": layers,
        "70,272": one.layout.bytes_per_token,
        "68.6": one.layout.bytes_per_token / 1024,
        "128": heads,
        "3.81": layers * heads * (128 + 128) * 2 / 2**20,
        "192": shape.nope_dim + shape.rope_dim,
        "4.77": layers * own * 2 / 2**20,
    }


@card(
    question="A published list of interview answers says MLA's cache is even smaller than MQA's. Is it?",
    answer="No. For DeepSeek's shapes MLA keeps 576 numbers a token and layer. MQA with one head of 128 keeps a key "
    "and a value: 256. So MLA keeps 2.25 times as much, like GQA with that many groups. Its advantage is another one: "
    "for little more than two KV heads, every query head gets keys and values of its own. MLA is 3.6 times smaller "
    "than the usual 8 KV heads, but not smaller than MQA.",
    follow_ups=("Then why not MQA?", "Where does the low rank come from, and what does it lose?"),
    file="nanokv/layers/mla.py",
    command="nanokv size deepseek-v3 llama-3.1-70b",
)
def smaller_than_mqa():
    kept = mla().layout.specs[0].bytes_per_token / 2
    gqa = mla("llama-3.1-70b").layout.specs[0].bytes_per_token / 2
    return {"576": kept, "128": 128, "256": 2 * 128, "2.25": kept / 256, "8": gqa / 256, "3.6": gqa / kept}


@card(
    question="A common claim: MHA with DeepSeek-V3's 128 heads of 128 would cache roughly 16,384 numbers a token and "
    "layer, so MLA saves 28 times. What is wrong?",
    answer="Half is missing. 16,384 numbers are the keys alone, or the values alone. Together they are 32,768, so "
    "MLA's 576 are 56.9 times fewer. And if you materialise what this model really multiplies, keys of 192 and values "
    "of 128, it is 40,960, or 71.1 times. Say which of the three you compare with. The fair comparison is GQA with 8 "
    "groups: 3.6 times.",
    follow_ups=(
        "Which of these does a naive implementation really keep?",
        "What did the transformers library cache in earlier versions?",
    ),
    file="nanokv/core/spec.py",
    command="nanokv size deepseek-v3 --json",
)
def half_of_mha():
    one = mla()
    kept, shape, heads = one.layout.specs[0].bytes_per_token / 2, one.config.mla, one.config.num_heads
    key = shape.nope_dim + shape.rope_dim
    own = heads * (key + shape.value_dim)
    return {
        "16,384": heads * 128,
        "32,768": 2 * heads * 128,
        "576": kept,
        "56.9": 2 * heads * 128 / kept,
        "192": key,
        "40,960": own,
        "71.1": own / kept,
        "8": 8,
        "3.6": 8 * 2 * 128 / kept,
    }


@card(
    question="MLA can attend absorbed, over the latents, or expanded, over keys and values computed from them. Which "
    "is cheaper when, in DeepSeek-V3?",
    answer="Expanding costs work for every cached token. Absorbing makes each pair of query and key more expensive: "
    "1,088 multiply-adds a head instead of 320. So decode rows are always absorbed, a fresh prompt always expanded. "
    "With a long cached prefix it depends on the number of new rows: break-even is at 171. An engine with chunked "
    "prefill and prefix hits crosses that line all the time, so it decides by the formula in each step.",
    follow_ups=(
        "The two round differently. What does that do to exact reuse?",
        "What changes with a quantised latent?",
    ),
    file="nanokv/layers/mla.py",
    command="nanokv learn solution 05.3 --give-up",
)
def absorbed_or_expanded():
    from nanokv.layers.mla import expands

    shape = mla().config.mla
    turn = next(rows for rows in range(1, 1000) if expands(shape, 10_000_000, rows))
    assert expands(shape, 0, 4096) and not expands(shape, 4096, 1)
    return {
        "1,088": shape.kv_rank + shape.rope_dim + shape.kv_rank,
        "320": shape.nope_dim + shape.rope_dim + shape.value_dim,
        "171": turn,
    }


@card(
    question="A colleague writes absorbed MLA as attention with one KV head of width 576 and calls a stock kernel. "
    "The output is nonsense. What is your first guess?",
    answer="The scale. A stock kernel divides scores by the root of the width it sees: one over the root of 576 is "
    "0.0417. But the score is still that of a key of 192 numbers, computed in another order: 0.0722, 1.73 times as "
    "much. So the softmax comes out too flat. Second guess: the value is the first 512 numbers of the key, not all of "
    "it. Third: with YaRN the scale has one more factor.",
    follow_ups=("Which test would have caught it?", "How do you test the numerics of a reordered computation?"),
    file="nanokv/layers/mla.py",
    command="nanokv size deepseek-v3 deepseek-v2-lite",
)
def the_scale_stays():
    shape = mla().config.mla
    key, seen = shape.nope_dim + shape.rope_dim, shape.kv_rank + shape.rope_dim
    return {
        "576": seen,
        "0.0417": seen**-0.5,
        "192": key,
        "0.0722": key**-0.5,
        "1.73": (seen / key) ** 0.5,
        "512": shape.kv_rank,
    }
