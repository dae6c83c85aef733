"""The text of an answer as it comes: what is shown when, and where stop texts end it."""

from hypothesis import given, settings
from hypothesis import strategies as st

from nanokv.engine.text_stream import TextStream


class Pieces:
    """A byte-level tokenizer whose tokens are given bytes."""

    is_byte_level = True
    special_ids = frozenset()

    def __init__(self, table: list[bytes]) -> None:
        self.bytes_of_token = table.__getitem__


def answer(tokens: list[bytes], stop: tuple[str, ...], min_tokens: int) -> tuple[str, int]:
    """The text of an answer of these tokens, and the number of tokens that it has."""
    stream, shown = TextStream(Pieces(tokens), stop), ""
    for place in range(len(tokens)):
        stream.push(place, place + 1 >= min_tokens)
        shown += stream.take_delta()
        assert stream.text == shown
        if stream.stopped:
            return shown, place + 1
    stream.flush(True)
    return shown + stream.take_delta(), len(tokens)


def plain_answer(tokens: list[bytes], stop: tuple[str, ...], min_tokens: int) -> tuple[str, int]:
    """The same, from whole texts: a stop text counts where a token from min_tokens on completes it."""
    texts = ["", *(b"".join(tokens[: count + 1]).decode("utf-8", "ignore") for count in range(len(tokens)))]
    for count in range(max(1, min_tokens), len(tokens) + 1):
        old, new = texts[count - 1], texts[count]
        ends = [(at, at + len(text)) for text in stop for at in range(len(new)) if new.startswith(text, at)]
        starts = [start for start, end in ends if end > len(old)]
        if starts:
            return new[: min(starts)], count
    return b"".join(tokens).decode("utf-8", "replace"), len(tokens)


TOKENS = st.lists(
    st.sampled_from([b"a", b"b", b"ab", b"bba", "é".encode(), "é".encode()[:1], "é".encode()[1:]]), max_size=12
)
STOPS = st.lists(st.text("abé", min_size=1, max_size=6), max_size=3).map(tuple)


@settings(max_examples=300, deadline=None)
@given(TOKENS, STOPS, st.integers(0, 8))
def test_a_stop_text_counts_where_a_token_from_min_tokens_on_completes_it(tokens, stop, min_tokens):
    if b"".join(tokens).decode("utf-8", "ignore").encode() == b"".join(tokens):
        assert answer(tokens, stop, min_tokens) == plain_answer(tokens, stop, min_tokens)


@settings(max_examples=300, deadline=None)
@given(
    TOKENS, STOPS, st.integers(0, 14), st.lists(st.text("abz", max_size=9).map("{}z".format), min_size=1, max_size=3)
)
def test_a_stop_text_that_is_never_said_changes_no_answer(tokens, stop, min_tokens, never_said):
    assert answer(tokens, (*stop, *never_said), min_tokens) == answer(tokens, stop, min_tokens)


def test_the_rest_of_a_character_from_before_min_tokens_does_not_stop():
    stream = TextStream(Pieces(["é".encode()[:1]]), ("\ufffd",))
    stream.push(0, may_stop=False)
    stream.flush(may_stop=True)  # the answer has ended, at max_tokens below min_tokens
    assert stream.text == "\ufffd" and not stream.stopped
