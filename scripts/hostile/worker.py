"""Loads model folders under limits in a process of its own: CPU time, waiting time, memory, and the form of an error.

python scripts/hostile/worker.py SANE SECONDS MIB WAIT     folders come through stdin, verdicts leave as JSON
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

MOST_CHARACTERS = 8000
"""Of an error message."""


@dataclass
class Verdict:
    """How one folder ended.

    ok        whether it loaded, or was refused as it should be
    kind      "loads", "refused", or the name of the violation
    seconds   of CPU time
    text      the message of the error, or how the request ended
    """

    ok: bool
    kind: str
    seconds: float
    text: str


class Hang(BaseException):
    """The time to wait is over. Not an Exception, so that no handler of the loader takes it."""


def judge(folder: Path, seconds: float, wait: float) -> Verdict:
    """Loads a folder, generates two tokens, and says whether all of it kept to the rules."""
    from nanokv import LLM, SamplingParams
    from nanokv.core.errors import NanokvError

    def over(*_: Any) -> None:
        raise Hang

    start = time.process_time()
    if hasattr(signal, "SIGALRM"):
        signal.signal(signal.SIGALRM, over)
        signal.setitimer(signal.ITIMER_REAL, wait)
    try:
        with LLM(folder, num_pages=20, kernels="reference", device="cpu") as llm:
            output = llm.generate([[5, 6, 7]], SamplingParams(max_tokens=2, temperature=0))[0]
        kind, text = "loads", f"{output.finish_reason} {output.error or ''}"
    except NanokvError as error:
        kind, text = "refused", str(error)
        if not text.isprintable() or len(text) > MOST_CHARACTERS:
            kind = "not one short line"
    except Hang:
        kind, text = "hangs", f"not done in {wait} s"
    except BaseException as error:  # a PanicException of a library is one
        kind, text = f"leaks {type(error).__name__}", str(error)
    finally:
        if hasattr(signal, "SIGALRM"):
            signal.setitimer(signal.ITIMER_REAL, 0)
    spent = time.process_time() - start
    if spent > seconds:
        kind = "takes long" if kind in ("loads", "refused") else kind
    return Verdict(kind in ("loads", "refused"), kind, spent, text)


def limit_memory(mib: int) -> None:
    """At most so much more address space than now, where the system can limit it."""
    with contextlib.suppress(ImportError, OSError):
        import resource

        pages = int(Path("/proc/self/statm").read_text().split()[0])
        most = pages * os.sysconf("SC_PAGE_SIZE") + (mib << 20)
        resource.setrlimit(resource.RLIMIT_AS, (most, most))


class Worker:
    """A process that judges folders, and is replaced when it dies or says nothing.

    sane      a folder that loads: the process imports and compiles with it before its memory is limited
    seconds   of CPU time that a folder may take
    mib       of memory that a folder may take
    """

    WAIT, PATIENCE, CASES = 10.0, 40.0, 1000
    """Seconds until a folder is given up; until its process is killed; folders of one process."""

    def __init__(self, sane: Path, seconds: float, mib: int) -> None:
        self._command = [sys.executable, __file__, str(sane), str(seconds), str(mib), str(self.WAIT)]
        self._process: subprocess.Popen[str] | None = None
        self._left = 0

    def judge(self, folder: Path) -> Verdict:
        """The verdict on one folder."""
        if self._process is None or self._process.poll() is not None or self._left == 0:
            self.close()
            self._process = subprocess.Popen(
                self._command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
            )
            self._left = self.CASES
            self._answer(2 * self.PATIENCE)
        self._left -= 1
        assert self._process.stdin is not None
        self._process.stdin.write(f"{folder}\n")
        self._process.stdin.flush()
        return self._answer(self.PATIENCE)

    def _answer(self, patience: float) -> Verdict:
        assert self._process is not None and self._process.stdout is not None
        ready, _, _ = select.select([self._process.stdout], [], [], patience)
        line = self._process.stdout.readline() if ready else ""
        if line:
            return Verdict(**json.loads(line))
        self._process.kill()
        code = self._process.wait()
        self.close()
        return Verdict(False, "process dies" if ready else "hangs in a library", patience, f"exit status {code}")

    def close(self) -> None:
        """Ends the process."""
        if self._process is not None:
            self._process.kill()
            self._process.communicate()
            self._process = None


def main() -> None:
    """Judges the folders whose paths come through stdin."""
    parser = argparse.ArgumentParser(description=__doc__)
    for name, kind in (("sane", Path), ("seconds", float), ("mib", int), ("wait", float)):
        parser.add_argument(name, type=kind)
    arguments = parser.parse_args()
    import torch

    torch.set_num_threads(1)
    print(json.dumps(asdict(judge(arguments.sane, arguments.seconds, 60))), flush=True)
    limit_memory(arguments.mib)
    for line in sys.stdin:
        verdict = judge(Path(line.rstrip("\n")), arguments.seconds, arguments.wait)
        print(json.dumps(asdict(verdict)), flush=True)


if __name__ == "__main__":
    main()
