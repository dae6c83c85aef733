"""Prefixes: what may match, what breaks a match, what to evict, where to send a request."""

from nanokv.learn.cards import card


@card(
    question="Every token of a prompt of 1,024 is in the cache, in pages of 16. How many must still be computed?",
    answer="At least one: the cache keeps keys and values, not the last hidden state, and the first new token needs "
    "its logits. So a match is capped one token short of the prompt and rounded down to whole pages: 1,008 are found "
    "and 16 computed. Without the cap, a request has nothing to schedule: it waits for ever, or samples from the row "
    "of another request.",
    follow_ups=("Could you keep the last hidden state instead?", "What does the first decode step do with that page?"),
    file="nanokv/cache/manager.py",
    command="nanokv bench request --prompt-tokens 1024 --output-tokens 16",
)
def a_full_hit():
    from nanokv.bench.prefix import matchable

    found = matchable(1024, 1024, 16)
    return {"1,008": found, "16": 1024 - found}


@card(
    question="Why must the identity of a cached page include the tokens before it, and what else belongs to it?",
    answer="Keys and values depend on all earlier tokens, so equal tokens after another prefix are another page. A "
    "hash chain includes the parent's hash; a tree has it by construction. Besides tokens: everything that changes "
    "the numbers, such as weights, dtype, codec, adapter, image contents. And a salt, where tenants must not detect "
    "each other's prompts by time to first token: the same 64 tokens under another salt match 0 of 4 pages.",
    follow_ups=("How would you read a neighbour's prompt by timing?", "Why tag each field before hashing?"),
    file="nanokv/cache/radix.py",
    command="nanokv learn solution 04.2 --give-up",
)
def identity():
    from array import array

    from nanokv.cache.radix import RadixTree

    tree, tokens = RadixTree(16), array("i", range(64)).tobytes()
    node, _ = tree.match_prefix(tokens, "mine")
    tree.lock(node)
    tree.insert(node, tokens, array("i", range(4)))
    return {"64": len(tokens) // 4, "4": tree.prefix_length(tokens, "mine"), "0": tree.prefix_length(tokens, "yours")}


@card(
    question="Radix tree or a table of chained hashes for the prefix cache? Take a prompt of 64 pages and another "
    "that shares 40 of them.",
    answer="Both find the same 40 pages. The table has an entry a page, so a match is 64 look-ups at most and nothing "
    "is ever split; but it does not show which page is a leaf. The tree has an entry a branch: the 64 pages are 1 "
    "node, compared at the speed of memory. The second prompt splits it into 2, with no page copied. Leaves, locks "
    "and eviction order follow from its shape. A table is easier to share between processes.",
    follow_ups=(
        "Which half of a split keeps the identity, and why?",
        "What does a table do with a parent evicted before its child?",
    ),
    file="nanokv/cache/radix.py",
    command="nanokv learn solution 04.4 --give-up",
)
def tree_or_table():
    from array import array

    from nanokv.cache.radix import RadixTree

    tree, tokens = RadixTree(16), array("i", range(64 * 16))
    node, _ = tree.match_prefix(tokens.tobytes())
    tree.lock(node)
    tree.insert(node, tokens.tobytes(), array("i", range(64)))
    before = [len(one.pages) for one in tree.nodes() if one.pages]
    other = tokens[: 40 * 16] + array("i", range(5000, 5000 + 24 * 16))
    _, pages = tree.match_prefix(other.tobytes())
    return {"40": len(pages), "64": before[0], "1": len(before), "2": sum(bool(one.pages) for one in tree.nodes())}


@card(
    question="The prefix cache evicts the least recently used prefix first. Build the worst case: 8 conversations "
    "fit, 9 take turns, 10 rounds.",
    answer="Each conversation comes back just after its eviction: of 90 turns 0 find anything. Keeping any 7 and "
    "letting the last two compete for one place would give 63 hits after the first round. Real traces have this shape "
    "when the working set just exceeds the pool, so the hit rate drops like a cliff, not a slope. Remedies: more "
    "memory, admission by cost and reuse, or fewer conversations at a time.",
    follow_ups=("Why evict only leaves without locks?", "What should a policy weigh besides recency?"),
    file="nanokv/cache/radix.py",
    command="nanokv learn solution 04.5 --give-up",
)
def the_worst_case_of_lru():
    from array import array

    from nanokv.cache.radix import RadixTree

    tree, hits, turns = RadixTree(1), 0, 0
    for _ in range(10):
        for conversation in range(9):
            tokens = array("i", [conversation]).tobytes()
            turns += 1
            hits += tree.prefix_length(tokens)
            if not tree.prefix_length(tokens) and tree.num_pages == 8:
                tree.evict(1)
            node, _ = tree.match_prefix(tokens)
            tree.lock(node)
            end, _ = tree.insert(node, tokens, array("i", [conversation]))
            tree.unlock(end)
    return {"90": turns, "0": hits, "63": 7 * (10 - 1), "7": 8 - 1}


@card(
    question="A chat product with a system prompt of 1,000 tokens has a hit ratio near zero. The current time is at "
    "token 20. What do you advise? (pages of 16)",
    answer="Everything after the first difference is another prefix: 16 tokens match. Move the time to the end of the "
    "system prompt and 992 match. The same holds for tool lists in random order, user names at the front, and "
    "templates that print the last answer differently from its tokens: decode to text, encode again, and the ids "
    "differ. So keep the ids of past turns and append to them; never rebuild them from text.",
    follow_ups=("How would you find the culprit in production?", "What if a template drops earlier reasoning?"),
    file="nanokv/text/conversation.py",
    command="nanokv bench prefix --shared 0,0.5,1 --concurrency 1",
)
def what_breaks_hits():
    from nanokv.bench.prefix import matchable

    return {"16": matchable(1100, 20, 16), "992": matchable(1100, 1000, 16)}


@card(
    question="Four replicas each have their own prefix cache and compute 10,000 prompt tokens a second. Do you route "
    "the next turn, with 2,000 tokens of history, by load or by affinity?",
    answer="At random, a turn finds its history 25 percent of the time. Affinity saves 0.2 seconds of computing, so "
    "the turn may wait that long for its own replica and no longer: for each replica, compare the estimated queue "
    "plus uncached tokens over speed. Pure affinity fails when one popular system prompt sends all requests to one "
    "machine. The same formula is the cure, because a long queue outweighs a hit, and other replicas then cache the "
    "prefix too.",
    follow_ups=("How does the router know what a replica has cached?", "How stale may that knowledge be?"),
    file="nanokv/engine/scheduler.py",
    command="nanokv bench prefix --concurrency 4 --shared 0,0.9",
)
def affinity_or_load():
    return {"25": 100 / 4, "0.2": 2000 / 10_000}
