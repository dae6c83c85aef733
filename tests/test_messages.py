"""What a chat may hold: each input reaches the template with its meaning, or is refused by its place."""

import json

import pytest
from chat_templates import GEMMA3, HERMES, LLAMA31, QWEN3, TEMPLATES

from nanokv.core.errors import RequestError
from nanokv.text.template import ChatTemplate

USER = {"role": "user", "content": "Hi"}
SPECIAL = {"bos_token": "<s>", "eos_token": "</s>"}
TOOLS = [
    {"type": "function", "function": {"name": "weather", "parameters": {"properties": {"city": {"type": "string"}}}}}
]
ARGUMENTS = {"city": "Zürich <b>", "days": [1, 2]}
PLAIN = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"


def render(source: str, *messages: dict, **variables) -> str:
    return ChatTemplate(source, SPECIAL).render(messages, **variables)


def calling(arguments, **fields) -> tuple[dict, dict, dict]:
    call = {"type": "function", "id": "a", "function": {"name": "weather", "arguments": arguments}}
    return USER, {"role": "assistant", "tool_calls": [call], **fields}, {"role": "tool", "content": "12 C"}


@pytest.mark.parametrize("name", TEMPLATES)
def test_released_templates_render_as_in_transformers(name):
    from transformers.utils.chat_template_utils import render_jinja_template

    arguments = json.dumps(ARGUMENTS, ensure_ascii=False) if name == "deepseek" else ARGUMENTS
    thought = {"role": "assistant", "content": "<think>\nhm\n</think>\n\nHello "}
    chats = [
        [USER],
        [{"role": "system", "content": "Be brief. "}, USER, thought, {"role": "user", "content": "日本 👍 <b>&'\""}],
        [USER, {**thought, "reasoning_content": "why"}, USER],
        [*calling(arguments, content="")],
    ]
    for chat in chats:
        for tools in (None, TOOLS) if name not in ("deepseek", "gemma3") else (None,):
            if name == "gemma3" and len(chat) == 3 and "tool_calls" in chat[1]:
                continue
            theirs = render_jinja_template(
                [chat], tools=tools, chat_template=TEMPLATES[name], add_generation_prompt=True, **SPECIAL
            )
            assert render(TEMPLATES[name], *chat, tools=tools) == theirs[0][0]


@pytest.mark.parametrize("source", [PLAIN, QWEN3, LLAMA31, HERMES, "{{ messages[0].content | trim | tojson }}"])
def test_text_parts_are_one_text_where_the_template_wants_a_text(source):
    parts = [{"type": "text", "text": "Hi "}, {"type": "text", "text": "there"}]
    assert render(source, {"role": "user", "content": parts}) == render(source, {"role": "user", "content": "Hi there"})


def test_text_parts_are_given_on_where_the_template_takes_parts():
    parts = [{"type": "text", "text": "Hi "}, {"type": "text", "text": "there"}]
    assert "user\nHithere<end_of_turn>" in render(GEMMA3, {"role": "user", "content": parts})


@pytest.mark.parametrize("fields", [{}, {"content": None}, {"content": None, "refusal": None, "function_call": None}])
def test_a_field_that_is_none_is_as_good_as_missing(fields):
    source = PLAIN + "{{ messages[1].tool_calls[0].function.name }}{{ messages[1] | length }}"
    assert render(source, *calling({}, **fields)) == "[user]Hi[assistant][tool]12 Cweather2"
    answer = {"role": "assistant", "content": "12 C", "tool_calls": None}
    assert render("{{ 'tool_calls' in messages[0] }}", answer) == "False"


@pytest.mark.parametrize("name", ["qwen3", "llama31", "deepseek", "mistral", "hermes"])
def test_arguments_of_a_call_may_be_json_text_or_a_dictionary(name):
    text = json.dumps(ARGUMENTS, ensure_ascii=False)
    as_text, as_dictionary = (render(TEMPLATES[name], *calling(given, content="")) for given in (text, ARGUMENTS))
    assert as_text == as_dictionary
    assert text in as_text


def test_arguments_that_are_printed_are_json():
    source = "{{ messages[1].tool_calls[0].function.arguments }}"
    for arguments in (ARGUMENTS, json.dumps(ARGUMENTS, ensure_ascii=False)):
        assert json.loads(render(source, *calling(arguments))) == ARGUMENTS
    assert render(source, *calling("no JSON")) == "no JSON"


@pytest.mark.parametrize("name", ["tools", "documents"])
def test_tools_for_which_a_template_has_no_place_are_refused(name):
    with pytest.raises(RequestError, match=f"{name}: the model's chat template has no place for {name}"):
        render(PLAIN, USER, **{name: [{"name": "f"}]})
    assert render(PLAIN, USER, **{name: []}) == render(PLAIN, USER, **{name: None}) == "[user]Hi"


@pytest.mark.parametrize(
    ("source", "role", "is_known"),
    [
        (PLAIN, "wizard", False),
        (PLAIN, "tool", True),
        (PLAIN, "developer", True),
        ("{{ messages[0].content }}", "system", True),
        (QWEN3, "tool", True),
        (QWEN3, "developer", False),
        (LLAMA31, "ipython", True),
        (LLAMA31, "developer", True),
        (HERMES, "developer", False),
        (GEMMA3, "model", True),
    ],
)
def test_a_role_that_the_template_does_not_know_is_refused(source, role, is_known):
    template = ChatTemplate(source, SPECIAL)._templates["default"]
    assert template.knows(role) == is_known
    if not is_known:
        with pytest.raises(RequestError, match=rf"messages\[1\]\['role'\]='{role}': unknown to the chat template"):
            render(source, USER, {"role": role, "content": "x"})


NESTED: list = []
NESTED.append(NESTED)


@pytest.mark.parametrize(
    ("messages", "complaint"),
    [
        ([], "at least one"),
        ("Hi", "expected a list"),
        ({"role": "user"}, "expected a list"),
        ([{"content": "Hi"}], r"messages\[0\]"),
        ([USER, {"role": "user"}], r"messages\[1\]: a message of 'user' has no 'content'"),
        ([{"role": "assistant", "content": None}], r"messages\[0\]: a message of 'assistant' has no 'content'"),
        ([{"role": "assistant", "content": None, "tool_calls": []}], "has no 'content'"),
        ([{"role": "assistant", "tool_calls": "f()"}], r"messages\[0\]\['tool_calls'\]='f\(\)': expected a list"),
        ([{"role": "user", "content": 3}], r"messages\[0\]\['content'\]=3: expected a text"),
        ([{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}],
         r"messages\[0\]\['content'\]\[0\]: a part of type 'image_url'; expected \{'type': 'text'"),
        ([USER, {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text"}]}],
         r"messages\[1\]\['content'\]\[1\]: \{'type': 'text'\}; expected"),
        ([{"role": "user", "content": ["a"]}], r"messages\[0\]\['content'\]\[0\]: 'a'; expected"),
        ([{"role": "user", "content": "Hi", "image": object()}], "object is no text"),
        ([{"role": "user", "content": "Hi", "extra": NESTED}], "nested too deep"),
        ([{"role": "user", "content": "Hi", "extra": {(1, 2): 3}}], "a tuple is no key of a dictionary"),
    ],
)  # fmt: skip
def test_an_invalid_message_is_named(messages, complaint):
    with pytest.raises(RequestError, match=complaint) as caught:
        ChatTemplate("x").render(messages)
    assert "\n" not in str(caught.value)


def test_tool_calls_and_variables_that_the_template_never_reads_are_refused():
    template = ChatTemplate("{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}{{ mood }}")
    call = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f", "arguments": {}}}]}
    with pytest.raises(RequestError, match=r"messages\[1\]\['tool_calls'\]: .* has no place for them"):
        template.render([{"role": "user", "content": "Hi"}, call])
    with pytest.raises(RequestError, match="temprature: no such argument"):
        template.render([{"role": "user", "content": "Hi"}], temprature=0)
    assert template.render([{"role": "user", "content": "Hi"}], mood="!") == "[user]Hi!"
    with pytest.raises(RequestError, match="tools='x': expected a list"):
        template.render([{"role": "user", "content": "Hi"}], tools="x")
