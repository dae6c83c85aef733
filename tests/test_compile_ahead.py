"""Kernels that other processes compile while a model is loaded."""

import json
import os
import subprocess
import sys

import oracles
import pytest

from nanokv.cli.repl import compiling
from nanokv.core.config import EngineConfig
from nanokv.kernels import ahead

pytest.importorskip("numba")


@pytest.fixture
def empty_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("NUMBA_CACHE_DIR", str(tmp_path))
    return tmp_path


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("codec", ["raw", "tq4"])
def test_the_kernels_that_are_compiled_ahead_are_those_that_a_model_runs(tmp_path, dtype, codec):
    from nanokv import LLM, SamplingParams
    from nanokv.kernels.cpu.ahead import kernels

    with LLM(oracles.llama(tmp_path, head_dim=64), dtype=dtype, codec=codec, num_pages=16) as llm:
        llm.generate([oracles.prompt(20)], SamplingParams(max_tokens=2, ignore_eos=True))
    wanted = kernels(dtype, codec == "raw", is_latent=False)
    assert wanted and all(signature in function.signatures for function, signature in wanted)


RUN = """
import sys
from nanokv.kernels import ahead
threads = ahead.start("float16", "raw", False)
assert threads
for thread in threads:
    thread.join()
assert ahead.start("float16", "raw", False) == []
from numba.core import event
from nanokv import LLM, SamplingParams
with LLM(sys.argv[1], dtype="float16", num_pages=16) as llm, event.install_recorder("numba:compile") as recorder:
    llm.generate([[5, 6, 7]], SamplingParams(max_tokens=2, ignore_eos=True))
assert recorder.buffer == []
"""


@pytest.mark.skipif((os.cpu_count() or 1) < 2, reason="needs a second core")
def test_a_run_compiles_nothing_after_the_processes_have_ended(tmp_path, empty_cache):
    folder = oracles.llama(tmp_path, head_dim=64)
    subprocess.run([sys.executable, "-c", RUN, str(folder)], check=True)


@pytest.mark.parametrize("program", ["raise SystemExit(1)", "import os, signal; os.kill(os.getpid(), signal.SIGTERM)"])
def test_a_process_that_dies_does_no_harm(empty_cache, monkeypatch, program):
    monkeypatch.setattr(ahead, "_PROGRAM", program)
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    for _ in range(2):  # the next run tries again
        (thread,) = ahead.start("float32", "raw", False)
        thread.join()
    assert list(empty_cache.iterdir()) == []


def test_a_process_that_cannot_be_started_does_no_harm(empty_cache, monkeypatch):
    monkeypatch.setattr(sys, "executable", str(empty_cache / "no such python"))
    for thread in ahead.start("float32", "raw", False):
        thread.join()
    monkeypatch.setattr(sys, "executable", None)
    assert ahead.start("float32", "raw", False) == []


def test_a_single_core_compiles_for_itself(empty_cache, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {3}, raising=False)
    assert ahead.start("float32", "raw", False) == []


def test_the_process_ends_with_its_parent(empty_cache):
    done = empty_cache / "done"
    order = {"path": sys.path, "done": str(done), "dtype": "float32", "is_raw": True, "is_latent": False}
    process = subprocess.Popen([sys.executable, "-c", ahead._PROGRAM], stdin=subprocess.PIPE, text=True)
    process.communicate(json.dumps(order) + "\n", timeout=60)  # closes the pipe, as the end of the parent does
    assert process.returncode == 0 and not done.exists()


def test_a_claim_is_held_by_one_and_ends_with_its_process(tmp_path):
    from nanokv.kernels.cpu.claims import claim

    path = tmp_path / "lock"
    with claim(path, wait=False) as first, claim(path, wait=False) as second:
        assert first and not second
    hold = (
        f"from nanokv.kernels.cpu.claims import claim\nwith claim({str(path)!r}, wait=True): print(flush=True); input()"
    )
    process = subprocess.Popen([sys.executable, "-c", hold], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    process.stdout.readline()
    with claim(path, wait=False) as held:
        assert not held
    process.kill()
    with claim(path, wait=True) as held:
        assert held
    process.communicate()
    with claim(tmp_path / "no folder" / "lock", wait=True) as held:  # nothing is locked, and nothing waits
        assert held


def test_an_inner_function_is_no_machine_code_of_its_own():
    from nanokv.kernels.cpu.compiled import compiled, inner

    @inner
    def half(x):
        return x / 2

    whole = compiled(lambda x: half(x) + half(x))
    assert whole(3.0) == 3.0
    (result,) = half.overloads.values()
    engine = result.target_context.codegen()._engine
    assert not engine.is_symbol_defined(result.fndesc.mangled_name)
    (result,) = whole.overloads.values()
    assert engine.is_symbol_defined(result.fndesc.mangled_name)


@pytest.mark.parametrize(
    "fields, config, started",
    [
        ({"torch_dtype": "bfloat16"}, {}, ("bfloat16", "raw", False)),
        ({"text_config": {"dtype": "float16"}}, {"codec": "tq4"}, ("float16", "tq4", False)),
        ({"kv_lora_rank": 8}, {"device": "cpu"}, ("float32", "raw", True)),
        ({}, {"dtype": "bfloat16"}, ("bfloat16", "raw", False)),
        ({"dtype": "int3"}, {}, None),
        ({}, {"kernels": "reference"}, None),
        ({}, {"device": "cuda"}, None),
    ],
)
def test_chat_compiles_ahead_what_a_folder_and_its_options_say(tmp_path, monkeypatch, fields, config, started):
    seen = []
    monkeypatch.setattr(ahead, "start", lambda *given: seen.append(given))
    monkeypatch.setattr(compiling, "NVIDIA", tmp_path / "no driver")
    (tmp_path / "config.json").write_text(json.dumps(fields))
    compiling.compile_ahead(tmp_path, EngineConfig(**config))
    assert seen == ([] if started is None else [started])


def test_a_folder_that_cannot_be_read_is_left_to_the_loader(tmp_path, monkeypatch):
    monkeypatch.setattr(ahead, "start", lambda *given: pytest.fail("started"))
    (tmp_path / "config.json").write_text("{")
    compiling.compile_ahead(tmp_path, EngineConfig(device="cpu"))


def test_compiling_ahead_imports_neither_torch_nor_numba():
    program = "import nanokv.cli.repl.compiling, sys; assert not {'torch', 'numba'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", program], check=True)
