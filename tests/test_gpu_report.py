"""scripts/gpu_report.py on a CPU: if a part fails or hangs, the rest of the report is still written."""

import json
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "scripts"))
gpu_report = import_module("gpu_report")


@pytest.mark.slow
def test_a_quick_run_on_a_cpu_writes_json_and_a_table(tmp_path):
    path = tmp_path / "report.json"
    command = [sys.executable, "scripts/gpu_report.py", "--quick", "--device", "cpu", "--only", "limits", "--only"]
    done = subprocess.run([*command, "kernels", "--json", path], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    report = json.loads(path.read_text())
    about, _, kernels = report["parts"]
    assert not any("error" in part for part in report["parts"])
    assert not any("error" in row for row in kernels["rows"])
    assert all(row["seconds"] > 0 for row in kernels["rows"])
    assert {row["name"] for row in kernels["rows"]} >= {
        "attention decode", "attention prefill", "MLA decode", "code_attention", "store_codes", "store_latent",
        "GDN step", "GDN chunk", "rms_norm", "silu_mul",
    }  # fmt: skip
    assert all("bytes_share" in row for row in kernels["rows"])
    assert report["about"]["versions"]["torch"] and report["quick"]
    assert about["rows"][0]["shape"] == "cpu" and about["rows"][0]["auto"].startswith(("cpu", "cuda"))
    table = path.with_suffix(".md").read_text()
    assert table.count("\n") == 2 + sum(len(part["rows"]) for part in report["parts"])


def test_a_part_that_fails_reports_its_error_and_a_part_that_hangs_is_stopped():
    failed = gpu_report.run_part("engine nobody", "cpu", True, 120)
    assert "KeyError: 'nobody'" in failed["error"] and failed["rows"] == []
    stopped = gpu_report.run_part("kernels", "cpu", True, 0.2)
    assert stopped["error"] == "stopped after 0 s"


@pytest.mark.slow
def test_the_host_time_of_a_step_is_at_most_twice_the_time_of_a_decode_step():
    part = gpu_report.run_part("host", "cpu", True, 120)
    assert "error" not in part
    assert [row["shape"] for row in part["rows"]] == ["1 x 32", "2 x 32"]
    assert all(0 < row["seconds"] < 2 * row["decode_step_s"] for row in part["rows"])


def test_timed_calls_alternate():
    from gpu.common import Run, seconds

    seen = []
    seconds([lambda: seen.append("a"), lambda: seen.append("b")], Run("cpu", quick=True))
    assert seen[-5:] == list("ababa")


def test_the_remaining_budget_is_the_limit_of_the_next_part(tmp_path, monkeypatch):
    seen = []

    def run_part(part, device, quick, limit):
        seen.append((part, limit))
        return {"part": part, "seconds": 1.0, "rows": [{"name": "a", "error": "no"}]}

    monkeypatch.setattr(gpu_report, "run_part", run_part)
    monkeypatch.setattr(sys, "argv", ["gpu_report.py", "--json", str(tmp_path / "r.json"), "--budget", "60"])
    gpu_report.main()
    assert [part for part, _ in seen] == list(gpu_report.LIMITS)
    assert all(limit <= 60 for _, limit in seen)
    assert "- **limits: a **: no" in (tmp_path / "r.md").read_text()


def test_the_package_imports_without_optional_packages():
    """A machine with a GPU may have neither the readers of other formats nor the client of the hub."""
    code = "import sys; sys.modules.update(dict.fromkeys(['gguf', 'msgspec', 'huggingface_hub', 'triton'])); "
    code += "import nanokv.llm, nanokv.cli.main, nanokv.bench.prefix"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
