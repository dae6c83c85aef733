"""Interview cards: the numbers are right, files and commands exist, and the quiz asks them."""

import os
import shlex
import subprocess
import sys
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from nanokv.cli.main import main
from nanokv.learn.cards import Card, load_cards, topics, wrong_numbers

ROOT = Path(__file__).parents[1]
CARDS = load_cards()
WORDS = 150
"""Words of a minute."""


def each(values):
    return pytest.mark.parametrize("one", values, ids=lambda one: f"{one.topic}-{one.name}")


def quiz(*words: str, typed: str = "") -> tuple[int, str]:
    """Exit code and everything printed."""
    result = CliRunner().invoke(main, ["learn", "quiz", *words], input=typed)
    return result.exit_code, result.output


def test_there_are_sixty_cards_on_ten_topics_and_no_question_twice():
    assert len(CARDS) == len({one.question for one in CARDS}) == len({one.name for one in CARDS}) == 60
    assert topics() == [
        "arithmetic", "attention", "disaggregation", "failures", "hybrids", "paging", "prefixes", "quantization",
        "roofline", "scheduling",
    ]  # fmt: skip
    assert all(len(load_cards(topic)) >= 5 for topic in topics())


@each(CARDS)
def test_the_numbers_of_a_card_are_right(one):
    assert one.numbers(), "a card without numbers"
    assert not wrong_numbers(one)


@each(CARDS)
def test_a_card_takes_a_minute_and_has_follow_ups(one):
    assert len(one.answer.split()) <= WORDS and len(one.follow_ups) >= 2
    assert one.question.endswith(("?", ")", ".")) and all(text.endswith(("?", ".")) for text in one.follow_ups)


@pytest.mark.parametrize("name", sorted({one.file for one in CARDS}))
def test_the_file_to_show_exists(name):
    assert (ROOT / name).is_file()


@pytest.mark.parametrize("line", sorted({one.command for one in CARDS}))
def test_the_command_to_show_is_valid(line):
    program, *words = shlex.split(line)
    command, context = main, main.make_context(program, words)
    assert program == "nanokv"
    while isinstance(command, click.Group):
        name, command, words = command.resolve_command(context, [*context._protected_args, *context.args])
        context = command.make_context(name, words, parent=context)
    if line.startswith(("nanokv size ", "nanokv learn solution ")):  # the rest measures, or needs weights
        result = CliRunner().invoke(main, shlex.split(line)[1:])
        assert result.exit_code == 0 and result.output, result.output


@pytest.mark.parametrize(
    ("answer", "numbers", "words"),
    [
        ("It is 4.8.", {"4.8": 4.9}, ["4.8: computed 4.900"]),
        ("It is 4.8.", {"4.8": 4.84}, []),
        ("It is 131,072, in int4.", {"131,072": 131071}, ["131,072: computed 131,071.00"]),
        ("It is 5, not 7.", {"5": 5}, ["7: neither computed nor given"]),
        ("It is 3.", {}, []),
        ("It is five.", {"5": 5}, ["5: not in the answer"]),
    ],
)
def test_a_wrong_number_is_found(answer, numbers, words):
    one = Card("topic", "name", "Is it 3?", answer, (), "file", "command", lambda: numbers)
    assert wrong_numbers(one) == words


def test_a_quiz_asks_each_card_of_a_topic_and_counts():
    code, said = quiz("--topic", "paging", "-n", "100", typed="\ny\n\nn\n" * 3)
    assert code == 0 and said.endswith("3 of 6 known\n")
    flat = " ".join(said.replace("\n  - ", " ").split())
    for one in load_cards("paging"):
        assert all(text in flat for text in (one.question, one.answer, *one.follow_ups, one.file, one.command))


def test_a_quiz_names_the_topics_and_asks_five():
    code, said = quiz(typed="\nwhat\nyes\n" * 5)
    assert code == 0 and said.endswith("5 of 5 known\n")
    assert said.startswith("60 cards; topics: ") and all(topic in said.splitlines()[0] for topic in topics())


def test_answers_come_after_the_question_only():
    said = quiz("--topic", "paging", "-n", "1")[1]
    assert "Enter:" in said and "Show me" not in said and said.endswith("0 of 0 known\n")


def test_a_pipe_that_ends_early_ends_the_quiz_with_a_count():
    assert quiz("-n", "3", typed="\ny\n\n")[1].endswith("1 of 1 known\n")


def test_bad_input_is_one_line():
    assert quiz("--topic", "page") == (1, f"nanokv: topic 'page': expected one of {', '.join(topics())}\n")
    code, said = quiz("-n", "0")
    assert code == 2 and said.count("\n") == 1 and "'-n': 0 is not in the range" in said


def test_a_quiz_works_in_a_pipe_and_imports_nothing_heavy():
    code = (
        "import sys; from nanokv.cli.main import main\n"
        "try: main(['learn', 'quiz', '-n', '60'])\n"
        "finally: print(sorted({'torch', 'numpy', 'numba'} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        input="\ny\n" * 60,
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    assert done.stdout.endswith("60 of 60 known\n[]\n"), done.stderr
