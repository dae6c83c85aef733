"""TextStream: the text of one sample. Turns tokens into text as they come, and finds stop texts across tokens."""

from __future__ import annotations

from nanokv.text.detokenizer import Detokenizer
from nanokv.text.tokenizer import Tokenizer


class TextStream:
    """The text that may be shown, and the text that is held back because it may be the beginning of a stop text.

    |<------------------ text of the tokens so far ------------------>|
    [0, shown): handed out as deltas   [shown, end): held back, at most len(longest stop) - 1 characters
    """

    def __init__(self, tokenizer: Tokenizer, stop: tuple[str, ...]) -> None:
        self._detokenizer = Detokenizer(tokenizer)
        self._stop = stop
        self._hold = max((len(text) for text in stop), default=1) - 1
        self._text = ""
        self._shown = 0
        self.stopped = False

    def push(self, token_id: int, may_stop: bool) -> None:
        """Take one more token; `stopped` is true once a stop text is complete (it is cut off, with all after it)."""
        self._take(self._detokenizer.push(token_id), may_stop)

    def flush(self, may_stop: bool) -> None:
        """No more tokens: a character that stayed incomplete becomes U+FFFD, and nothing is held back any longer."""
        if not self.stopped:
            self._take(self._detokenizer.flush(), may_stop)
        self._hold = 0

    def _take(self, new: str, may_stop: bool) -> None:
        """Appends `new` to the text. With `may_stop`, cuts it off where the earliest stop text begins, never before
        what was shown; then `stopped` is true and nothing is held back any longer.
        """
        start = max(0, len(self._text) - self._hold)
        self._text += new
        if may_stop:
            places = [place for stop in self._stop if (place := self._text.find(stop, start)) >= 0]
            if places:
                self._text = self._text[: max(self._shown, min(places))]
                self._hold = 0
                self.stopped = True

    @property
    def text(self) -> str:
        """The text that may be shown by now."""
        return self._text[: max(self._shown, len(self._text) - self._hold)]

    def take_delta(self) -> str:
        """What became showable since the last call."""
        text = self.text
        delta = text[self._shown :]
        self._shown = len(text)
        return delta
