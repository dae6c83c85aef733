"""RadixTree: runs of tokens -> the pages that hold them. Knows neither requests nor bytes of K and V.

A node holds a run of whole pages. Tokens are compared as bytes (int32, `array('i', tokens).tobytes()`), so that a match
of thousands of tokens runs at the speed of memcmp; a page is the smallest thing that is matched, split or evicted.

    root (one a namespace)
     +-- [system prompt: pages 4 7 1]            a node's children differ in their first page
          +-- [question A: pages 2 9]            a request's handle is the node that ENDS where its published
          +-- [question B: page 5]               pages end; a lock on it counts on every node up to the root

A match that ends inside a run splits it. The lower part keeps its identity: whatever ended there still does.

    before   parent -- node [p0 p1 p2 p3]          after   parent -- upper [p0 p1] -- node [p2 p3]

A node may carry a state: the checkpoint of recurrent layers at the end of its run (states.py). A split leaves it below.

Locks: node.ref_count is the number of handles on the node or below it, so an unlocked node has an unlocked subtree, and
all pages that are not locked can be evicted, leaf by leaf. Each node pays for its own pages in `num_protected`.
Source: SGLang RadixAttention (Zheng et al. 2024).
"""

from __future__ import annotations

import heapq
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator

from nanokv.core.errors import CacheError
from nanokv.core.keys import TOKEN_BYTES, page_keys, root_key


class Node:
    """A run of tokens and its pages, below the run of its parent. `last_access` is a tick of the tree's clock."""

    __slots__ = ("children", "last_access", "pages", "parent", "queued", "ref_count", "salt", "state", "tokens")

    def __init__(self, parent: Node | None, tokens: bytes, pages: array[int], salt: str | None = None) -> None:
        self.parent = parent
        self.tokens = bytearray(tokens)  # grows in place while its only reader decodes
        self.pages = pages
        self.children: dict[bytes, Node] = {}  # by the bytes of the child's first page
        self.ref_count = 0
        self.last_access = 0
        self.queued = False  # whether the eviction heap has an entry for it
        self.salt = salt  # a root's namespace
        self.state: int | None = None  # the state at the end of the run


class RadixTree:
    """The prefix tree of one pool.

    page_size    tokens in a page
    identity     of the model, for the keys of pages; b"" where keys never leave the process
    Attributes: num_pages (in the tree), num_protected (of them, under a lock); both are kept up to date step by step
    """

    def __init__(self, page_size: int, identity: bytes = b"") -> None:
        self.num_pages = 0
        self.num_protected = 0
        self._page_size = page_size
        self._page_bytes = page_size * TOKEN_BYTES
        self._identity = identity
        self._keys: dict[int, bytes] = {}  # page -> key; beside the nodes, so that splits need not carry them
        self._roots: dict[str | None, Node] = {}
        self._clock = 0
        self._heap: list[tuple[int, int, Node]] = []  # (last use when queued, serial, leaf)
        self._serial = 0
        self._cut: list[Node] = []  # nodes with a state that lost their last pages

    @property
    def num_evictable(self) -> int:
        return self.num_pages - self.num_protected

    # -- finding

    def prefix_length(self, tokens: bytes, salt: str | None = None) -> int:
        """Pages that `match_prefix` would find. Changes nothing."""
        if salt not in self._roots:
            return 0
        _, position, partial = self._walk(tokens, self._roots[salt])
        in_part = 0 if partial is None else self._common_pages(partial, tokens, position)
        return position // self._page_bytes + in_part

    def state_length(self, tokens: bytes, salt: str | None = None) -> int:
        """Pages up to the deepest state that `match_prefix` would pass. Changes nothing."""
        nodes = self._walk(tokens, self._roots[salt])[0] if salt in self._roots else []
        last = max((place for place, node in enumerate(nodes) if node.state is not None), default=-1)
        return sum(len(node.pages) for node in nodes[: last + 1])

    def match_prefix(self, tokens: bytes, salt: str | None = None) -> tuple[Node, array[int]]:
        """The longest run of whole pages that stands in the tree, and the node that ends there (split if need be).

        tokens    tokens as bytes; what is left over after the last whole page is ignored
        Returns the node (a root when nothing matched; not locked yet) and the pages on the way to it
        """
        root = self._roots.setdefault(salt, Node(None, b"", array("i"), salt))
        nodes, position, partial = self._walk(tokens, root)
        if partial is not None:
            nodes.append(self._split(partial, self._common_pages(partial, tokens, position)))
        self._clock += 1
        pages = array("i")
        for node in nodes:
            node.last_access = self._clock
            pages.extend(node.pages)
        return nodes[-1], pages

    def _walk(self, tokens: bytes, root: Node) -> tuple[list[Node], int, Node | None]:
        """Nodes from the root down whose runs match whole, the byte they reach, and a child that matches in part."""
        page_bytes = self._page_bytes
        node, position, nodes = root, 0, [root]
        while (child := node.children.get(tokens[position : position + page_bytes])) is not None:
            if not tokens.startswith(child.tokens, position):
                return nodes, position, child
            node = child
            nodes.append(node)
            position += len(node.tokens)
        return nodes, position, None

    def _common_pages(self, node: Node, tokens: bytes, position: int) -> int:
        """Whole pages that node.tokens shares with tokens[position:], 1 or more: it was found by its first page."""
        size = self._page_bytes
        low, high = 1, len(node.tokens) // size
        while low < high:
            middle = (low + high + 1) // 2
            if tokens.startswith(node.tokens[low * size : middle * size], position + low * size):
                low = middle
            else:
                high = middle - 1
        return low

    def _split(self, node: Node, num_pages: int) -> Node:
        """Puts the first `num_pages` of the node into a new parent; the node keeps its identity and the rest."""
        at = num_pages * self._page_bytes
        upper = Node(node.parent, node.tokens[:at], node.pages[:num_pages])
        upper.ref_count, upper.last_access = node.ref_count, node.last_access
        node.parent.children[self._first_page(node)] = upper
        node.parent, node.tokens, node.pages = upper, node.tokens[at:], node.pages[num_pages:]
        upper.children[self._first_page(node)] = node
        return upper

    def _first_page(self, node: Node) -> bytes:
        return bytes(node.tokens[: self._page_bytes])

    # -- holding

    def lock(self, node: Node) -> None:
        """One more handle on the node: nothing on its way to the root is evicted until `unlock`."""
        while node is not None:
            if node.ref_count == 0:
                self.num_protected += len(node.pages)
            node.ref_count += 1
            node = node.parent

    def unlock(self, node: Node) -> None:
        """One handle less. Its whole path counts as used just now."""
        self._clock += 1
        leaf = node
        while node is not None:
            if node.ref_count == 0:
                raise CacheError("a node of the prefix tree is unlocked twice")
            node.ref_count -= 1
            if node.ref_count == 0:
                self.num_protected -= len(node.pages)
            node.last_access = self._clock
            node = node.parent
        self._enqueue_leaf(leaf)

    def insert(self, node: Node, tokens: bytes, pages: array[int]) -> tuple[Node, array[int]]:
        """Continues the tree below `node`, on which the caller has a lock, and moves that lock to the new end.

        tokens  of whole pages, as bytes
        pages   the caller's page for each of them
        Returns the node that ends there and the pages that now stand in the tree: pages[i] itself where it was
                adopted, another page where the tree held that page's tokens already (then pages[i] stays the caller's)
        """
        if node.ref_count == 0:
            raise CacheError("only the holder of a node may extend it")
        size, position, standing = self._page_bytes, 0, array("i")
        while position < len(tokens):
            child = node.children.get(tokens[position : position + size])
            if child is None:
                rest = pages[position // size :]
                return self._append(node, tokens[position:], rest), standing + rest
            if not tokens.startswith(child.tokens, position):
                child = self._split(child, self._common_pages(child, tokens, position))
            if child.ref_count == 0:
                self.num_protected += len(child.pages)
            child.ref_count += 1
            standing.extend(child.pages)
            position += len(child.tokens)
            node = child
        return node, standing

    def _append(self, node: Node, tokens: bytes, pages: array[int]) -> Node:
        self._keys.update(zip(pages, page_keys(bytes(tokens), self._page_size, self._last_key(node)), strict=True))
        self.num_pages += len(pages)
        self.num_protected += len(pages)
        if node.parent is not None and not node.children and node.ref_count == 1 and node.state is None:
            # Only the caller ends here: the leaf grows, and a long answer is one node, not a chain of one-page nodes.
            node.tokens += tokens
            node.pages.extend(pages)
            return node
        child = Node(node, tokens, pages)
        child.ref_count = 1
        node.children[self._first_page(child)] = child
        return child

    def _last_key(self, node: Node) -> bytes:
        return self._keys[node.pages[-1]] if node.pages else root_key(self._identity, node.salt)

    # -- letting go

    def evict(self, num_pages: int) -> list[int]:
        """Takes up to `num_pages` unlocked pages out of the tree, least recently used leaf first, each leaf from its
        tail, so that prefixes survive longest. Returns them; fewer only when everything else is locked."""
        evicted: list[int] = []
        while self._heap and len(evicted) < num_pages:
            queued_at, serial, node = self._heap[0]
            if node.ref_count or node.children:
                heapq.heappop(self._heap)
                node.queued = False
            elif queued_at != node.last_access:  # used since: it queues again, further back
                heapq.heapreplace(self._heap, (node.last_access, serial, node))
            else:
                kept = max(0, len(node.pages) - (num_pages - len(evicted)))
                evicted.extend(reversed(node.pages[kept:]))
                if node.state is not None:
                    self._cut.append(node)
                if kept:
                    del node.pages[kept:], node.tokens[kept * self._page_bytes :]
                else:
                    heapq.heappop(self._heap)
                    self._remove(node)
        self.num_pages -= len(evicted)
        return evicted

    def keys_of(self, pages: Iterable[int]) -> list[bytes]:
        """The keys of pages that are in the tree, or that the last `evict` returned."""
        return [self._keys[page] for page in pages]

    def take_cut(self) -> list[Node]:
        """The nodes that carry a state and lost pages under it to `evict` since the last call."""
        cut, self._cut = self._cut, []
        return cut

    def _remove(self, node: Node) -> None:
        parent, node.parent = node.parent, None
        del parent.children[self._first_page(node)]
        self._enqueue_leaf(parent)

    def _enqueue_leaf(self, node: Node) -> None:
        """Queues a node that may now be evicted; forgets the root of an empty namespace."""
        if node.ref_count or node.children:
            return
        if node.parent is None:
            del self._roots[node.salt]
        elif not node.queued:
            node.queued = True
            self._serial += 1
            heapq.heappush(self._heap, (node.last_access, self._serial, node))

    # -- proving

    def nodes(self) -> Iterator[Node]:
        """Every node, roots included, parents before children."""
        stack = list(self._roots.values())
        while stack:
            node = stack.pop()
            yield node
            stack.extend(node.children.values())

    def check(self, handles: Iterable[Node]) -> None:
        """Recounts everything from the nodes that are held right now. Raises CacheError where the books disagree."""
        locks: Counter[Node] = Counter()
        for node in handles:
            while node is not None:
                locks[node] += 1
                node = node.parent
        queued = {node for _, _, node in self._heap}
        num_pages = num_protected = 0
        for node in self.nodes():
            num_pages += len(node.pages)
            num_protected += len(node.pages) if node.ref_count else 0
            if node.ref_count != locks.pop(node, 0):
                raise CacheError(f"a node with pages {list(node.pages)[:8]} miscounts its locks ({node.ref_count})")
            if len(node.tokens) != len(node.pages) * self._page_bytes:
                raise CacheError(f"a node has {len(node.tokens)} bytes of tokens and {len(node.pages)} pages")
            keys = page_keys(bytes(node.tokens), self._page_size, self._last_key(node.parent or node))
            if keys != self.keys_of(node.pages):
                raise CacheError(f"pages {list(node.pages)[:8]} are filed under the keys of other tokens")
            if any(child.parent is not node or self._first_page(child) != key for key, child in node.children.items()):
                raise CacheError("a child is filed under another key or parent")
            if node.parent is None and not (node.ref_count or node.children):
                raise CacheError(f"namespace {node.salt!r} is empty and still there")
            if node.parent is not None and not (node.pages and (node.ref_count or node.children or node in queued)):
                raise CacheError("an unlocked leaf would never be evicted, or a node has no pages")
        if locks:
            raise CacheError("a held node is not in the tree")
        if (num_pages, num_protected) != (self.num_pages, self.num_protected):
            raise CacheError(
                f"{num_pages} pages, {num_protected} locked; counted {self.num_pages}, {self.num_protected}"
            )
