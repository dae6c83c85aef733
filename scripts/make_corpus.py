"""The corpus of the tiny models: training documents, questions, and the tokenizer trained on them.

    python scripts/make_corpus.py --documents 5                     a few rows of training text
    python scripts/make_corpus.py --items "recall 256" --number 2   questions of a test, with their answers
    python scripts/make_corpus.py --tests                           the names of all tests
    python scripts/make_corpus.py --tokenizer FILE                  a new tokenizer for these documents

Everything is drawn from one seeded generator and nothing is stored: training makes its rows on the fly and never uses
one twice. Only the tokenizer is stored, in tiny/tokenizer.json: documents may change, token ids may not. tiny/items.py
documents the functions that make questions; other programs import them from here:

    from make_corpus import across_chunk, chat, items, recall, two_chunk
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path

from tiny.documents import lexicon, row
from tiny.facts import ANSWER, BLIND, CLASS, HIDDEN, NEW, TEXT, Level, Sentence
from tiny.items import TESTS, Item, across_chunk, chat, items, recall, render, two_chunk
from tiny.words import BOS, PIECE, SPECIALS
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

__all__ = [
    "ANSWER",
    "BLIND",
    "CLASS",
    "HIDDEN",
    "NEW",
    "TESTS",
    "TEXT",
    "TOKENIZER",
    "Encoder",
    "Item",
    "across_chunk",
    "chat",
    "items",
    "recall",
    "render",
]
__all__ += ["row", "train_tokenizer", "two_chunk"]

TOKENIZER = Path(__file__).parent / "tiny" / "tokenizer.json"
EVERYTHING = {"seeds": 0.5, "lists": 1, "owners": 0.5, "recall": 1, "far": 1, "two": 1, "direct": 0.5, "across": 1}
EVERYTHING |= {"chat": 2, "story": 1}
LEVEL = Level(facts=8, pairs=4, filler=0.3)


def train_tokenizer(seed: int = 0, rows: int = 1500) -> Tokenizer:
    """A byte-level BPE tokenizer in which every word of the corpus is one token, with and without a space before it.

    Raises ValueError that names a word with several tokens.
    """
    rng = random.Random(seed)
    texts = ["".join(text for text, _ in row(rng, EVERYTHING, LEVEL, 256)) for _ in range(rows)]
    # Special tokens cut a text before BPE. Each word is added a few times, so that none is rare by chance.
    cut = [piece for text in texts for piece in _cut(text)] + [form for w in lexicon() for form in (w, f" {w}")] * 5
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=4096, min_frequency=2, special_tokens=list(SPECIALS), initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(cut, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", special_tokens=[(BOS, tokenizer.token_to_id(BOS))]
    )
    for word in lexicon():
        for form in (word, f" {word}"):
            if len(tokenizer.encode(form, add_special_tokens=False).ids) != 1:
                raise ValueError(f"{form!r} is not one token")
    return tokenizer


def _cut(text: str) -> list[str]:
    for special in SPECIALS:
        text = text.replace(special, "\0")
    return [piece for piece in text.split("\0") if piece]


class Encoder:
    """Text to token ids by table look-up: equal to the tokenizer for texts of the corpus, and many times faster."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self._pieces: dict[str, list[int]] = {}
        self._texts: dict[str, list[int]] = {}

    def __call__(self, text: str) -> list[int]:
        """Token ids, without a token added at the front."""
        found = self._texts.get(text)
        if found is None:
            found = [token_id for piece in PIECE.findall(text) for token_id in self._piece(piece)]
            if len(text) < 32:  # heads and values of facts, which repeat often
                self._texts[text] = found
        return found

    def row(self, fragments: Sentence, tokens: int) -> tuple[list[int], list[int]]:
        """The first `tokens` ids of a row, and the class of each."""
        ids: list[int] = []
        kinds: list[int] = []
        for text, kind in fragments:
            new = self(text)
            ids += new
            kinds += [kind] * len(new)
        return ids[:tokens], kinds[:tokens]

    def _piece(self, piece: str) -> list[int]:
        if piece not in self._pieces:
            self._pieces[piece] = self.tokenizer.encode(piece, add_special_tokens=False).ids
        return self._pieces[piece]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=1, help="(%(default)s)")
    parser.add_argument("--documents", type=int, default=0, metavar="N", help="print N rows of training text")
    parser.add_argument("--kind", help="rows of one kind only: " + ", ".join(EVERYTHING))
    parser.add_argument("--tokens", type=int, default=128, help="of a row (%(default)s)")
    parser.add_argument("--items", choices=TESTS, metavar="TEST", help="print questions of this test, as JSON lines")
    parser.add_argument("--number", type=int, default=5, help="of questions (%(default)s)")
    parser.add_argument("--tests", action="store_true", help="print the names of all tests")
    parser.add_argument("--tokenizer", metavar="FILE", help="train a tokenizer and write it to FILE")
    options = parser.parse_args()
    if options.kind is not None and options.kind not in EVERYTHING:
        parser.error(f"--kind {options.kind}: one of {', '.join(EVERYTHING)}")
    rng = random.Random(options.seed)
    mix = EVERYTHING if options.kind is None else {options.kind: 1.0}
    for _ in range(options.documents):
        print("".join(text for text, _ in row(rng, mix, LEVEL, options.tokens)), end="\n\n")
    for item in items(options.items, options.number, options.seed) if options.items else ():
        print(json.dumps({"prompt": item.prompt, "answer": item.answer, "chunks": item.bounds}))
    if options.tokenizer:
        train_tokenizer().save(options.tokenizer)
    if options.tests:
        print("\n".join(TESTS))


if __name__ == "__main__":
    main()
