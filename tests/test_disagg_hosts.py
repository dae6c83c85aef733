"""Between hosts: two network namespaces that the tests make themselves, or the loopback where two are not needed."""

import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import oracles
import pytest
from click.testing import CliRunner

from nanokv import LLM, DisaggConfig, EngineConfig, SamplingParams
from nanokv.cli.main import main
from nanokv.core.errors import ConfigError
from nanokv.disagg import server
from nanokv.disagg.config import split_address
from nanokv.disagg.transport import bind
from nanokv.disagg.worker import PrefillModel

HERE = Path(__file__).parent
ENVIRONMENT = {**os.environ, "PYTHONPATH": f"{HERE.parent}:{HERE}"}
GREEDY = SamplingParams(max_tokens=6, temperature=0.0, ignore_eos=True)
PROMPTS = [oracles.prompt(length, seed=length) for length in (40, 90, 150)]
ROOM = {"num_pages": 64, "page_size": 8, "debug_checks": True, "num_states": 12}
ADDRESSES = ("10.77.0.1", "10.77.0.2")
SLOW = pytest.mark.slow


class Server:
    """`nanokv disagg prefill` as a user starts it."""

    def __init__(self, folder: Path, address: str, prefix: list[str] | None = None, *more: str) -> None:
        command = [sys.executable, "-m", "nanokv.cli.main", "disagg", "prefill", str(folder), "--listen", address]
        options = ["--page-size", "8", "--kv-memory", "8MiB", *more]
        self.process = subprocess.Popen(
            [*(prefix or []), *command, *options], stderr=subprocess.PIPE, text=True, env=ENVIRONMENT
        )
        assert "listening" in self.process.stderr.readline()

    def __enter__(self) -> "Server":
        return self

    def __exit__(self, *exception: object) -> None:
        self.process.kill()
        self.process.wait()
        self.process.stderr.close()


def write_secret(path: Path, text: str = "an example of a shared secret") -> Path:
    path.write_text(text + "\n")
    path.chmod(0o600)
    return path


def free_address() -> str:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return f"127.0.0.1:{server.getsockname()[1]}"


def listen_in_a_thread(folder: Path, address: str) -> None:
    """A server in this process: cheaper than one of its own, where its end is not tested."""
    model = PrefillModel(folder, EngineConfig(page_size=8, kv_memory="8MiB"), "cpu", "float32")
    threading.Thread(target=server.listen, args=(model, bind(split_address(address))), daemon=True).start()


def answers(llm: LLM) -> list[list[int]]:
    return [output.token_ids for output in llm.generate(PROMPTS, GREEDY)]


@pytest.mark.parametrize(
    "family", [pytest.param("llama", marks=SLOW), pytest.param("deepseek_v3", marks=SLOW), "qwen3_next"]
)
def test_pages_and_states_from_another_host_equal_those_of_one_process(family, tmp_path):
    folder, address = oracles.checkpoint(family, tmp_path), free_address()
    with LLM(folder, **ROOM) as llm:
        alone = answers(llm)
    with Server(folder, address) as server:
        with LLM(folder, disagg=DisaggConfig(connect=address, min_tokens=8, heartbeat_s=3.0), **ROOM) as llm:
            assert answers(llm) == alone
            assert answers(llm) == alone  # with hits: only what is missing travels
            assert llm.stats()["remote_prefills"] >= 3 and llm.stats()["remote_lost"] == 0
        with LLM(folder, disagg=DisaggConfig(connect=address, min_tokens=8, heartbeat_s=3.0), **ROOM) as llm:
            assert answers(llm) == alone  # the next decode process
            server.process.send_signal(signal.SIGSTOP)  # it is silent, and does not end
            llm.reset_prefix_cache()
            assert answers(llm) == alone
            server.process.kill()
            llm.reset_prefix_cache()
            assert answers(llm) == alone
            llm.engine.cache.check()
            assert llm.stats()["pages_held"] == 0 and llm.stats()["worker_deaths"] >= 1


DECODE = """
import sys
import test_disagg_hosts as t
there = t.DisaggConfig(connect=sys.argv[2], min_tokens=8, heartbeat_s=3.0)
with t.LLM(sys.argv[1], disagg=there, **t.ROOM) as llm:
    while True:
        assert len(t.answers(llm)) == 3 and llm.stats()["remote_prefills"]
        print("answered", flush=True)
        llm.reset_prefix_cache()
"""


@pytest.mark.slow
def test_both_processes_die_and_two_new_ones_work(tiny_llama):
    """In the middle of their work. Nothing that is left of the first two disturbs the next two."""
    address = free_address()
    with LLM(tiny_llama, **ROOM) as llm:
        alone = answers(llm)
    with Server(tiny_llama, address):
        command = [sys.executable, "-c", DECODE, str(tiny_llama), address]
        decode = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=ENVIRONMENT)
        try:
            assert decode.stdout.readline() == "answered\n"
        finally:
            decode.kill()
            decode.wait()
            decode.stdout.close()
    there = DisaggConfig(connect=address, min_tokens=8, heartbeat_s=3.0)
    with Server(tiny_llama, address), LLM(tiny_llama, disagg=there, **ROOM) as llm:
        assert answers(llm) == alone
        assert llm.stats()["remote_prefills"] == 3 and llm.stats()["remote_lost"] == 0
        llm.engine.cache.check()


def test_an_ipv6_address_is_reached_and_in_use_for_a_second_server(tiny_llama, monkeypatch):
    """The error comes before the second server loads a model."""
    try:
        with bind(("::1", 0)) as free:
            address = f"[::1]:{free.getsockname()[1]}"
    except OSError:
        pytest.skip("no IPv6 here")
    with Server(tiny_llama, address):
        with LLM(tiny_llama, disagg=DisaggConfig(connect=address, min_tokens=8), **ROOM) as llm:
            answers(llm)
            assert llm.stats()["remote_prefills"] == 3 and llm.stats()["remote_lost"] == 0
        monkeypatch.setattr("nanokv.disagg.worker.load_model", pytest.fail)
        taken = CliRunner().invoke(main, ["disagg", "prefill", str(tiny_llama), "--listen", address])
        assert taken.exit_code == 1 and f"--listen {address}: Address already in use" in taken.stderr


def test_a_wrong_address_and_a_wrong_model_are_refused(tiny_llama, tmp_path):
    address = free_address()
    with pytest.raises(ConfigError, match=re.escape(f"connect='{address}'")):
        LLM(tiny_llama, disagg=DisaggConfig(connect=address), **ROOM)
    listen_in_a_thread(tiny_llama, address)
    with pytest.raises(ConfigError, match="another model"):
        LLM(oracles.llama(tmp_path, seed=1), disagg=DisaggConfig(connect=address), **ROOM)


@pytest.mark.slow
def test_codes_are_sent_between_hosts_with_the_same_codec_options(tmp_path):
    folder, address = oracles.llama(tmp_path, head_dim=32), free_address()
    chosen = {"codec": "tq4", "native_layers": "first1", "prefill": "fast"}
    with LLM(folder, **ROOM, **chosen) as llm:
        alone = answers(llm)
    options = [f"--{name.replace('_', '-')}={value}" for name, value in chosen.items()]
    there = DisaggConfig(connect=address, min_tokens=8)
    with Server(folder, address, None, *options), LLM(folder, disagg=there, **ROOM, **chosen) as llm:
        assert answers(llm) == alone
        assert llm.stats()["remote_prefills"] == 3 and llm.stats()["remote_lost"] == 0


def test_a_server_allocates_its_pages_once_for_all_decode_processes(tiny_llama, monkeypatch):
    """A later shortage of memory ends no server and refuses no decode process."""
    address, taken = free_address(), server.memory_for_pages

    def once(*arguments):
        monkeypatch.setattr(server, "memory_for_pages", short)
        return taken(*arguments)

    def short(*arguments):
        raise ConfigError("kv_memory='8MiB': but only 0 bytes are free")

    monkeypatch.setattr(server, "memory_for_pages", once)
    listen_in_a_thread(tiny_llama, address)
    with LLM(tiny_llama, **ROOM) as llm:
        alone = answers(llm)
    for _ in range(2):
        with LLM(tiny_llama, disagg=DisaggConfig(connect=address, min_tokens=8, heartbeat_s=3.0), **ROOM) as llm:
            assert answers(llm) == alone
            assert llm.stats()["remote_prefills"] == 3 and llm.stats()["remote_lost"] == 0


# ---- two namespaces ----------------------------------------------------------------------------------------------


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True, text=True)


@pytest.fixture
def hosts():
    """Two namespaces joined by a veth pair: the `ip netns exec` of each. Skips where they cannot be made."""
    names = [f"nanokv{os.getpid()}{side}" for side in "ab"]
    try:
        for name in names:
            ip("netns", "add", name)
        ip("link", "add", "nkv0", "netns", names[0], "type", "veth", "peer", "name", "nkv1", "netns", names[1])
        for number, name in enumerate(names):
            ip("-n", name, "addr", "add", f"{ADDRESSES[number]}/24", "dev", f"nkv{number}")
            ip("-n", name, "link", "set", f"nkv{number}", "up")
            ip("-n", name, "link", "set", "lo", "up")
    except (OSError, subprocess.CalledProcessError) as error:
        remove(names)
        pytest.skip(f"network namespaces cannot be made here: {getattr(error, 'stderr', None) or error}")
    yield names
    remove(names)


def remove(names: list[str]) -> None:
    for name in names:
        subprocess.run(["ip", "netns", "delete", name], capture_output=True)


SCRIPT = """
import os, subprocess, sys
import test_disagg_hosts as t
folder, namespace, secret = sys.argv[1:]
with t.LLM(folder, **t.ROOM) as llm:
    alone = t.answers(llm)
config = t.DisaggConfig(connect=f"{t.ADDRESSES[0]}:7000", secret_file=secret, min_tokens=8, heartbeat_s=3.0)
with t.LLM(folder, disagg=config, **t.ROOM) as llm:
    assert t.answers(llm) == alone
    assert llm.stats()["remote_prefills"] == 3 and llm.stats()["remote_lost"] == 0
    llm.reset_prefix_cache()
    t.ip("link", "set", "nkv1", "down")  # no reset, no end of file: silence
    assert t.answers(llm) == alone
    assert llm.stats()["remote_lost"] > 0
    llm.engine.cache.check()
    assert llm.stats()["pages_held"] == 0
    t.ip("link", "set", "nkv1", "up")
    t.wait_until_ready(llm)
    llm.reset_prefix_cache()
    before = llm.stats()
    assert t.answers(llm) == alone
    assert llm.stats()["remote_prefills"] == before["remote_prefills"] + 3
    assert llm.stats()["remote_lost"] == before["remote_lost"]
print("done")
"""


def wait_until_ready(llm: LLM) -> None:
    deadline = time.monotonic() + 60
    while llm.stats()["prefill_workers_ready"] == 0:
        assert time.monotonic() < deadline
        llm.engine.step()
        time.sleep(0.01)


@pytest.mark.slow
def test_a_cut_link_costs_no_token_and_is_used_again_when_it_is_back(hosts, tiny_llama, tmp_path):
    first, second = (["ip", "netns", "exec", name] for name in hosts)
    secret = write_secret(tmp_path / "secret")
    with Server(tiny_llama, f"{ADDRESSES[0]}:7000", first, "--secret-file", str(secret)):
        decode = subprocess.run(
            [*second, sys.executable, "-c", SCRIPT, str(tiny_llama), hosts[1], str(secret)],
            env=ENVIRONMENT, capture_output=True, text=True, timeout=300,
        )  # fmt: skip
    assert decode.stdout == "done\n", decode.stderr


@pytest.mark.slow  # a timing: it needs a machine with two idle cores
@pytest.mark.xfail(strict=False, reason="missed on two cores: both ends share them; docs/benchmarks.md")
def test_pages_travel_at_nearly_the_speed_of_a_bare_send(hosts):
    ends = [
        subprocess.Popen(
            ["ip", "netns", "exec", name, sys.executable, str(HERE / "link_speed.py"), str(rank), ADDRESSES[0], "7001"],
            stdout=subprocess.PIPE, text=True, env=ENVIRONMENT,
        )
        for rank, name in enumerate(hosts)
    ]  # fmt: skip
    outputs = [end.communicate(timeout=300)[0] for end in ends]
    num_bytes, pages, bare = map(float, outputs[1].split())
    print(
        f"{num_bytes / 2**20:.0f} MiB: pages {num_bytes / pages / 2**30:.2f} GiB/s, bare {num_bytes / bare / 2**30:.2f}"
    )
    assert bare / pages >= 0.7
