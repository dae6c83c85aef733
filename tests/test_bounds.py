"""Hostile chat templates: each is refused in one line, after little time and memory, and changes nothing around it."""

import sys
import threading
import tracemalloc

import pytest

from nanokv.core.errors import RequestError
from nanokv.text.template import ChatTemplate

USER = [{"role": "user", "content": "Hi"}]
LOOP = "{% for i in range(99999) %}"
GROW = "{% set ns = namespace(s='aaaaaaaaaa', l=[]) %}" + "{% for i in range(99999) %}"
ENDLESS = {
    "loops": LOOP * 3 + "{% endfor %}" * 3,
    "lazy filters": LOOP + "{{ range(99999) | map('string') | list | length }}{% endfor %}",
    "group": "{{ range(99999) | map('string') | groupby(0) | list | length }}" * 9,
}
LARGE = {
    "text times": "{{ 'a' * 2000000000 }}",
    "times text": "{{ 2000000000 * 'a' }}",
    "list times": "{{ ([0] * 2000000000) | length }}",
    "bytes times": "{{ 'a'.encode() * 2000000000 }}",
    "power": "{{ (9 ** 999999) | string | length }}",
    "tower": "{{ 9 ** (9 ** 9) }}",
    "squares": "{% set ns = namespace(n=9) %}" + LOOP + "{% set ns.n = ns.n * ns.n %}{% endfor %}",
    "percent": "{{ '%2000000000d' % 5 }}",
    "percent star": "{{ '%*d' % (2000000000, 5) }}",
    "percent reuse": "{{ ('%(a)s' * 9999) % {'a': 'a' * 99999} }}",
    "precision": "{{ '%.2000000000f' % 1.5 }}",
    "format": "{{ '{:2000000000d}'.format(5) }}",
    "format nested": "{{ '{:{}}'.format(5, 2000000000) }}",
    "format reuse": "{{ ('{0}' * 9999).format('a' * 99999) }}",
    "format map": "{{ ('{a}' * 9999).format_map({'a': 'a' * 99999}) }}",
    "format filter": "{{ '%2000000000d' | format(5) }}",
    "center": "{{ 'a' | center(2000000000) }}",
    "mapped center": "{{ ['a'] | map('center', 2000000000) | list | length }}",
    "methods": "{{ 'a'.center(2000000000) }}",
    "ljust": "{{ 'a'.ljust(2000000000) }}",
    "zfill": "{{ 'a'.zfill(2000000000) }}",
    "tabs": "{{ ('\t' * 99999).expandtabs(99999) }}",
    "replace": "{{ ('a' * 99999).replace('a', 'b' * 99999) }}",
    "replace filter": "{{ ('a' * 99999) | replace('a', 'b' * 99999) }}",
    "join": "{{ ('a' * 99999).join('b' * 99999) }}",
    "join filter": "{{ range(99999) | join('b' * 99999) }}",
    "translate": "{{ 'aaaa'.translate({97: 'b' * 99999}) }}",
    "integer bytes": "{{ (5).to_bytes(2000000000, 'big') | length }}",
    "indent": "{{ ('a\n' * 1000) | indent(2000000) }}",
    "wrap": "{{ ('a ' * 99999) | wordwrap(1, wrapstring='b' * 99999) | length }}",
    "batch": "{{ [[1] | batch(300000000, 'x') | list] | length }}",
    "slice": "{{ range(10) | slice(200000000) | list | length }}",
    "round": "{{ 1.5 | round(2000000000, 'floor') }}",
    "sum": "{{ ([[1]] * 99999) | sum(start=[]) | length }}",
    "indent of a number": "{{ 1 | tojson(indent=2000000000) }}",
    "json indent": "{{ ([[1]] * 9999) | tojson(indent=99999) }}",
    "concatenation": GROW + "{% set ns.s = ns.s ~ ns.s %}{% endfor %}",
    "addition": GROW + "{% set ns.s = ns.s + ns.s %}{% endfor %}",
    "blocks": GROW + "{% set x %}{{ ns.s }}{{ ns.s }}{% endset %}{% set ns.s = x %}{% endfor %}",
    "macro": "{% macro m(s) %}{{ s }}{{ s }}{% endmacro %}" + GROW + "{% set ns.s = m(ns.s) %}{% endfor %}",
    "output": LOOP + "{{ 'a' * 99999 }}{% endfor %}",
    "copies": GROW + "{% set ns.l = ns.l + [('a' * 999999).upper()] %}{% endfor %}",
    "cuts": "{% set s = 'a' * 999999 %}" + GROW + "{% set ns.l = ns.l + [s[1:]] %}{% endfor %}",
    "lists": GROW + "{% set ns.l = [ns.l, ns.l] %}{% if loop.index == 60 %}{{ ns.l }}{% endif %}{% endfor %}",
    "json lists": GROW
    + "{% set ns.l = [ns.l, ns.l] %}{% if loop.index == 60 %}{{ ns.l | tojson }}{% endif %}{% endfor %}",
    "equal lists": "{% set ns = namespace(a=[], b=[]) %}" + LOOP + "{% set ns.a = [ns.a, ns.a] %}{% set ns.b = "
    "[ns.b, ns.b] %}{% if loop.index == 60 %}{{ ns.a == ns.b }}{% endif %}{% endfor %}",
    "index": "{% set ns = namespace(a=[], b=[]) %}"
    + LOOP
    + "{% set ns.a = [ns.a, ns.a] %}{% set ns.b = [ns.b, ns.b] %}"
    "{% if loop.index == 60 %}{{ [ns.a].index(ns.b) }}{% endif %}{% endfor %}",
    "keys": "{% set ns = namespace(a=(1,)) %}" + LOOP + "{% set ns.a = (ns.a, ns.a) %}{% if loop.index == 60 %}"
    "{{ {ns.a: 1} }}{% endif %}{% endfor %}",
    "exception": GROW + "{% set ns.l = [ns.l, ns.l] %}{% if loop.index == 60 %}{{ raise_exception(ns.l) }}{% endif %}"
    "{% endfor %}",
    "recursion": "{% macro f(x) %}{{ f(x) }}{% endmacro %}{{ f(1) }}",
    "deep json": GROW + "{% set ns.l = [ns.l] %}{% if loop.index == 5000 %}{{ ns.l | tojson }}{% endif %}{% endfor %}",
    "date": "{{ strftime_now('%Y' * 10000000) }}",
    "source": "{{ 1 }}" * 300000,
    "nested tags": "{% if 1 %}" * 3000 + "{% endif %}" * 3000,
    "nested loops": "{% for a in [1] %}" * 40 + "{% endfor %}" * 40,
}


def refused(source: str) -> str:
    with pytest.raises(RequestError, match="chat template") as caught:
        ChatTemplate(source).render(USER)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 400
    return str(caught.value)


@pytest.mark.parametrize("name", LARGE)
def test_a_template_that_asks_for_too_much_is_refused(name, monkeypatch):
    monkeypatch.setattr("nanokv.text.bounds._VALUE", 1 << 14)  # a shorter walk to the bound
    refused(LARGE[name])


@pytest.mark.parametrize("name", ["text times", "concatenation", "macro", "copies", "cuts", "output"])
def test_a_template_is_bounded_in_memory(name):
    tracemalloc.start()
    try:
        refused(LARGE[name])
        assert tracemalloc.get_traced_memory()[1] < 200 * 2**20
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("name", ENDLESS)
def test_a_template_is_bounded_in_time(name, monkeypatch):
    monkeypatch.setattr("nanokv.text.bounds._SECONDS", 0.2)
    assert "it runs for more than" in refused(ENDLESS[name])


def test_a_template_is_bounded_in_any_thread_and_leaves_no_trace_function(monkeypatch):
    monkeypatch.setattr("nanokv.text.bounds._SECONDS", 0.2)
    found = []

    def run():
        own = lambda *event: own  # noqa: E731
        sys.settrace(own)
        try:
            found.extend([refused(ENDLESS["loops"]), sys.gettrace() is own])
        finally:
            sys.settrace(None)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert "it runs for more than" in found[0] and found[1]


def test_a_long_conversation_is_within_the_bounds():
    source = (
        "{% set ns = namespace(all='', list=[]) %}{% for m in messages %}{% set ns.all = ns.all ~ m.content %}"
        "{% set ns.list = ns.list + [m] %}{% if m in messages[1:] %}{% endif %}{% endfor %}{{ ns.all }}"
    )
    messages = [{"role": "user", "content": f"word {i} " * 20} for i in range(100)]
    assert ChatTemplate(source).render(messages) == "".join(message["content"] for message in messages)
