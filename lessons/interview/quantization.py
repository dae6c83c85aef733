"""Quantised caches: true bits, why keys are harder, and claims that do not survive arithmetic."""

from nanokv.learn.cards import card


def token(codec: str = "raw", model: str = "llama-3.1-8b", page_size: int = 16) -> float:
    """Bytes of a token, all layers, whole pages without padding."""
    from nanokv.bench.size import measure

    return measure(model, "bfloat16", codec, page_size).layout.page_payload / page_size


@card(
    question="Int4 with a float16 scale and minimum for each group of 32 numbers. How many bits a number, and how "
    "many times smaller than bf16? And with one scale for a whole vector of 128?",
    answer="Two float16 are 32 bits over 32 numbers, so one bit each: 5 bits, 3.2 times smaller, not 4. Over groups "
    "of 128 it would be 4.25 bits and 3.76 times. With only a scale, one for a vector of 128: 4.125 bits, 3.88 times. "
    "Always quote true bits, with everything stored beside the codes, and state the vector's length: at 64 the same "
    "codec takes 4.25.",
    follow_ups=(
        "What stays unquantised in a real system, and what does that do to the number?",
        "Why does a codec with an unquantised partial group look better in short contexts than it is?",
    ),
    file="nanokv/codecs/quantizer.py",
    command="nanokv size llama-3.1-8b --codec int4",
)
def true_bits():
    raw = token()
    grouped, whole = token("kivi4", page_size=32), token("int4")
    return {
        "5": 16 * grouped / raw,
        "3.2": raw / grouped,
        "4": 16 / 4,
        "4.25": 16 * token("int4", "smollm2-135m-instruct") / token("raw", "smollm2-135m-instruct"),
        "3.76": 16 / 4.25,
        "4.125": 16 * whole / raw,
        "3.88": raw / whole,
        "64": 64,
    }


@card(
    question="A paper's headline: attention up to 8 times faster with 4-bit keys. What do you ask?",
    answer="Compared with what? Thirty-two bits over four is 8 by arithmetic alone, so the baseline was float32 keys, "
    "which production systems avoid. Against bf16, with 4.125 true bits, the ceiling of the memory gain is 3.88, "
    "against fp8 1.94, before a single code is unpacked. And logits only? Then values and softmax are missing from "
    "both sides. Ask for time per output token of a whole model, and the baseline's dtype.",
    follow_ups=("When is a slower kernel still worth it?", "What would you measure besides speed?"),
    file="nanokv/bench/codec_speed.py",
    command="nanokv bench codecs --codecs raw,fp8,tq4 --quick",
)
def eight_times():
    raw, codes, eight = token(), token("tq4"), 8 * token() / 16
    return {"8": 32 / 4, "4.125": 16 * codes / raw, "3.88": raw / codes, "1.94": eight / codes}


@card(
    question="Another headline: six times smaller at 3 bits. Is that possible against bf16?",
    answer="No. Three bits and a float16 length for each vector are 3.125 true bits at 128 dimensions: 5.12 times; at "
    "64 it is 4.92. Six times needs at most 2.67 true bits. Keys at three bits and values at two give 2.625, or 6.1 "
    "times, but with another quality. To check such a claim, write down the page in bytes; it takes a minute.",
    follow_ups=("Why should keys get more bits than values?", "How do four layers kept in bf16 change it?"),
    file="nanokv/codecs/__init__.py",
    command="nanokv size llama-3.1-8b --codec tq3/tq2",
)
def six_times():
    raw, three, mixed = token(), token("tq3"), token("tq3/tq2")
    small = token("raw", "smollm2-135m-instruct") / token("tq3", "smollm2-135m-instruct")
    return {
        "3.125": 16 * three / raw,
        "128": 128,
        "5.12": raw / three,
        "64": 64,
        "4.92": small,
        "2.67": 16 / 6,
        "2.625": 16 * mixed / raw,
        "6.1": raw / mixed,
    }


@card(
    question="Why does KIVI quantise keys per channel and values per token? Take int4 and one key channel 20 times as "
    "large as the others.",
    answer="Keys have a few channels that are large in every token; values do not. With one scale a token, the large "
    "channel sets the step: 2.67 times the size of the others, so most of them fall on the same one or two codes and "
    "are lost. Per channel, the large one has its own step. That needs a group of tokens, so the newest wait "
    "unquantised. The other cure is to rotate: one channel of 20 spreads over all 128, whose typical size is then 2.0 "
    "and the largest about 5.",
    follow_ups=("Before or after the rotary embedding?", "Why do values tolerate fewer bits?"),
    file="nanokv/codecs/kivi.py",
    command="nanokv learn solution 07.2 --give-up",
)
def keys_per_channel():
    import torch

    from nanokv.codecs import tables
    from nanokv.codecs.basis import haar

    x = torch.ones(64, 128)
    x[:, 0] = 20
    x *= torch.randn(64, 128, generator=torch.Generator().manual_seed(0)).sign()
    turned = x @ haar(128, 0).to(x).T
    return {
        "2.67": 20 / float(tables.uniform(4).max()),
        "128": 128,
        "2.0": float(turned.square().mean().sqrt()),
        "5": float(turned.abs().amax(1).median()),
    }


@card(
    question="A test of a 3-bit TurboQuant demands a mean squared error of at most 0.03, as the paper prints. A "
    "correct implementation fails. Why?",
    answer="The paper's 0.03 is truncated, not rounded up: the exact value of the Lloyd-Max table is 0.0340 at 128 "
    "dimensions and 0.0334 at 64. For four bits it prints 0.009 where the exact value is 0.0093. Compute the number "
    "from the density, then test against it with a tolerance from the sample size. And do not copy tables: one in "
    "circulation takes the mean of equally likely bins and has 2.1 times the error of the best table.",
    follow_ups=(
        "Why is the density of a rotated coordinate known?",
        "How far is the uniform table from the best table?",
    ),
    file="nanokv/codecs/tables.py",
    command="nanokv learn solution 07.4 --give-up",
)
def truncated_figures():
    import math
    from statistics import NormalDist

    from nanokv.codecs import tables

    exact, normal = tables.distortion(4, 128), NormalDist()
    edges = [-math.inf] + [normal.inv_cdf(i / 16) for i in range(1, 16)] + [math.inf]
    means = [16 * (normal.pdf(a) - normal.pdf(b)) for a, b in zip(edges, edges[1:], strict=False)]
    grid = [(a + b) / 2 for a, b in zip(means, means[1:], strict=False)]
    cuts = [-math.inf, *grid, math.inf]
    error = 1.0
    for mean, low, high in zip(means, cuts, cuts[1:], strict=False):
        share = normal.cdf(high) - normal.cdf(low)
        error += share * mean**2 - 2 * mean * (normal.pdf(low) - normal.pdf(high))
    return {
        "0.0340": tables.distortion(3, 128),
        "0.0334": tables.distortion(3, 64),
        "0.009": math.floor(exact * 1000) / 1000,
        "0.0093": exact,
        "2.1": error / tables.distortion(4, 512),
        "128": 128,
        "64": 64,
    }


@card(
    question="QJL adds a sign sketch of the residual and makes products unbiased. Why does it usually hurt at 3 bits?",
    answer="The sketch takes a bit from the table. With 3 bits you have a table of two and the sketch, and the error "
    "of a product is then half of pi times the error of two bits: 0.182 for 0.116, against 0.034 for a table of "
    "three. So 5.4 times the variance buys freedom from a bias of 3.4 percent, and softmax tolerates a small common "
    "factor better than noise. The goal is attention, not unbiasedness.",
    follow_ups=("Which scale removes the bias without a sketch?", "Why does an orthogonal sketch do better?"),
    file="nanokv/codecs/papers/turboquant_prod.py",
    command="nanokv bench codecs --codecs raw,tq3,tqp3 --quick",
)
def the_sketch():
    import math

    from nanokv.codecs import tables

    two, three = tables.distortion(2, 128), tables.distortion(3, 128)
    return {
        "0.182": math.pi / 2 * two,
        "0.116": two,
        "0.034": three,
        "5.4": math.pi / 2 * two / three,
        "3.4": 100 * three,
    }


@card(
    question="With a 4-bit cache the perplexity fell. Is the cache better than the original? Assume that the model "
    "gave the right one of two words 50 percent, and now gives it 60.",
    answer="It changed, and by luck towards the text. The loss fell by 0.18 nats, and yet the distribution moved away "
    "from the model's: a divergence of 0.02 nats. Perplexity averages such luck in both directions; divergence from "
    "the raw cache cannot be negative and counts every change. Report divergence, how often the most likely word "
    "changed, and a task that needs recall, at long contexts.",
    follow_ups=("Which damage do these averages still hide?", "How many tokens does the comparison need?"),
    file="nanokv/bench/codec_quality.py",
    command="nanokv bench codecs --quick --codecs raw,int4",
)
def lower_perplexity():
    import math

    return {"0.18": math.log(0.6 / 0.5), "0.02": 0.5 * math.log(0.5 / 0.6) + 0.5 * math.log(0.5 / 0.4)}
