"""The prefill process of a lesson that runs with the student's functions: nanokv.disagg.worker, patched with them."""

from __future__ import annotations

import sys
from pathlib import Path

from nanokv.disagg import worker
from nanokv.learn.mine import patch_passed

if __name__ == "__main__":
    patch_passed(Path("my"), twins=False)
    sys.exit(worker.main(sys.argv[1:]))
