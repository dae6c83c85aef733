"""Renders chat templates put together at random: each renders, or is refused in one line, in little time and memory.

    python scripts/fuzz_templates.py --templates 10000 --seed 0

A template nests loops, macros and namespaces around expressions of filters, methods and operators with large numbers
and growing texts. A violation is an exception that is not a NanokvError, a message of several lines or over 400
characters, more than 4 s of CPU time (a template has 2), or more than 1 GiB of memory. Exits with 1 where there is one,
and prints the template.
"""

from __future__ import annotations

import argparse
import random
import resource
import sys
import time
from collections import Counter

from nanokv.core.errors import NanokvError
from nanokv.text.template import ChatTemplate

CPU_SECONDS, MEMORY, CHARACTERS = 4.0, 1 << 30, 400
MESSAGES = [{"role": "user", "content": "Hi"}]
NUMBERS = ("0", "1", "-1", "7", "60", "999", "99999", "2000000000", "9999999999999999999")
VALUES = (
    "'a'",
    "'%s'",
    "'{}'",
    "ns.s",
    "ns.l",
    "ns.n",
    "messages",
    "messages[0].content",
    "range(99999)",
    "[0]",
    "{'a': 1}",
)
FILTERS = (
    "length", "string", "list", "join", "tojson", "upper", "sort", "reverse", "sum", "first", "map('string')",
    "groupby(0)", "batch({n})", "slice({n})", "center({n})", "indent({n})", "replace('a', {v})", "round({n})",
    "format({v})",
    "wordwrap({n})", "tojson(indent={n})", "truncate({n})", "random", "unique", "pprint",
    "map(attribute='x')", "urlize",
)  # fmt: skip
METHODS = (
    "upper()", "center({n})", "ljust({n})", "zfill({n})", "replace('a', {v})", "join({v})", "split({v})", "format({v})",
    "index({v})", "count({v})", "splitlines()", "expandtabs({n})", "encode()", "title()", "__class__", "items()",
)  # fmt: skip
OPERATORS = ("+", "~", "*", "**", "%", "//", "==", "<", "in", "and")


def expression(rng: random.Random, depth: int) -> str:
    """An expression of jinja."""
    if depth == 0:
        return rng.choice((*VALUES, *NUMBERS))
    inside = expression(rng, depth - 1)
    kind = rng.randrange(4)
    if kind == 0:
        return f"({inside} {rng.choice(OPERATORS)} {expression(rng, depth - 1)})"
    tail = rng.choice(FILTERS if kind == 1 else METHODS)
    tail = tail.replace("{n}", rng.choice(NUMBERS)).replace("{v}", rng.choice(VALUES))
    return f"({inside} | {tail})" if kind == 1 else f"({inside}).{tail}" if kind == 2 else inside


GROW = "{% for x in range(99999) %}{% set ns.l = [ns.l, ns.l] %}{% set ns.s = ns.s ~ ns.s %}BODY{% endfor %}"
BLOCK = "{% set block %}BODY{% endset %}{{ block }}{{ block | length }}"


def template(rng: random.Random) -> str:
    """The source of a template."""
    body = f"{{{{ {expression(rng, rng.randrange(1, 4))} }}}}"
    for _ in range(rng.randrange(4)):
        value, again = expression(rng, 1), rng.choice(("", "{{ m(x) }}"))
        around = (
            f"{{% for x in range({rng.choice(NUMBERS)}) %}}BODY{{% endfor %}}",
            f"{{% set ns.s = {expression(rng, 2)} %}}BODY",
            f"{{% macro m(x) %}}BODY{again}{{% endmacro %}}{{{{ m({value}) }}}}",
            f"{{% if {value} %}}BODY{{% endif %}}",
            GROW,
            BLOCK,
        )
        body = rng.choice(around).replace("BODY", body)
    return "{% set ns = namespace(s='aaaaaaaaaa', l=[], n=9) %}" + body


def memory() -> int:
    """The most bytes that this process has held."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10


def fault(source: str) -> tuple[str, str | None]:
    """The outcome of a template, and its violation or None."""
    start, before = time.process_time(), memory()
    try:
        ChatTemplate(source).render(MESSAGES)
        outcome, wrong = "rendered", None
    except NanokvError as error:
        text = str(error)
        outcome, wrong = "refused", "a long message" if "\n" in text or len(text) > CHARACTERS else None
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        outcome, wrong = "raised", f"{type(error).__name__}: {error}"[:200]
    if (seconds := time.process_time() - start) > CPU_SECONDS:
        wrong = f"{seconds:.1f} s of CPU time"
    if memory() > max(before, MEMORY):
        wrong = f"{memory() >> 20} MiB of memory"
    return outcome, wrong


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--templates", type=int, default=1000, metavar="N", help="how many (1000)")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    outcomes: Counter[str] = Counter()
    for number in range(options.templates):
        source = template(random.Random(f"{options.seed}/{number}"))
        outcome, wrong = fault(source)
        outcomes[outcome] += 1
        if wrong is not None:
            outcomes["violations"] += 1
            print(f"VIOLATION {number}: {wrong}: {source}", flush=True)
    print(", ".join(f"{count:,} {name}" for name, count in sorted(outcomes.items())) + f"; {memory() >> 20} MiB")
    sys.exit(outcomes["violations"] > 0)


if __name__ == "__main__":
    main()
