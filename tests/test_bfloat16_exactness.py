"""The exactness law where a CPU multiplies bfloat16: the bits of a token's logits depend on its request alone."""

import oracles
import pytest
import torch
from test_exactness import PARAMS, answers

from nanokv.kernels import forms
from nanokv.kernels.cpu import amx
from nanokv.llm import LLM

pytestmark = pytest.mark.skipif(not forms.multiplies_bfloat16(), reason="needs a CPU with bfloat16 instructions")


@pytest.fixture(scope="module", autouse=True, params=["tiles", "pairs"])
def form(request):
    """The form of all weights; "pairs" on a machine that has tiles: as if it had none."""
    if request.param == "tiles" and not amx.has_tiles():
        pytest.skip("needs AMX")
    with pytest.MonkeyPatch.context() as patch:
        if request.param == "pairs":
            patch.setattr(amx, "has_tiles", lambda: False)
        yield request.param


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A random Llama whose widths are multiples of 32, in bfloat16."""
    return oracles.llama(
        tmp_path_factory.mktemp("wide-llama"), dtype=torch.bfloat16, hidden_size=96, intermediate_size=160, head_dim=32
    )


@pytest.fixture(scope="module")
def alone(model, form):
    """The answer of each request alone, without a prefix cache, its prompt in one step."""
    with LLM(model, num_pages=64, prefix_cache=False, max_requests=1) as llm:
        assert llm.dtype == torch.bfloat16 and llm.stats()["row_invariant"]
        assert {layer.mlp.down.packed.form for layer in llm.engine.model.layers} == {form}
        return answers(llm)


@pytest.mark.parametrize("page_size", [4, 16])
@pytest.mark.parametrize("budget", [7, 2048])
def test_page_size_prefix_hits_and_chunks_change_no_bit_in_bfloat16(model, alone, page_size, budget):
    with LLM(model, page_size=page_size, num_pages=2048 // page_size, max_step_tokens=budget) as llm:
        assert answers(llm) == alone
        assert answers(llm) == alone  # now with cache hits
        assert llm.stats()["hit_tokens"] > 0


def test_preemption_and_order_change_no_bit_in_bfloat16(model, alone):
    with LLM(model, page_size=4, num_pages=40, max_step_tokens=32) as llm:
        assert answers(llm, list(range(len(PARAMS)))[::-1]) == alone
        assert llm.stats()["preemptions"] > 0


def test_threads_change_no_bit_in_bfloat16(model, alone):
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        with LLM(model, num_pages=128) as llm:
            assert answers(llm) == alone
    finally:
        torch.set_num_threads(before)
