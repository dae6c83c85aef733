"""LocalWorker: a prefill process of this host, as a peer. Started, killed, and known to be dead.

A kill has taken effect once `gone` is true, and not before. A pidfd becomes readable when every thread of the process
has ended and its mappings are removed. Only then may its pages have other owners.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys

import msgspec

from nanokv.core.spin import bounded
from nanokv.disagg.channel import Channel, wait
from nanokv.disagg.worker import WorkerSpec

ENTRY = "nanokv.disagg.worker"
"""The module that a prefill process runs."""


class LocalWorker:
    """One process, from start to death.

    spec   WorkerSpec
    why    None: the process logs why it ended

    A process group of its own (process_group=0) has two effects: Ctrl-C in the terminal reaches the decode process
    only, and where the decode process dies while the worker is stopped, the kernel sends SIGHUP to the orphaned group.
    """

    def __init__(self, spec: WorkerSpec) -> None:
        near, far = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        with far:
            self._process = subprocess.Popen(
                [sys.executable, "-m", ENTRY, str(far.fileno()), msgspec.json.encode(spec).decode()],
                pass_fds=[far.fileno()],
                stdin=subprocess.DEVNULL,
                process_group=0,
                env=bounded(os.environ),
            )
        self.name = spec.name
        self.why: str | None = None
        self.channel = Channel(near)
        self._pidfd = os.pidfd_open(self._process.pid)
        self._gone = False

    @property
    def pid(self) -> int:
        """Its process id."""
        return self._process.pid

    def fileno(self) -> int:
        """A descriptor that is readable once the process has ended."""
        return self._pidfd

    def kill(self) -> None:
        """Ends it by SIGKILL, stopped or not. It may write until `gone`."""
        if not self.gone:
            signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)

    @property
    def gone(self) -> bool:
        """Whether it can write no more, because it has ended."""
        if not self._gone and wait([self._pidfd], seconds=0):
            self._process.wait()
            self._gone = True
        return self._gone

    def close(self) -> None:
        """Frees its descriptors. Called once, after its end."""
        self.channel.close()
        os.close(self._pidfd)
