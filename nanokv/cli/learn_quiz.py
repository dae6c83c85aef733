"""nanokv learn quiz: asks interview cards one by one. It reads lines, so it works in a terminal and in a pipe."""

from __future__ import annotations

import sys
import textwrap
from collections.abc import Sequence

import click

from nanokv.learn.cards import Card

WIDTH = 100


def quiz(cards: Sequence[Card]) -> None:
    """Asks each card and prints the number of known ones. The end of the input ends it early."""
    asked = known = 0
    for number, one in enumerate(cards, 1):
        click.echo(f"\n{number} of {len(cards)}   {one.topic}")
        _say(one.question)
        if _line("  Answer aloud, then Enter: ") is None:
            break
        _show(one)
        if (yes := _yes("  Did you know it? y/n: ")) is None:
            break
        asked += 1
        known += yes
    click.echo(f"\n{known} of {asked} known")


def _show(one: Card) -> None:
    click.echo()
    _say(one.answer)
    click.echo("\n  Then they ask:")
    for text in one.follow_ups:
        _say(text, "  - ")
    click.echo(f"\n  Show me: {one.file}\n           {one.command}\n")


def _say(text: str, start: str = "  ") -> None:
    click.echo(textwrap.fill(text, WIDTH, initial_indent=start, subsequent_indent=" " * len(start)))


def _yes(question: str) -> bool | None:
    """The answer to a yes-or-no question; None at the end of the input."""
    while (said := _line(question)) is not None:
        if said.lower() in ("y", "yes", "n", "no"):
            return said.lower().startswith("y")
    return None


def _line(question: str) -> str | None:
    """A line of the input without its newline; None at the end of the input."""
    click.echo(question, nl=False)
    line = sys.stdin.readline()
    if not line.endswith("\n"):  # the input ended without a newline, so this line is still open
        click.echo()
    return line.strip() if line else None
