"""scripts/size_configs.py: configs of every kind of attention, refusals, and faults that it has to find."""

import json
import sys
import tarfile
from pathlib import Path

import pytest
from test_model_config import without

from nanokv.hub.catalog import CATALOG

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "scripts"))

import size_configs

FP8 = {"quant_method": "fp8", "weight_block_size": [128, 128], "modules_to_not_convert": ["lm_head"] * 500}
CONFIGS = {
    "llama": without(),
    "qwen2": without(model_type="qwen2", architectures=["Qwen2ForCausalLM"], use_sliding_window=False),
    "mistral": without(model_type="mistral", architectures=["MistralForCausalLM"], sliding_window=None, head_dim=128),
    "mistral-window": without(model_type="mistral", architectures=["MistralForCausalLM"], sliding_window=4096),
    "fp8": without(quantization_config=FP8),
    "kimi": {**CATALOG["deepseek-v3"].config, "model_type": "kimi_k2", "quantization_config": FP8},
    "hybrid": CATALOG["qwen3.5-0.8b"].config,
    "next": CATALOG["qwen3-next-80b-a3b"].config,
    "vision": {
        "model_type": "qwen3_vl", "architectures": ["Qwen3VLForConditionalGeneration"], "dtype": "bfloat16",
        "text_config": without("architectures", "torch_dtype", model_type="qwen3_vl_text"),
    },
    "gemma": {"model_type": "gemma4", "architectures": ["Gemma4ForConditionalGeneration"], "x": [1] * 10_000},
}  # fmt: skip


def run(capsys, monkeypatch, place: Path) -> tuple[int, str, str]:
    monkeypatch.setattr(sys, "argv", ["size_configs.py", str(place)])
    with pytest.raises(SystemExit) as ended:
        size_configs.main()
    printed = capsys.readouterr()
    return ended.value.code, printed.out, printed.err


@pytest.fixture
def folder(tmp_path):
    for name, config in CONFIGS.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(config))
    return tmp_path


def test_every_kind_of_attention_is_compared_with_a_count_by_hand(folder, capsys, monkeypatch):
    code, table, faults = run(capsys, monkeypatch, folder)
    assert (code, faults) == (0, "")
    assert table.endswith("10 configs: 8 sized, 2 refused, 0 faults\n")
    rows = {line.split()[0]: line.split()[1:] for line in table.splitlines()[1:-1]}
    assert rows["fp8"] == rows["llama"] == ["23,040", "0"] and rows["kimi"] == ["70,272", "0"]
    assert rows["hybrid"] == ["12,288", f"{18 * (2**20 + 6144 * 3 * 2):,}"]
    assert rows["gemma"][:3] == ["refused", "model_type='gemma4'", "is"]
    assert rows["mistral-window"][:2] == ["refused", "sliding_window=4096:"]


def test_an_archive_gives_the_rows_of_its_folder(folder, tmp_path_factory, capsys, monkeypatch):
    path = tmp_path_factory.mktemp("archive") / "configs.tar.gz"
    with tarfile.open(path, "w:gz") as archive:
        archive.add(folder, "configs")
    assert run(capsys, monkeypatch, path) == run(capsys, monkeypatch, folder)


def test_a_wrong_answer_a_long_refusal_and_a_traceback_are_faults(folder, capsys, monkeypatch):
    def refuse(model, *_):
        raise size_configs.NanokvError(f"{model}: {'x' * 200}")

    def fail(*_):
        raise ZeroDivisionError

    monkeypatch.setattr(size_configs, "grouped_heads", lambda config, layers: layers)
    code, table, faults = run(capsys, monkeypatch, folder)
    assert code == 1 and "llama: (23040, 0) by nanokv, (60, 0) by hand" in faults and "7 faults" in table
    monkeypatch.setattr(size_configs, "measure", refuse)
    assert "hybrid: refused with" in run(capsys, monkeypatch, folder)[2]
    monkeypatch.setattr(size_configs, "measure", fail)
    assert "gemma: Traceback" in run(capsys, monkeypatch, folder)[2]
    (folder / "empty").mkdir()
    assert run(capsys, monkeypatch, folder / "empty")[0] == 1
