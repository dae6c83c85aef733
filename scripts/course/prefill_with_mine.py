"""The prefill process of a lesson that runs with the student's functions: with them, nanokv.disagg.worker."""

from __future__ import annotations

import sys
from pathlib import Path

from nanokv.disagg import worker
from nanokv.learn.mine import bind_passed

if __name__ == "__main__":
    bind_passed(Path("my"), twins=False)
    sys.exit(worker.main(sys.argv[1:]))
