"""The jinja environment of chat templates: that of transformers, for which they are written, with bounds.

jinja's sandbox keeps a template from Python's internals, but bounds neither time nor memory; bounds.py does.
Source   transformers (utils/chat_template_utils.py) for the functions and filters beside jinja's own
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Iterable, Mapping
from datetime import datetime
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.compiler import CodeGenerator, operators
from jinja2.ext import Extension, loopcontrols
from jinja2.filters import FILTERS
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.tests import TESTS

from nanokv.text.bounds import (
    Budget,
    OutOfBounds,
    allow,
    allow_binary,
    allow_format,
    allow_method,
    allow_percent,
    deep,
    keep,
    limited,
    weight,
)

_MOST_CHARS = 1 << 16  # of a template, which bounds its compilation: some take quadratic time


def compile_template(source: str) -> jinja2.Template:
    """Compiles a template. Raises jinja2.TemplateError, and what Python raises for code that is nested too deep."""
    if len(source) > _MOST_CHARS:
        raise OutOfBounds(f"it has {len(source)} characters; at most {_MOST_CHARS} are allowed")
    return _environment().from_string(source)


def render(template: jinja2.Template, values: Mapping[str, Any]) -> str:
    """The text that a template writes. Raises OutOfBounds, and any Exception that the template causes."""
    budget = Budget(weight(list(values.values()), is_bounded=False))
    pieces, size = [], 0
    with limited(budget):
        for piece in template.root_render_func(template.new_context(dict(values))):
            size += len(piece)
            allow(size)
            pieces.append(piece)
    return "".join(pieces)


# ---- filters and tests -----------------------------------------------------------------------------------------------

_SHALLOW = {"length", "count", "first", "last", "default", "d", "list", "map", "select", "reject", "selectattr", "attr",
            "rejectattr", "items", "reverse", "batch", "slice", "random"}  # fmt: skip
"""Filters that do not look into what a list contains."""

_SIZES: dict[str, Callable[..., int]] = {
    "center": lambda value, width=80: width,
    "indent": lambda s, width=4, *more, **named: (
        len(s) + (s.count("\n") + 2) * (len(width) if isinstance(width, str) else width)
    ),
    "replace": lambda context, s, old, new, count=None: len(str(s)) + str(s).count(str(old)) * len(str(new)),
    "wordwrap": lambda environment, s, width=79, break_long_words=True, wrapstring=None, break_on_hyphens=True: (
        width + len(s) * (1 + len(wrapstring or ""))
    ),
    "batch": lambda value, linecount, fill_with=None: linecount,
    "slice": lambda environment, value, slices, fill_with=None: slices,
    "round": lambda value, precision=0, method="common": abs(precision),
}
"""Filter -> characters or items that its result may have."""


def _bounded(name: str, function: Any) -> Callable:
    """A filter or a test that asks before it makes or walks a large value."""
    size = _SIZES.get(name)
    first = hasattr(function, "jinja_pass_arg")  # the place of the value, after jinja's own argument

    @functools.wraps(function)
    def ask(*args: Any, **kwargs: Any) -> Any:
        if name not in _SHALLOW:
            for value in args[first:]:
                deep(value)
        if size is not None:
            allow(size(*args, **kwargs))
        return function(*args, **kwargs)

    return ask


@jinja2.pass_eval_context
def _join(context: Any, value: Iterable, d: str = "", attribute: Any = None) -> str:
    items = list(value)
    allow(weight(items) + len(str(d)) * len(items))
    return FILTERS["join"](context, items, d, attribute)


def _format(value: str, *args: Any, **kwargs: Any) -> str:
    allow_percent(str(deep(value)), kwargs or args)
    return FILTERS["format"](value, *args, **kwargs)


@jinja2.pass_environment
def _sum(environment: Any, iterable: Iterable, attribute: Any = None, start: float = 0) -> Any:
    if not isinstance(start, (int, float)):
        raise jinja2.TemplateError("sum adds numbers")
    return FILTERS["sum"](environment, iterable, attribute, start)


def _tojson(value: Any, ensure_ascii=False, indent=None, separators=None, sort_keys=False) -> str:
    """jinja's own escapes <, > and & for HTML."""
    width = max(0, indent) if isinstance(indent, int) else len(indent or "")
    allow(width)  # the library makes the indentation even for a number
    weight(value, width)
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


# ---- the environment -------------------------------------------------------------------------------------------------


class _Code(CodeGenerator):
    """Writes the Python code of a template, in which new values are counted."""

    def _within(self, function: str, visit: Callable, node: nodes.Node, *args: Any, **kwargs: Any) -> None:
        self.write(f"environment.{function}(")
        visit(node, *args, **kwargs)
        self.write(")")

    def visit_Filter(self, node: nodes.Filter, *args: Any, **kwargs: Any) -> None:
        self._within("keep", super().visit_Filter, node, *args, **kwargs)

    def visit_Call(self, node: nodes.Call, *args: Any, **kwargs: Any) -> None:
        self._within("keep", super().visit_Call, node, *args, **kwargs)

    def visit_List(self, node: nodes.List, *args: Any, **kwargs: Any) -> None:
        self._within("keep", super().visit_List, node, *args, **kwargs)

    def visit_Tuple(self, node: nodes.Tuple, *args: Any, **kwargs: Any) -> None:
        if node.ctx == "load":  # it may become a key, whose hash walks all of it
            self._within("deep", super().visit_Tuple, node, *args, **kwargs)
        else:
            super().visit_Tuple(node, *args, **kwargs)

    def visit_Getitem(self, node: nodes.Getitem, *args: Any, **kwargs: Any) -> None:
        if isinstance(node.arg, nodes.Slice):  # a copy
            self._within("keep", super().visit_Getitem, node, *args, **kwargs)
        else:
            super().visit_Getitem(node, *args, **kwargs)

    def visit_Concat(self, node: nodes.Concat, frame: Any) -> None:
        self.write("environment.join_texts((")
        for part in node.nodes:
            self.visit(part, frame)
            self.write(", ")
        self.write("))")

    def visit_Compare(self, node: nodes.Compare, frame: Any) -> None:
        self.write("(")
        self._within("deep", self.visit, node.expr, frame)
        for one in node.ops:
            self.write(f" {operators[one.op]} ")
            self._within("deep", self.visit, one.expr, frame)
        self.write(")")


class _Environment(ImmutableSandboxedEnvironment):
    code_generator_class = _Code
    intercepted_binops = frozenset({"+", "-", "*", "/", "//", "%", "**"})
    keep = staticmethod(keep)
    deep = staticmethod(deep)

    @staticmethod
    def concat(pieces: Iterable[str]) -> str:  # type: ignore[override]
        """The text of a block or a macro."""
        listed = list(pieces)
        allow(sum(map(len, listed)))
        return keep("".join(listed))

    @staticmethod
    def join_texts(values: tuple) -> str:
        """`a ~ b`"""
        return _Environment.concat([str(deep(value)) for value in values])

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        allow_binary(operator, left, right)
        return keep(super().call_binop(context, operator, left, right))

    def call(__self, __context: Any, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        owner, given = getattr(__obj, "__self__", None), list(args)
        if isinstance(owner, (str, bytes, int)):
            allow_method(owner, __obj.__name__, given)
        elif not isinstance(__obj, jinja2.runtime.Macro):  # it may compare or write what it is given
            for value in given:
                deep(value)
        return super().call(__context, __obj, *given, **kwargs)

    def wrap_str_format(self, value: Any) -> Any:
        wrapped = super().wrap_str_format(value)
        if wrapped is None:
            return None

        def bounded(*args: Any, **kwargs: Any) -> str:
            allow_format(value.__self__, args, kwargs)
            return wrapped(*args, **kwargs)

        return bounded


class _Generation(Extension):
    """{% generation %} marks the assistant's text for training; here it renders the text."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Any) -> Any:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body).set_lineno(line)


class _Namespace(jinja2.utils.Namespace):
    """Refuses names that Python calls by itself (__html__, ...)."""

    def __setitem__(self, name: str, value: Any) -> None:
        if name.startswith("_"):
            raise jinja2.TemplateError(f"a namespace takes no name that begins with an underscore: {name}")
        super().__setitem__(name, value)

    def __repr__(self) -> str:
        return "<Namespace>"


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


@jinja2.pass_context
def _finalize(_context: Any, value: Any) -> Any:  # with a context, so that nothing is computed at compilation
    return deep(value)


@functools.cache
def _environment() -> _Environment:
    environment = _Environment(
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=[_Generation, loopcontrols],
        finalize=_finalize,
        optimized=False,
    )
    filters: dict[str, Callable] = {**FILTERS, "join": _join, "format": _format, "sum": _sum, "tojson": _tojson}
    environment.filters = {name: _bounded(name, function) for name, function in filters.items()}
    environment.tests = {name: _bounded(name, function) for name, function in TESTS.items()}
    del environment.globals["lipsum"]
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    environment.globals["namespace"] = _Namespace
    environment.globals["dict"] = lambda *args, **kwargs: dict(*args, **kwargs)
    return environment
