"""The forms of a model's weights and of its attention are named, with the reason where a preferred one does not fit."""

import pytest
import torch

from nanokv import LLM
from nanokv.kernels import forms
from nanokv.kernels.cpu import amx
from nanokv.kernels.instructions import instructions
from nanokv.kernels.linear import pack_linear
from nanokv.models.forms import forms_of

needs_bfloat16 = pytest.mark.skipif(not forms.multiplies_bfloat16(), reason="needs a CPU with bfloat16 instructions")
needs_tiles = pytest.mark.skipif(not (forms.multiplies_bfloat16() and amx.has_tiles()), reason="needs AMX")


def chosen(folder, **config):
    with LLM(folder, num_pages=20, device="cpu", **config) as llm:
        return forms_of(llm.engine.model), llm.stats()


def reason(shape, weight=torch.bfloat16, activation=torch.bfloat16) -> tuple[str, str | None]:
    packed = pack_linear(torch.zeros(shape, dtype=weight), activation)
    return packed.form, packed.refusal


def test_every_matrix_of_a_model_is_counted_once(tiny_llama):
    """Two layers of qkv, out, gate and up, down; and the head."""
    found, stats = chosen(tiny_llama, dtype="float32")
    assert found.weights == {"blocks": 9} and found.attention == ("float32",)
    assert (stats["weight_forms"], stats["attention_form"]) == ("9 blocks", "float32")
    assert str(found) == "weights: 9 blocks (float32 weights); attention: float32"


@pytest.mark.parametrize(
    ("config", "attention"),
    [({"codec": "tq4"}, "codes"), ({"codec": "tqp4"}, "decoded"), ({"kernels": "reference"}, "reference")],
)
def test_attention_is_named_by_what_it_reads(config, attention, tiny_llama):
    found, stats = chosen(tiny_llama, dtype="float32", **config)
    assert stats["attention_form"] == attention
    assert found.weights == ({"plain": 9} if attention == "reference" else {"blocks": 9})


@needs_tiles
def test_weights_and_attention_on_tiles_need_no_reason(tiny_llama):
    assert reason((64, 96)) == ("tiles", None)
    assert set(chosen(tiny_llama, dtype="bfloat16")[0].weights) <= {"tiles", "pairs"}


def test_the_instructions_of_a_machine_are_those_that_its_forms_use():
    found = instructions()
    assert ("AMX" in found) == amx.has_tiles() and ("AVX-512 bf16" in found) >= forms.multiplies_bfloat16()
    assert not {"AVX2", "AVX-512"} <= set(found)


@needs_bfloat16
def test_a_width_that_no_tile_holds_is_the_reason_for_the_next_form():
    assert reason((64, 100)) == ("pairs", "width 100 is no multiple of 32")
    assert reason((64, 100), torch.float32, torch.float32) == ("blocks", "float32 weights")


@needs_bfloat16
@pytest.mark.parametrize(("has", "why"), [(True, "the system does not grant AMX"), (False, "the CPU has no AMX")])
def test_a_machine_without_tiles_takes_the_next_form_and_says_why(has, why, tiny_llama, monkeypatch):
    monkeypatch.setattr(amx, "has_tiles", lambda: False)
    monkeypatch.setattr(amx, "cpu_has_tiles", lambda: has)
    assert reason((64, 64)) == ("pairs", why)
    found, stats = chosen(tiny_llama, dtype="bfloat16")
    assert (stats["weight_forms"], stats["attention_form"]) == ("9 pairs", "float32")
    assert str(found) == f"weights: 9 pairs ({why}); attention: float32"


def test_without_bfloat16_products_weights_stay_16_bit_and_activations_are_float32(tiny_llama, monkeypatch):
    for module in ("forms", "linear"):
        monkeypatch.setattr(f"nanokv.kernels.{module}.multiplies_bfloat16", lambda: False)
    found, _ = chosen(tiny_llama, dtype="bfloat16")
    assert str(found) == "weights: 9 blocks (the CPU has no bfloat16 instructions); attention: float32"
