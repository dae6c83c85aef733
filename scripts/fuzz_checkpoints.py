"""Loads model folders that no honest program writes: each loads, or is refused in one line within bounds.

    python scripts/fuzz_checkpoints.py                          the listed folders
    python scripts/fuzz_checkpoints.py --mutants 10000          and so many random mutants of valid folders
    python scripts/fuzz_checkpoints.py --only st-shape          the cases whose names begin so
    python scripts/fuzz_checkpoints.py --only mutant-17 --mutants 18 --keep /tmp/found

The bounds: 2 s of CPU time, 1 GiB of memory beyond a loaded engine (where the system can limit it), no waiting, and an
error that is a NanokvError of one printable line. Folders are loaded in a process of their own and asked for two
tokens. Exits with 1 where one breaks a bound, or where a valid folder does not load. Needs POSIX.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

from hostile.cases import all_cases
from hostile.models import seeds
from hostile.mutants import mutate
from hostile.worker import Verdict, Worker


def plan(mutants: int, seed: int, names: list[str]) -> Iterator[tuple[str, str, Callable[[Path], object]]]:
    """(name, valid folder, change) of each case: valid folders, the listed ones, mutants of every valid one in turn."""
    for name in names:
        yield f"valid-{name}", name, lambda folder: None
    for name, (model, change) in all_cases().items():
        yield name, model, change
    for number in range(mutants):
        yield f"mutant-{number}", names[number % len(names)], partial(mutate, seed=f"{seed}/{number}")


def row(name: str, verdict: Verdict) -> str:
    """A line of the table."""
    text = ascii(verdict.text[:150])[1:-1]
    return f"{'  ' if verdict.ok else '!!'} {name[:40]:40} {verdict.seconds:5.2f} s  {verdict.kind:18} {text}"


def main() -> int:
    """Runs the cases and prints a table. Returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mutants", type=int, default=0, help="number of random mutants (0)")
    parser.add_argument("--seed", type=int, default=0, help="of the mutants (0)")
    parser.add_argument("--only", default="", help="beginning of the names of the cases to run")
    parser.add_argument("--seconds", type=float, default=2.0, help="CPU time of one folder (2)")
    parser.add_argument("--mib", type=int, default=1024, help="memory of one folder (1024)")
    parser.add_argument("--keep", type=Path, help="folder for copies of the folders that break a bound")
    arguments = parser.parse_args()
    kinds: Counter[str] = Counter()
    slowest: tuple[float, str] = (0.0, "")
    with tempfile.TemporaryDirectory(prefix="hostile-") as root:
        valid = {folder.name: folder for folder in seeds(Path(root, "valid"))}
        worker = Worker(valid["llama"], arguments.seconds, arguments.mib)
        work = Path(root, "work")
        for name, model, change in plan(arguments.mutants, arguments.seed, list(valid)):
            if not name.startswith(arguments.only):
                continue
            shutil.copytree(valid[model], work)
            change(work)
            verdict = worker.judge(work)
            verdict.ok &= verdict.kind == "loads" or not name.startswith("valid-")
            kinds["broken bounds" if not verdict.ok else verdict.kind] += 1
            slowest = max(slowest, (verdict.seconds, name))
            if not verdict.ok or not name.startswith("mutant-"):
                print(row(name, verdict), flush=True)
            if not verdict.ok and arguments.keep:
                shutil.copytree(work, arguments.keep / name.replace("/", "_"), symlinks=True)
            shutil.rmtree(work)
        worker.close()
    counts = ", ".join(f"{count} {kind}" for kind, count in sorted(kinds.items()))
    print(f"{kinds.total()} folders: {counts}; the slowest took {slowest[0]:.2f} s ({slowest[1]})")
    return 1 if kinds["broken bounds"] else 0


if __name__ == "__main__":
    sys.exit(main())
