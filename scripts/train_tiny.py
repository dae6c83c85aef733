"""Trains a tiny model that looks facts up in its context, and measures it.

    python scripts/train_tiny.py tiny-gqa --out weights --work build/tiny-gqa
    python scripts/train_tiny.py tiny-gqa --out weights --work build/tiny-gqa --evaluate

Training has stages: first very short and dense documents, until the model binds a name to a value (a sudden step, at a
time that depends on the seed), then sentences, then longer rows. A stage ends when its gate is passed (a share of exact
answers on held-out questions) or at its limit. Each evaluation writes a checkpoint with the complete state, including
both optimisers and the generator, so a run that was killed continues exactly when it is started again.

Source   Muon: Jordan et al. 2024. Skipped positions: Zhu et al. 2023 (PoSE), so that rows of 512 tokens teach
         distances of 2,000.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

MEMORY = {"MALLOC_MMAP_THRESHOLD_": "4294967296", "MALLOC_TRIM_THRESHOLD_": "4294967296"}
MEMORY |= {"MALLOC_TOP_PAD_": "268435456", "TORCHINDUCTOR_COMPILE_THREADS": "1"}
if __name__ == "__main__" and not MEMORY.keys() <= os.environ.keys():
    # glibc reads these when a process starts. Without them it returns the memory of every large activation.
    os.execve(sys.executable, [sys.executable, *sys.argv], os.environ | MEMORY)

import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
import transformers  # noqa: E402
from make_corpus import ANSWER, BLIND, CLASS, HIDDEN, NEW, TEXT, TOKENIZER, Encoder, items, row  # noqa: E402
from rich.console import Console  # noqa: E402
from rich.progress import MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn  # noqa: E402
from tiny import measure  # noqa: E402
from tiny.chats import ASK_STORY  # noqa: E402
from tiny.facts import Level  # noqa: E402
from tiny.models import CONTEXT, NAMES, build, export  # noqa: E402
from tiny.muon import Muon  # noqa: E402
from tokenizers import Tokenizer  # noqa: E402
from torch import Tensor  # noqa: E402

from nanokv import LLM, SamplingParams  # noqa: E402

WEIGHTS = torch.tensor([0.0, 0.0, 0.0])
WEIGHTS[TEXT], WEIGHTS[ANSWER], WEIGHTS[NEW] = 1.0, 5.0, 0.1


@dataclass(frozen=True)
class Stage:
    """One stage of training.

    length, batch   tokens of a row, rows of a step
    mix             kinds of documents and their weights
    gate            test -> share of exact answers; the stage ends when one evaluation passes every test
    watch           further tests to report
    steps           the limit of steps
    rate            learning rate at the beginning and at the limit, as a share of the full one
    skip            share of rows whose positions jump, up to CONTEXT
    required        whether a run that fails the gate is aborted
    """

    name: str
    length: int
    batch: int
    mix: dict[str, float]
    level: Level
    steps: int
    gate: dict[str, float]
    watch: tuple[str, ...] = ()
    rate: tuple[float, float] = (1.0, 1.0)
    skip: float = 0.0
    required: bool = False


DENSE = Level(facts=6, pairs=5, filler=0.0)
BLINDED = 0.85
"""Share of across-chunk documents with blind questions, once the model resolves "it" while reading."""
FILL = {"lists": 0.3, "owners": 0.2, "recall": 1.0, "two": 1.5, "direct": 0.7, "across": 2.5, "order": 0.3}
GAPS = {**FILL, "across": 3.0, "chat": 0.7}
TALK = {"lists": 0.2, "recall": 1.0, "far": 0.7, "two": 1.5, "direct": 0.4, "across": 2.5, "chat": 1.7, "story": 0.5}
CHATS = {"chat told": 0.95, "chat two": 0.95}
LONG = (
    *(f"{test} 512" for test in ("recall", "two-chunk written", "two-chunk direct", "across-chunk")),
    "recall 1024",
    "chat turns",
)


def gate(length: int, share: float) -> dict[str, float]:
    tests = ("recall", "two-chunk written", "two-chunk direct", "across-chunk")
    return {f"{test} {length}": share for test in tests}


STAGES = (
    # One lookup: the model must know every short form of a fact before a question needs two of them.
    Stage("bind", 64, 64, {"seeds": 1.0}, DENSE, 900, {"seeds": 0.97}, required=True),
    Stage("one", 64, 64, {"seeds": 0.2, "owners": 1.0, "lists": 1.0}, DENSE, 300, {"recall 64": 0.97}),
    # Two lookups, in documents with no other content; then with other words between.
    Stage(
        "compose", 64, 64, {"seeds": 0.1, "owners": 0.4, "lists": 0.4, "order": 2.0, "direct": 1.5, "two": 0.3}, DENSE,
        500, {"two-chunk direct 128": 0.9}, ("across-chunk 96",),
    ),
    Stage("fill", 128, 32, FILL, Level(8, 5, 0.4, BLINDED), 850, gate(128, 0.9), rate=(0.7, 0.7)),
    # Chats, and longer rows.
    Stage("talk", 128, 32, TALK, Level(8, 5, 0.4, BLINDED), 300, {**gate(128, 0.95), **CHATS}, rate=(0.7, 0.5)),
    Stage("gaps", 128, 32, GAPS, Level(8, 5, 0.4, BLINDED), 400, gate(128, 0.95), rate=(0.8, 0.8)),
    Stage(
        "256", 256, 16, TALK, Level(10, 5, 0.4, BLINDED), 400, {**gate(256, 0.95), **CHATS}, rate=(0.7, 0.6), skip=0.1,
    ),
    Stage("512", 512, 8, TALK, Level(12, 6, 0.4, BLINDED), 200, {}, LONG, rate=(0.5, 0.4), skip=0.5),
    Stage("1024", 1024, 4, TALK, Level(16, 6, 0.45, BLINDED), 250, {}, LONG, rate=(0.4, 0.02), skip=0.4),
)  # fmt: skip
EVERY = 50
WARM_UP = 50


@dataclass
class Progressed:
    """The progress of a run: the part of a checkpoint besides tensors and the generator."""

    stage: int = 0
    step: int = 0
    """Steps of the current stage."""
    total: int = 0
    tokens: int = 0
    seconds: float = 0.0
    """Seconds of training, without evaluation."""
    stage_began: float = 0.0
    finished: bool = False
    history: list[dict] = field(default_factory=list)


class Trainer:
    """One run: a model, its optimisers, the generator of its documents, and its progress."""

    def __init__(self, options: argparse.Namespace, stages: tuple[Stage, ...], console: Console) -> None:
        self.options, self.stages, self.console = options, stages, console
        self.tokenizer = Tokenizer.from_file(str(TOKENIZER))
        self.encoder = Encoder(self.tokenizer)
        self.model = build(options.model, self.tokenizer.get_vocab_size(), options.seed)
        named = list(self.model.named_parameters())
        matrices = [tensor for name, tensor in named if tensor.ndim == 2 and "embed" not in name]
        others = [tensor for name, tensor in named if not (tensor.ndim == 2 and "embed" not in name)]
        self.muon = Muon(matrices, rate=0.02)
        self.adam = torch.optim.AdamW(others, lr=2e-3, betas=(0.9, 0.95), weight_decay=0.0)
        self.rng = random.Random(options.seed)
        self.at = Progressed()
        self.checkpoint = options.work / "checkpoint.pt"
        self.loss = torch.compile(self._loss, dynamic=False) if options.compile else self._loss
        self.stop_token = self.tokenizer.token_to_id(".")

    # ---- one step ---------------------------------------------------------------------------------------------------

    def _loss(self, ids: Tensor, kinds: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """The weighted mean loss, and the loss of each token."""
        with torch.autocast("cpu", torch.bfloat16, enabled=self.options.bfloat16):
            seen = (kinds[:, :-1, None] & BLIND == 0) | (kinds[:, None, :-1] & HIDDEN == 0)
            hidden = self.model.model(
                input_ids=ids[:, :-1], attention_mask=seen[:, None], position_ids=positions, use_cache=False
            ).last_hidden_state
            logits = F.linear(hidden, self.model.lm_head.weight)
        each = F.cross_entropy(logits.float().flatten(0, 1), ids[:, 1:].reshape(-1), reduction="none")
        weights = WEIGHTS[kinds[:, 1:].reshape(-1) & CLASS]
        return (each * weights).sum() / weights.sum(), each.detach()

    def batch(self, stage: Stage) -> tuple[Tensor, Tensor, Tensor]:
        """Token ids and classes [batch, length + 1], positions [batch, length]."""
        rows = []
        for _ in range(stage.batch):
            tokens = stage.length + 1
            rows.append(self.encoder.row(row(self.rng, stage.mix, stage.level, tokens), tokens))
        ids = torch.tensor([ids for ids, _ in rows])
        positions = torch.arange(stage.length).repeat(stage.batch, 1)
        for place in range(stage.batch):
            if self.rng.random() < stage.skip:
                self.jump(ids[place], positions[place])
        return ids, torch.tensor([kinds for _, kinds in rows]), positions

    def jump(self, ids: Tensor, positions: Tensor) -> None:
        """Shifts the positions after one to three full stops: the words of a sentence stay together."""
        stops = (ids[: len(positions) - 1] == self.stop_token).nonzero().flatten().tolist()
        room = CONTEXT - len(positions)
        for place in self.rng.sample(stops, min(len(stops), self.rng.randint(1, 3))):
            by = self.rng.randint(0, room)
            positions[place + 1 :] += by
            room -= by

    def train_step(self, stage: Stage, progress: float) -> tuple[float, float]:
        """One update. Returns the mean loss of ordinary words and of answers."""
        ids, kinds, positions = self.batch(stage)
        loss, each = self.loss(ids, kinds, positions)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        scale = stage.rate[0] + (stage.rate[1] - stage.rate[0]) * progress
        scale *= min(1.0, (self.at.total + 1) / WARM_UP)
        for group in self.adam.param_groups:
            group["lr"] = 2e-3 * scale
        self.muon.step(scale)
        self.adam.step()
        self.model.zero_grad(set_to_none=True)
        flat = kinds[:, 1:].reshape(-1) & CLASS
        return each[flat == TEXT].mean().item(), each[flat == ANSWER].mean().item()

    # ---- the run ----------------------------------------------------------------------------------------------------

    def run(self) -> None:
        """Trains from the checkpoint to the end and exports. Raises SystemExit if a required gate is failed."""
        self.restore()
        columns = (TextColumn("{task.description}"), MofNCompleteColumn(), TextColumn("{task.fields[note]}"))
        quiet = not self.console.is_terminal
        with Progress(*columns, TimeElapsedColumn(), console=self.console, disable=quiet) as bars:
            while not self.at.finished:
                stage = self.stages[self.at.stage]
                bar = bars.add_task(f"{self.options.model} {stage.name}", total=stage.steps, note="")
                passed = self.run_stage(stage, lambda step, note, bar=bar: bars.update(bar, completed=step, note=note))
                if stage.required and not passed:
                    sys.exit(f"stage {stage.name!r}: not passed in {self.at.step} steps; try another --seed")
                self.at.stage, self.at.step, self.at.stage_began = self.at.stage + 1, 0, self.at.seconds
                self.at.finished = self.at.stage == len(self.stages)
                self.save()
                if not stage.required:
                    export(self.model, self.tokenizer, self.options.out / self.options.model)

    def run_stage(self, stage: Stage, show: Callable[[int, str], None]) -> bool:
        """Trains until the gate is passed (True) or the limit is reached."""
        losses: list[tuple[float, float]] = []
        while (progress := self.progress(stage)) < 1:
            begin = time.perf_counter()
            losses.append(self.train_step(stage, progress))
            self.at.step += 1
            self.at.total += 1
            self.at.tokens += stage.length * stage.batch
            self.at.seconds += time.perf_counter() - begin
            show(self.at.step, f"text {losses[-1][0]:.2f}, answers {losses[-1][1]:.3f}")
            if self.at.step % EVERY == 0 or self.progress(stage) >= 1:
                scores = self.evaluate(stage, losses)
                losses.clear()
                if stage.gate and all(scores[test] >= share for test, share in stage.gate.items()):
                    return True
                self.save()
        return False

    def progress(self, stage: Stage) -> float:
        """Progress of the stage from 0 to 1, in steps or, with --minutes, in time: the larger of the two."""
        steps = self.at.step / stage.steps
        if self.options.minutes is None:
            return steps
        costs = [one.steps * (1 + one.length / 1024) for one in self.stages]
        deadline = 60 * self.options.minutes * sum(costs[: self.at.stage + 1]) / sum(costs)
        spent = self.at.seconds - self.at.stage_began
        return max(steps, spent / max(1e-9, deadline - self.at.stage_began))

    def evaluate(self, stage: Stage, losses: list[tuple[float, float]]) -> dict[str, float]:
        """Exact answers on held-out items. Prints one line and adds one entry to the history."""
        scores = {}
        for test in (*stage.gate, *stage.watch):
            asked = items(test, 16 if "1024" in test else 32, seed=0)
            scores[test] = measure.score(self.model, self.encoder, asked).exact
        entry = {"stage": stage.name, "step": self.at.step, "tokens": self.at.tokens, "seconds": round(self.at.seconds)}
        entry |= {"text_loss": sum(text for text, _ in losses) / len(losses)}
        entry |= {"answer_loss": sum(answer for _, answer in losses) / len(losses), **scores}
        self.at.history.append(entry)
        shown = "  ".join(f"{test} {share:.0%}" for test, share in scores.items())
        self.console.print(
            f"{time.strftime('%H:%M:%S')} {stage.name} {self.at.step}: {self.at.tokens / 1e6:.1f} M tokens, "
            f"{self.at.seconds:.0f} s, text {entry['text_loss']:.2f}, answers {entry['answer_loss']:.3f}  {shown}",
            soft_wrap=True,
        )
        return scores

    # ---- checkpoints ------------------------------------------------------------------------------------------------

    def save(self) -> None:
        state = {
            "model_name": self.options.model,
            "seed": self.options.seed,
            "at": vars(self.at),
            "rng": self.rng.getstate(),
            "model": self.model.state_dict(),
            "muon": self.muon.state_dict(),
            "adam": self.adam.state_dict(),
        }
        new = self.checkpoint.with_suffix(".new")
        torch.save(state, new)
        os.replace(new, self.checkpoint)

    def restore(self) -> None:
        """Continues from the checkpoint if there is one. Raises SystemExit if it belongs to another run."""
        if not self.checkpoint.exists():
            return
        state = torch.load(self.checkpoint)
        if (state["model_name"], state["seed"]) != (self.options.model, self.options.seed):
            sys.exit(f"{self.checkpoint} is of {state['model_name']}, seed {state['seed']}: give another --work")
        self.at = Progressed(**state["at"])
        version, numbers, gauss = state["rng"]
        self.rng.setstate((version, tuple(numbers), gauss))
        self.model.load_state_dict(state["model"])
        self.muon.load_state_dict(state["muon"])
        self.adam.load_state_dict(state["adam"])
        self.console.print(f"continuing from step {self.at.total}")


def evaluate(options: argparse.Namespace, console: Console) -> None:
    """Measures the exported model with bfloat16 weights, computed in float32; writes evaluation.json."""
    folder = options.out / options.model
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="sdpa")
    kept = LLM(folder, dtype="bfloat16").engine.layout
    llm = LLM(folder, dtype="float32")
    encoder = Encoder(Tokenizer.from_file(str(folder / "tokenizer.json")))
    last = STAGES[-1]
    tell = llm.chat([{"role": "user", "content": ASK_STORY}], SamplingParams(temperature=0.0, max_tokens=120))
    found = {
        "model": options.model,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "bytes_per_token": kept.bytes_per_token,
        "bytes_per_sequence": kept.state_payload,
        **measure.held_out_loss(llm, encoder, last.mix, last.level, rows=32, tokens=1024),
        "story": tell.text,
    }
    console.print(found)

    def show(name: str, score: measure.Score) -> None:
        console.print(
            f"{name:44} {score.exact:6.1%} of {score.items}, first {score.first:6.1%}, loss {score.loss:.3f}",
            soft_wrap=True,
        )

    found["scores"] = measure.card(llm, model, encoder, show)
    options.work.mkdir(parents=True, exist_ok=True)
    (options.work / "evaluation.json").write_text(json.dumps(found, indent=2) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", choices=NAMES)
    parser.add_argument(
        "--out", type=Path, default=Path("weights"), help="the folder for the exported MODEL (%(default)s)"
    )
    parser.add_argument("--work", type=Path, help="the folder for checkpoints and measurements (build/MODEL)")
    parser.add_argument("--seed", type=int, default=1, help="of weights and documents (%(default)s)")
    parser.add_argument("--minutes", type=float, help="time limit of the run; each stage gets its share")
    parser.add_argument("--threads", type=int, default=1, help="(%(default)s)")
    parser.add_argument(
        "--bfloat16", action="store_true", help="use autocast, on processors with bfloat16 instructions"
    )
    parser.add_argument("--no-compile", dest="compile", action="store_false", help="train without torch.compile")
    parser.add_argument("--evaluate", action="store_true", help="measure the exported model instead of training")
    options = parser.parse_args()
    options.work = options.work or Path("build") / options.model
    torch.set_num_threads(options.threads)
    console = Console()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    if options.evaluate:
        evaluate(options, console)
        return
    options.work.mkdir(parents=True, exist_ok=True)
    Trainer(options, STAGES, console).run()


if __name__ == "__main__":
    main()
