"""Scores of a tiny model: exact answers, loss, and both with chunks that cannot see each other."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
import transformers
from make_corpus import ANSWER, CLASS, TEXT, Encoder, Item, items, row

from nanokv import LLM
from tiny.facts import Level

BATCH_TOKENS = 8192


@dataclass(frozen=True)
class Score:
    """The score of one test.

    exact   share of items in which every answer token is the most likely one, as greedy decoding requires
    first   share of items in which the first answer token is the most likely one
    loss    mean cross-entropy of answer tokens, in nats
    """

    items: int
    exact: float
    first: float
    loss: float


Visible = Callable[[Item], torch.Tensor]


@torch.inference_mode()
def score(
    model: transformers.PreTrainedModel, encoder: Encoder, asked: list[Item], visible: Visible | None = None
) -> Score:
    """Answers under teacher forcing.

    visible   the tokens that each token of an item may attend to, bool [prompt, prompt]; None: all before it
    """
    rows = []
    for item in asked:
        ids, answer = encoder(item.text), encoder(item.answer)
        rows.append((ids, len(answer), item))
    rows.sort(key=lambda row: len(row[0]))
    answers = []
    while rows:
        width = len(rows[-1][0])
        batch, rows = rows[-max(1, BATCH_TOKENS // width) :], rows[: -max(1, BATCH_TOKENS // width)]
        ids = torch.full((len(batch), width), model.config.pad_token_id)
        for place, (row_ids, _, _) in enumerate(batch):
            ids[place, : len(row_ids)] = torch.tensor(row_ids)  # padding at the end changes no earlier token
        mask = None
        if visible is not None:
            mask = torch.ones(len(batch), 1, width, width, dtype=torch.bool).tril()
            for place, (_, _, item) in enumerate(batch):
                part = visible(item)
                mask[place, 0, : len(part), : len(part)] &= part
        hidden = model.model(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
        for place, (row_ids, length, _) in enumerate(batch):
            end = len(row_ids)
            logits = F.linear(hidden[place, end - length - 1 : end - 1], model.lm_head.weight)
            answers.append((logits, ids[place, end - length : end]))
    return graded(answers)


def score_through(llm: LLM, encoder: Encoder, asked: list[Item]) -> Score:
    """As `score`, computed by nanokv with its cache."""
    answers = []
    for item in asked:
        ids, length = encoder(item.text), len(encoder(item.answer))
        answers.append((llm.score(ids)[-length - 1 : -1], torch.tensor(ids[-length:])))
    return graded(answers)


def graded(answers: list[tuple[torch.Tensor, torch.Tensor]]) -> Score:
    """The score of these answers.

    answers   for each item, logits [length, vocab] and the right tokens [length]
    """
    right = [logits.argmax(-1) == wanted for logits, wanted in answers]
    losses = [F.cross_entropy(logits, wanted).item() for logits, wanted in answers]
    exact, first = sum(bool(each.all()) for each in right), sum(bool(each[0]) for each in right)
    number = len(answers)
    return Score(number, exact / number, first / number, sum(losses) / number)


def isolated(item: Item, own_pair: bool = False) -> torch.Tensor:
    """Each chunk sees <|endoftext|> and itself; the question sees all. bool [prompt, prompt].

    own_pair   the second, fourth, ... chunk also sees the one before it, which is all that it needs
    """
    chunk = torch.full((item.prompt_tokens,), len(item.chunks))
    chunk[0] = -1
    for place, (start, end) in enumerate(item.bounds):
        chunk[start:end] = place
    of_row, of_column = chunk[:, None], chunk[None, :]
    seen = (of_row == len(item.chunks)) | (of_column == -1) | (of_row == of_column)
    if own_pair:
        seen |= (of_row % 2 == 1) & (of_column == of_row - 1)
    return seen


def own_pair(item: Item) -> torch.Tensor:
    return isolated(item, own_pair=True)


def held_out_loss(
    llm: LLM, encoder: Encoder, mix: dict[str, float], level: Level, rows: int, tokens: int
) -> dict[str, float]:
    """Mean cross-entropy of ordinary words and of answers on rows outside the training data."""
    rng = random.Random("held out")
    sums, counts = {TEXT: 0.0, ANSWER: 0.0}, {TEXT: 0, ANSWER: 0}
    for _ in range(rows):
        ids, kinds = encoder.row(row(rng, mix, level, tokens), tokens)
        loss = F.cross_entropy(llm.score(ids)[:-1], torch.tensor(ids[1:]), reduction="none")
        for kind in sums:
            chosen = torch.tensor(kinds[1:]) & CLASS == kind
            sums[kind] += loss[chosen].sum().item()
            counts[kind] += int(chosen.sum())
    names = {TEXT: "text", ANSWER: "answer"}
    found = {f"{names[kind]}_loss": sums[kind] / counts[kind] for kind in sums}
    return found | {f"{names[kind]}_tokens": counts[kind] for kind in sums}


CARD: list[tuple[str, int]] = [
    *((f"recall {distance}", 200) for distance in (64, 128, 256, 512)),
    ("recall 1024", 100),
    ("recall 2048", 50),
    *((f"recall {distance}, 13 facts", 100) for distance in (256, 512)),
    ("recall 1024, 13 facts", 50),
    *((f"two-chunk written {tokens}", 200) for tokens in (128, 256, 512)),
    ("two-chunk written 1024", 100),
    *((f"two-chunk direct {tokens}", 100) for tokens in (128, 256, 512)),
    *((f"two-chunk {form} 256", 100) for form in ("first", "second")),
    *((f"across-chunk {tokens}", 200) for tokens in (96, 128, 256)),
    *((f"across-chunk {tokens}", 100) for tokens in (512, 1024)),
    *((f"chat {form}", 100) for form in ("told", "turns", "at once", "two", "unknown")),
]
"""The tests of the model card, with their numbers of items."""
MASKED = [("across-chunk 128", 200), ("across-chunk 256", 200), ("two-chunk written 256", 200)]


def card(
    llm: LLM, model: transformers.PreTrainedModel, encoder: Encoder, done: Callable[[str, Score], None]
) -> dict[str, dict[str, float]]:
    """All scores of the model card by test: with nanokv, and those with a mask with transformers.

    A model with recurrent layers cannot be masked and has fewer scores.

    done   called with each score
    """
    found: dict[str, Score] = {}

    def keep(name: str, scored: Score) -> None:
        found[name] = scored
        done(name, scored)

    for test, number in CARD:
        keep(test, score_through(llm, encoder, items(test, number)))
    if "linear_attention" not in (getattr(model.config, "layer_types", None) or []):
        for test, number in MASKED:
            keep(f"{test}, chunks isolated", score(model, encoder, items(test, number), isolated))
            if test.startswith("across"):
                keep(f"{test}, own pair only", score(model, encoder, items(test, number), own_pair))
    return {name: vars(scored) for name, scored in found.items()}
