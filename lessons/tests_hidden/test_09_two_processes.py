"""Hidden checks of lesson 09: random streams and grants against the engine's own functions."""

from array import array

from nanokv.core.request import Request
from nanokv.disagg.granted_cache import GrantedCache, GrantedPages
from nanokv.disagg.messages import HEADER, MAX_FRAME, Ping, ProtocolError, encode, take_frames
from nanokv.learn.expect import equal, random_of
from nanokv.learn.patching import reference


def test_09_1_random_cuts():
    random = random_of("cuts")
    for _ in range(40):
        stream = b"".join(encode(Ping(generation=1)) for _ in range(random.randint(1, 8)))
        if random.random() < 0.3:
            stream += HEADER.pack(MAX_FRAME + random.randint(1, 1000)) + b"x" * random.randint(0, 9)
        pair, at = (bytearray(), bytearray()), 0
        while at < len(stream):
            cut = stream[at : at + random.randint(1, 20)]
            at += len(cut)
            seen = []
            for run, buffer in zip((take_frames, reference(take_frames)), pair, strict=True):
                buffer += cut
                try:
                    seen.append((run(buffer), bytes(buffer)))
                except ProtocolError:
                    seen.append("refused")
            equal(seen[0], seen[1], f"messages and bytes left after {at} of {len(stream)} bytes")
            if seen[1] == "refused":
                break


def grants(label: str):
    """Random requests, each with the engine's cache and the student's, which received the same grant."""
    random = random_of(label)
    for _ in range(60):
        checkpoints = {4 * random.randint(1, 9): random.randrange(9) for _ in range(random.randint(0, 4))}
        what = GrantedPages(
            array("i", range(random.randint(1, 9))), 4 * random.randint(0, 3), random.randrange(9), checkpoints
        )
        computed, pair = random.randint(0, 40), []
        for kind in (GrantedCache, reference(GrantedCache)):
            cache, request = kind(4), Request([1])
            cache.give(request, what)
            request.num_computed, request.held.state_id = computed, what.state
            pair.append((cache, request))
        yield random, what, pair


def test_09_2_random_grants():
    for _, what, pair in grants("match"):
        seen = [
            (cache.match(r), list(r.held.pages), r.held.state_id, r.num_computed, r.held.num_cached)
            for cache, r in pair
        ]
        equal(seen[0], seen[1], f"match of {what}")


def test_09_3_random_grants():
    for random, what, pair in grants("chunk"):
        asked = random.randint(1, 40)
        seen = [cache.limit_chunk(r, asked) for cache, r in pair]
        equal(seen[0], seen[1], f"chunk of {asked} from {pair[0][1].num_computed}, checkpoints {what.checkpoints}")


def test_09_4_random_grants():
    for random, what, pair in grants("commit"):
        in_flight, seen = random.choice([0, 0, 4, 8]), []
        for cache, request in pair:
            request.num_computed = request.num_computed // 4 * 4
            cache.commit(request, in_flight)
            seen.append(cache.drain_moves().states)
        equal(seen[0], seen[1], f"copies with {in_flight} in flight, checkpoints {what.checkpoints}")
