"""Slash commands about the engine: /cache, /stats."""

from __future__ import annotations

from nanokv.cli.repl import cache_view
from nanokv.cli.repl.registry import Chat, command
from nanokv.core.errors import RequestError


@command("/cache", "draw this conversation's pages, the prefix tree, the pool")
def _cache(chat: Chat, _argument: str) -> None:
    """A page is marked * where another branch of the tree shares it: an answer that
    /regen or /undo replaced, or another conversation with the same beginning."""
    engine, tokens = chat.llm.engine, chat.conversation.token_ids
    page_size, tree = engine.layout.page_size, engine.cache.tree
    held, here = cache_view.pages_of(tree, tokens, page_size)
    decode = lambda ids: chat.conversation.tokenizer.decode(ids, skip_special=False)  # noqa: E731
    for line in (
        *cache_view.conversation_lines(held, len(tokens), page_size),
        *cache_view.tree_lines(tree, decode, here),
        *cache_view.pool_line(chat.llm.stats()).splitlines(),
    ):
        chat.terminal.line(line)


@command("/stats [on|off]", "the engine's counters; on, off: the line after answers")
def _stats(chat: Chat, argument: str) -> None:
    """38 tok · 61.2 tok/s · TTFT 41 ms · prompt 212 (cached 192) · KV 249 tok / 16 pages / 5.6 MiB
    tok     tokens of the answer, with the token that ends it
    tok/s   decode only: (tok - 1) / (time of the last token - time of the first)
    TTFT    time to first token, from Enter
    prompt  tokens of the whole conversation
    cached  tokens of these that the prefix cache had
    KV      tokens in the cache at the end of the answer, and their pages
    Time in which kernels were compiled is in no speed, and is shown apart.
    /stats alone shows the engine's counters."""
    if not argument:
        for name, value in chat.llm.stats().items():
            chat.terminal.line(f"  {name:19} {value:,}" if type(value) is int else f"  {name:19} {value}")
        return
    if argument not in ("on", "off"):
        raise RequestError("usage: /stats, /stats on or /stats off")
    chat.show_stats = argument == "on"
    chat.terminal.note(f"stats {argument}")
