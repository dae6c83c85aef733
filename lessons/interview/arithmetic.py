"""Cache arithmetic: bytes of a token, of a context, of a batch."""

from nanokv.learn.cards import card


def layout(model: str, codec: str = "raw", page_size: int = 16):
    """What `nanokv size` reads: the PageLayout of a model in bfloat16."""
    from nanokv.bench.size import measure

    return measure(model, "bfloat16", codec, page_size).layout


@card(
    question="How many bytes of KV cache does a token of Llama-3.1-8B take, and one of the 70B? (32 or 80 layers, 8 "
    "KV heads of 128 numbers, bf16)",
    answer="Keys and values, so 2, times layers, times KV heads, times head dim, times 2 bytes. The 8B takes 131,072 "
    "bytes, which is 128 KiB. The 70B has the same heads and more layers: 320 KiB. So a context of 8,192 tokens takes "
    "2.5 GiB on the 70B. Query heads do not count, because they are not stored.",
    follow_ups=(
        "And in fp8? In int4 with a scale for each vector?",
        "Which of these factors does tensor parallelism divide, and up to how many GPUs?",
    ),
    file="nanokv/core/spec.py",
    command="nanokv size llama-3.1-8b llama-3.1-70b --context 8K",
)
def bytes_of_a_token():
    small, large = layout("llama-3.1-8b"), layout("llama-3.1-70b")
    each = large.bytes_per_token
    return {
        "2": len(small.specs[0].paged),
        "131,072": small.bytes_per_token,
        "320": each / 1024,
        "2.5": 8192 * each / 2**30,
        "8,192": large.pages_for(8192) * large.page_size,
    }


@card(
    question="Qwen3-0.6B has a thirteenth of the parameters of an 8B model. Is its cache a thirteenth too?",
    answer="No. A token takes 112 KiB against 128 KiB of Llama-3.1-8B, which is 88 percent. The cache depends on "
    "layers, KV heads and head dim, and these are nearly as large: 28 layers, 8 KV heads, 128 numbers each. "
    "Parameters grow with the square of the width; the cache does not depend on it. So in a small model the cache "
    "dominates memory sooner.",
    follow_ups=(
        "At what context length does the cache of the small model outgrow its weights?",
        "What would you change in the small model's design?",
    ),
    file="nanokv/models/decoder.py",
    command="nanokv size qwen3-0.6b llama-3.1-8b",
)
def small_models_have_large_caches():
    from nanokv.bench.size import measure

    one = measure("qwen3-0.6b", "bfloat16", "raw", 16)
    mine, other = one.layout.bytes_per_token, layout("llama-3.1-8b").bytes_per_token
    config = one.config
    return {
        "112": mine / 1024,
        "128": other / 1024,
        "88": 100 * mine / other,
        "28": config.num_layers,
        "8": config.num_kv_heads,
    }


@card(
    question="At how many cached tokens in the batch does a decode step of Llama-3.1-8B read more cache than weights?",
    answer="Count the bytes that a step reads. The weights are 16.06 GB in bf16. But 1.05 of them are the embedding "
    "table, where a step looks up one row a token. So 15.01 GB are read, and at 131,072 bytes a token that equals "
    "about 114,500 tokens: 14 requests of 8K. Many write-ups divide all weights and get 122,500. Beyond that point, a "
    "larger batch makes tokens only slightly cheaper.",
    follow_ups=(
        "How does this change with a quantised cache? With quantised weights?",
        "Why does the embedding of SmolLM2 count, although it is a table too?",
    ),
    file="nanokv/bench/decode.py",
    command="nanokv bench decode --batch 1,8,32 --context 256,2048",
)
def where_the_cache_outweighs_the_weights():
    from nanokv.hub.catalog import CATALOG

    c = CATALOG["llama-3.1-8b"].config
    width, table = c["hidden_size"], c["vocab_size"] * c["hidden_size"]
    heads = width // c["num_attention_heads"] * c["num_key_value_heads"]
    block = 2 * width * width + 2 * width * heads + 3 * width * c["intermediate_size"] + 2 * width
    weights = 2 * (c["num_hidden_layers"] * block + 2 * table + width)
    read, token = weights - 2 * table, layout("llama-3.1-8b").bytes_per_token
    return {
        "16.06": weights / 1e9,
        "1.05": 2 * table / 1e9,
        "15.01": read / 1e9,
        "131,072": token,
        "114,500": round(read / token, -2),
        "14": round(read / token / 8192),
        "122,500": round(weights / token, -2),
    }


@card(
    question="80 GB, of which 16 GB are weights and 4 GB activations and graphs. Llama-3.1-8B, 2,000 tokens in, 500 "
    "out. How many requests run at once?",
    answer="If the engine reserves the full length: 157 pages of 2 MiB a request, so 182 requests in 60 GB. But not "
    "all requests are at their end. In a steady mix an answer is on average half written: 2,250 tokens, 203 requests. "
    "An engine that admits by the current length and preempts when memory runs out gets near the second number. One "
    "that reserves the maximum gets the first, or far less if max_tokens is left at its default.",
    follow_ups=(
        "Lengths are only known as a distribution. By which length do you admit?",
        "What does preemption cost then?",
    ),
    file="nanokv/engine/scheduler.py",
    command="nanokv size llama-3.1-8b --memory 60GB --context 2000,2250,2500",
)
def requests_in_memory():
    pages = layout("llama-3.1-8b")
    memory = 80e9 - 16e9 - 4e9

    def fit(tokens):
        return memory // (pages.pages_for(tokens) * pages.page_bytes)

    return {
        "157": pages.pages_for(2500),
        "2": pages.page_bytes / 2**20,
        "182": fit(2500),
        "60": memory / 1e9,
        "2,250": 2000 + 500 / 2,
        "203": round(memory / (2250 * pages.bytes_per_token)),
    }


@card(
    question="Besides keys and values, what grows with the length of a prompt? Take a prompt of 8,192 tokens and "
    "Llama-3.1-8B.",
    answer="Page tables: an int32 a page, so 2 KiB: negligible. Activations of prefill, which a token budget bounds. "
    "And logits, if you are careless: all rows times 128,256 words in float32 are 4.2 GB, though only the last row is "
    "sampled. So compute logits only for the rows that need them. For scoring, which needs all rows, return them 256 "
    "at a time.",
    follow_ups=("Which of these grow with the batch instead?", "What changes with a sliding window?"),
    file="nanokv/engine/inputs.py",
    command="nanokv size llama-3.1-8b --context 8K",
)
def what_else_grows():
    from nanokv.engine.scheduler import SCORE_ROWS
    from nanokv.hub.catalog import CATALOG

    vocabulary = CATALOG["llama-3.1-8b"].config["vocab_size"]
    return {
        "2": layout("llama-3.1-8b").pages_for(8192) * 4 / 1024,
        "128,256": vocabulary,
        "4.2": 8192 * vocabulary * 4 / 1e9,
        "256": SCORE_ROWS,
    }


@card(
    question="You chat with SmolLM2-135M (30 layers, 3 KV heads of 64, bf16). How much text does 1 GiB of cache hold?",
    answer="A token takes 23,040 bytes, which is 22.5 KiB; a page of 16 tokens takes 360 KiB. So 1 GiB holds 2,912 "
    "pages, or 46,592 tokens: more than five times the model's context of 8,192. The rest of the pool is not wasted: "
    "it keeps earlier conversations, and the prefix tree finds them. In float32 it holds half as many.",
    follow_ups=("Why is the answer a whole number of pages?", "Which conversation is evicted first?"),
    file="nanokv/bench/size.py",
    command="nanokv size smollm2-135m-instruct --memory 1GiB",
)
def a_gigabyte_of_chat():
    from nanokv.bench.size import measure

    one = measure("smollm2-135m-instruct", "bfloat16", "raw", 16)
    return {
        "23,040": one.layout.bytes_per_token,
        "22.5": one.layout.bytes_per_token / 1024,
        "16": one.layout.page_size,
        "360": one.layout.page_bytes / 1024,
        "2,912": 2**30 // one.layout.page_bytes,
        "46,592": one.tokens_in(2**30),
        "8,192": one.config.max_positions,
    }
