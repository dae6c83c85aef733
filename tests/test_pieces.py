"""Pieces of a text encode as the whole does, under every way in which a tokenizer treats beginnings and spaces."""

import random

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers

from nanokv.text.template import ChatTemplate
from nanokv.text.tokenizer import Tokenizer, byte_alphabet

KINDS = ("bytes", "bytes+space", "first", "always", "never", "prepend")
PARTS = ["<s>", "</s>", "<l>", "<r>", "<b>", "tool", "a", "b", "ab", " ", "  ", "\n", "▁", "é", "[user]"]


def build(kind: str) -> Tokenizer:
    """A small tokenizer; `<l>`, `<r>` and `<b>` take the spaces on their left, right and both sides."""
    if kind.startswith("bytes"):
        letters = sorted(byte_alphabet())
        backend = tokenizers.Tokenizer(
            models.BPE({letter: i for i, letter in enumerate([*letters, "ab", "Ġa"])}, [("a", "b"), ("Ġ", "a")])
        )
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=kind == "bytes+space", use_regex=True)
        backend.decoder = decoders.ByteLevel()
    else:
        letters = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), *"▁abelorstu[]<>/", "▁a", "ab"]
        merges = [("▁", "a"), ("a", "b")]
        vocab = {letter: i for i, letter in enumerate(letters)}
        backend = tokenizers.Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", byte_fallback=True))
        if kind == "prepend":
            backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        else:
            backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=kind, split=False)
        backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    for name, strips in (("<s>", {}), ("</s>", {}), ("<l>", {"lstrip": True}), ("<r>", {"rstrip": True}),
                         ("<b>", {"lstrip": True, "rstrip": True})):  # fmt: skip
        backend.add_tokens([AddedToken(name, special=True, normalized=False, **strips)])
    backend.add_tokens([AddedToken("tool", special=False)])
    template = ChatTemplate("{% for m in messages %}<s>[{{ m.role }}]{{ m.content }}</s>{% endfor %}")
    return Tokenizer(backend, template)


BUILT = {kind: build(kind) for kind in KINDS}


@pytest.mark.parametrize("kind", KINDS)
@given(st.lists(st.sampled_from(PARTS), max_size=12).map("".join))
@settings(max_examples=60, deadline=None)
def test_pieces_encode_as_the_whole_does(kind, text):
    tokenizer = BUILT[kind]
    whole = tokenizer.encode(text)
    assert tokenizer.pieces._from(text, (), 0) == whole
    for cut in range(len(text) + 1):
        after = tokenizer.pieces.encode_after(text, (), cut)
        if after is not None and any(text[:cut].endswith(name) for name in ("<s>", "</s>")):
            assert [*tokenizer.encode(text[:cut]), *after] == whole
        elif after is not None and kind == "bytes":
            assert tokenizer.decode([*tokenizer.encode(text[:cut]), *after], False) == tokenizer.decode(whole, False)


@pytest.mark.parametrize("kind", KINDS)
def test_a_spelled_special_token_changes_no_other_token(kind):
    """The chat begins with the ids of the same chat in which the message spells a word, and has the same turns."""
    tokenizer = BUILT[kind]
    end = tokenizer.special_id("</s>")
    for seed in range(20):
        draw = random.Random(seed)
        first, second = ("".join(draw.choices(["a", "b", "ab", " ", "[user]"], k=4)) for _ in range(2))
        spelled, plain = (
            tokenizer.chat([{"role": "user", "content": first}, {"role": "user", "content": f"{name}{second}"}])
            for name in ("</s>", "aaaa")
        )
        assert spelled.count(end) == plain.count(end) == 2
        turn = plain.index(end) + 1
        assert spelled[:turn] == plain[:turn]


def test_no_space_follows_a_special_token_where_only_the_first_word_gets_one():
    """Llama 2's Metaspace "first" beside a message that spells a special token."""
    tokenizer = BUILT["first"]
    ids = tokenizer.chat([{"role": "user", "content": "ab"}, {"role": "user", "content": "</s>"}])
    assert [tokenizer.id_to_token(i) for i in ids[:8]] == ["<s>", "[", "u", "s", "e", "r", "]", "ab"]
    assert ids.count(tokenizer.special_id("</s>")) == 2


def test_a_spelled_token_stays_text_though_the_vocabulary_joins_its_letters():
    vocab = {"<unk>": 0, "<s>": 1, "<": 2, "s": 3, ">": 4, "a": 5}
    pieces = [("<unk>", -9.0), ("<s>", 0.0), *((letter, -2.0) for letter in "<s>a")]
    backend = tokenizers.Tokenizer(models.Unigram(pieces, unk_id=0))
    backend.add_tokens([AddedToken("<s>", special=True, normalized=False)])
    tokenizer = Tokenizer(backend, ChatTemplate("<s>{{ messages[0].content }}"))
    assert tokenizer.chat([{"role": "user", "content": "a<s>a"}]) == [1, *(vocab[letter] for letter in "a<s>a")]
