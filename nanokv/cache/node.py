"""Node: one node of the prefix tree (radix.py). Knows no requests and no bytes of K and V."""

from __future__ import annotations

from array import array


class Node:
    """Tokens and their pages, after those of the parent.

    tokens        bytes of whole pages of token ids; a root has none
    pages         the page ids
    children      nodes by the bytes of their first page
    ref_count     handles on this node or below it
    last_access   time of the last use, by the tree's clock
    queued        the eviction heap has an entry for the node
    salt          namespace, of a root
    state         the state at the end of the tokens, or None
    """

    __slots__ = ("children", "last_access", "pages", "parent", "queued", "ref_count", "salt", "state", "tokens")

    def __init__(
        self, parent: Node | None, tokens: bytes | bytearray, pages: array[int], salt: str | None = None
    ) -> None:
        self.parent = parent
        self.tokens = bytearray(tokens)  # grows in place while one request decodes on it
        self.pages = pages
        self.children: dict[bytes, Node] = {}
        self.ref_count = 0
        self.last_access = 0
        self.queued = False
        self.salt = salt
        self.state: int | None = None

    def path(self) -> list[Node]:
        """The nodes from the root down to this one."""
        path = [self]
        while (parent := path[-1].parent) is not None:
            path.append(parent)
        return path[::-1]
