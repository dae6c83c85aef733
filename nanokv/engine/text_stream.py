"""TextStream: the text of one sample. Decodes tokens one by one, and finds stop texts across tokens."""

from __future__ import annotations

from nanokv.text.detokenizer import Detokenizer
from nanokv.text.tokenizer import Tokenizer


class TextStream:
    """Text that has been shown, and text that is held back because a stop text may begin in it.

    |<------------------ text of the tokens so far ------------------>|
    [0, shown): returned as deltas     [shown, end): held back, at most len(longest stop) - 1 characters

    tokenizer   decodes the tokens
    stop        stop texts
    Attributes: stopped (a stop text is complete)
    """

    def __init__(self, tokenizer: Tokenizer, stop: tuple[str, ...]) -> None:
        self._tokenizer = tokenizer
        self._detokenizer = Detokenizer(tokenizer)
        self._stop = stop
        self._hold = max((len(text) for text in stop), default=1) - 1
        self._text = ""
        self._shown = 0
        self._may_stop = False  # of the last token, whose text may still wait for `flush`
        self.stopped = False

    def restarted(self) -> TextStream:
        """A stream without tokens, which ends at the same stop texts."""
        return TextStream(self._tokenizer, self._stop)

    def push(self, token_id: int, may_stop: bool) -> None:
        """Appends the text of a token. `may_stop`: a stop text that is complete is cut off, and sets `stopped`."""
        self._may_stop = may_stop
        self._take(self._detokenizer.push(token_id), may_stop)

    def flush(self, may_stop: bool) -> None:
        """Ends the text: an incomplete character becomes U+FFFD, and no text is held back any more."""
        if not self.stopped:
            self._take(self._detokenizer.flush(), may_stop and self._may_stop)
        self._hold = 0

    def _take(self, new: str, may_stop: bool) -> None:
        """Appends `new` to the text. With `may_stop`, cuts it off at the earliest of the stop texts that `new`
        completes, never before what was shown; then `stopped` is true and nothing is held back any longer.
        """
        old = len(self._text)
        self._text += new
        if may_stop:
            places = [p for stop in self._stop if (p := self._text.find(stop, max(0, old + 1 - len(stop)))) >= 0]
            if places:
                self._text = self._text[: max(self._shown, min(places))]
                self._hold = 0
                self.stopped = True

    @property
    def text(self) -> str:
        """The text that may be shown."""
        return self._text[: max(self._shown, len(self._text) - self._hold)]

    def take_delta(self) -> str:
        """The text that may be shown since the last call."""
        text = self.text
        delta = text[self._shown :]
        self._shown = len(text)
        return delta
