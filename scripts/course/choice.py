"""The exercises that a class gets. `export` and `grade` choose the same."""

from __future__ import annotations

import random
import re

from nanokv.core.check import check_integer
from nanokv.core.errors import CourseError
from nanokv.learn.course import Course, Exercise

A_LESSON = 3
"""Exercises of each lesson in a variant."""


def choose(course: Course, variant: int, numbers: str | None) -> list[Exercise]:
    """The exercises of the chosen lessons; above variant 0 three of each lesson.

    numbers   numbers and ranges such as "1-4" or "2,4-6"; None: all lessons
    Raises    CourseError for a lesson that does not exist and for a negative variant
    """
    check_integer(CourseError, "variant", variant, 0)
    wanted = _range(course, numbers)
    chosen = []
    for number in wanted:
        mine = course.of_lesson(number)
        if variant:
            drawn = random.Random(f"variant {variant} lesson {number}").sample(mine, min(A_LESSON, len(mine)))
            mine = [one for one in mine if one in drawn]
        chosen += mine
    return chosen


def _range(course: Course, text: str | None) -> list[int]:
    known = [lesson.number for lesson in course.lessons]
    if text is None:
        return known
    if not re.fullmatch(r"\d{1,20}(-\d{1,20})?(,\d{1,20}(-\d{1,20})?)*", text):
        raise CourseError(f"lessons={text!r}: expected numbers and ranges, as 1-4 or 2,4-6")
    wanted: set[int] = set()
    for part in text.split(","):
        first, last = (int(end) for end in (part.split("-") if "-" in part else (part, part)))
        if first not in known or last not in known or first > last:
            there = f"there are the lessons {', '.join(map(str, known))}"
            raise CourseError(f"lessons={text!r}: {part}: expected a lesson, or a first and a last one; {there}")
        wanted |= {number for number in known if first <= number <= last}
    return sorted(wanted)
