"""The tokenizer inside a GGUF file, as tokenizer.json: byte-level BPE, or SentencePiece BPE with scores."""

from __future__ import annotations

from typing import TYPE_CHECKING

from nanokv.core.errors import PullError
from nanokv.hub.gguf_file import GGUFFile
from nanokv.hub.gguf_splits import KINDS, SPLITS
from nanokv.hub.gguf_tokens import CONTROL, ENDS, NORMAL, UNKNOWN, USER_DEFINED, special_id, token_texts

if TYPE_CHECKING:
    from tokenizers import Tokenizer

_LONGEST = 512
"""Letters of a piece of a SentencePiece vocabulary: each way to cut it is tried."""


def build_tokenizer(file: GGUFFile) -> tuple[Tokenizer, dict]:
    """Builds the tokenizer of a GGUF file.

    Returns   the tokenizer, and the content of tokenizer_config.json
    Raises    PullError naming a kind of tokenizer that is not supported, or a vocabulary that contradicts itself
    """
    kind, texts = file.text("tokenizer.ggml.model"), token_texts(file)
    types = file.numbers("tokenizer.ggml.token_type", len(texts), NORMAL)
    vocab = {text: i for i, text in enumerate(texts)}
    try:
        if kind == "gpt2":
            tokenizer, add_bos = _byte_level(file, vocab)
        elif kind == "llama":
            tokenizer, add_bos = _sentence_pieces(file, vocab, types)
        else:
            raise PullError(f"{file.path}: tokenizer model {kind!r:.60} is not supported; 'llama' and 'gpt2' are")
        _add_tokens(tokenizer, texts, types)
        config = _special_tokens(file, tokenizer, texts, add_bos)
    except (PullError, MemoryError):
        raise
    except Exception as error:  # the library raises bare Exceptions
        reason = " ".join(str(error).split())
        raise PullError(f"{file.path}: its vocabulary and merges contradict each other: {reason:.100}") from error
    return tokenizer, config


def _byte_level(file: GGUFFile, vocab: dict[str, int]) -> tuple[Tokenizer, bool]:
    """Byte-level BPE: the text is cut by the expressions of its kind; and whether a text begins with bos."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

    name = file.text("tokenizer.ggml.pre", "default")
    if name not in SPLITS:
        raise PullError(f"{file.path}: pre-tokenizer {name!r:.60} is not supported; supported are {', '.join(KINDS)}")
    splits = SPLITS[name]
    merges = []
    for merge in file.texts("tokenizer.ggml.merges"):
        middle = merge.find(" ", 1)
        if middle < 0:
            raise PullError(f"{file.path}: the merge {merge!r:.60} is not two pieces with a space between")
        merges.append((merge[:middle], merge[middle + 1 :]))
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges, ignore_merges=splits.ignore_merges))
    steps: list[pre_tokenizers.PreTokenizer] = [
        pre_tokenizers.Split(Regex(cut), behavior="isolated") for cut in splits.cuts
    ]
    steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer, splits.add_bos


def _sentence_pieces(file: GGUFFile, vocab: dict[str, int], types: list[int]) -> tuple[Tokenizer, bool]:
    """SentencePiece BPE; and whether a text begins with bos."""
    from tokenizers import Tokenizer, models

    longest = max(vocab, key=len, default="")
    if len(longest) > _LONGEST:
        raise PullError(
            f"{file.path}: token {vocab[longest]} has {len(longest)} letters; at most {_LONGEST} are supported"
        )
    unknown = next((text for text, i in vocab.items() if types[i] == UNKNOWN), None)
    merges = merges_from_scores(vocab, file.numbers("tokenizer.ggml.scores", len(vocab)))
    model = models.BPE(vocab=vocab, merges=merges, unk_token=unknown, fuse_unk=True, byte_fallback=True)
    tokenizer = Tokenizer(model)
    _cut_pieces(tokenizer, file.flag("tokenizer.ggml.add_space_prefix", True))
    return tokenizer, True


def _cut_pieces(tokenizer: Tokenizer, space_first: bool) -> None:
    """A space is the letter ▁, which also precedes the text; unknown letters become bytes."""
    from tokenizers import decoders, normalizers

    letters: list[normalizers.Normalizer] = [normalizers.Replace(" ", "▁")]
    text = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    if space_first:
        letters.insert(0, normalizers.Prepend("▁"))
        text.append(decoders.Strip(" ", left=1))
    tokenizer.normalizer = normalizers.Sequence(letters)
    tokenizer.decoder = decoders.Sequence(text)


def _add_tokens(tokenizer: Tokenizer, texts: list[str], types: list[int]) -> None:
    """Marks the tokens that are found in a text before it is cut. Those that end an answer are special by name."""
    from tokenizers import AddedToken

    special = [t for t, kind in zip(texts, types, strict=True) if kind in (UNKNOWN, CONTROL) or t in ENDS]
    plain = [t for t, kind in zip(texts, types, strict=True) if kind == USER_DEFINED and t not in ENDS]
    for is_special, added in ((True, special), (False, plain)):
        tokenizer.add_tokens([AddedToken(text, special=is_special, normalized=False) for text in added])


def _special_tokens(file: GGUFFile, tokenizer: Tokenizer, texts: list[str], add_bos: bool) -> dict:
    """The content of tokenizer_config.json; lets the tokenizer add the first and the last token of a text."""
    from tokenizers import processors

    config: dict = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    for field, key in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding")):
        if (token_id := special_id(file, key)) is not None:
            config[f"{field}_token"] = texts[token_id]
    add_bos = file.flag("tokenizer.ggml.add_bos_token", add_bos)
    first = [config["bos_token"]] if add_bos and "bos_token" in config else []
    add_eos = file.flag("tokenizer.ggml.add_eos_token", False)
    last = [config["eos_token"]] if add_eos and "eos_token" in config else []
    if first or last:
        second = [f"{text}:1" for text in [*first, "$B", *last]]
        tokenizer.post_processor = processors.TemplateProcessing(
            single=[*first, "$A", *last],
            pair=[*first, "$A", *last, *second],
            special_tokens=[(text, texts.index(text)) for text in {*first, *last}],
        )
    return config


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
