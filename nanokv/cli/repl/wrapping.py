"""WordWrap: streamed text with line breaks between words, so that a terminal never cuts one at its right edge."""

from __future__ import annotations

from rich.cells import cell_len


class WordWrap:
    """Takes text in pieces and returns what can be written: all but a last word that may go on in the next piece.

        "What a long l" -> "What a long"
        "ine it is\\n"  -> "\\nline it is\\n"     where the line would end inside "line"

    A character of two columns (CJK, emoji) is a word of its own. A word longer than a line is cut by the terminal.
    """

    def __init__(self) -> None:
        self._column = 0
        self._spaces = self._word = ""
        self._is_cut = False  # the word is longer than a line, and its beginning is written

    def feed(self, text: str, columns: int) -> str:
        """What `text` adds to the screen. columns: the width of the terminal."""
        out: list[str] = []
        for char in text:
            if char in " \t\n" or cell_len(char) == 2:
                out.append(self._place(columns))
                self._is_cut = False
            if char == "\n":
                out.append(self._spaces + char)
                self._column, self._spaces = 0, ""
            elif char in " \t":
                self._spaces += char
            else:
                self._word += char
                if self._is_cut or cell_len(char) == 2 or cell_len(self._word) >= columns:
                    out.append(self._place(columns))
                    self._is_cut = cell_len(char) != 2
        return "".join(out)

    def rest(self, columns: int) -> str:
        """The word that waits for its end."""
        return self._place(columns)

    def _place(self, columns: int) -> str:
        """The spaces and the word, or the word on a line of its own."""
        if not self._word:
            return ""
        gap = self._column + cell_len(self._spaces.expandtabs(8))
        width = cell_len(self._word)
        breaks = self._column > 0 and gap + width > columns and not self._is_cut
        out = ("\n" if breaks else self._spaces) + self._word
        self._column = width if breaks else gap + width
        if self._is_cut:
            self._column = (self._column - 1) % columns + 1
        self._spaces = self._word = ""
        return out


def wrapped(text: str, columns: int) -> str:
    """`text` with line breaks between words."""
    wrap = WordWrap()
    return wrap.feed(text, columns) + wrap.rest(columns)
