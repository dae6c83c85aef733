"""A prefill process of this host, as the decode process sees it: started, watched, killed, and known to be dead.

Killing takes effect when `gone` says so and not before: a pidfd becomes readable once every thread of the process has
ended, and its mappings have been taken down by then. Only then may its pages be given to others.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys

import msgspec

from nanokv.disagg.channel import Channel, wait
from nanokv.disagg.worker import WorkerSpec

ENTRY = "nanokv.disagg.worker"
"""The module that a prefill process runs."""


class LocalWorker:
    """One process, from start to death.

    A group of its own (process_group=0) has two effects: Ctrl-C in the terminal reaches the decode process only, and
    should that one die while this one is stopped, the kernel hangs up on the orphaned group, which ends it.
    """

    def __init__(self, spec: WorkerSpec) -> None:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-m", ENTRY, str(theirs.fileno()), msgspec.json.encode(spec).decode()],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                process_group=0,
            )
        self.name = spec.name
        self.why: str | None = None  # it says so itself, on stderr
        self.channel = Channel(ours)
        self._pidfd = os.pidfd_open(self._process.pid)
        self._gone = False

    @property
    def pid(self) -> int:
        return self._process.pid

    def fileno(self) -> int:
        """Readable when it has ended."""
        return self._pidfd

    def kill(self) -> None:
        """Ends it, stopped or not. It may write until `gone`."""
        if not self.gone:
            signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)

    @property
    def gone(self) -> bool:
        """Whether it can no longer write anything, because it has ended."""
        if not self._gone and wait([self._pidfd], seconds=0):
            self._process.wait()
            self._gone = True
        return self._gone

    def close(self) -> None:
        """Frees what stands for it here. Call it once it is gone."""
        self.channel.close()
        os.close(self._pidfd)
