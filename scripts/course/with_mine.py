"""A lesson with the student's functions in the engine and in its prefill process: python -m course.with_mine LESSON."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

from nanokv.core.errors import CourseError
from nanokv.disagg import process
from nanokv.learn.mine import patch_passed

if __name__ == "__main__":
    try:
        patch_passed(Path("my"), twins=False)
    except CourseError as error:
        sys.exit(str(error))
    process.ENTRY = "course.prefill_with_mine"
    sys.path.insert(0, "lessons")
    runpy.run_path(sys.argv[1], run_name="__main__")
