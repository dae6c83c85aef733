"""Hidden checks of lesson 04: random trees against the engine's own functions."""

from array import array

from nanokv.cache.radix import Node, RadixTree
from nanokv.core.request import Request
from nanokv.engine.admission_policy import common_prefix
from nanokv.learn.expect import equal, random_of
from nanokv.learn.patching import reference


def history(kind: type[RadixTree], random) -> list:
    """The results of a tree in a random history of matches, extensions, releases and evictions. Checks each step."""
    size = random.choice([1, 2, 4])
    tree, handles, made, seen = kind(size), [], 0, []
    for _ in range(60):
        verb = random.choice(["hold", "hold", "drop", "evict", "state"])
        if verb == "hold":
            tokens = array("i", [random.randrange(2) for _ in range(size * random.randint(1, 8))])
            salt = random.choice([None, None, "a"])
            seen.append(tree.prefix_length(tokens.tobytes(), salt))
            node, pages = tree.match_prefix(tokens.tobytes(), salt)
            tree.lock(node)
            rest = len(tokens) // size - len(pages)
            own = array("i", range(made, made + rest))
            made += rest
            end, standing = tree.insert(node, tokens[len(pages) * size :].tobytes(), own)
            handles.append(end)
            seen += [list(pages), list(standing)]
        elif verb == "drop" and handles:
            tree.unlock(handles.pop(random.randrange(len(handles))))
        elif verb == "evict":
            seen.append(list(tree.evict(random.randint(0, 5))))
            seen.append(len(tree.take_cut()))
        elif verb == "state" and handles:
            node = random.choice(handles)
            if node.parent is not None:
                node.state = made
        seen.append((tree.num_pages, tree.num_protected))
        tree.check(handles)
    return seen


def same_histories() -> None:
    for case in range(8):
        got, expected = (history(kind, random_of(f"tree {case}")) for kind in (RadixTree, reference(RadixTree)))
        for one, other in zip(got, expected, strict=True):
            equal(one, other, "the tree's result in a random history")


def test_04_1_random_nodes():
    random = random_of("nodes")
    for _ in range(200):
        size = random.choice([1, 4])
        tree, count = RadixTree(size), random.randint(1, 12)
        own = array("i", [random.randrange(2) for _ in range(size * count)])
        start = array("i", [0] * (size * random.randint(0, 3)))
        other = own[:size] + array("i", [random.randrange(2) for _ in range(random.randint(0, size * count))])
        keep = random.randint(size, len(own))
        tokens = (start + (own[:keep] + other[keep:] if random.random() < 0.7 else other)).tobytes()
        node = Node(None, own.tobytes(), array("i", range(count)))
        arguments = node, tokens, len(start) * start.itemsize
        equal(tree._common_pages(*arguments), reference(RadixTree)(size)._common_pages(*arguments), "common pages")


def test_04_1_random_histories():
    same_histories()


def test_04_2_random_histories():
    same_histories()


def test_04_3_random_histories():
    same_histories()


def test_04_4_random_histories():
    same_histories()


def test_04_5_random_histories():
    same_histories()


def test_04_6_random_prompts():
    random = random_of("prompts")
    for _ in range(200):
        pair = []
        same = [random.randrange(3) for _ in range(random.choice([5, 31, 32, 33, 60]))]
        for _ in range(2):
            tokens = array("i", [*same, *(random.randrange(3) for _ in range(random.randint(0, 6)))])
            request = Request(list(tokens))
            request.tokens = tokens
            pair.append(request)
        equal(
            common_prefix(*pair),
            reference(common_prefix)(*pair),
            f"tokens shared by prompts of {len(same)} equal ones",
        )
