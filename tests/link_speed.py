"""One end of a transfer: `link_speed.py RANK HOST PORT`. Rank 0 sends pages through PageSender, then the same bytes by
a bare sendall, in turns; rank 1 receives both ways and prints the least seconds of each: noise only adds."""

import socket
import sys
import time

import torch

from nanokv.cache.store import CacheStore
from nanokv.core.spec import LayerSpec, PageLayout, Plane
from nanokv.disagg.channel import Channel, wait
from nanokv.disagg.messages import Layers, pack_ints
from nanokv.disagg.transport import PageReceiver, PageSender, bind

ROUNDS, PAGES, GROUPS = 7, 128, 6


def connections(rank: int, host: str, port: int) -> tuple[socket.socket, socket.socket]:
    """Two connections between the ends: one for pages, a bare one."""
    if rank == 0:
        with bind((host, port)) as listening:
            return listening.accept()[0], listening.accept()[0]
    deadline = time.monotonic() + 60
    while True:
        try:
            return socket.create_connection((host, port)), socket.create_connection((host, port))
        except ConnectionRefusedError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.05)


def main(rank: int, host: str, port: int) -> None:
    spec = LayerSpec(paged=tuple(Plane(name, (3, 16, 64), torch.bfloat16, 1) for name in "kv"))
    layout = PageLayout([spec] * 30, 16)  # SmolLM2: 2,048 tokens
    store = CacheStore(layout, PAGES)
    store.pages.data.random_(generator=torch.Generator().manual_seed(1))
    first_sock, bare = connections(rank, host, port)
    channel = Channel(first_sock)
    bounds = [round(30 * part / GROUPS) for part in range(GROUPS + 1)]
    places = list(reversed(range(PAGES)))
    plan = [
        Layers(generation=1, request="r", attempt=1, places=pack_ints(places), first=first, last=last)
        for first, last in zip(bounds[:-1], bounds[1:], strict=True)
    ]
    whole = torch.empty(store.pages.data.numel(), dtype=torch.uint8).numpy().data
    expected = store.pages.data.clone()
    sender, receiver = PageSender(channel, store, channel.send, 60), PageReceiver(channel, store, 60)
    times: dict[str, list[float]] = {"pages": [], "bare": []}
    for _ in range(ROUNDS):
        for kind in times:
            if rank == 0:
                bare.recv(1)  # both are here
                if kind == "pages":
                    for layers in plan:
                        sender.send(layers, range(PAGES))
                    channel.drain(0, 60)
                else:
                    bare.sendall(store.pages.data.view(-1).numpy().data)
                continue
            store.pages.data.zero_()
            bare.send(b"!")
            start = time.perf_counter()
            if kind == "pages":
                for _ in plan:
                    while not (messages := channel.receive()):
                        wait([channel])
                    receiver.receive(messages[0], lambda has_come: None)
            else:
                done = 0
                while done < len(whole):
                    done += bare.recv_into(whole[done:])
            times[kind].append(time.perf_counter() - start)
            if kind == "pages":
                assert torch.equal(store.pages.data[places], expected)
    if rank == 1:
        print(store.pages.data.numel(), min(times["pages"]), min(times["bare"]), flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2], int(sys.argv[3]))
