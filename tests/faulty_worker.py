"""A prefill process that fails on command: the entry module of the fault tests in place of nanokv.disagg.worker.

After every message and every layer it reads the file $NANOKV_FAULT, which holds "POINT ACTION", and performs the action
if it is at that point. The file is removed before, so each fault happens once.

    points    "PREFILL received", "layer", "DONE before", "DONE sent", ... for each kind of message
    actions   kill, stop: this process; raise: an exception; half: half a frame, then kill; twice: the message again;
              noise: bytes that are no message; stale: first the same about another attempt and another pool
"""

import os
import signal
import sys
from pathlib import Path

import msgspec

from nanokv.disagg import worker
from nanokv.disagg.messages import Message, encode

FAULT = Path(os.environ["NANOKV_FAULT"])


def action_at(point: str) -> str | None:
    try:
        planned, _, action = FAULT.read_text().rpartition(" ")
    except FileNotFoundError:
        return None
    if planned != point:
        return None
    FAULT.unlink()
    return action


def die(action: str | None) -> None:
    if action in ("kill", "stop"):
        os.kill(os.getpid(), signal.SIGKILL if action == "kill" else signal.SIGSTOP)
    elif action == "raise":
        raise RuntimeError("injected fault")


class FaultySession(worker.Session):
    def hear(self, message: Message) -> None:
        die(action_at(f"{message.__struct_config__.tag} received"))
        super().hear(message)

    def beat(self) -> None:
        if self.loop.running:
            die(action_at("layer"))
        super().beat()

    def send(self, message: Message) -> None:
        kind = message.__struct_config__.tag
        action = action_at(f"{kind} before")
        if action == "half":
            frame = encode(message)
            self.channel._sock.send(frame[: len(frame) // 2])
            die("kill")
        if action == "noise":
            self.channel._sock.send(b"\x00\x00\x00\x02\xc1\xc1")
        if action == "version":
            message = msgspec.structs.replace(message, version=99)
        if action == "stale":
            super().send(msgspec.structs.replace(message, attempt=message.attempt + 1000))
            super().send(msgspec.structs.replace(message, generation=7))
        die(action)
        super().send(message)
        if action == "twice":
            super().send(message)
        die(action_at(f"{kind} sent"))


if __name__ == "__main__":
    sys.exit(worker.main(sys.argv[1:], FaultySession))
