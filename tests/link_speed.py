"""One end of a transfer: `link_speed.py RANK HOST PORT`. Rank 0 sends pages through PageSender, then the same bytes by
a bare send of gloo, in turns; rank 1 receives both ways and prints the least seconds of each: noise only adds."""

import sys
import time

import torch

from nanokv.cache.store import CacheStore
from nanokv.core.spec import LayerSpec, PageLayout, Plane
from nanokv.disagg.messages import Layers, pack_ints
from nanokv.disagg.transport import PageReceiver, PageSender, dist, join_group, timedelta

ROUNDS, PAGES, GROUPS = 7, 128, 6


def main(rank: int, host: str, port: int, mine: str) -> None:
    spec = LayerSpec(paged=tuple(Plane(name, (3, 16, 64), torch.bfloat16, 1) for name in "kv"))
    layout = PageLayout([spec] * 30, 16)  # SmolLM2: 2,048 tokens
    store = CacheStore(layout, PAGES)
    store.pages.data.random_(generator=torch.Generator().manual_seed(1))
    rendezvous = dist.TCPStore(host, port, 2, is_master=rank == 0, timeout=timedelta(seconds=60))
    group = join_group(rendezvous, rank, torch.device("cpu"), mine, 60)
    bounds = [round(30 * part / GROUPS) for part in range(GROUPS + 1)]
    places = list(reversed(range(PAGES)))
    plan = [
        Layers(generation=1, request="r", attempt=1, places=pack_ints(places), first=first, last=last)
        for first, last in zip(bounds[:-1], bounds[1:], strict=True)
    ]
    whole, token = torch.empty(store.pages.data.numel(), dtype=torch.uint8), torch.zeros(1, dtype=torch.uint8)
    expected = store.pages.data.clone()
    sender, receiver = PageSender(group, store, lambda layers: None), PageReceiver(group, store)
    times: dict[str, list[float]] = {"pages": [], "bare": []}
    for _ in range(ROUNDS):
        for kind in times:
            if rank == 0:
                group.recv([token], 1, 0).wait()  # both are here
                if kind == "pages":
                    for layers in plan:
                        sender.send(layers, range(PAGES))
                    sender.drain()
                else:
                    group.send([store.pages.data.view(-1)], 1, 0).wait()
                continue
            store.pages.data.zero_()
            group.send([token], 0, 0).wait()
            start = time.perf_counter()
            if kind == "pages":
                for layers in plan:
                    receiver.post(layers)
                receiver.drain()
            else:
                group.recv([whole], 0, 0).wait()
            times[kind].append(time.perf_counter() - start)
            if kind == "pages":
                assert torch.equal(store.pages.data[places], expected)
    if rank == 1:
        print(store.pages.data.numel(), min(times["pages"]), min(times["bare"]), flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2], int(sys.argv[3]), sys.argv[4])
