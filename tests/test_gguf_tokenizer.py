"""Tokenizers of GGUF files: how each kind cuts a text, what begins and ends one, and vocabularies that do not fit."""

import json
import re
import unicodedata

import pytest
import tiny_gguf
from tokenizers import Regex, pre_tokenizers

from nanokv.core.errors import PullError
from nanokv.hub.gguf_splits import SPLITS, _ranges
from nanokv.hub.gguf_tokenizer import build_tokenizer
from nanokv.hub.gguf_tokens import end_ids, special_id, token_texts
from nanokv.text.tokenizer import byte_alphabet

BYTES = sorted(byte_alphabet())


def pieces(name: str, text: str) -> list[str]:
    """The pieces into which a pre-tokenizer cuts a text."""
    cuts = [pre_tokenizers.Split(Regex(cut), behavior="isolated") for cut in SPLITS[name].cuts]
    return [piece for piece, _ in pre_tokenizers.Sequence(cuts).pre_tokenize_str(text)]


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("llama-bpe", "I¦'LL¦ pay¦ ¦123¦45¦ \n\n¦ ¦ ok¦...\n"),
        ("qwen2", "I¦'LL¦ pay¦ ¦1¦2¦3¦ \n\n¦ ¦ ok¦...\n"),
        ("qwen2", "e¦\u0301a¦ क¦ा"),
        ("qwen35", "e\u0301a¦ का¦ ¦1¦2"),
        ("tekken", "Hello¦World¦ don¦'t¦ ¦1¦2¦3¦/\n¦ a¦/b"),
        ("tekken", "ABCdef¦.Éa"),
        ("deepseek-llm", "Hello¦ w¦ö¦rld¦!!¦ ¦123¦\n¦\n¦漢字¦ ok¦ "),
        ("deepseek-llm", "Кот¦,¦ ¦ἄ¦νθρωπος¦;¦ ¦한국"),
        ("deepseek-coder", "x¦ =¦ ¦漢¦y¦+¦1¦2¦\r¦\n"),
        ("deepseek-v3", "Hello¦ ¦123¦45¦ ¦漢字かな¦x¦!abc¦\n\n¦ {}"),
        ("smollm", "it¦'s¦ ¦1¦2¦ x"),
        ("gpt-2", "it¦'s¦ 12¦ ¦ x"),
        ("default", "a¦.¦b¦ ¦123¦45"),
    ],
)
def test_each_pre_tokenizer_cuts_as_its_model_does(name, text):
    """The text is cut at each ¦."""
    assert pieces(name, text.replace("¦", "")) == text.split("¦")


@pytest.mark.parametrize("name", SPLITS)
def test_no_pre_tokenizer_loses_a_letter(name):
    text = "Hello, wörld! I'LL 12345\n\n  漢字かな한국 हिन्दी e\u0301 𐐀ǅ👍🏽\t{x: ½} ' ''d\r\n"
    assert "".join(pieces(name, text)) == text


def test_names_that_llama_cpp_treats_alike_cut_alike():
    for name in ("llama3", "llama-v3", "falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2", "jina-v5-nano"):
        assert SPLITS[name] == SPLITS["llama-bpe"]
        assert SPLITS[name].ignore_merges and SPLITS[name].add_bos
    assert SPLITS["deepseek-r1-qwen"] == SPLITS["megrez"] == SPLITS["qwen2"]
    assert SPLITS["tekken"].ignore_merges and SPLITS["tekken"].add_bos
    assert not any(SPLITS[name].add_bos for name in ("qwen2", "qwen35", "deepseek-llm", "deepseek-v3", "smollm"))


def test_deepseeks_letters_are_those_with_two_cases():
    """The class of deepseek-llm holds letters with cases, but for some that Unicode has added or moved since."""
    cut = SPLITS["deepseek-llm"].cuts[1]
    ranges = [tuple(int(end, 16) for end in pair) for pair in re.findall(r"x\{(\w+)\}-\\x\{(\w+)\}", cut)]
    inside = {chr(c) for first, last in ranges for c in range(first, last + 1)}
    others = {c for c in inside if unicodedata.category(c) not in ("Lu", "Ll", "Lt")}
    assert others <= {chr(c) for c in range(0x1C80, 0x10000) if unicodedata.category(chr(c)) in ("Cn", "Lo")}
    assert all(c in inside for c in "azAZéßŁżΩωЖя")
    assert _ranges("41-5A B5") == r"\x{41}-\x{5A}\x{B5}"


def gpt2(tokens, **fields):
    return tiny_gguf.vocabulary(tokens, model="gpt2", pre=fields.pop("pre", "gpt-2"), merges=["a b"], **fields)


def test_tekken_takes_a_word_that_is_a_token_whole_and_begins_with_bos():
    tokens = [*BYTES, "ab", "abc", "<s>"]
    file = gpt2(tokens, pre="tekken", bos_token_id=len(tokens) - 1, token_type=[1] * (len(tokens) - 1) + [3])
    backend, _ = build_tokenizer(file)
    assert backend.encode("abc").tokens == ["<s>", "abc"]
    backend, _ = build_tokenizer(gpt2(tokens[:-1]))
    assert backend.encode("abc").tokens == ["ab", "c"]


def test_a_text_ends_with_eos_where_the_file_says_so():
    tokens = [*BYTES, "ab", "</s>"]
    backend, _ = build_tokenizer(gpt2(tokens, eos_token_id=len(tokens) - 1, add_eos_token=True))
    assert backend.encode("ab").tokens == ["ab", "</s>"]
    assert backend.encode("ab", add_special_tokens=False).tokens == ["ab"]


def test_an_unknown_pre_tokenizer_is_named_with_the_known_ones():
    with pytest.raises(
        PullError, match=r"pre-tokenizer 'superbpe' is not supported; supported are default, gpt-2, smollm,"
    ):
        build_tokenizer(gpt2([*BYTES, "ab"], pre="superbpe"))


@pytest.mark.parametrize(
    "name", ["<|eot_id|>", "<|im_end|>", "<end_of_turn>", "<|endoftext|>", "<｜end▁of▁sentence｜>"]
)
def test_tokens_end_an_answer_by_their_name_where_no_key_names_them(name):
    tokens = [*BYTES, "ab", "<|end_of_text|>", name, "<|other|>"]
    file = gpt2(tokens, eos_token_id=257, token_type=[1] * 257 + [3, 1, 3])
    assert end_ids(file, token_texts(file)) == [257, 258]
    backend, _ = build_tokenizer(file)  # a token that ends an answer is special, whatever its type says
    assert backend.encode(f"ab{name}").tokens == ["ab", name]
    assert backend.decode([256, 258]) == "ab"


def test_ends_that_keys_name_come_first_and_an_end_of_one_message_is_none():
    tokens = [*BYTES, "ab", "<|im_end|>", "<e>", "<|end|>", "<|call|>", "<|return|>"]
    file = gpt2(tokens, eos_token_id=261, eot_token_id=258)
    assert end_ids(file, token_texts(file)) == [261, 258, 257, 260]


def test_the_ends_of_a_file_reach_the_generation_config(tmp_path):
    from nanokv.hub.gguf import convert

    tiny_gguf.write(tmp_path / "tiny.gguf", edit=tiny_gguf.replaced("tokenizer.ggml.eos_token_id", 1))
    (tmp_path / "model").mkdir()
    convert(tmp_path / "tiny.gguf", tmp_path / "model", {}, lambda *_: None)
    assert json.loads((tmp_path / "model" / "generation_config.json").read_text())["eos_token_id"] == [1, 0, 2]
    assert json.loads((tmp_path / "model" / "config.json").read_text())["eos_token_id"] == 1


def test_special_ids_beyond_the_vocabulary_count_as_missing():
    file = gpt2([*BYTES, "ab"], eos_token_id=2**32 - 1, padding_token_id=300)
    assert [special_id(file, name) for name in ("eos", "padding", "bos")] == [None, None, None]
    pieces = tiny_gguf.vocabulary(["<unk>", "<s>", "</s>", "a"], model="llama", scores=[0.0] * 4, eos_token_id=9)
    assert [special_id(pieces, name) for name in ("unknown", "bos", "eos", "padding")] == [0, 1, 2, None]


@pytest.mark.parametrize(
    ("fields", "complaint"),
    [
        ({"tokens": [*BYTES, "a"]}, "257 tokens, of which only 256 differ"),
        ({"merges": ["a b", "x yz"]}, "its vocabulary and merges contradict each other"),
        ({"merges": ["ab"]}, "the merge 'ab' is not two pieces"),
        ({"merges": [1, 2]}, "merges=a list of 2: expected a list of texts"),
        ({"token_type": [1, 1]}, "token_type=a list of 2: expected a list of 257 numbers"),
        ({"bos_token_id": 1.0}, "bos_token_id=1.0: expected an integer"),
        ({"add_bos_token": 1}, "add_bos_token=1: expected true or false"),
        ({"model": "bert"}, "tokenizer model 'bert' is not supported; 'llama' and 'gpt2' are"),
        ({"model": "llama"}, "the key tokenizer.ggml.scores is missing"),
        (
            {"model": "llama", "scores": [0.0] * 257, "tokens": [*BYTES, "a" * 600]},
            "token 256 has 600 letters; at most",
        ),
    ],
)
def test_a_vocabulary_that_does_not_fit_is_refused_in_one_line(fields, complaint):
    fields = {"tokens": [*BYTES, "ab"], "model": "gpt2", "pre": "gpt-2", "merges": ["a b"], **fields}
    with pytest.raises(PullError) as caught:
        build_tokenizer(tiny_gguf.vocabulary(**fields))
    assert complaint in str(caught.value)
    assert "\n" not in str(caught.value)


def test_an_empty_token_is_no_text():
    tokens = [*BYTES, "ab", ""]
    assert token_texts(gpt2(tokens))[-1] == "[EMPTY_257]"


def test_more_tokens_than_embeddings_are_refused(tmp_path):
    tiny_gguf.write(
        tmp_path / "tiny.gguf", edit=tiny_gguf.replaced("tokenizer.ggml.tokens", [*tiny_gguf.TOKENS, "more"])
    )
    from nanokv.hub.gguf_file import GGUFFile

    with pytest.raises(PullError, match=r"269 tokens, but token_embd.weight has 268 rows"):
        token_texts(GGUFFile(tmp_path / "tiny.gguf"))
