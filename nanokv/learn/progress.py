"""Progress: which exercises have passed, in my/progress.json. A pass belongs to the file's content at that time."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

from nanokv.core.errors import CourseError
from nanokv.learn.course import Course, Exercise

MY = Path("my")
"""The student's folder, relative to the current one."""
FILE = "progress.json"


class Progress:
    """The passes of one folder. Passes of exercises that this course does not have are kept.

    folder   the student's files
    Raises   CourseError where progress.json is not readable; it is never overwritten then
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._path = folder / FILE
        self._passed: dict[str, str] = {}
        if self._path.is_file():
            try:
                passed = json.loads(self._path.read_text("utf-8"))["passed"]
                self._passed = {str(key): str(digest) for key, digest in passed.items()}
            except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
                raise CourseError(
                    f"{self._path}: not readable ({type(error).__name__}); remove it, and a check writes a new one"
                ) from None

    def status(self, exercise: Exercise) -> str:
        """ "new", "started", "passed", or "changed": the file has passed and differs by now."""
        path = self.folder / exercise.file
        if not path.is_file():
            return "new"
        known = self._passed.get(exercise.id)
        if known is None:
            return "started"
        return "passed" if known == _digest(path) else "changed"

    def note(self, exercise: Exercise, passed: bool) -> None:
        """Records the result of a check of the file as it is now."""
        if passed:
            self._passed[exercise.id] = _digest(self.folder / exercise.file)
        elif self._passed.pop(exercise.id, None) is None:
            return
        scratch = self._path.with_suffix(".tmp")
        scratch.write_text(json.dumps({"passed": dict(sorted(self._passed.items()))}, indent=1) + "\n", "utf-8")
        os.replace(scratch, self._path)

    def current(self, course: Course) -> Exercise | None:
        """The exercise to work on: the first that is started and has not passed, else the next new one.

        The next one follows the last that has passed, so a skipped exercise is offered again only at the end. None
        where all have passed.
        """
        statuses = [self.status(exercise) for exercise in course.exercises]
        begun = [place for place, status in enumerate(statuses) if status in ("started", "changed")]
        new = [place for place, status in enumerate(statuses) if status == "new"]
        last = max((place for place, status in enumerate(statuses) if status == "passed"), default=-1)
        places = begun + [place for place in new if place > last] + new
        return course.exercises[places[0]] if places else None

    def foreign(self, course: Course) -> list[Path]:
        """Files of exercises that this course does not have: an older or a newer course had them."""
        known = {exercise.file for exercise in course.exercises}
        found = sorted(self.folder.glob("[0-9][0-9]_[0-9]*.py")) if self.folder.is_dir() else []
        return [path for path in found if path.name not in known]


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()[:16]
