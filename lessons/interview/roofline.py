"""Roofline: what bounds a step, and so how much an optimisation can gain at most."""

from nanokv.learn.cards import card


def token(model: str = "llama-3.1-8b") -> int:
    from nanokv.bench.size import measure

    return measure(model, "bfloat16", "raw", 16).layout.bytes_per_token


@card(
    question="H100: 989 TFLOP/s in bf16, 3.35 TB/s. Where is the ridge, and how fast can one request of an 8B model "
    "(16 GB) decode at most?",
    answer="The ridge is at 295 operations a byte. Decoding one request reads 16 GB for two operations a weight, "
    "about one operation a byte: far left of it, bound by memory. 16 over 3,350 GB/s is 4.8 milliseconds, or 209 "
    "tokens a second, before any cache is read. Batching moves right: each request adds operations but no weights, "
    "until the cache outweighs them or, near 295 requests, arithmetic becomes the bound.",
    follow_ups=(
        "What moves each bound: quantised weights, tensor parallelism, speculation?",
        "Which workloads reach the ridge?",
    ),
    file="nanokv/bench/decode.py",
    command="nanokv bench decode --batch 1,4,16 --context 256",
)
def the_ridge():
    return {
        "295": 989 / 3.35,
        "3,350": 3.35 * 1000,
        "4.8": 1000 * 16 / 3350,
        "209": 3350 / 16,
    }


@card(
    question="A request of 1K in, 512 out takes 2.5 s, of which prefill takes 100 ms. Another of 16K in takes 3.2 s, "
    "of which 769 ms are the time to first token. What does a perfect cache hit save of each? Is that its only "
    "benefit?",
    answer="Alone, at most the prefill: 4 percent of the first, 24 of the second. The last token of the prompt must "
    "still be computed, which costs about one decode step, so it is a little less. The ratio of input to output "
    "decides. But under load the saved prefill is machine time for other requests: queues shorten, and throughput "
    "rises by far more than the one request shows. That is why a prefix cache looks weak on paper and strong in "
    "production.",
    follow_ups=("Which number of your service decides the saving?", "Derive the ceiling for throughput."),
    file="nanokv/bench/request.py",
    command="nanokv bench request --prompt-tokens 1024,4096 --output-tokens 512",
)
def a_perfect_hit():
    from nanokv.bench.request import prefill_share

    def share(ttft, total):
        return 100 * prefill_share(ttft, (total - ttft) / 511, total)

    return {"4": 100 * prefill_share(0.1, 0.0, 2.5), "24": share(0.769, 3.2)}


@card(
    question="Prompts of 10,240 tokens, answers of 32. The machine computes 20,000 prompt tokens a second and decodes "
    "2,000. How many requests a second with nothing shared, and with 90 percent shared, in pages of 16?",
    answer="With nothing shared a request takes 0.512 seconds of prefill and 0.0155 of decoding: the first of the 32 "
    "tokens comes out of the prefill. That is 1.9 requests a second. With 90 percent cached, 1,024 tokens are left: "
    "15 a second, 8 times as many. Latency in a closed loop falls by the same factor, because it is clients over "
    "throughput. Measure against this ceiling, from speeds of the same run: the gap is the engine's overhead.",
    follow_ups=(
        "Why does decode speed itself depend on sharing?",
        "What limits the curve when nearly everything is shared?",
    ),
    file="nanokv/bench/prefix.py",
    command="nanokv bench prefix --concurrency 1,8 --shared 0,0.5,0.9",
)
def prefix_under_load():
    from nanokv.bench.prefix import ceiling_requests_per_s, matchable

    left = 10_240 - matchable(10_240, 9216, 16)
    none, most = (ceiling_requests_per_s(tokens, 32, 20_000, 2000) for tokens in (10_240, left))
    return {
        "0.512": 10_240 / 20_000,
        "0.0155": 31 / 2000,
        "1.9": none,
        "1,024": left,
        "15": most,
        "8": most / none,
    }


@card(
    question="Does a cache of 8 bits speed up decoding of Llama-3.1-8B, with 16 GB of weights? Try 1 request of 1,024 "
    "tokens, and 64 of 4,096.",
    answer="It can gain what it saves of the bytes of a step. With one short request the cache is 0.8 percent of "
    "them, so halving it only saves memory. With 64 long ones 34.4 GB of cache stand beside the weights, 68 percent; "
    "halved, the step is 1.52 times faster at most, before unpacking. And the saved memory allows a larger batch, "
    "which is often the larger gain. Without batch and context the claim says nothing.",
    follow_ups=("When is unpacking hidden, and when not?", "How does the batch size change the compute side?"),
    file="nanokv/bench/decode.py",
    command="nanokv bench codecs --codecs raw,int8 --quick",
)
def eight_bits():
    from nanokv.bench.decode import bytes_per_step

    weights = 16 * 10**9
    one, many = bytes_per_step(weights, 1, 1024, token()), bytes_per_step(weights, 64, 4096, token())
    half = bytes_per_step(weights, 64, 4096, token() // 2)
    return {
        "0.8": 100 * (1 - weights / one),
        "34.4": (many - weights) / 1e9,
        "68": 100 * (1 - weights / many),
        "1.52": many / half,
    }


@card(
    question="How long does the prefill of 8,192 tokens take at least with Llama-3.1-8B (8.03 billion parameters, 32 "
    "layers, 32 heads of 128) on 989 TFLOP/s?",
    answer="Linear layers: two operations a parameter and token, 131.6 TFLOP. Attention: each token attends to half "
    "of the context on average, scores and sums take four operations a number, over all layers and heads 17.6 TFLOP. "
    "Together 149, so 0.15 seconds at full speed, and twice that in practice. Attention is 12 percent here; it grows "
    "with the square, so at 64K it is half of all. Pricing prefill by tokens alone is wrong for long contexts.",
    follow_ups=(
        "How much of each part does a cached prefix save?",
        "Where do the embedding and the output head count?",
    ),
    file="nanokv/bench/measure.py",
    command="nanokv bench request --prompt-tokens 512,2048",
)
def prefill_at_best():
    def attention(tokens):
        return 4 * 32 * 32 * 128 * tokens * tokens / 2

    linear, part = 2 * 8.03e9 * 8192, attention(8192)
    long = attention(65536) / (attention(65536) + 2 * 8.03e9 * 65536)
    assert 0.4 < long < 0.6
    return {
        "131.6": linear / 1e12,
        "17.6": part / 1e12,
        "149": (linear + part) / 1e12,
        "0.15": (linear + part) / 989e12,
        "12": 100 * part / (linear + part),
    }


@card(
    question="Speculative decoding with 4 drafts: how many tokens does a verification step give if each draft is "
    "accepted with probability 0.8, and with 0.6? When is it slower than plain decoding?",
    answer="Sum the probabilities that the first drafts all hold, plus the target's own token: 3.36 at 0.8, 2.31 at "
    "0.6. That is the gain only while a verification costs one step: few requests, bound by reading weights. In a "
    "large batch, near the ridge, 5 rows a request are 5 times the work, and it loses. Drafting costs too. Keys and "
    "values of rejected tokens are simply overwritten; recurrent states must be rolled back.",
    follow_ups=(
        "Why does the output's distribution not change?",
        "How would you choose the number of drafts at run time?",
    ),
    file="nanokv/engine/scheduler.py",
    command="nanokv bench decode --batch 1,5 --context 256",
)
def drafts():
    def tokens(a, k=4):
        return (1 - a ** (k + 1)) / (1 - a)

    return {"3.36": tokens(0.8), "2.31": tokens(0.6), "5": 4 + 1}
