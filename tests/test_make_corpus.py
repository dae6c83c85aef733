"""The corpus of the tiny models: rows are reproducible, distances are exact, and answers follow from the text."""

import random
import re
from itertools import pairwise
from pathlib import Path

import pytest
from tokenizers import Tokenizer

from nanokv.text.template import ChatTemplate

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def corpus():
    patch = pytest.MonkeyPatch()
    patch.syspath_prepend(str(ROOT / "scripts"))
    import make_corpus
    from tiny import documents, facts, words

    yield type("Corpus", (), {"make": make_corpus, "documents": documents, "facts": facts, "words": words})
    patch.undo()


@pytest.fixture(scope="module")
def encoder(corpus):
    return corpus.make.Encoder(Tokenizer.from_file(str(corpus.make.TOKENIZER)))


def text_of(fragments):
    return "".join(text for text, _ in fragments)


def derive(told):
    """The facts of a text: (name, verb) -> value; "it" is the last thing that "There is" names."""
    said, there = {}, None
    pattern = r"The key of (\w+) is ((?:\d ?)+)\.|There is (\w+ \w+)\.|(\w+) (is|owns) ([\w ]+?)\."
    for key, digits, thing, subject, verb, value in re.findall(pattern, told):
        if thing:
            there = thing
        elif key:
            said[key, "key"] = digits.strip()
        else:
            said[subject, verb] = there if value == "it" else value
    return said


def test_the_same_seed_gives_the_same_rows_and_questions(corpus):
    make = corpus.make

    def rows(seed):
        rng = random.Random(seed)
        return [make.row(rng, make.EVERYTHING, make.LEVEL, 200) for _ in range(20)]

    assert rows(1) == rows(1) != rows(2)
    for test in make.TESTS:
        assert make.items(test, 3, seed=5) == make.items(test, 3, seed=5) != make.items(test, 3, seed=6)


def test_the_encoder_and_the_token_count_agree_with_the_tokenizer(corpus, encoder):
    make, rng = corpus.make, random.Random(7)
    texts = [text_of(make.row(rng, make.EVERYTHING, make.LEVEL, 300)) for _ in range(60)]
    texts += [item.text for test in make.TESTS for item in make.items(test, 2)]
    for text in texts:
        ids = encoder.tokenizer.encode(text, add_special_tokens=False).ids
        assert encoder(text) == ids
        assert corpus.words.count(text) == len(ids)
        assert encoder.tokenizer.decode(ids, skip_special_tokens=False) == text


def test_a_newly_trained_tokenizer_splits_text_as_the_stored_one_does(corpus, encoder):
    new = corpus.make.train_tokenizer(rows=300)
    text = text_of(corpus.make.row(random.Random(5), corpus.make.EVERYTHING, corpus.make.LEVEL, 2000))
    assert new.encode(text).tokens == encoder.tokenizer.encode(text).tokens


def test_a_text_begins_with_the_bos_token_of_documents(corpus, encoder):
    assert encoder.tokenizer.encode(" It rained.").ids[0] == encoder.tokenizer.token_to_id(corpus.words.BOS) == 0
    assert [encoder.tokenizer.token_to_id(token) for token in corpus.words.SPECIALS] == [0, 1, 2, 3]


def test_filler_has_exactly_the_requested_length_and_no_fact_words(corpus):
    rng = random.Random(3)
    for tokens in (0, *range(corpus.words.SHORTEST, 300)):
        assert corpus.words.count("".join(corpus.words.filler(rng, tokens))) == tokens
    words = set(re.findall(r"\w+", "".join(corpus.words.filler(rng, 5000))))
    assert not words & set(corpus.words.FACT_WORDS)


@pytest.mark.parametrize(
    "kind", ["seeds", "lists", "owners", "recall", "far", "two", "direct", "order", "across", "story", "chat"]
)
def test_every_kind_of_document_fills_a_row(kind, corpus, encoder):
    rng = random.Random(11)
    for tokens in (65, 129, 600):
        for _ in range(10):
            fragments = corpus.make.row(rng, {kind: 1.0}, corpus.facts.Level(10, 5, 0.3), tokens)
            ids, kinds = encoder.row(fragments, tokens)
            assert len(ids) == len(kinds) == tokens
            assert ids[0] == (1 if kind == "chat" else 0)


def test_answers_in_documents_appear_earlier_in_the_text(corpus):
    make, rng = corpus.make, random.Random(13)
    for kind in ("seeds", "lists", "owners", "recall", "far", "two", "direct", "order", "across"):
        for _ in range(50):
            before = ""
            for text, known in corpus.documents.document(rng, kind, make.LEVEL, 200):
                assert known & make.CLASS != make.ANSWER or text in before
                before += text


@pytest.mark.parametrize("distance", [9, 12, 13, 18, 64, 65, 100, 256, 512, 2048])
@pytest.mark.parametrize("facts", [1, 6, 13])
def test_recall_questions_have_exactly_the_requested_distance(distance, facts, corpus, encoder):
    rng = random.Random(17)
    for _ in range(10):
        item = corpus.make.recall(rng, distance, facts)
        name = re.search(r"The key of (\w+) is$", item.prompt)[1]
        said = derive(item.prompt)
        assert said[name, "key"] == item.answer.strip()
        assert len(said) == facts
        fact = item.prompt.index(f" The key of {name} is")
        before = encoder(corpus.words.BOS + item.prompt[:fact] + f" The key of {name} is")
        assert item.prompt_tokens - len(before) == distance
    with pytest.raises(ValueError, match="at least 9"):
        corpus.make.recall(rng, 8)


@pytest.mark.parametrize("tokens", [80, 128, 257, 1024])
def test_two_chunk_answers_follow_from_the_facts_in_the_chunks(tokens, corpus):
    rng = random.Random(19)
    for form in ("written", "direct", "first", "second"):
        for _ in range(10):
            item = corpus.make.two_chunk(rng, form, tokens)
            told = derive("".join(item.chunks))
            name = re.search(r"(\w+) own\?$| (\w+) (?:is|owns)$", item.prompt)
            name = name[1] or name[2]
            alias = name if form == "second" else told[name, "is"]
            assert (
                item.answer
                == {
                    "written": f" {name} is {alias}. {alias} owns {told[alias, 'owns']}",
                    "direct": f" {told[alias, 'owns']}",
                    "first": f" {alias}",
                    "second": f" {alias} owns {told[alias, 'owns']}",
                }[form]
            )
            assert item.prompt_tokens == tokens
            assert " owns " not in item.chunks[0]
            assert " is " not in item.chunks[1].replace("It is", "")


@pytest.mark.parametrize("tokens", [70, 128, 255, 1024])
def test_across_chunk_answers_follow_only_from_the_order_of_the_chunks(tokens, corpus):
    rng = random.Random(23)
    asked = []
    for _ in range(40):
        item = corpus.make.across_chunk(rng, tokens)
        name = re.search(r" (\w+) owns$", item.prompt)[1]
        assert derive("".join(item.chunks))[name, "owns"] == item.answer.strip()
        assert item.prompt_tokens == tokens
        things = [re.match(r" There is (\w+ \w+)\.", chunk)[1] for chunk in item.chunks[::2]]
        names = [re.match(r" (\w+) owns it\.", chunk)[1] for chunk in item.chunks[1::2]]
        assert not any(thing in chunk for chunk in item.chunks[1::2] for thing in things)
        assert not any(name in chunk for chunk in item.chunks[::2] for name in names)
        asked.append(names.index(name))
    assert set(asked) == {0, 1, 2, 3}  # every pair is asked about


def test_chunks_tile_the_prompt_and_bounds_are_token_positions(corpus, encoder):
    for test in ("two-chunk written 256", "across-chunk 256"):
        for item in corpus.make.items(test, 10):
            ids = encoder.tokenizer.encode(item.prompt).ids
            assert item.bounds[0][0] == 1
            assert all(end == start for (_, end), (start, _) in pairwise(item.bounds))
            for chunk, (start, end) in zip(item.chunks, item.bounds, strict=True):
                assert encoder.tokenizer.decode(ids[start:end]) == chunk
            assert encoder.tokenizer.decode(ids[item.bounds[-1][1] :]) == item.question


def test_chat_prompts_equal_the_rendered_chat_template(corpus):
    import tiny.models

    template = ChatTemplate(tiny.models.TEMPLATE)
    for form in ("told", "turns", "at once", "two", "unknown"):
        for item in corpus.make.items(f"chat {form}", 20):
            assert item.prompt == template.render(item.messages)
            assert item.answer.endswith(corpus.words.END)
            told = derive(" ".join(message["content"] for message in item.messages[:-1]))
            values = re.findall(r" (?:is|owns) ([\w ]+)\.", item.answer)
            at_once = derive(item.messages[-1]["content"])
            assert set(values) <= {*told.values(), *at_once.values()}
            assert bool(values) == (form != "unknown")
