"""RadixTree: sequences of tokens -> the pages that hold them. Knows neither requests nor bytes of K and V.

A node holds the tokens of whole pages (node.py). Tokens are compared as bytes (int32, `array('i', tokens).tobytes()`),
so that a match of thousands of tokens runs at the speed of memcmp. A page is the unit of matching, splitting and
eviction.

    root (one a namespace)
     +-- [system prompt: pages 4 7 1]            a node's children differ in their first page
          +-- [question A: pages 2 9]            a request's handle is the node that ENDS where its published
          +-- [question B: page 5]               pages end; a lock on it counts on every node up to the root

A match that ends inside a node splits it. The lower part stays the old node, so handles on it remain valid.

    before   parent -- node [p0 p1 p2 p3]          after   parent -- upper [p0 p1] -- node [p2 p3]

A node may carry a state: the checkpoint of recurrent layers at its end (states.py). It stays with the lower part.

Locks: node.ref_count is the number of handles on the node or below it, so an unlocked node has an unlocked subtree, and
all pages that are not locked can be evicted, leaf by leaf. `num_protected` counts the pages of locked nodes.
Source: SGLang RadixAttention (Zheng et al. 2024).
"""

from __future__ import annotations

import heapq
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator

from nanokv.cache.node import Node
from nanokv.core.errors import CacheError
from nanokv.core.keys import TOKEN_BYTES, page_keys, root_key


class RadixTree:
    """The prefix tree of one pool.

    page_size    tokens in a page
    identity     of the model, for the keys of pages; b"" where keys never leave the process
    Attributes: num_pages (in the tree), num_protected (of locked nodes)
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
        self._heap: list[tuple[int, int, Node]] = []  # (last_access when queued, serial, leaf)
        self._serial = 0
        self._cut: list[Node] = []  # nodes with a state whose last pages were evicted

    @property
    def num_evictable(self) -> int:
        """Pages that `evict` could return."""
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
        """The longest prefix of whole pages that is in the tree. Splits the node in which it ends.

        tokens    token ids as bytes; a partial page at the end is ignored
        Returns   the node at the end of the prefix (not locked; the root where nothing matched), and all its pages
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
        """The nodes from the root down that match completely, the byte they reach, and a child that matches in part."""
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
        """Whole pages that node.tokens shares with tokens[position:]: at least 1, by which the node was found."""
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
        assert node.parent is not None  # a root has no pages to split
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

    def lock(self, end: Node) -> None:
        """Adds a handle on the node `end`: no page from there up to the root is evicted until `unlock`."""
        node: Node | None = end
        while node is not None:
            if node.ref_count == 0:
                self.num_protected += len(node.pages)
            node.ref_count += 1
            node = node.parent

    def unlock(self, end: Node) -> None:
        """Removes a handle. Every node up to the root counts as used now. Raises CacheError for a missing handle."""
        self._clock += 1
        node: Node | None = end
        while node is not None:
            if node.ref_count == 0:
                raise CacheError("a node of the prefix tree is unlocked twice")
            node.ref_count -= 1
            if node.ref_count == 0:
                self.num_protected -= len(node.pages)
            node.last_access = self._clock
            node = node.parent
        self._enqueue_leaf(end)

    def insert(self, node: Node, tokens: bytes, pages: array[int]) -> tuple[Node, array[int]]:
        """Inserts pages below `node`, on which the caller has a handle, and moves that handle to their end.

        tokens    of whole pages, as bytes
        pages     the caller's page for each of them
        Returns   the node at their end, and the page that the tree holds for each: pages[i] where it took the caller's,
                  another page where it held these tokens before (pages[i] stays the caller's)
        Raises    CacheError for a node without a handle
        """
        if node.ref_count == 0:
            raise CacheError("only the holder of a node may extend it")
        size, position, in_tree = self._page_bytes, 0, array("i")
        while position < len(tokens):
            child = node.children.get(tokens[position : position + size])
            if child is None:
                rest = pages[position // size :]
                return self._append(node, tokens[position:], rest), in_tree + rest
            if not tokens.startswith(child.tokens, position):
                child = self._split(child, self._common_pages(child, tokens, position))
            if child.ref_count == 0:
                self.num_protected += len(child.pages)
            child.ref_count += 1
            in_tree.extend(child.pages)
            position += len(child.tokens)
            node = child
        return node, in_tree

    def _append(self, node: Node, tokens: bytes, pages: array[int]) -> Node:
        self._keys.update(zip(pages, page_keys(bytes(tokens), self._page_size, self._last_key(node)), strict=True))
        self.num_pages += len(pages)
        self.num_protected += len(pages)
        if node.parent is not None and not node.children and node.ref_count == 1 and node.state is None:
            # The caller has the only handle: the leaf grows, so a long answer is one node and not a chain of nodes.
            node.tokens += tokens
            node.pages.extend(pages)
            return node
        child = Node(node, tokens, pages)
        child.ref_count = 1
        node.children[self._first_page(child)] = child
        return child

    def _last_key(self, node: Node) -> bytes:
        return self._keys[node.pages[-1]] if node.pages else root_key(self._identity, node.salt)

    # -- evicting

    def evict(self, num_pages: int) -> list[int]:
        """Removes up to `num_pages` unlocked pages, least recently used leaf first, each leaf from its end, so that
        prefixes stay longest. Returns them; fewer only where all others are locked."""
        evicted: list[int] = []
        while self._heap and len(evicted) < num_pages:
            queued_at, serial, node = self._heap[0]
            if node.ref_count or node.children:
                heapq.heappop(self._heap)
                node.queued = False
            elif queued_at != node.last_access:  # used since: queued again, further back
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
        """The keys of pages in the tree, or returned by the last `evict`."""
        return [self._keys[page] for page in pages]

    def take_cut(self) -> list[Node]:
        """The nodes with a state whose last pages `evict` has removed since the last call."""
        cut, self._cut = self._cut, []
        return cut

    def _remove(self, node: Node) -> None:
        parent, node.parent = node.parent, None
        assert parent is not None  # a root is never evicted
        del parent.children[self._first_page(node)]
        self._enqueue_leaf(parent)

    def _enqueue_leaf(self, node: Node) -> None:
        """Queues an unlocked leaf for eviction; removes the root of an empty namespace."""
        if node.ref_count or node.children:
            return
        if node.parent is None:
            del self._roots[node.salt]
        elif not node.queued:
            node.queued = True
            self._serial += 1
            heapq.heappush(self._heap, (node.last_access, self._serial, node))

    def clear(self) -> list[int]:
        """Removes every node, locked or not. Returns the pages that were in the tree; their keys stay for `keys_of`."""
        pages = [page for node in self.nodes() for page in node.pages]
        self.num_pages = self.num_protected = 0
        self._roots, self._heap, self._cut = {}, [], []
        return pages

    # -- checking

    def nodes(self) -> Iterator[Node]:
        """Every node, roots included, parents before children."""
        stack = list(self._roots.values())
        while stack:
            node = stack.pop()
            yield node
            stack.extend(node.children.values())

    def check(self, handles: Iterable[Node]) -> None:
        """Recounts everything from the nodes with a handle, one entry a handle. Raises CacheError for a difference."""
        locks = Counter(node for end in handles for node in end.path())
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
