"""Public checks of lesson 04. All tokens of a page are the same number, the name of the page."""

from array import array

from nanokv.cache.radix import Node, RadixTree
from nanokv.core.request import Request
from nanokv.engine.admission_policy import common_prefix
from nanokv.learn.expect import equal

PAGE = 4


def as_bytes(*names: int) -> bytes:
    """The tokens of whole pages, as bytes."""
    return array("i", [name for name in names for _ in range(PAGE)]).tobytes()


def node_of(parent: Node | None, *names: int, first_page: int = 0) -> Node:
    """A node below `parent`, filed under its first page."""
    node = Node(parent, as_bytes(*names), array("i", range(first_page, first_page + len(names))))
    if parent is not None:
        parent.children[as_bytes(names[0])] = node
    return node


def named(node: Node) -> list[int]:
    """The names of the pages of a node."""
    tokens = array("i")
    tokens.frombytes(bytes(node.tokens))
    return list(tokens)[::PAGE]


def test_04_1_whole_pages_from_the_start():
    tree, node = RadixTree(PAGE), node_of(None, 1, 2, 3, 4)
    equal(tree._common_pages(node, as_bytes(1, 2, 9, 4), 0), 2, "pages that 1 2 3 4 and 1 2 9 4 share")
    equal(tree._common_pages(node, as_bytes(1, 9), 0), 1, "pages that 1 2 3 4 and 1 9 share")


def test_04_1_the_tokens_may_end_first_and_in_the_middle_of_a_page():
    tree, node = RadixTree(PAGE), node_of(None, 1, 2, 3, 4)
    equal(tree._common_pages(node, as_bytes(1, 2, 3), 0), 3, "pages that 1 2 3 4 and 1 2 3 share")
    equal(tree._common_pages(node, as_bytes(1, 2, 3)[:-4], 0), 2, "the same, one token shorter")


def test_04_1_compared_at_a_position():
    tree, node = RadixTree(PAGE), node_of(None, 5, 6, 7)
    tokens = as_bytes(1, 2, 5, 6, 8)
    equal(
        tree._common_pages(node, tokens, len(as_bytes(1, 2))),
        2,
        "pages that 5 6 7 shares with 1 2 5 6 8 from page 2 on",
    )


def family() -> tuple[RadixTree, Node, Node, Node]:
    """root - [1 2] - [3 4 5]"""
    root = node_of(None)
    upper = node_of(root, 1, 2)
    return RadixTree(PAGE), root, upper, node_of(upper, 3, 4, 5, first_page=2)


def test_04_2_whole_nodes_match_all_the_way_down():
    tree, root, upper, lower = family()
    nodes, position, partial = tree._walk(as_bytes(1, 2, 3, 4, 5), root)
    equal(nodes == [root, upper, lower], True, "root, [1 2] and [3 4 5] are on the way")
    equal(position, len(as_bytes(1, 2, 3, 4, 5)), "the byte at which the walk ends")
    equal(partial, None, "a child that matches in part")


def test_04_2_a_node_that_matches_in_part_is_returned():
    tree, root, upper, lower = family()
    nodes, position, partial = tree._walk(as_bytes(1, 2, 3, 9, 9), root)
    equal(nodes == [root, upper], True, "root and [1 2] are on the way")
    equal(position, len(as_bytes(1, 2)), "the byte at which the walk ends")
    equal(partial is lower, True, "[3 4 5] is the child that matches in part")


def test_04_2_an_unknown_page_ends_the_walk():
    tree, root, upper, _ = family()
    equal(tree._walk(as_bytes(8), root), ([root], 0, None), "the walk for page 8")
    nodes, position, partial = tree._walk(as_bytes(1, 2, 8), root)
    equal((nodes == [root, upper], position, partial), (True, len(as_bytes(1, 2)), None), "the walk for 1 2 8")


def test_04_2_tokens_after_the_last_whole_page_find_nothing():
    tree, root, upper, _ = family()
    nodes, position, partial = tree._walk(as_bytes(1, 2) + as_bytes(3)[:-4], root)
    equal(
        (nodes == [root, upper], position, partial), (True, len(as_bytes(1, 2)), None), "the walk for 1 2 and 3 tokens"
    )


def test_04_3_a_handle_counts_on_every_node_of_its_path():
    tree, root, upper, lower = family()
    tree.lock(lower)
    equal([node.ref_count for node in (root, upper, lower)], [1, 1, 1], "ref_count of root, [1 2] and [3 4 5]")
    tree.lock(upper)
    equal(
        [node.ref_count for node in (root, upper, lower)], [2, 2, 1], "ref_count of each after another handle on [1 2]"
    )


def test_04_3_pages_are_counted_once_however_many_handles_hold_them():
    tree, _, upper, lower = family()
    tree.lock(upper)
    equal(tree.num_protected, 2, "num_protected with a handle on [1 2]")
    tree.lock(lower)
    equal(tree.num_protected, 5, "num_protected with another one on [3 4 5]")
    tree.lock(lower)
    equal(tree.num_protected, 5, "num_protected with one more there")


def test_04_4_the_upper_part_is_new_and_the_lower_keeps_its_identity():
    tree, _root, _upper, lower = family()
    above = tree._split(lower, 1)
    equal(
        (named(above), list(above.pages)),
        ([3], [2]),
        "tokens and pages of the upper part of [3 4 5], split at 1",
    )
    equal((named(lower), list(lower.pages)), ([4, 5], [3, 4]), "tokens and pages of the lower part")
    equal(above is lower, False, "the upper part is the old node")


def test_04_4_parents_and_children_know_each_other():
    tree, _root, upper, lower = family()
    child = node_of(lower, 6, first_page=5)
    above = tree._split(lower, 2)
    equal(upper.children == {as_bytes(3): above}, True, "[1 2] has the upper part below it, filed under page 3")
    equal(above.children == {as_bytes(5): lower}, True, "the upper part has the lower one, filed under page 5")
    equal((above.parent is upper, lower.parent is above), (True, True), "each part knows its parent")
    equal(lower.children == {as_bytes(6): child}, True, "the children stay with the lower part")


def test_04_4_locks_and_use_hold_for_both_and_a_state_stays_below():
    tree, _, _, lower = family()
    lower.ref_count, lower.last_access, lower.state = 3, 17, 8
    above = tree._split(lower, 1)
    equal((above.ref_count, above.last_access), (3, 17), "ref_count and last_access of the upper part")
    equal((above.state, lower.state), (None, 8), "states of the upper and the lower part")


class Planted(RadixTree):
    """A tree that numbers its pages itself."""

    def __init__(self) -> None:
        super().__init__(PAGE)
        self.made = 0

    def hold(self, *names: int) -> Node:
        node, found = self.match_prefix(as_bytes(*names))
        self.lock(node)
        rest = len(names) - len(found)
        pages = array("i", range(self.made, self.made + rest))
        self.made += rest
        return self.insert(node, as_bytes(*names[len(found) :]), pages)[0]

    def plant(self, *names: int) -> None:
        self.unlock(self.hold(*names))


def test_04_5_a_leaf_loses_pages_from_its_tail():
    tree = Planted()
    tree.plant(1, 2, 3)
    equal(tree.evict(2), [2, 1], "two pages evicted of the node with pages 0 1 2")
    equal(list(tree.match_prefix(as_bytes(1, 2, 3))[1]), [0], "pages found afterwards")
    equal(tree.num_pages, 1, "num_pages")


def test_04_5_the_least_recently_used_leaf_is_evicted_first():
    tree = Planted()
    tree.plant(1)
    tree.plant(2)
    tree.plant(3)
    tree.unlock(tree.hold(1))
    equal(tree.evict(2), [1, 2], "two pages evicted after page 0 was used again")
    tree.check([])


def test_04_5_a_locked_node_is_not_evicted():
    tree = Planted()
    tree.plant(1, 2)
    handle = tree.hold(5)
    equal(sorted(tree.evict(10)), [0, 1], "pages evicted while page 2 is held")
    tree.check([handle])


def test_04_5_a_parent_is_evicted_after_its_last_child():
    tree = Planted()
    tree.plant(1, 2)
    tree.plant(1, 3)
    equal(len(tree.evict(2)), 2, "pages evicted")
    tree.check([])
    equal(list(tree.match_prefix(as_bytes(1, 2))[1]), [0], "the shared page is still found")
    equal(tree.evict(1), [0], "the last page to evict")


def test_04_5_a_state_is_lost_with_the_last_page_of_its_node():
    tree = Planted()
    node = tree.hold(1, 2)
    node.state = 4
    tree.unlock(node)
    tree.evict(1)
    equal(tree.take_cut() == [node], True, "the node that lost its state is listed by take_cut")


def prompt(*tokens: int) -> Request:
    request = Request(list(tokens))
    request.tokens = array("i", tokens)
    return request


def test_04_6_up_to_the_first_difference():
    same = list(range(50))
    equal(common_prefix(prompt(*same, 1, 2), prompt(*same, 9, 9, 9)), 50, "tokens shared, of 50 equal ones")


def test_04_6_one_token_is_left_to_compute():
    same = list(range(50))
    equal(common_prefix(prompt(*same), prompt(*same, 1)), 49, "tokens shared by a prompt of 50 and a longer one")
    equal(common_prefix(prompt(*same), prompt(*same)), 49, "tokens shared by two equal prompts of 50")
    equal(common_prefix(prompt(*same, 7), prompt(*same)), 50, "tokens shared by a prompt of 51 and its beginning")


def test_04_6_a_short_common_beginning_counts_as_none():
    same = list(range(20))
    equal(common_prefix(prompt(*same, *[1] * 20), prompt(*same, *[2] * 20)), 0, "20 equal tokens, less than 32")
