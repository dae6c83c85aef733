"""The files of a tokenizer: first, last and end tokens, added tokens, and files that are hostile."""

import json
from pathlib import Path

import oracles
import pytest
from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers, processors
from tokenizers import Tokenizer as Backend

from nanokv import SamplingParams
from nanokv.core.errors import CheckpointError, RequestError
from nanokv.llm import LLM
from nanokv.models.read import read_folder
from nanokv.text.detokenizer import Detokenizer
from nanokv.text.files import end_ids
from nanokv.text.tokenizer import Tokenizer, byte_alphabet

BOS, EOS = 256, 257
FIRST = processors.TemplateProcessing("<s> $A", None, [("<s>", BOS)])
LAST = processors.TemplateProcessing("$A </s>", None, [("</s>", EOS)])


def byte_backend(*plain: str) -> Backend:
    """Ids 0 to 255 are bytes, then come <s>, </s> and `plain` added tokens."""
    letters = sorted(byte_alphabet(), key=byte_alphabet().__getitem__)
    backend = Backend(models.BPE({letter: i for i, letter in enumerate(letters)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_tokens([AddedToken(name, special=True, normalized=False) for name in ("<s>", "</s>")])
    backend.add_tokens([AddedToken(name, normalized=False) for name in plain])
    return backend


def saved(folder: Path, backend: Backend, **config) -> Tokenizer:
    backend.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "LlamaTokenizerFast", "bos_token": "<s>", "eos_token": "</s>", **config}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return Tokenizer.from_folder(folder)


@pytest.mark.parametrize("processor", [None, processors.ByteLevel(trim_offsets=False), FIRST, LAST,
                                       processors.Sequence([FIRST, LAST])])  # fmt: skip
@pytest.mark.parametrize("first", [None, True])
@pytest.mark.parametrize("last", [None, True])
def test_plain_text_gets_each_token_that_its_files_ask_for_once(tmp_path, processor, first, last):
    backend = byte_backend()
    if processor is not None:
        backend.post_processor = processor
    around = backend.encode("").ids
    tokenizer = saved(tmp_path, backend, add_bos_token=first, add_eos_token=last)
    expected = [BOS] * (first or BOS in around) + [104, 105] + [EOS] * (last or EOS in around)
    assert tokenizer.encode("hi", add_special=True) == expected
    assert tokenizer.encode("hi") == [104, 105]
    at = expected.index(104)
    assert tokenizer.encode("<s>hi", add_special=True) == [*expected[:at], BOS, *expected[at:]]


def test_a_false_flag_takes_no_token_away_as_in_transformers(tmp_path):
    from transformers import AutoTokenizer

    backend = byte_backend()
    backend.post_processor = FIRST
    tokenizer = saved(tmp_path, backend, tokenizer_class="PreTrainedTokenizerFast", add_bos_token=False)
    theirs = AutoTokenizer.from_pretrained(tmp_path)("hi").input_ids
    assert tokenizer.encode("hi", add_special=True) == theirs == [BOS, 104, 105]


def test_a_first_token_that_is_no_token_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match="tokenizer_config.json adds '<begin>' to each text"):
        saved(tmp_path, byte_backend(), add_bos_token=True, bos_token="<begin>")
    assert saved(tmp_path, byte_backend(), add_bos_token=True, bos_token=None).encode("hi", True) == [104, 105]


def test_a_tokenizer_neither_cuts_nor_pads_a_prompt(tmp_path):
    backend = byte_backend()
    backend.enable_truncation(4)
    backend.enable_padding(length=200_000_000, pad_token="</s>", pad_id=EOS)
    assert saved(tmp_path, backend).encode("abcdefgh") == list(b"abcdefgh")


def test_text_on_which_a_tokenizer_panics_is_refused(tmp_path, capfd):
    backend = byte_backend()
    split = pre_tokenizers.Split(Regex("(x+x+)+y"), "isolated")
    backend.pre_tokenizer = pre_tokenizers.Sequence([split, backend.pre_tokenizer])
    tokenizer = saved(tmp_path, backend)
    with pytest.raises(RequestError, match="text: the tokenizer fails on it") as caught:
        tokenizer.encode("x" * 60 + "!")
    assert "\n" not in str(caught.value)
    assert tokenizer.encode("x") == [120]


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"])
@pytest.mark.parametrize("content", ["[" * 100_000, '{"a":' * 100_000, "{", b"\xff"])
def test_a_damaged_file_is_named_in_one_line(tmp_path, name, content):
    saved(tmp_path, byte_backend())
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    for read in (Tokenizer.from_folder, end_ids):
        with pytest.raises(CheckpointError, match=name) as caught:
            read(tmp_path)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("word", ["café", "đem", "naïve", "ĠĠ", "日本", "a b é", "plain", "<｜User｜>"])
def test_an_added_token_means_its_own_text(word):
    tokenizer = Tokenizer(byte_backend(word))
    ids = tokenizer.encode(f"x {word} y")
    stream = Detokenizer(tokenizer)
    assert len(ids) == 5
    assert tokenizer.decode(ids) == "".join([*map(stream.push, ids), stream.flush()]) == f"x {word} y"


# ---- ends ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A random Llama, each of whose tokens is a special token: <0>, <1>, ..."""
    folder = oracles.llama(tmp_path_factory.mktemp("ends"))
    backend = Backend(models.WordLevel({"?": 0}, unk_token="?"))
    backend.add_tokens([AddedToken(f"<{i}>", special=True, normalized=False) for i in range(1, 256)])
    backend.save(str(folder / "tokenizer.json"))
    return folder


def answer(folder: Path, **params):
    with LLM(folder, num_pages=16, dtype="float32") as llm:
        return llm.generate([5, 6, 7], SamplingParams(temperature=0, max_tokens=8, **params))[0]


def test_the_end_token_of_the_tokenizer_ends_an_answer(folder):
    config = read_folder(folder)
    free = answer(folder, ignore_eos=True)
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": f"<{free.token_ids[3]}>"}))
    assert read_folder(folder).eos_token_ids == (*config.eos_token_ids, free.token_ids[3])
    ended = answer(folder)
    (folder / "tokenizer_config.json").unlink()
    place = free.token_ids.index(free.token_ids[3])
    assert ended.token_ids == free.token_ids[: place + 1] and ended.finish_reason == "stop"


def test_a_stop_text_that_is_a_special_token_ends_an_answer(folder):
    free = answer(folder, ignore_eos=True)
    stop = f"<{free.token_ids[3]}>"
    place = free.token_ids.index(free.token_ids[3])
    ended = answer(folder, ignore_eos=True, stop=("never there", stop))
    assert ended.token_ids == free.token_ids[: place + 1] and ended.finish_reason == "stop"
    late = answer(folder, ignore_eos=True, stop=stop, min_tokens=place + 2)
    assert free.token_ids[3] not in late.token_ids[: place + 1]


@pytest.mark.parametrize("config", [{}, {"eos_token": None}, {"eos_token": "<9999>"}, {"eos_token": ["<1>"]}])
def test_an_end_token_that_is_no_token_adds_no_end(folder, config):
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    assert end_ids(folder) == ()
    (folder / "tokenizer_config.json").unlink()


def test_the_end_token_may_stand_in_the_vocabulary_alone(tmp_path):
    Backend(models.WordLevel({"?": 0, "end": 1}, unk_token="?")).save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "special_tokens_map.json").write_text('{"eos_token": "end"}')
    assert end_ids(tmp_path) == (1,)
