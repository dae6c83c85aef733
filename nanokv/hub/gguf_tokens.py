"""The tokens of a GGUF file: their texts and types, and which of them begin and end a text.

Source: llama_vocab::impl::load in llama.cpp's src/llama-vocab.cpp, whose rules are followed.
"""

from __future__ import annotations

from nanokv.core.errors import PullError
from nanokv.hub.gguf_file import GGUFFile

NORMAL, UNKNOWN, CONTROL, USER_DEFINED = 1, 2, 3, 4
"""Types of tokens."""

ENDS = frozenset((
    "<|eot_id|>", "<|im_end|>", "<|end|>", "<|return|>", "<|call|>", "<|flush|>", "<|calls|>", "<end_of_turn>",
    "<|endoftext|>", "</s>", "<|eom_id|>", "<EOT>", "_<EOT>", "[EOT]", "[EOS]", "<|end_of_text|>", "<end_of_utterance>",
    "<eos>", "<turn|>", "<|tool_response>", "<｜end▁of▁sentence｜>", "[e~[",
))  # fmt: skip
"""Tokens that end an answer wherever a vocabulary has them."""
_FILL_IN = {
    "fim_pad": ("<|fim_pad|>", "<fim-pad>", "<fim_pad>", "<PAD>", "[PAD]"),
    "fim_rep": ("<|fim_repo|>", "<|repo_name|>", "<fim-repo>", "<REPO>", "<reponame>"),
    "fim_sep": ("<|file_sep|>",),
}
"""Tokens between files in training: they end an answer too. Key -> the names that count where the file lacks it."""


def token_texts(file: GGUFFile) -> list[str]:
    """The text of each token; an empty one has a name that no text contains. Raises PullError where two are equal."""
    texts = [text or f"[EMPTY_{i}]" for i, text in enumerate(file.texts("tokenizer.ggml.tokens"))]
    if len(set(texts)) != len(texts):
        raise PullError(f"{file.path}: {len(texts)} tokens, of which only {len(set(texts))} differ")
    if len(texts) > file.shape("token_embd.weight")[0]:
        rows = file.shape("token_embd.weight")[0]
        raise PullError(f"{file.path}: {len(texts)} tokens, but token_embd.weight has {rows} rows")
    return texts


def special_id(file: GGUFFile, name: str) -> int | None:
    """The id of a special token ("bos", "eos", "eot", "unknown", "padding", ...); None: there is none.

    An id beyond the vocabulary counts as missing. SentencePiece vocabularies have default ids; llama.cpp's default of
    byte-level ones, 11 (Falcon's), is not taken over: in other vocabularies it is a common piece of text.
    """
    count = len(file.texts("tokenizer.ggml.tokens"))
    defaults = {"bos": 1, "eos": 2, "unknown": 0} if file.text("tokenizer.ggml.model") == "llama" else {}
    for token_id in (file.integer(f"tokenizer.ggml.{name}_token_id", -1, -(2**31), 2**32), defaults.get(name, -1)):
        if 0 <= token_id < count:
            return token_id
    return None


def end_ids(file: GGUFFile, texts: list[str]) -> list[int]:
    """The ids of all tokens that end an answer: those of keys, first eos, then those known by name.

    texts   of all tokens
    """
    ids = [i for name in ("eos", "eot", "eom", *_FILL_IN) if (i := special_id(file, name)) is not None]
    absent = {text for name, names in _FILL_IN.items() if special_id(file, name) is None for text in names}
    found = {text: i for i, text in enumerate(texts) if text in ENDS or text in absent}
    if found.keys() & {"<|call|>", "<|calls|>"} and found.keys() & {"<|return|>", "<|flush|>"}:
        found.pop("<|end|>", None)  # there it ends one of several messages
    if "<|tool_response>" in found:
        found.pop("</s>", None)
    return list(dict.fromkeys([*ids, *found.values()]))
