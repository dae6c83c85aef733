"""Page keys are equal only for equal tokens after an equal prefix, with the same model and salt."""

import subprocess
import sys
from array import array

from naive_cache import House

from nanokv.cache.observers import Observers
from nanokv.core.keys import KEY_BYTES, page_keys, root_key


def test_a_key_depends_on_the_tokens_of_its_page_and_all_tokens_before():
    root = root_key(b"model", None)
    keys = page_keys([1, 2, 3, 4, 5], 2, root)
    assert [len(key) for key in keys] == [KEY_BYTES, KEY_BYTES]  # the fifth token fills no page
    assert keys == page_keys(array("i", [1, 2, 3, 4]).tobytes(), 2, root)
    assert page_keys([3, 4], 2, keys[0]) == keys[1:]
    assert page_keys([9, 2, 3, 4], 2, root)[1] != keys[1]
    assert page_keys([1, 2, 3, 4], 4, root)[0] not in keys


def test_each_pair_of_model_and_salt_has_its_own_keys():
    roots = [root_key(*names) for names in [(b"a", None), (b"b", None), (b"a", ""), (b"a", "s"), (b"as", None)]]
    assert len(set(roots)) == len(roots)


def test_keys_are_the_same_in_every_process():
    code = "from nanokv.core.keys import *; print(page_keys([1, 2], 2, root_key(b'm', 's'))[0].hex())"
    key = page_keys([1, 2], 2, root_key(b"m", "s"))[0]
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == key.hex()


class Recorder:
    """A CacheObserver that records the cached pages by key."""

    def __init__(self) -> None:
        self.cached: dict[bytes, int] = {}
        self.evicted: list[tuple[bytes, int]] = []

    def stored(self, keys, pages) -> None:
        self.cached.update(zip(keys, pages, strict=True))

    def evicting(self, keys, pages) -> None:
        for key, page in zip(keys, pages, strict=True):
            assert self.cached.pop(key) == page
            self.evicted.append((key, page))


def test_observers_receive_the_key_of_every_stored_and_evicted_page():
    recorder = Recorder()
    house = House(6, observers=Observers([recorder], b"model"))
    house.serve(range(9))
    house.serve(range(9), answer=[1])  # the same pages: no new page is stored
    first = page_keys(list(range(8)), 4, root_key(b"model", None))
    assert list(recorder.cached) == first
    house.serve(range(100, 119), salt="s")
    assert [key for key, _ in recorder.evicted] == [first[1]]
    assert len(recorder.cached) == house.cache.stats()["pages_cached"]
    assert page_keys(list(range(100, 116)), 4, root_key(b"model", "s"))[3] in recorder.cached
    house.cache.reset()
    assert not recorder.cached


def test_the_moves_of_a_plan_list_the_evicted_pages_to_save():
    recorder = Recorder()
    house = House(3, observers=Observers([recorder], b"model"))
    house.serve(range(9))
    request = house.request(range(100, 109))
    assert house.admit(request)
    assert house.cache.drain_moves().saves == recorder.evicted != []


def test_an_observer_that_raises_costs_nothing_and_the_others_still_hear(caplog):
    class Broken(Recorder):
        def stored(self, keys, pages) -> None:
            raise OSError("away")

        evicting = stored

    recorder = Recorder()
    house = House(3, observers=Observers([Broken(), recorder], b"model"), num_states=8)
    house.serve(range(9))
    house.serve(range(100, 109))
    assert recorder.evicted and len(recorder.cached) == house.cache.stats()["pages_cached"]
    house.cache.check()
