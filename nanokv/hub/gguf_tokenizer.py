"""The tokenizer inside a GGUF file, as tokenizer.json: byte-level BPE, or SentencePiece BPE with scores."""

from __future__ import annotations

from typing import TYPE_CHECKING

from nanokv.core.errors import PullError
from nanokv.hub.gguf_file import GGUFFile

if TYPE_CHECKING:
    from tokenizers import Tokenizer

_UNKNOWN, _CONTROL, _USER_DEFINED = 2, 3, 4

# Pre-tokenizers by their names in llama.cpp, with its regular expressions (src/llama-vocab.cpp).
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)"
_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_SPLITS = {
    "default": [r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", r"[0-9][0-9][0-9]"],
    **{name: [_LLAMA3] for name in ("llama-bpe", "llama3", "llama-v3")},
}
_KINDS = ("smollm", "gpt-2", *_SPLITS)


def build_tokenizer(file: GGUFFile) -> tuple[Tokenizer, dict]:
    """Builds the tokenizer of a GGUF file.

    Returns   the tokenizer, and the content of tokenizer_config.json
    Raises    PullError naming a kind of tokenizer that is not supported
    """
    from tokenizers import AddedToken, Tokenizer, models, processors

    kind = file.require("tokenizer.ggml.model")
    tokens: list[str] = file.require("tokenizer.ggml.tokens")
    types: list[int] = file.get("tokenizer.ggml.token_type", [1] * len(tokens))
    vocab = {token: i for i, token in enumerate(tokens)}
    if not len(vocab) == len(tokens) == len(types):
        raise PullError(f"{file.path}: {len(tokens)} tokens, {len(vocab)} different ones, {len(types)} token types")
    pre = file.get("tokenizer.ggml.pre", "default")
    if kind == "gpt2" and pre in _KINDS:
        merges = [tuple(merge.split(" ", 1)) for merge in file.require("tokenizer.ggml.merges")]
        tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges, ignore_merges=_SPLITS.get(pre) == [_LLAMA3]))
        _cut_bytes(tokenizer, pre)
        add_bos = file.get("tokenizer.ggml.add_bos_token", _SPLITS.get(pre) == [_LLAMA3])
    elif kind == "llama":
        unknown = next((token for token, t in zip(tokens, types, strict=True) if t == _UNKNOWN), None)
        merges = merges_from_scores(vocab, file.require("tokenizer.ggml.scores"))
        model = models.BPE(vocab=vocab, merges=merges, unk_token=unknown, fuse_unk=True, byte_fallback=True)
        tokenizer = Tokenizer(model)
        _cut_pieces(tokenizer, file.get("tokenizer.ggml.add_space_prefix", True))
        add_bos = file.get("tokenizer.ggml.add_bos_token", True)
    else:
        name = f"tokenizer model {kind!r}" if kind != "gpt2" else f"pre-tokenizer {pre!r}"
        raise PullError(f"{file.path}: {name} is not supported; 'llama' and 'gpt2' with {', '.join(_KINDS)} are")

    for special, chosen in ((True, (_UNKNOWN, _CONTROL)), (False, (_USER_DEFINED,))):
        added = [token for token, t in zip(tokens, types, strict=True) if t in chosen]
        tokenizer.add_tokens([AddedToken(token, special=special, normalized=False) for token in added])
    config: dict = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    for field, key in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding")):
        token_id = file.get(f"tokenizer.ggml.{key}_token_id")
        if token_id is not None and 0 <= token_id < len(tokens):
            config[f"{field}_token"] = tokens[token_id]
    if add_bos and "bos_token" in config:
        bos = config["bos_token"]
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", pair=f"{bos} $A {bos}:1 $B:1", special_tokens=[(bos, vocab[bos])]
        )
    return tokenizer, config


def _cut_bytes(tokenizer: Tokenizer, pre: str) -> None:
    """Byte-level BPE: text is split by the expressions of its kind. SmolLM makes each digit a token."""
    from tokenizers import Regex, decoders, pre_tokenizers

    steps: list[pre_tokenizers.PreTokenizer] = []
    if pre in _SPLITS:
        steps += [pre_tokenizers.Split(Regex(cut), behavior="isolated") for cut in _SPLITS[pre]]
    elif pre == "smollm":
        steps.append(pre_tokenizers.Digits(individual_digits=True))
    steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=pre not in _SPLITS))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps)
    tokenizer.decoder = decoders.ByteLevel()


def _cut_pieces(tokenizer: Tokenizer, space_first: bool) -> None:
    """SentencePiece: a space is the letter ▁, which also precedes the text; unknown letters become bytes."""
    from tokenizers import decoders, normalizers

    letters: list[normalizers.Normalizer] = [normalizers.Replace(" ", "▁")]
    text = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    if space_first:
        letters.insert(0, normalizers.Prepend("▁"))
        text.append(decoders.Strip(" ", left=1))
    tokenizer.normalizer = normalizers.Sequence(letters)
    tokenizer.decoder = decoders.Sequence(text)


def merges_from_scores(vocab: dict[str, int], scores: list[float]) -> list[tuple[str, str]]:
    """The merges of a SentencePiece BPE model: each split of a piece into two pieces, the best-scored piece first.

    vocab    piece -> token id
    scores   of each token id
    Source   transformers, convert_slow_tokenizer.generate_merges
    """
    found = []
    for piece, token_id in vocab.items():
        ways = [(piece[:i], piece[i:]) for i in range(1, len(piece)) if piece[:i] in vocab and piece[i:] in vocab]
        ways.sort(key=lambda way: (vocab[way[0]], vocab[way[1]]))
        found += [(scores[token_id], left, right) for left, right in ways]
    found.sort(key=lambda entry: (entry[0], len(entry[1]), len(entry[2])), reverse=True)
    return [(left, right) for _, left, right in found]
