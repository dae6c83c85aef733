"""Chat templates: equal to those of transformers, found in every place of a checkpoint, refusals of one line."""

import json
import os

import pytest

from nanokv.core.errors import CheckpointError, RequestError
from nanokv.text.template import ChatTemplate
from nanokv.text.tokenizer import Tokenizer

USER = [{"role": "user", "content": "Hi"}]
CHATS = [
    USER,
    [{"role": "system", "content": "Be brief."}, *USER],
    [*USER, {"role": "assistant", "content": "Hello  there\n"}, {"role": "user", "content": "日本 👍 1234 <b>&'\""}],
    [{"role": "user", "content": "def f():\n    return 1\n"}],
]

QWEN3 = """
{%- if tools %}
    {{- '<|im_start|>system\\n' }}
    {%- for tool in tools %}{{- "\\n" }}{{- tool | tojson }}{%- endfor %}
    {{- "<|im_end|>\\n" }}
{%- endif %}
{%- set ns = namespace(multi_step_tool=true, last_query_index=messages|length - 1) %}
{%- for message in messages[::-1] %}
    {%- set index = (messages|length - 1) - loop.index0 %}
    {%- if ns.multi_step_tool and message.role == "user" and message.content is string %}
        {%- set ns.multi_step_tool = false %}
        {%- set ns.last_query_index = index %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- if message.role == "assistant" %}
        {%- set content = message.content.split('</think>')[-1].lstrip('\\n') %}
        {%- generation %}{{- '<|im_start|>assistant\\n' ~ content }}{%- endgeneration %}
    {%- elif message.role == "tool" %}
        {%- if loop.first %}{%- continue %}{%- endif %}
        {{- raise_exception("no tools here") }}
    {%- else %}
        {{- '<|im_start|>' + message.role + '\\n' + message.content | trim }}
    {%- endif %}
    {{- '<|im_end|>' + '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\\n\\n</think>\\n\\n' }}
    {%- endif %}
{%- endif %}
{%- set extra = dict(a=1, b="<é>") %}
{{- extra | tojson(indent=1) }}{{ bos_token }}
"""


@pytest.mark.parametrize("messages", CHATS)
@pytest.mark.parametrize("prompt", [True, False])
def test_smollm2s_text_and_ids_equal_those_of_transformers(smollm2, theirs, messages, prompt):
    tokenizer = Tokenizer.from_folder(smollm2)
    text = theirs.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt)
    ids = theirs.apply_chat_template(messages, add_generation_prompt=prompt)["input_ids"]
    assert tokenizer.apply_template(messages, add_generation_prompt=prompt) == text
    assert tokenizer.chat(messages, add_generation_prompt=prompt) == ids


@pytest.mark.parametrize("variables", [{}, {"enable_thinking": False}, {"tools": [{"name": "f", "x": "<é>"}]}])
def test_the_functions_of_templates_equal_those_of_transformers(theirs, variables):
    chat = [*CHATS[2], {"role": "assistant", "content": "<think>\nhm\n</think>\n\nyes"}, *USER]
    expected = theirs.apply_chat_template(
        chat, chat_template=QWEN3, tokenize=False, add_generation_prompt=True, **variables
    )
    template = ChatTemplate(QWEN3, {"bos_token": theirs.bos_token})
    assert template.render(chat, **variables) == expected


def test_the_template_file_precedes_the_config(tmp_path):
    config = {"chat_template": "from config {{ bos_token }}", "bos_token": {"content": "<s>"}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    assert ChatTemplate.from_folder(tmp_path).render(USER) == "from config <s>"
    (tmp_path / "chat_template.jinja").write_text("from file {{ bos_token }}{{ eos_token }}")
    (tmp_path / "special_tokens_map.json").write_text('{"eos_token": "</s>", "bos_token": "older"}')
    assert ChatTemplate.from_folder(tmp_path).render(USER) == "from file <s></s>"


def test_tools_choose_the_template_named_tool_use(tmp_path):
    def rendered(names, **variables):
        named = [{"name": name, "template": f"{name} {{{{ tools }}}}"} for name in names]
        (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": named}))
        return ChatTemplate.from_folder(tmp_path).render(USER, **variables)

    tools = {"tools": [1]}
    assert rendered(["tool_use", "default"]) == "default None"
    assert rendered(["tool_use", "default"], **tools) == "tool_use [1]"
    assert rendered(["default"], **tools) == "default [1]"
    assert rendered(["tool_use"], **tools) == "tool_use [1]"
    with pytest.raises(RequestError, match="'tool_use', 'rag', and none with the name 'default'"):
        rendered(["tool_use", "rag"])


def test_a_folder_may_have_no_template(tmp_path, smollm2):
    assert ChatTemplate.from_folder(tmp_path) is None
    (tmp_path / "tokenizer.json").write_bytes((smollm2 / "tokenizer.json").read_bytes())
    with pytest.raises(RequestError, match="no chat template"):
        Tokenizer.from_folder(tmp_path).chat(USER)


@pytest.mark.parametrize(
    ("name", "content", "complaint"),
    [
        ("tokenizer_config.json", "{", "tokenizer_config.json"),
        ("tokenizer_config.json", "[]", "expected a JSON object"),
        ("tokenizer_config.json", '{"chat_template": 3}', "chat_template is not a text"),
        ("tokenizer_config.json", '{"chat_template": [{"name": ["a"], "template": "x"}]}', "is no list of"),
        ("tokenizer_config.json", '{"a":' * 100000, "recursion"),
    ],
)
def test_a_damaged_template_is_named(tmp_path, name, content, complaint):
    (tmp_path / name).write_text(content)
    with pytest.raises(CheckpointError, match=complaint):
        ChatTemplate.from_folder(tmp_path)


@pytest.mark.parametrize(
    "source", ["{% for %}", "{% trans %}x{% endtrans %}", "{{ 1 | no_filter }}", "{{ " + "(" * 5000]
)
def test_a_template_that_does_not_compile_refuses_chats_only(tmp_path, source):
    (tmp_path / "chat_template.jinja").write_text(source)
    template = ChatTemplate.from_folder(tmp_path)
    with pytest.raises(RequestError, match="chat_template.jinja.*unusable chat template: ") as caught:
        template.render(USER)
    assert "\n" not in str(caught.value)


def test_a_byte_order_mark_is_no_part_of_a_file(tmp_path):
    (tmp_path / "tokenizer_config.json").write_text('{"bos_token": "<s>"}', encoding="utf-8-sig")
    (tmp_path / "chat_template.jinja").write_text("{{ bos_token }}x", encoding="utf-8-sig")
    assert ChatTemplate.from_folder(tmp_path).render(USER) == "<s>x"


def test_a_file_that_is_no_regular_file_is_refused(tmp_path):
    os.mkfifo(tmp_path / "chat_template.jinja")
    with pytest.raises(CheckpointError, match="chat_template.jinja: not a regular file"):
        ChatTemplate.from_folder(tmp_path)


@pytest.mark.parametrize(
    "source",
    [
        "{{ raise_exception('only\nusers') }}",
        "{{ messages[7].content }}",
        "{{ messages[0].content + 1 }}",
        "{{ 1 / 0 }}",
        "{{ nothing.at.all }}",
        "{{ ''.__class__.__mro__ }}",
        "{% set ns = namespace() %}{% set ns.__html__ = 1 %}",
        "{{ range(10**9) | list }}",
        "{{ messages.append(1) }}",
    ],
)
def test_a_failing_template_is_one_line(source):
    with pytest.raises(RequestError, match="chat template refuses") as caught:
        ChatTemplate(source).render(USER)
    assert "\n" not in str(caught.value)
