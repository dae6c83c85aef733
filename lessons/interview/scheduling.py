"""Scheduling: one step at a time, admission, waiting, preemption."""

from nanokv.learn.cards import card


@card(
    question="Static against continuous batching: four requests with answers of 10, 10, 10 and 100 tokens share a "
    "batch. How much of the work is useful, and what is decided again in each step?",
    answer="Static: the batch runs 100 steps with four places, 400 in all, of which 130 give a token of an answer: "
    "32.5 percent. Continuous batching decides the batch again in every step: a finished request leaves at once, a "
    "waiting one joins, and a prompt in chunks runs beside decodes. Head-of-line blocking returns elsewhere: a long "
    "prompt in the same step, or a request at the head of the queue that does not fit.",
    follow_ups=("Where does continuous batching lose against static?", "What must a kernel accept for this to work?"),
    file="nanokv/engine/scheduler.py",
    command="nanokv learn solution 03.6 --give-up",
)
def continuous():
    answers = [10, 10, 10, 100]
    places = len(answers) * max(answers)
    return {"400": places, "130": sum(answers), "32.5": 100 * sum(answers) / places}


@card(
    question="A prompt of 8,192 tokens arrives while others decode. The engine computes 8,000 prompt tokens a second. "
    "What does chunked prefill with a budget of 256 tokens change, and what does it cost?",
    answer="In one step, the prompt stops every running answer for 1.02 seconds. In chunks of 256 it takes 32 steps, "
    "each about 32 milliseconds, and every running request gets a token in each: time between tokens is bounded. The "
    "prompt's own first token comes a little later, weights are read 32 times instead of once, and each chunk reads "
    "the earlier keys again. Choose the largest budget whose step still meets your bound on time between tokens.",
    follow_ups=("Why must results not depend on the chunks?", "When is another process the better answer?"),
    file="nanokv/engine/scheduler.py",
    command="nanokv bench disagg --chunk 256",
)
def chunked_prefill():
    steps = 8192 / 256
    assert round(1000 * 256 / 8000) == steps  # milliseconds of one, by chance
    return {"1.02": 8192 / 8000, "32": steps}


@card(
    question="The pool is full. Recompute the victim later, or swap it out? Llama-3.1-8B, 2,000 tokens, 400 TFLOP/s "
    "of real speed, 25 GB/s over PCIe.",
    answer="Recompute: two operations a parameter and token, about 32 TFLOP, so 80 milliseconds. Swap: 262 MB, 10.5 "
    "milliseconds out and as much in: 21. On paper swapping wins by far. But a prefix tree changes it: the victim's "
    "full pages stay published until another request needs them, so often only the last page is computed again. "
    "Recompute also batches with other work, and needs no second memory to manage. Measure how often the pages are "
    "still there.",
    follow_ups=("At what context length does the comparison turn?", "What would a tier of host memory add?"),
    file="nanokv/engine/scheduler.py",
    command="nanokv size llama-3.1-8b --context 2000",
)
def recompute_or_swap():
    from nanokv.bench.size import measure

    moved = measure("llama-3.1-8b", "bfloat16", "raw", 16).payload(2000)
    work = 2 * 8.03e9 * 2000
    one_way = 1000 * moved / 25e9
    return {
        "32": work / 1e12,
        "80": 1000 * work / 400e12,
        "262": moved / 1e6,
        "10.5": one_way,
        "21": 2 * one_way,
    }


@card(
    question="Which request do you preempt, and how do you keep two requests from preempting each other for ever? The "
    "victim has 100 tokens, pages have 16.",
    answer="The newest: it loses the least. The oldest then always moves forward, so it finishes and frees pages; "
    "that is the proof against livelock. A step that preempts admits no request. And admission asks for room for all "
    "known tokens beside the room promised to running requests, with a page to spare for each, so that an admitted "
    "request is not preempted at once. The victim returns to the head of the queue; if its pages are still cached, 96 "
    "tokens match again and 4 are computed.",
    follow_ups=("What if the oldest alone does not fit?", "Why keep its sampled tokens?"),
    file="nanokv/engine/scheduler.py",
    command="nanokv learn solution 03.5 --give-up",
)
def whom_to_preempt():
    from nanokv.bench.prefix import matchable

    found = matchable(100, 100, 16)
    return {"96": found, "4": 100 - found}


@card(
    question="Eight requests with the same system prompt of 2,048 tokens and 16 of their own arrive at the same "
    "moment, on an empty cache. What does a naive prefix cache compute?",
    answer="All of it, eight times: 16,512 tokens, because nothing is published when the other seven look. Let a "
    "request wait while a running one computes its prefix, if it would share at least 32 tokens: then it is 2,176. "
    "Read the unfinished prefixes off the running requests, not from a table of promises: an abort or a preemption "
    "then needs no bookkeeping. And bound the wait: a request passed over 100 times stops waiting.",
    follow_ups=("What if the computing request is preempted?", "Why not share pages before they are computed?"),
    file="nanokv/engine/admission_policy.py",
    command="nanokv learn solution 04.6 --give-up",
)
def prefix_in_the_making():
    from nanokv.engine.admission_policy import MAX_PASSED_OVER, MIN_SHARED

    return {
        "16,512": 8 * (2048 + 16),
        "32": MIN_SHARED,
        "2,176": 2048 + 8 * 16,
        "100": MAX_PASSED_OVER,
    }


@card(
    question="One dashboard shows 40 ms between outputs, another 20 ms a token, for the same requests. Which is "
    "right? Each output carries two tokens.",
    answer="Both. Inter-token latency is the gap between outputs as they stream; time per output token divides the "
    "time after the first token by the number of tokens after it. With two tokens in an output, as speculation gives, "
    "11 outputs 40 apart hold 20 tokens after the first: 20 milliseconds each. Name the metric, say whether gaps are "
    "pooled over requests, and give percentiles: users feel the long gap, not the mean.",
    follow_ups=("Where does queueing show in these?", "What is goodput?"),
    file="nanokv/core/request.py",
    command="nanokv learn solution 01.2 --give-up",
)
def two_latencies():
    from nanokv.core.metrics import RequestMetrics

    times = [0.0] + [0.04 * (1 + i // 2) for i in range(20)]
    assert len(times) - 1 == 20
    return {"11": len(set(times)), "20": 1000 * RequestMetrics(arrival=-1.0, token_times=times).tpot}
