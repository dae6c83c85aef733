"""Disaggregation: prefill and decode in separate processes. What moves, which process owns it, how it fails."""

from nanokv.learn.cards import card


def moved(tokens: int = 8192) -> int:
    """Bytes of a prompt of Llama-3.1-70B."""
    from nanokv.bench.size import measure

    return measure("llama-3.1-70b", "bfloat16", "raw", 16).payload(tokens)


@card(
    question="Prefill on one host, decode on another: what does it cost to move a prompt of 8,192 tokens of "
    "Llama-3.1-70B over 400 Gb/s or over 100, and when does it pay? Prefill runs at 400 TFLOP/s.",
    answer="The prompt's cache is 2.5 GiB: 54 milliseconds at 400 Gb/s, 215 at 100. Computing it takes two operations "
    "a parameter and token, at least 2.87 seconds. So moving it adds 2 or 7 percent to the prefill, and in return no "
    "decode step waits for a prompt. It pays where prompts are long and answers must not stall. It loses where "
    "prompts are short, most tokens are cached, or one of the two sides is idle.",
    follow_ups=("How does the ratio change with GQA, MLA, fp8?", "How many prefill workers for one decoder?"),
    file="nanokv/disagg/dispatcher.py",
    command="nanokv size llama-3.1-70b --context 8K",
)
def moving_a_prompt():
    fast, slow = moved() / 50e9, moved() / 12.5e9
    compute = 2 * 70e9 * 8192 / 400e12
    return {
        "2.5": moved() / 2**30,
        "54": 1000 * fast,
        "215": 1000 * slow,
        "2.87": compute,
        "2": 100 * fast / compute,
        "7": 100 * slow / compute,
    }


@card(
    question="The same prompt of 2.5 GiB over 100 Gb/s: how do you hide the 215 ms?",
    answer="A layer's keys and values are final when the layer has run. So send groups of layers while later ones are "
    "computed. A layer is 33.6 MB, or 2.7 milliseconds on the wire, and computing one takes far longer. So all but "
    "the last is hidden, and of 215 milliseconds 2.7 remain visible. If a page stores its layers side by side, a "
    "group is one run of bytes. Chunked prefill hides the transfer the other way, chunk by chunk.",
    follow_ups=("What if the network is slower than the prefill?", "Where does the first token come from?"),
    file="nanokv/disagg/server.py",
    command="nanokv bench disagg --prompt-tokens 2048",
)
def layer_by_layer():
    layer = moved() / 80
    return {"33.6": layer / 1e6, "2.7": 1000 * layer / 12.5e9}


@card(
    question="The decode process gives a prefill process pages to write into. The client aborts. When are these pages "
    "free?",
    answer="Not now. The other process may be writing into them at this moment. They stay quarantined until that "
    "process has confirmed that it writes no more, or is known to be dead. Silence is not death: a stopped process "
    "that wakes up would write into a page that belongs to another request by then. So after 10 seconds of silence it "
    "is killed, and the pages are free when its process descriptor reports its end. A timeout alone only makes the "
    "corruption rare.",
    follow_ups=(
        "And between hosts, where you cannot kill the process?",
        "Which reports the end first, the socket or the descriptor?",
    ),
    file="nanokv/disagg/grants.py",
    command="nanokv chat --disagg -p 'Hello'",
)
def quarantine():
    from nanokv.disagg.config import DisaggConfig

    return {"10": DisaggConfig().heartbeat_s}


@card(
    question="Why does every message carry an attempt number and a pool generation? Is the request's id not enough?",
    answer="The same request may be computed again after a failure. Then a late DONE of its old worker would be "
    "believed, over pages of other requests. Attempt numbers are never used twice, so a message with an old number is "
    "dropped and counted. The generation does the same for the pool: page seven of a pool before a restart is another "
    "page. And failures end: after 2 remote attempts a request is computed locally, so a poisonous prompt cannot kill "
    "workers for ever.",
    follow_ups=("Which part of this is fencing?", "What must both sides agree on before the first page?"),
    file="nanokv/disagg/messages.py",
    command="nanokv learn solution 09.1 --give-up",
)
def attempts():
    from nanokv.engine.transfers import MAX_ATTEMPTS

    return {"2": MAX_ATTEMPTS}


@card(
    question="From what prompt length on does it pay to send a prefill to another process? A decode step takes 20 ms, "
    "prefill runs at 3,200 tokens a second.",
    answer="A prompt computed here lengthens a step. With 64 tokens it doubles: 20 milliseconds more for every "
    "running request, once. A transfer costs about a step as well, in messages and waiting. So below 64 uncached "
    "tokens the prompt stays here: the threshold is step time times prefill speed. Count uncached tokens, not the "
    "prompt: a long prompt with a hit is a short one.",
    follow_ups=(
        "How does a queue on the prefill side change this?",
        "Why is the threshold a constant here and not learnt?",
    ),
    file="nanokv/disagg/config.py",
    command="nanokv bench disagg --plot disagg.png",
)
def worth_asking():
    from nanokv.disagg.config import DisaggConfig

    assert DisaggConfig().min_tokens == 64
    return {"64": 0.020 * 3200, "20": 1000 * 64 / 3200}
