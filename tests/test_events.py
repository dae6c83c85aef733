"""Events: typed records for any number of subscribers; an exception in a subscriber does not reach the engine."""

import json

from nanokv.core import events as events_module
from nanokv.core.event_log import EventLog
from nanokv.core.events import Event, Events, Matched, Preempted, StepLaunched


def test_every_event_has_a_unique_name_and_a_docstring():
    kinds = [kind for kind in vars(events_module).values() if isinstance(kind, type) and issubclass(kind, Event)]
    named = [kind for kind in kinds if hasattr(kind, "name")]
    assert len({kind.name for kind in named}) == len(named) >= 12
    assert all(kind.__doc__ for kind in kinds)


def test_events_without_a_subscriber_are_false():
    events = Events()
    assert not events
    unsubscribe = events.subscribe(print)
    assert events
    unsubscribe()
    unsubscribe()
    assert not events


def test_a_subscriber_that_fails_is_removed_and_the_others_continue(caplog):
    events, seen = Events(), []

    def failing(event: Event) -> None:
        raise OSError("no space left")

    events.subscribe(failing)
    events.subscribe(seen.append)
    for index in range(2):
        events.emit(Preempted("r", index))
    assert [event.index for event in seen] == [0, 1]
    assert caplog.messages == ["a subscriber of events ends here: no space left"]


def test_a_subscriber_that_unsubscribes_and_then_fails_is_removed_once(caplog):
    events = Events()

    def failing(event: Event) -> None:
        unsubscribe()
        raise OSError("no space left")

    unsubscribe = events.subscribe(failing)
    events.emit(Preempted("r", 0))
    assert not events and caplog.messages == ["a subscriber of events ends here: no space left"]


def test_the_log_numbers_steps_and_leaves_out_what_is_none(tmp_path):
    log = EventLog(str(tmp_path / "log"))
    log(Matched("r", 0, [3]))
    log(StepLaunched(7, 2, [("r", 0, 2)], [(1, 2)], []))
    log(Matched(None, None, []))
    log.close()
    records = [json.loads(line) for line in (tmp_path / "log").read_text().splitlines()]
    assert all(record.pop("t") >= 0 for record in records)
    assert records[1:] == [
        {"step": 0, "event": "match", "request": "r", "index": 0, "pages": [3]},
        {"step": 7, "event": "step", "tokens": 2, "requests": [["r", 0, 2]], "copies": [[1, 2]], "state_copies": []},
        {"step": 7, "event": "match", "pages": []},
    ]
