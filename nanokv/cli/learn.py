"""nanokv learn: exercises whose solution is the engine. Your functions are in my/, one file each."""

from __future__ import annotations

import random

import click

from nanokv.cli.common import Group
from nanokv.cli.learn_report import check_and_report, print_next, print_totals, write_fresh
from nanokv.core.errors import CourseError
from nanokv.learn.checking import student_path
from nanokv.learn.course import Exercise, load_course
from nanokv.learn.progress import MY, Progress
from nanokv.learn.source import solution

MARKS = {"passed": "x", "changed": "~", "started": ".", "new": " "}


def _exercise(ctx: click.Context, parameter: click.Parameter, value: str | None) -> Exercise | None:
    return None if value is None else load_course().exercise(value)


exercise_argument = click.argument("exercise", metavar="ID", callback=_exercise)


@click.group(
    cls=Group,
    invoke_without_command=True,
    epilog="\b\nExamples:\n  nanokv learn\n  nanokv learn start 02.1\n  nanokv learn check 02.1\n  nanokv learn watch",
)
@click.pass_context
def learn(context: click.Context) -> None:
    """Write parts of this engine yourself. Without a command: your points and the next exercise."""
    if context.invoked_subcommand is None:
        course, progress = load_course(), Progress(MY)
        print_totals(course, progress)
        print_next(course, progress)


@learn.command("list", epilog="Example: nanokv learn list")
def list_() -> None:
    """Show all lessons and exercises: [x] passed, [~] changed since, [.] started."""
    course, progress = load_course(), Progress(MY)
    for lesson in course.lessons:
        click.echo(f"{lesson.name}   {lesson.title}")
        for one in course.of_lesson(lesson.number):
            mark = MARKS[progress.status(one)]
            may = "  may be skipped" if one.optional else ""
            click.echo(f"  [{mark}] {one.id}  {one.title:52} {'*' * one.difficulty:5} {one.minutes:3} min{may}")
    for path in progress.foreign(course):
        click.echo(f"{path}: this course has no such exercise; the file stays as it is")


@learn.command(epilog="Example: nanokv learn start 02.1")
@exercise_argument
def start(exercise: Exercise) -> None:
    """Write my/ID.py: signature, docstring and a TODO."""
    path = MY / exercise.file
    if path.exists():
        raise CourseError(f"{path}: exists already; nanokv learn check {exercise.id} runs it")
    write_fresh(exercise)
    click.echo(f"{path}: {exercise.title}, about {exercise.minutes} minutes")
    click.echo(f"write {exercise.function}, then: nanokv learn check {exercise.id}")


@learn.command("check", epilog="Example: nanokv learn check 02.1")
@exercise_argument
@click.pass_context
def check_(context: click.Context, exercise: Exercise) -> None:
    """Run the public checks of an exercise against my/ID.py. Exit code 1 when one fails."""
    if not check_and_report(load_course(), exercise):
        context.exit(1)


@learn.command(epilog="Example: nanokv learn watch 02.1")
@click.argument("exercise", metavar="ID", required=False, callback=_exercise)
def watch(exercise: Exercise | None) -> None:
    """Check again whenever the file is saved. Keys: n next, h hint, l list, r run, q quit."""
    from nanokv.cli.learn_watch import watch as watch_exercises

    course = load_course()
    watch_exercises(course, exercise or Progress(MY).current(course))


@learn.command(epilog="Example: nanokv learn hint 02.1")
@exercise_argument
def hint(exercise: Exercise) -> None:
    """Print the hint of an exercise."""
    click.echo(exercise.hint)


@learn.command("solution", epilog="Example: nanokv learn solution 02.1 --give-up")
@exercise_argument
@click.option("--give-up", is_flag=True, help="Print it although yours has not passed.")
def solution_(exercise: Exercise, give_up: bool) -> None:
    """Print the engine's function once yours has passed."""
    if not give_up and Progress(MY).status(exercise) != "passed":
        raise CourseError(f"exercise {exercise.id}: not passed yet; --give-up prints the solution all the same")
    click.echo(f"# {exercise.target}\n{solution(exercise)}", nl=False)


@learn.command("progress", epilog="Example: nanokv learn progress")
def progress_() -> None:
    """Show the passed exercises and their points, by lesson."""
    course, progress = load_course(), Progress(MY)
    for lesson in course.lessons:
        mine = course.of_lesson(lesson.number)
        done = [one for one in mine if progress.status(one) == "passed"]
        bar = "#" * len(done) + "." * (len(mine) - len(done))
        points = f"{sum(one.points for one in done):3} of {sum(one.points for one in mine):3} points"
        click.echo(f"{lesson.name:24} {bar:8} {len(done)} of {len(mine)}   {points}")
    print_totals(course, progress)


@learn.command(epilog="Example: nanokv learn reset 02.1")
@exercise_argument
def reset(exercise: Exercise) -> None:
    """Begin an exercise again. Your file stays, under another name."""
    path = student_path(exercise, MY)
    number = 1
    while (kept := path.with_suffix(f".py.{number}")).exists():
        number += 1
    path.rename(kept)
    write_fresh(exercise)
    Progress(MY).note(exercise, passed=False)
    click.echo(f"{path}: as at the start; your file is now {kept}")


@learn.command("quiz", epilog="Example: nanokv learn quiz --topic paging -n 3")
@click.option("--topic", metavar="TOPIC", help="Only this topic. Default: all, and their names first.")
@click.option("-n", "count", type=click.IntRange(min=1), default=5, show_default=True, help="Questions to ask.")
def quiz_(topic: str | None, count: int) -> None:
    """Ask interview questions. You answer; then come an answer, the next questions, a file and a command to show."""
    from nanokv.cli.learn_quiz import quiz
    from nanokv.learn.cards import load_cards, topics

    cards = load_cards(topic)
    if topic is None:
        click.echo(f"{len(cards)} cards; topics: {', '.join(topics())}")
    quiz(random.sample(cards, min(count, len(cards))))
