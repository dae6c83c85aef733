"""Draws the cache: the pages of this conversation, the prefix tree, the pool. Reads the tree, changes nothing in it.

this conversation: 86 tokens = 5 cached pages of 16 + 6 tokens
  pages   0* 1* 2* 4  5
          * shared with another branch of the tree
  open    6 of 16 tokens in no page: the next turn computes them again
prefix tree: 6 pages in 3 nodes
  └─ 3 pages [0-2]  "<|im_start|>user⏎Tell me something about rivers and lake…"
     ├─ 1 page [3]  "<|im_start|>assistant⏎The N"
     └─ 2 pages [4-5]  "<|im_start|>assistant⏎A lake is a pool of w"  <- here
pool: 200 pages of 256 B = 50.0 KiB: 6 cached, 0 held, 194 free; 0 evictions
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from rich.cells import cell_len

from nanokv.cache.node import Node
from nanokv.cache.radix import RadixTree
from nanokv.cli.common import binary, counted

WIDTH = 79
PAGES_WIDTH = 22  # columns of the page ids of one node
MOST_ROWS = 16  # rows of pages of a conversation; of more rows the middle is left out
MOST_NODES = 40  # nodes of the tree that are drawn


@dataclass(frozen=True)
class Held:
    """One page of a conversation.

    page     its id
    shared   whether more than one branch of the tree goes through it
    """

    page: int
    shared: bool


def pages_of(tree: RadixTree, tokens: list[int], page_size: int) -> tuple[list[Held], Node | None]:
    """The cached pages of the longest prefix of `tokens`, in order, and the last node on the way; None without one."""
    blob = array("i", tokens).tobytes()
    page_bytes = page_size * array("i").itemsize
    node = next((node for node in tree.nodes() if node.parent is None and node.salt is None), None)
    held: list[Held] = []
    last, position = None, 0
    while node is not None:
        node = node.children.get(blob[position : position + page_bytes])
        if node is None:
            break
        last = node
        for index, page in enumerate(node.pages):
            start = index * page_bytes
            if not blob.startswith(node.tokens[start : start + page_bytes], position + start):
                return held, last
            held.append(Held(page, _has_branches(node)))
        position += len(node.tokens)
    return held, last


def _has_branches(node: Node) -> bool:
    while len(node.children) == 1:
        node = next(iter(node.children.values()))
    return bool(node.children)


def conversation_lines(held: list[Held], num_tokens: int, page_size: int) -> Iterator[str]:
    """The lines that draw the pages of a conversation of `num_tokens` tokens."""
    in_pages = len(held) * page_size
    rest = num_tokens - in_pages
    yield f"this conversation: {counted(num_tokens, 'token')} = {counted(len(held), 'cached page')} of {page_size}" + (
        f" + {counted(rest, 'token')}" if rest else ""
    )
    if held:
        cell = max(len(str(item.page)) for item in held) + 2
        per_row = max(1, (WIDTH - 10) // cell)
        rows = [held[start : start + per_row] for start in range(0, len(held), per_row)]
        for number, row in enumerate(rows):
            if len(rows) > MOST_ROWS and MOST_ROWS // 2 <= number < len(rows) - MOST_ROWS // 2:
                if number == MOST_ROWS // 2:
                    left_out = (len(rows) - 2 * (MOST_ROWS // 2)) * per_row
                    yield f"{'':10}... {counted(left_out, 'more page')}"
                continue
            cells = (f"{item.page}{'*' if item.shared else ''}".ljust(cell) for item in row)
            yield f"  {'' if number else 'pages':8}{''.join(cells)}".rstrip()
        if any(item.shared for item in held):
            yield f"{'':10}* shared with another branch of the tree"
    if rest >= page_size:
        yield f"  missing {rest} tokens: evicted, or not computed yet; the next turn computes them"
    elif rest:
        yield f"  open    {rest} of {page_size} tokens in no page: the next turn computes them again"


def tree_lines(tree: RadixTree, decode: Callable[[list[int]], str], here: Node | None) -> Iterator[str]:
    """The lines that draw the prefix tree, one per node: pages, their ids, their text. The node `here` is marked."""
    roots = [node for node in tree.nodes() if node.parent is None]
    num_nodes = sum(1 for node in tree.nodes()) - len(roots)
    yield f"prefix tree: {counted(tree.num_pages, 'page')} in {counted(num_nodes, 'node')}"
    drawn = 0
    stack = [(child, "  ", is_last) for root in reversed(roots) for child, is_last in _children(root)]
    while stack:
        node, indent, is_last = stack.pop()
        if drawn == MOST_NODES:
            yield f"  ... {counted(num_nodes - drawn, 'more node')}"
            return
        drawn += 1
        yield _node_line(node, indent + ("└─ " if is_last else "├─ "), decode, node is here)
        below = indent + ("   " if is_last else "│  ")
        if len(below) > WIDTH // 3:  # a deep chain restarts its indentation
            below = "  "
        stack.extend((child, below, last) for child, last in _children(node))


def _children(node: Node) -> list[tuple[Node, bool]]:
    """The children, oldest last because a stack gives that first, each with whether it is drawn last."""
    return [(child, place == 0) for place, child in enumerate(reversed(node.children.values()))]


def _node_line(node: Node, branch: str, decode: Callable[[list[int]], str], is_here: bool) -> str:
    tokens = array("i")
    tokens.frombytes(bytes(node.tokens[: 4 * WIDTH]))  # the first WIDTH tokens: at least a line of text
    head = f"{branch}{counted(len(node.pages), 'page')} [{_ranges(node.pages, PAGES_WIDTH)}]"
    if node.state is not None:
        head += f" state {node.state}"
    if node.ref_count:
        head += f" locked x{node.ref_count}"
    mark = "  <- here" if is_here else ""
    room = WIDTH - len(head) - len(mark) - 4
    text = _shortened(decode(tokens.tolist()), room) if room >= 8 else ""
    return head + (f'  "{text}"' if text else "") + mark


def pool_line(stats: dict) -> str:
    """The numbers of the pool, and of the states where layers are recurrent. `stats` is LLM.stats()."""
    total, page_bytes = stats["pages_total"], stats["page_bytes"]

    def used(what: str, evictions: int) -> str:
        cached, held, free = (stats[f"{what}_{state}"] for state in ("cached", "held", "free"))
        return f"{cached:,} cached, {held:,} held, {free:,} free; {counted(evictions, 'eviction')}"

    pool = f"pool: {counted(total, 'page')} of {binary(page_bytes)} = {binary(total * page_bytes)}: "
    pool += used("pages", stats["evictions"])
    if "states_total" not in stats:
        return pool
    states = f"states: {stats['states_total']:,} of {binary(stats['state_bytes'])}: "
    return f"{pool}\n{states}{used('states', stats['state_evictions'])}"


def _ranges(pages: array, room: int) -> str:
    """Page ids in order, consecutive ones as a range ("4-7 1"), cut to `room` columns."""
    runs: list[list[int]] = []
    for page in pages:
        if runs and page == runs[-1][1] + 1:
            runs[-1][1] = page
        else:
            runs.append([page, page])
    text = ""
    for first, last in runs:
        more = f" {first}" if first == last else f" {first}-{last}"
        if len(text) + len(more) > room - 3:
            return f"{text[1:]} ..."
        text += more
    return text[1:]


def _shortened(text: str, room: int) -> str:
    """`text` on one line, cut to `room` columns."""
    flat = "".join("⏎" if char == "\n" else char if char.isprintable() else "·" for char in text)
    shown, columns = "", 0
    for char in flat:
        columns += cell_len(char)
        if columns > room - 1:
            return shown + "…"
        shown += char
    return shown
