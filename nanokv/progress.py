"""A progress bar for many prompts, on stderr."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from nanokv.core.request import RequestOutput
from nanokv.engine.ticket import Ticket

MANY = 8
"""Prompts from which on a bar is shown without being asked for."""


def advance_with_bar(tickets: Sequence[Ticket], outputs: Sequence[RequestOutput], progress: bool | None) -> None:
    """Steps the engine until the tickets' samples, which arrive in `outputs`, have ended, and draws how many have.

    progress   None: draw only where stderr is a terminal
    """
    if progress is None and not (sys.stderr is not None and sys.stderr.isatty()):
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    total = sum(ticket.request.params.n for ticket in tickets)
    columns = (
        TextColumn("answers"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(),
        TextColumn("{task.fields[tokens]:,} tokens"),
    )  # fmt: skip
    with Progress(*columns, console=Console(stderr=True)) as bars:
        task = bars.add_task("", total=total, tokens=0)
        num_tokens = num_seen = 0
        for ticket in tickets:
            while ticket.advance():
                num_tokens += sum(len(output.token_ids) for output in outputs[num_seen:])
                num_seen = len(outputs)
                bars.update(task, completed=num_seen, tokens=num_tokens)
        bars.update(task, completed=total, tokens=sum(len(output.token_ids) for output in outputs))
