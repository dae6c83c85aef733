"""The detokenizer: deltas are whole characters and add up to the text of decoding all ids at once."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_tokenizer import TEXTS, sentencepiece

from nanokv.text.detokenizer import Detokenizer
from nanokv.text.tokenizer import Tokenizer

_LOADED = {}


@pytest.fixture(scope="module", autouse=True)
def loaded(smollm2):
    _LOADED["bytes"] = Tokenizer.from_folder(smollm2)
    _LOADED["pieces"] = sentencepiece()


def deltas(tokenizer: Tokenizer, ids: list[int], skip_special: bool = True) -> list[str]:
    detokenizer = Detokenizer(tokenizer, skip_special)
    pieces = [*map(detokenizer.push, ids), detokenizer.flush()]
    assert detokenizer.text == "".join(pieces)
    return pieces


@pytest.mark.parametrize("kind", ["bytes", "pieces"])
@pytest.mark.parametrize("text", [*TEXTS, "กำลังทดสอบภาษาไทย", "👩‍🚀🧑🏿‍🤝‍🧑🏻", " leading", "a\ufffdb"])
def test_deltas_are_whole_characters_and_add_up_to_the_text(kind, text):
    tokenizer = _LOADED[kind]
    ids = tokenizer.encode(text)
    for skip in (True, False):
        pieces = deltas(tokenizer, ids, skip)
        assert "".join(pieces) == tokenizer.decode(ids, skip_special=skip)
        assert "\ufffd" in text or not any("\ufffd" in piece for piece in pieces)


@given(st.lists(st.integers(0, 49200) | st.integers(17, 300), max_size=60), st.booleans())
@settings(max_examples=200, deadline=None)
def test_deltas_of_any_ids_add_up_to_decoding_them_at_once(ids, skip):
    tokenizer = _LOADED["bytes"]
    assert "".join(deltas(tokenizer, ids, skip)) == tokenizer.decode(ids, skip_special=skip)


@given(st.text(max_size=30), st.integers(0, 3))
@settings(max_examples=80, deadline=None)
def test_deltas_of_truncated_pieces_add_up_to_decoding_them_at_once(text, cut):
    tokenizer = _LOADED["pieces"]
    ids = tokenizer.encode(text)
    ids = [1, *ids[: len(ids) - cut], 2]
    # the library decodes a run of bytes with a broken end as garbage, its beginning included, which was shown before
    if "\ufffd" not in tokenizer.decode(ids):
        assert "".join(deltas(tokenizer, ids)) == tokenizer.decode(ids)


def test_a_truncated_character_is_shown_at_the_end():
    for kind in ("bytes", "pieces"):
        tokenizer = _LOADED[kind]
        ids = tokenizer.encode("hello 👍")[:-1]
        pieces = deltas(tokenizer, ids)
        assert not any("\ufffd" in piece for piece in pieces[:-1])
        assert pieces[-1] == tokenizer.decode(ids).removeprefix("hello ")


def test_bytes_that_never_become_a_character_are_shown_after_a_while():
    tokenizer = _LOADED["pieces"]
    pieces = deltas(tokenizer, [3 + 0xFF] * 40)
    assert sum("\ufffd" in piece for piece in pieces) >= 4
    assert "".join(pieces) == "\ufffd" * 40


def test_special_and_unknown_tokens_inside_a_character_do_not_break_it():
    tokenizer = _LOADED["bytes"]
    first, *rest = tokenizer.encode("👍")
    assert "".join(deltas(tokenizer, [first, 2, 99999, *rest])) == "👍"


@pytest.mark.parametrize("kind", ["bytes", "pieces"])
def test_the_cost_of_a_token_does_not_grow(kind, monkeypatch):
    tokenizer = _LOADED[kind]
    ids = tokenizer.encode("hello world 漢 ") * 400
    tokenizer.is_byte_level  # noqa: B018
    looked_up = []
    for name, count in (("decode", lambda ids, skip: len(ids)), ("bytes_of_token", lambda token_id: 1)):
        original = getattr(tokenizer, name)
        monkeypatch.setattr(tokenizer, name, lambda *args, f=original, c=count: looked_up.append(c(*args)) or f(*args))
    detokenizer = Detokenizer(tokenizer)
    for token_id in ids:
        detokenizer.push(token_id)
    assert len(ids) <= sum(looked_up) <= 30 * len(ids)
