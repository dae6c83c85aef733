"""A chat without weights: a real engine and cache around a decoder whose tokens a test prescribes."""

import io
from types import SimpleNamespace

import torch

from nanokv import EngineConfig, SamplingParams
from nanokv.cli.repl.session import ChatSession
from nanokv.cli.repl.terminal import Terminal
from nanokv.core.spec import LayerSpec, Plane
from nanokv.engine.engine import Engine
from nanokv.engine.loop import EngineLoop
from nanokv.text.template import ChatTemplate
from nanokv.text.tokenizer import Tokenizer, byte_alphabet

TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
END, VOCABULARY = 257, 258


def byte_tokenizer() -> Tokenizer:
    """A tokenizer with one token per byte, and the two special tokens of ChatML."""
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers

    backend = tokenizers.Tokenizer(models.BPE({letter: byte for letter, byte in byte_alphabet().items()}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    return Tokenizer(backend, ChatTemplate(TEMPLATE))


class ScriptedDecoder:
    """A decoder that gives the tokens of `script`, one per step. Calls `before_step` with each step's number."""

    is_recordable = False

    def __init__(self, max_positions: int = 1024) -> None:
        plane = Plane("k", (16, 16), torch.uint8, token_axis=0)
        self.specs = [LayerSpec(paged=(plane,))]
        self.config = SimpleNamespace(
            family="scripted", num_layers=1, vocab_size=VOCABULARY, eos_token_ids=(END,), max_positions=max_positions
        )
        self.script: list[int] = []
        self.prompts: list[list[int]] = []
        self.before_step = lambda step: None
        self._step = 0

    def bind(self, layout) -> None:
        pass

    def key_means(self):
        return []

    def will_say(self, text: str) -> None:
        self.script = [*text.encode(), END]
        self._step = 0

    def forward(self, batch, pool, between=None):
        self._step += 1
        self.before_step(self._step)
        logits = torch.full((len(batch.logit_rows), VOCABULARY), -100.0)
        for row in range(len(logits)):
            logits[row, self.script.pop(0)] = 100.0
        return logits


class ScriptedLLM:
    """The part of LLM that a chat uses, on a ScriptedDecoder."""

    def __init__(self, config: EngineConfig | None = None, max_positions: int = 1024) -> None:
        self.config = config or EngineConfig(num_pages=200, page_size=16, max_step_tokens=64)
        self.model = ScriptedDecoder(max_positions)
        self.model_config = self.model.config
        self.tokenizer = byte_tokenizer()
        self.engine = Engine(self.model, self.config, self.tokenizer)
        self.loop = EngineLoop(self.engine)
        self.folder, self.dtype, self.device = "weights/scripted", torch.float32, torch.device("cpu")
        self.device_reason = "as asked"

    def stats(self) -> dict:
        return self.engine.stats()

    def close(self) -> None:
        self.loop.close()

    def __enter__(self) -> "ScriptedLLM":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


class FakeTerminal:
    """A chat session, the lines a test enters and the output they cause."""

    def __init__(self, llm: ScriptedLLM | None = None, system: str | None = None) -> None:
        self.llm = llm or ScriptedLLM()
        self.out, self.err = io.StringIO(), io.StringIO()
        params = SamplingParams(temperature=0, max_tokens=100)
        self.session = ChatSession(self.llm, "scripted", system, params, Terminal(self.out, self.err), show_stats=True)

    def enter(self, line: str, answer: str = "") -> tuple[str, str]:
        """Enters a line, to which the model gives `answer`. Returns the output on stdout and on stderr."""
        if answer:
            self.llm.model.will_say(answer)
        start = self.out.tell(), self.err.tell()
        self.session.handle(line)
        self.llm.engine.cache.check()
        assert self.llm.stats()["pages_held"] == self.llm.stats()["pages_locked"] == 0
        return self.out.getvalue()[start[0] :], self.err.getvalue()[start[1] :]

    @property
    def said(self) -> list[tuple[str, str]]:
        return [(message["role"], message["content"]) for message in self.session.conversation.messages]


class Tty(io.StringIO):
    """A stream that claims to be a terminal."""

    def isatty(self) -> bool:
        return True
