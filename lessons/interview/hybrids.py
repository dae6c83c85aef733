"""Hybrids: a state instead of a cache in most layers, and the consequences for reuse."""

from nanokv.learn.cards import card


def size(model: str = "qwen3.5-9b"):
    from nanokv.bench.size import measure

    return measure(model, "bfloat16", "raw", 16)


@card(
    question="What does Qwen3.5-9B keep for a sequence, and from what length on do keys and values take more memory "
    "than the states?",
    answer="Of 32 layers 24 are Gated DeltaNet. Each keeps a float32 state, one matrix for every value head, and the "
    "last three inputs of a short convolution; together 49.1 MiB, whatever the length. The other 8 keep keys and "
    "values as usual: 32 KiB a token. The two are equal at 1,572 tokens. Short chats cost more than in a plain model, "
    "long ones much less.",
    follow_ups=("Why float32 for the state?", "What does this do to the largest batch of short requests?"),
    file="nanokv/layers/deltanet.py",
    command="nanokv size qwen3.5-9b",
)
def state_against_cache():
    one = size()
    layout, attention = one.layout, len(one.config.attention_layers)
    assert one.config.delta.kernel - 1 == 3
    return {
        "32": layout.bytes_per_token / 1024,
        "24": layout.num_layers - attention,
        "49.1": layout.state_payload / 2**20,
        "8": attention,
        "1,572": layout.state_payload / layout.bytes_per_token,
    }


@card(
    question="A context of 256K tokens: Qwen3-8B, all attention, against Qwen3.5-9B, a hybrid. What does each keep, "
    "and how much of the difference comes from the states?",
    answer="Qwen3-8B keeps 36 GiB, the hybrid 8.05. That is 4.5 times less, but not all of it comes from the states. "
    "The hybrid's attention has 4 KV heads of 256 where the other has 8 of 128, which is the same size, but it is 8 "
    "layers of 32 and not 36 of 36. Three layers of four without a cache give 4 times; the smaller number of layers "
    "gives the rest. The cache still grows with the context, only more slowly.",
    follow_ups=("When would a model with states alone lose?", "Which tasks show it first?"),
    file="nanokv/models/qwen3_next.py",
    command="nanokv size qwen3-8b qwen3.5-9b --context 256K",
)
def growth():
    plain, hybrid = size("qwen3-8b"), size()
    tokens, attention = 256 * 1024, len(hybrid.config.attention_layers)
    assert plain.layout.num_layers == 36
    assert (hybrid.config.num_kv_heads, plain.config.num_kv_heads) == (4, 8)
    a, b = plain.payload(tokens) / 2**30, hybrid.payload(tokens) / 2**30
    return {
        "36": a,
        "8.05": b,
        "4.5": a / b,
        "4": hybrid.layout.num_layers / attention,
        "256": hybrid.config.head_dim,
        "8": attention,
        "128": plain.config.head_dim,
        "32": hybrid.layout.num_layers,
    }


@card(
    question="Why can a hybrid not reuse every prefix that its attention layers have cached? What would a checkpoint "
    "at every page of 16 tokens cost in Qwen3.5-9B?",
    answer="Keys and values can be cut anywhere; a recurrent state is a summary at one position and cannot be "
    "rewound. A prefix is usable only where a copy of the state was kept, so a match is capped at the deepest "
    "checkpoint. A copy at every page would take 49.1 MiB beside a page of 0.5 MiB: 98 times as much. So keep few: "
    "where prompts branch, at the end of prompt and answer, perhaps on a coarse grid. And count both lengths, pages "
    "found and tokens reused, or a hit rate of zero stays invisible.",
    follow_ups=("Which is evicted first, the state or its pages?", "Where exactly does a branch need its checkpoint?"),
    file="nanokv/cache/states.py",
    command="nanokv learn solution 06.5 --give-up",
)
def checkpoints():
    layout = size().layout
    return {
        "49.1": layout.state_payload / 2**20,
        "0.5": layout.page_bytes / 2**20,
        "98": layout.state_bytes / layout.page_bytes,
    }


@card(
    question="What does the delta rule do that plain linear attention does not? Write the same key and value twice, "
    "then read.",
    answer="Linear attention adds the outer product each time: after two writes the key reads 2 times the value. The "
    "delta rule first reads what is stored under the key and writes only the difference: it reads 1 times the value, "
    "however often you write. So a key can be overwritten, which a memory of fixed size needs. The gate before it "
    "lets everything fade, so that old keys make room.",
    follow_ups=("What does beta do between zero and one?", "Why are keys normalised to length one?"),
    file="nanokv/kernels/reference/delta_rule.py",
    command="nanokv learn solution 06.3 --give-up",
)
def the_delta_rule():
    import numpy as np

    key, value = np.array([0.6, 0.8]), np.array([3.0, -1.0])
    added, corrected = np.zeros((2, 2)), np.zeros((2, 2))
    for _ in range(2):
        added += np.outer(key, value)
        corrected += np.outer(key, value - corrected.T @ key)
    return {"2": (added.T @ key / value)[0], "1": (corrected.T @ key / value)[0]}


@card(
    question="Prefill of 4,096 tokens through a delta-rule layer: does it take 4,096 steps, one after the other?",
    answer="Not on a GPU. In chunks of 64, only 64 steps depend on each other, and inside a chunk everything is "
    "matrix products. What a token writes depends on what earlier tokens of its chunk wrote: a lower triangular "
    "system. It is solved by substitution, for all chunks at the same time, because it needs no state. Then the state "
    "passes from chunk to chunk. The sums have another order, so the bits differ from the recurrence; where exactness "
    "is promised, the engine runs the recurrence.",
    follow_ups=("Why not powers of the matrix for the inverse?", "Why mask before taking the exponential?"),
    file="nanokv/kernels/reference/delta_rule.py",
    command="nanokv learn solution 06.4 --give-up",
)
def chunks():
    from nanokv.kernels.reference import delta_rule

    return {"64": 4096 / delta_rule.CHUNK}


@card(
    question="Speculative decoding with 4 drafts on Qwen3.5-9B: the target rejects the third. What happens to the "
    "cache, and what happens to the states?",
    answer="The keys and values of rejected tokens are cut off: reset the length, and that is all. A state has "
    "already absorbed them. Either keep a state for every position, 5 for a request, 246 MiB here, and choose one; or "
    "keep one from before and replay the accepted tokens; or keep the small inputs and replay those. The "
    "convolution's last inputs must be restored too, which is easily forgotten. That is why some libraries refuse to "
    "speculate on such models.",
    follow_ups=("Which oracle would you test the rollback against?", "What if a step without drafts follows?"),
    file="nanokv/cache/states.py",
    command="nanokv size qwen3.5-9b --context 1K",
)
def rollback():
    return {"5": 4 + 1, "246": 5 * size().layout.state_payload / 2**20}
