"""Sampling parameters by name, from the model's generation_config.json, options, `/set` and saved chats."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from nanokv.core.errors import CheckpointError, NanokvError, RequestError
from nanokv.core.request import SamplingParams
from nanokv.text.files import read_json

DEFAULTS = SamplingParams(max_tokens=1024)
"""The parameters of a model without recommendations."""


@dataclass(frozen=True)
class Setting:
    """One sampling parameter as text.

    parse   reads the text after its name; raises ValueError
    kind    what `parse` expects, for errors
    help    its line of help
    """

    parse: Callable[[str], Any]
    kind: str
    help: str


def _seed(text: str) -> int | None:
    return None if text.lower() in ("none", "off", "random") else int(text)


def _texts(text: str) -> tuple[str, ...]:
    """Texts, in quotes where they have spaces, with \\n and \\t for newline and tab; `none`: no text."""
    if text.lower() in ("none", "off"):
        return ()
    words = shlex.shlex(text, posix=True)
    words.whitespace_split, words.escape, words.commenters = True, "", ""
    return tuple(word.replace("\\n", "\n").replace("\\t", "\t") for word in words)


SETTINGS = {
    "temperature": Setting(float, "a number", "randomness; 0: always the most likely token"),
    "top_k": Setting(int, "an integer", "keep the k most likely tokens; 0: all"),
    "top_p": Setting(float, "a number", "keep the likeliest tokens up to this probability"),
    "min_p": Setting(float, "a number", "drop tokens below this share of the most likely"),
    "repetition_penalty": Setting(float, "a number", "above 1: repetition becomes less likely"),
    "max_tokens": Setting(int, "an integer", "maximum tokens of an answer"),
    "seed": Setting(_seed, "an integer or none", "makes answers reproducible; none: a new seed"),
    "stop": Setting(_texts, "texts in quotes, or none", "texts that end an answer"),
}
ALIASES = {"num_predict": "max_tokens", "max_new_tokens": "max_tokens", "repeat_penalty": "repetition_penalty"}


def canonical(name: str) -> str:
    """A parameter's own name, for it, for an option of the command line, or for a name that other programs use."""
    name = name.replace("-", "_")
    return ALIASES.get(name, name)


def known(name: str) -> str:
    """`canonical`. Raises RequestError where there is no such parameter."""
    name = canonical(name)
    if name not in SETTINGS:
        raise RequestError(f"{name}: no such parameter; there are {', '.join(SETTINGS)} and system")
    return name


def changed(params: SamplingParams, name: str, text: str, defaults: SamplingParams) -> SamplingParams:
    """`params` with one parameter read from `text`; `none` means no value, or that of `defaults` where one is needed.

    Raises RequestError naming the parameter, its value and the allowed ones.
    """
    name = known(name)
    if text.lower() in ("none", "default") and name not in ("seed", "stop"):
        return replace(params, **{name: getattr(defaults, name)})
    try:
        value = SETTINGS[name].parse(text)
    except ValueError:
        raise RequestError(f"{name}={text!r}: expected {SETTINGS[name].kind}") from None
    return checked(replace(params, **{name: value}))


def checked(params: SamplingParams) -> SamplingParams:
    """`params`. Raises RequestError where one of them is invalid."""
    params.validate()
    return params


def model_defaults(folder: Path) -> SamplingParams:
    """DEFAULTS, changed by the recommendations of the model's generation_config.json.

    Raises CheckpointError where the file is not JSON or recommends an invalid value.
    """
    path = folder / "generation_config.json"
    values = read_json(path)
    names = {ALIASES.get(name, name): name for name in values}
    chosen = {name: values[names[name]] for name in SETTINGS if name in names and values[names[name]] is not None}
    if values.get("do_sample") is False:
        chosen["temperature"] = 0.0
    try:
        return checked(replace(DEFAULTS, **chosen))
    except NanokvError as error:
        raise CheckpointError(f"{path}: {error}") from None


def shown(params: SamplingParams) -> dict[str, str]:
    """Each parameter's value as text that `/set` reads."""
    values = {name: getattr(params, name) for name in SETTINGS}
    texts = {name: "none" if value is None else f"{value}" for name, value in values.items()}
    texts["stop"] = " ".join(json.dumps(text, ensure_ascii=False) for text in params.stop) or "none"
    return texts
