"""What the pages for users tell to type works as written."""

import re
import shlex
from pathlib import Path

import pytest
from click.testing import CliRunner

from nanokv.cli.main import main

ROOT = Path(__file__).resolve().parents[1]
ASKED = [
    line
    for page in ("README.md", "weights/README.md")
    for line in re.findall(r"nanokv chat tiny-\w+ -p \".*?\"", (ROOT / page).read_text(encoding="utf-8"))
]


@pytest.mark.parametrize("name", ["tiny-gqa", "tiny-mla", "tiny-hybrid"])
@pytest.mark.parametrize("line", ASKED)
def test_a_small_shipped_model_answers_what_the_pages_ask(line, name):
    _, command, _, *options = shlex.split(line)
    result = CliRunner().invoke(main, [command, str(ROOT / "weights" / name), *options])
    assert (result.exit_code, result.stdout.strip()) == (0, "The key of Omar is 1 8 0."), result.stderr


def test_the_pages_ask_a_small_shipped_model():
    assert len(ASKED) >= 2
