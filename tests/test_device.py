"""The choice of a device and the line that explains it; fakes of torch and Triton produce every obstacle."""

import sys
from types import SimpleNamespace

import pytest
import torch

from nanokv.core.errors import ConfigError
from nanokv.engine import device as module
from nanokv.engine.device import choose_device, cuda_obstacle


def fake_torch(monkeypatch, version="12.8", available=True, count=1, capability=(9, 0)) -> None:
    cuda = SimpleNamespace(
        is_available=lambda: available,
        device_count=lambda: count,
        get_device_capability=lambda index: capability,
        get_device_name=lambda index: "Tesla T4",
    )
    fake = SimpleNamespace(version=SimpleNamespace(cuda=version), cuda=cuda, device=torch.device)
    monkeypatch.setattr(module, "torch", fake)


def fake_probe(monkeypatch, adds) -> None:
    monkeypatch.setitem(sys.modules, "nanokv.engine.check_triton", SimpleNamespace(adds=adds))


def raising(error: Exception):
    def adds(device):
        raise error

    return adds


@pytest.mark.parametrize(
    ("found", "words"),
    [
        ({"version": None}, "without CUDA"),
        ({"available": False}, "no CUDA device"),
        ({"count": 0}, "sees 0 CUDA devices"),
        ({"capability": (7, 5)}, "Tesla T4 has compute capability 7.5; 8.0 or newer"),
    ],
)
def test_an_unusable_cuda_device_is_reported_in_one_line(monkeypatch, found, words):
    fake_torch(monkeypatch, **found)
    assert words in cuda_obstacle(0)
    chosen = choose_device("auto")
    assert chosen.device.type == "cpu" and words in chosen.reason and "\n" not in chosen.reason


def test_a_missing_broken_or_wrong_triton_is_reported_in_one_line(monkeypatch):
    fake_torch(monkeypatch)
    monkeypatch.setitem(sys.modules, "nanokv.engine.check_triton", None)
    assert "cannot be imported" in cuda_obstacle(0)
    fake_probe(monkeypatch, raising(RuntimeError("Failed to find C compiler.\nPlease specify one")))
    assert cuda_obstacle(0) == "triton cannot compile a kernel (Failed to find C compiler.)"
    fake_probe(monkeypatch, lambda device: False)
    assert "wrong numbers" in cuda_obstacle(0)
    fake_probe(monkeypatch, lambda device: True)
    assert cuda_obstacle(0) is None


def test_auto_chooses_a_gpu_that_works_and_never_raises():
    assert choose_device("auto", lambda index: None).device == torch.device("cuda", 0)

    def broken(index):
        raise OSError("libcuda.so: version mismatch")

    chosen = choose_device("auto", broken)
    assert chosen.device == torch.device("cpu") and "libcuda.so" in chosen.reason


def test_a_named_device_is_used_or_refused_with_the_reason():
    assert choose_device("cuda:1", lambda index: None).device == torch.device("cuda", 1)
    assert choose_device("cpu", lambda index: "never asked").device == torch.device("cpu")
    with pytest.raises(ConfigError, match="device='cuda:3': number 3 is away; use cpu"):
        choose_device("cuda:3", lambda index: f"number {index} is away")


@pytest.mark.parametrize("name", ["gpu", "meta", "cuda:x"])
def test_the_error_for_an_unknown_device_lists_the_allowed_names(name):
    with pytest.raises(ConfigError, match="allowed are auto, cpu, cuda, cuda:N"):
        choose_device(name, lambda index: None)
