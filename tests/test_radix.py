"""The prefix tree: matches, splits, locks, eviction, and the time of a match."""

import random
import sys
from array import array

import pytest
from naive_cache import blob

from nanokv.cache.radix import RadixTree
from nanokv.core.errors import CacheError

PAGE = 4


class Planted(RadixTree):
    """A tree that numbers its pages and inserts whole prompts."""

    def __init__(self, page_size: int = PAGE) -> None:
        super().__init__(page_size)
        self.page_size, self.num_made = page_size, 0

    def hold(self, tokens, salt=None):
        """Matches, locks and inserts the rest. Returns the handle at the end of `tokens`."""
        node, found = self.match_prefix(blob(tokens), salt)
        self.lock(node)
        rest = len(tokens) // self.page_size - len(found)
        pages = array("i", range(self.num_made, self.num_made + rest))
        self.num_made += rest
        return self.insert(node, blob(tokens[len(found) * self.page_size :]), pages)[0]

    def plant(self, tokens, salt=None) -> None:
        self.unlock(self.hold(tokens, salt))


def pages(*names: int) -> list[int]:
    """Tokens of whole pages, each page named by one number."""
    return [name for name in names for _ in range(PAGE)]


def found(tree, tokens, salt=None) -> list[int]:
    foretold = tree.prefix_length(blob(tokens), salt)
    _, matched = tree.match_prefix(blob(tokens), salt)
    assert len(matched) == foretold
    return list(matched)


def test_a_match_is_whole_pages_and_the_rest_is_ignored():
    tree = Planted()
    tree.plant(pages(1, 2, 3))
    assert found(tree, pages(1, 2, 3)) == [0, 1, 2]
    assert found(tree, [*pages(1, 2), 3, 3, 3]) == [0, 1]
    assert found(tree, [*pages(1), 2, 2, 2, 9]) == [0]


def test_a_match_inside_a_node_splits_it_and_the_lower_part_keeps_its_identity():
    tree = Planted()
    handle = tree.hold(pages(1, 2, 3, 4))
    upper, matched = tree.match_prefix(blob(pages(1, 2, 9)))
    assert list(matched) == [0, 1] == list(upper.pages)
    assert list(handle.pages) == [2, 3] and handle.parent is upper and upper.ref_count == 1
    tree.check([handle])


def test_prefix_length_splits_no_node_and_changes_no_access_time():
    tree = Planted()
    tree.plant(pages(1, 2, 3, 4))
    tree.plant(pages(5))
    assert tree.prefix_length(blob(pages(1, 2, 9))) == 2
    assert tree.prefix_length(blob(pages(1)), "elsewhere") == 0
    assert [len(node.pages) for node in tree.nodes() if node.parent] == [1, 4]
    assert tree.evict(1) == [3]  # still the least recently used
    tree.check([])


def test_siblings_may_share_the_first_tokens_of_their_first_page():
    tree = Planted()
    tree.plant([1, 1, 1, 1])
    tree.plant([1, 1, 1, 2])
    assert (found(tree, [1, 1, 1, 2]), found(tree, [1, 1, 1, 3])) == ([1], [])


def test_tokens_are_compared_directly_so_equal_hashes_do_not_match():
    assert hash((-1,)) == hash((-2,))
    tree = Planted()
    tree.plant(pages(-1))
    assert found(tree, pages(-2)) == []


def test_namespaces_share_no_pages_and_none_differs_from_an_empty_salt():
    tree = Planted()
    for salt in (None, "", "None", "a"):
        assert found(tree, pages(1), salt) == []
        tree.plant(pages(1), salt)
    assert [found(tree, pages(1), salt) for salt in (None, "", "None", "a")] == [[0], [1], [2], [3]]


def test_an_empty_namespace_is_removed():
    tree = Planted()
    for number in range(100):
        tree.plant(pages(1), f"salt {number}")
        tree.evict(1)
    node, _ = tree.match_prefix(blob(pages(1)), "looked for in vain")
    tree.lock(node)
    tree.unlock(node)
    assert not list(tree.nodes())


def test_a_leaf_with_one_handle_grows_instead_of_starting_a_chain():
    tree = Planted()
    node = tree.hold(pages(0))
    for name in range(1, 50):
        again, adopted = tree.insert(node, blob(pages(name)), array("i", [name]))
        assert again is node and list(adopted) == [name]
    assert sum(1 for _ in tree.nodes()) == 2  # the root and one leaf
    tree.check([node])


def test_a_leaf_with_two_handles_does_not_grow():
    tree = Planted()
    first, second = tree.hold(pages(1)), tree.hold(pages(1))
    assert first is second
    longer, _ = tree.insert(first, blob(pages(2)), array("i", [7]))
    assert longer.parent is second and list(second.pages) == [0]
    tree.check([longer, second])


def test_insert_returns_the_cached_page_where_the_tree_already_has_one():
    tree = Planted()
    root, _ = tree.match_prefix(b"")
    tree.lock(root)
    tree.plant(pages(1, 2, 3))
    end, stands = tree.insert(root, blob(pages(1, 2, 5, 6)), array("i", [70, 71, 72, 73]))
    assert list(stands) == [0, 1, 72, 73] and tree.num_pages == 5
    tree.check([end])


def test_insert_at_an_unlocked_node_is_an_error():
    tree = Planted()
    tree.plant(pages(1))
    with pytest.raises(CacheError, match="holder"):
        tree.insert(tree.match_prefix(blob(pages(1)))[0], blob(pages(2)), array("i", [5]))


def test_a_lock_protects_the_matched_node_itself():
    tree = Planted()
    handle = tree.hold(pages(1, 2))
    assert (tree.num_protected, tree.evict(2)) == (2, [])
    tree.unlock(handle)
    assert (tree.num_protected, sorted(tree.evict(2))) == (0, [0, 1])


def test_unlocking_a_node_twice_is_an_error():
    tree = Planted()
    handle = tree.hold(pages(1))
    tree.unlock(handle)
    with pytest.raises(CacheError, match="twice"):
        tree.unlock(handle)


def test_protected_and_evictable_counts_stay_right_on_splits_and_shared_paths():
    tree = Planted()
    first = tree.hold(pages(1, 2, 3, 4))
    second = tree.hold(pages(1, 2, 5))
    third = tree.hold(pages(1))
    assert (tree.num_pages, tree.num_protected, tree.num_evictable) == (5, 5, 0)
    tree.unlock(first)
    assert (tree.num_protected, tree.num_evictable) == (3, 2)
    tree.unlock(second)
    assert tree.num_protected == 1
    tree.check([third])


def test_eviction_takes_the_least_recently_used_leaf_from_its_end():
    tree = Planted()
    tree.plant(pages(1, 2, 3))
    tree.plant(pages(4, 5))
    assert tree.evict(2) == [2, 1]
    assert found(tree, pages(1, 2, 3)) == [0]  # the prefix stays and is now the most recently used
    assert tree.evict(3) == [4, 3, 0]
    assert tree.num_pages == 0


def test_a_shared_parent_is_evicted_after_its_children_even_after_a_split():
    tree = Planted()
    tree.plant(pages(1, 2))
    tree.plant(pages(8))
    tree.plant(pages(1, 3))  # splits [1 2]; the shared page has just been used, page [2] has not
    assert tree.evict(4) == [1, 2, 3, 0]


def test_a_hit_moves_its_whole_path_to_the_end_of_the_eviction_queue():
    tree = Planted()
    tree.plant(pages(1, 2))
    tree.plant(pages(3))
    found(tree, pages(1, 2))
    assert tree.evict(1) == [2]


def test_an_evicted_page_is_no_longer_matched():
    tree = Planted()
    tree.plant(pages(1, 2))
    tree.evict(1)
    tree.plant(pages(7, 8))
    assert found(tree, pages(1, 2)) == [0]


def test_the_eviction_queue_does_not_grow_with_hits():
    tree = Planted()
    tree.plant(pages(1))
    for _ in range(1000):
        tree.plant(pages(1))
    assert len(tree._heap) == 1


@pytest.mark.parametrize(
    "spoil",
    [
        lambda tree, leaf: setattr(leaf, "ref_count", 1),
        lambda tree, leaf: setattr(tree, "num_protected", 1),
        lambda tree, leaf: leaf.pages.append(9),
        lambda tree, leaf: tree._heap.clear(),
        lambda tree, leaf: leaf.tokens.__setitem__(0, 99),
    ],
    ids=["lock", "counter", "pages", "queue", "key"],
)
def test_check_detects_an_inconsistent_tree(spoil):
    tree = Planted()
    tree.plant(pages(1, 2))
    tree.check([])
    spoil(tree, tree.match_prefix(blob(pages(1, 2)))[0])
    with pytest.raises(CacheError):
        tree.check([])


# -- the time of a match


def bushy(num_pages: int, page_size: int = 16) -> tuple[Planted, list[list[int]]]:
    """A tree of about `num_pages` pages and some of its prompts: 10,000 tokens, with a branch every 1 to 8 pages."""
    rng = random.Random(num_pages)
    tree, trunks = Planted(page_size), []
    num_trunks = max(1, num_pages // 6_000)
    bushiness = max(1, (num_pages // num_trunks - 625) // 139)
    for _ in range(num_trunks):
        trunk = [rng.randrange(50_000) for _ in range(10_000)]
        trunks.append(trunk)
        tree.plant(trunk)
        end = 0
        while (end := end + rng.randint(1, 8)) < 625:
            length = rng.randint(1, 2 * bushiness - 1) * page_size
            tree.plant(trunk[: end * page_size] + [rng.randrange(50_000) for _ in range(length)])
    return tree, trunks


def lines_of_a_match(tree: Planted, prompt: list[int]) -> int:
    """Lines of Python that match -> lock -> unlock of a prompt runs."""
    count = 0

    def trace(frame, event, argument):
        nonlocal count
        count += event == "line"
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        node, _ = tree.match_prefix(array("i", prompt).tobytes())
        tree.lock(node)
        tree.unlock(node)
    finally:
        sys.settrace(before)
    return count


def test_the_work_of_a_match_does_not_grow_with_the_tree():
    small, large = (
        [lines_of_a_match(tree, prompt) for prompt in prompts] for tree, prompts in map(bushy, (2_000, 60_000))
    )
    assert min(small) > 139 and max(large) < 1.5 * min(small)
