"""Failure stories: what broke in real engines, and the law that would have kept it from breaking."""

from nanokv.learn.cards import card


@card(
    question="A small engine decides that a new page is due where len(seq) % 16 == 1. Readers filed seven issues "
    "about that line, and some patches broke it. What is the real fault?",
    answer="The line is right only if you know when a token is appended: at 16 tokens one page is enough, at 17 a "
    "second is due, but by then the token is already in the list and not yet in the cache. Two lengths hide behind "
    "one number. Name them: what is known and what is computed. Then write the rule once, as pages for so many "
    "tokens, 1 and 2 here, and append in one place. Clever conditions on an unnamed moment are how off-by-ones live "
    "for ever.",
    follow_ups=("Which law ties the two lengths together?", "What does overlap of steps add to them?"),
    file="nanokv/core/request.py",
    command="nanokv learn solution 02.1 --give-up",
)
def an_unnamed_moment():
    from nanokv.core.spec import PageLayout

    layout = PageLayout([], 16)
    assert 17 % 16 == 1
    return {"16": layout.page_size, "17": layout.page_size + 1, "1": layout.pages_for(16), "2": layout.pages_for(17)}


@card(
    question="An engine keyed its prefix cache with Python's built-in hash (CVE-2025-25183). Why is that a hole, and "
    "what would you use for a cache of a billion pages?",
    answer="It is made for dictionaries, not against people: hash(-1) equals hash(-2), and since the hash of None is "
    "a constant, whole chains could be predicted and collisions built: one user's prompt answered over another's "
    "keys. Use a cryptographic hash over typed, length-framed fields. With 256 bits a billion pages collide by "
    "accident with odds of two to the power of 197 against. Or compare the tokens themselves, as a tree does: then "
    "there is nothing to collide.",
    follow_ups=("Why frame the fields?", "What does the comparison of tokens cost in a long match?"),
    file="nanokv/cache/radix.py",
    command="nanokv learn solution 04.2 --give-up",
)
def predictable_hash():
    import hashlib
    import math

    assert hash(-1) == hash(-2)
    bits = hashlib.sha256().digest_size * 8
    return {"256": bits, "197": bits - (2 * math.log2(1e9) - 1)}


@card(
    question="Reference code that recomputes a few tokens over reused chunks handed the chosen queries to a kernel "
    "with its usual causal mask. Two queries, at positions 10 and 99 of 100. What does the first one see?",
    answer="A usual causal mask is aligned to the bottom right: it takes the two queries for the last two positions. "
    "So the first sees 99 keys, of which only 11 are its past: the future leaks in, and quality numbers look fine "
    "because leaks help. The mask must compare positions, key at most query, never row numbers. Then scattered rows, "
    "chunks and decodes need no cases of their own. Test: recomputing every token must equal a plain prefill.",
    follow_ups=("Which kernels take positions?", "Which other test must rise monotonically?"),
    file="nanokv/kernels/reference/attention.py",
    command="nanokv learn solution 08.4 --give-up",
)
def a_leaking_mask():
    import torch

    keys, queries = torch.arange(100), torch.tensor([10, 99])
    rows = torch.ones(2, 100).tril(100 - 2).bool()
    right = keys[None] <= queries[:, None]
    return {"99": int(rows[0].sum()), "11": int(right[0].sum())}


@card(
    question="In a prefix tree a request locked the path above its match, but the loop began at the parent of the "
    "matched node. Its 4 pages are the only ones in the tree. What happens under pressure?",
    answer="The node it reads from is not locked, so eviction takes all 4 pages while the request attends to them, "
    "and somebody else writes there. Wrong text, no crash. Locked rightly, eviction takes 0. The law: a handle is "
    "the node where the match ends, and a lock counts on it and on every node up to the root. And recount after "
    "every test: free, held, cached and locked pages must make up the pool, or the books are wrong before the text "
    "is.",
    follow_ups=("How does a split move the locks?", "Which counter drifts if you forget?"),
    file="nanokv/cache/radix.py",
    command="nanokv learn solution 04.3 --give-up",
)
def a_lock_too_high():
    from array import array

    from nanokv.cache.radix import RadixTree

    def tree_with_a_request():
        tree, blob = RadixTree(16), array("i", range(64)).tobytes()
        node, _ = tree.match(blob)
        tree.lock(node)
        node, _ = tree.extend(node, blob, array("i", range(4)))
        return tree, node

    wrong, node = tree_with_a_request()
    wrong.unlock(node)
    wrong.lock(node.parent)
    right, _ = tree_with_a_request()
    return {"4": len(wrong.evict(4)), "0": len(right.evict(4))}


@card(
    question="Sessions on one GPU: 12 of them have a p99 below 2.6 s, 14 have 39 s. Nothing else changed. What do "
    "you look at first?",
    answer="The working set against the pool. If 12 prefixes fit and each turn touches its own, all later turns hit: "
    "100 percent. With 14 in turns and least-recently-used eviction each is gone just before it returns: 0 percent, "
    "and every turn pays the whole prefill, which makes queues, which age the cache further. A cliff, not a slope. "
    "So watch hit ratio and evictions beside latency, admit fewer at a time, quantise, or add a tier below.",
    follow_ups=("Which alarm comes before the cliff?", "Would another policy help, and who would pay?"),
    file="nanokv/cache/manager.py",
    command="nanokv bench prefix --concurrency 12,14 --shared 0.9",
)
def the_cliff():
    from array import array

    from nanokv.cache.radix import RadixTree

    def hits(sessions, room=12, rounds=5):
        tree, found = RadixTree(1), 0
        for turn in range(sessions * rounds):
            blob = array("i", [turn % sessions]).tobytes()
            if tree.length(blob):
                found += 1
            elif tree.num_pages == room:
                tree.evict(1)
            node, _ = tree.match(blob)
            tree.lock(node)
            end, _ = tree.extend(node, blob, array("i", [turn % sessions]))
            tree.unlock(end)
        return 100 * found / (sessions * (rounds - 1))

    return {"100": hits(12), "0": hits(14)}


@card(
    question="Greedy answers change with the load: alone a prompt gives one text, in a batch another. A user calls "
    "it a bug in the cache. Is it?",
    answer="Usually not: sums. In float32, 100,000,000 plus 1 minus 100,000,000 is 0; in another order it is 1. A "
    "matrix product picks its order by the number of rows, attention by how it splits a context, so batch mates "
    "change last bits, and a near tie flips a word. But do not stop there: a wrong cache hides behind the same "
    "excuse. Make one configuration exact, rows independent of their mates and sums over tiles at absolute "
    "positions, and test bits there; then differences elsewhere are rounding.",
    follow_ups=("What does exactness cost on a GPU?", "How large may a gap be for which you accept a flip?"),
    file="nanokv/kernels/linear.py",
    command="nanokv chat --dtype float32 --temperature 0 -p 'Hello'",
)
def rounding_or_a_bug():
    import numpy as np

    big, one = np.float32(1e8), np.float32(1)
    return {"100,000,000": float(big), "0": float((big + one) - big), "1": float((big - big) + one)}
