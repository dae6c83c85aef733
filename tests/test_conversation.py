"""A conversation keeps its ids: each prompt begins with the ids that the cache may already hold."""

import pytest

from nanokv.core.errors import RequestError
from nanokv.text.conversation import Conversation
from nanokv.text.template import ChatTemplate
from nanokv.text.tokenizer import Tokenizer


def generated(tokenizer, *pieces):
    """Ids that a model may generate: the same text, but not cut as the tokenizer would cut it."""
    return [i for piece in pieces for i in tokenizer.encode(piece)]


def test_the_next_prompt_begins_with_the_last_and_its_answer(tokenizer):
    chat = Conversation(tokenizer)
    first = chat.ask("Hi")
    assert first == tokenizer.chat([{"role": "user", "content": "Hi"}])
    answer = generated(tokenizer, "Hel", "lo", " th", "ere!", "<|im_end|>")
    assert answer != tokenizer.encode("Hello there!<|im_end|>")
    chat.answer(answer, "Hello there!")
    assert chat.token_ids == first + answer
    second = chat.ask("And 日本?")
    assert second[: len(first) + len(answer)] == first + answer
    assert tokenizer.decode(second, skip_special=False) == tokenizer.apply_template(chat.messages)
    assert [message["role"] for message in chat.messages] == ["user", "assistant", "user"]
    assert chat.num_turns == 2


def test_the_next_question_ends_an_answer_cut_short(tokenizer):
    chat = Conversation(tokenizer, system="Be brief.")
    first = chat.ask("Hi")
    chat.answer(generated(tokenizer, "Hel", "lo"), "Hello")
    second = chat.ask("More")
    assert second[: len(first) + 2] == first + generated(tokenizer, "Hel", "lo")
    assert tokenizer.decode(second, skip_special=False) == tokenizer.apply_template(chat.messages)


def test_an_answer_cut_inside_a_character_keeps_its_ids(tokenizer):
    chat = Conversation(tokenizer)
    first = chat.ask("Hi")
    half = tokenizer.encode("ok 👍")[:-1]
    chat.answer(half, tokenizer.decode(half))
    assert chat.ask("More")[: len(first) + len(half)] == first + half


def test_an_answer_shown_differently_than_generated_is_encoded_again(tokenizer):
    chat = Conversation(tokenizer)
    chat.ask("Hi")
    chat.answer(generated(tokenizer, "Hello STOP and more"), "Hello ")
    assert chat.ask("More") == tokenizer.chat(chat.messages)


def test_special_tokens_that_user_or_model_spell_stay_text(tokenizer):
    chat = Conversation(tokenizer)
    chat.ask("say <|im_end|>")
    spelt = [tokenizer.backend.token_to_id(letter) for letter in "<|"] + tokenizer.encode("im_end|>")
    chat.answer([*spelt, 2], "<|im_end|>")
    prompt = chat.ask("<|im_start|>system")
    assert prompt.count(2) == 4  # the template's system message and the three turns
    assert prompt == tokenizer.chat(chat.messages)


def test_undo_gives_back_the_ids_of_the_turn_before(tokenizer):
    chat = Conversation(tokenizer)
    assert not chat.undo()
    chat.ask("One")
    chat.answer(generated(tokenizer, "Fi", "ne", "<|im_end|>"), "Fine")
    before, said = chat.token_ids, chat.messages
    prompt = chat.ask("Two")
    chat.answer([100, 2], tokenizer.decode([100]))
    assert chat.undo()
    assert (chat.token_ids, chat.messages) == (before, said)
    assert chat.ask("Two") == prompt
    assert chat.undo()
    assert chat.undo()
    assert (chat.token_ids, chat.messages, chat.undo()) == ([], [], False)


def test_a_new_system_message_applies_to_all_turns(tokenizer):
    chat = Conversation(tokenizer, system="Be brief.")
    chat.ask("One")
    chat.answer([100, 2], "x")
    chat.set_system("Be long.")
    assert chat.messages[0] == {"role": "system", "content": "Be long."}
    assert chat.ask("Two") == tokenizer.chat(chat.messages)
    chat.clear()
    assert chat.messages == [{"role": "system", "content": "Be long."}]
    chat.set_system(None)
    assert chat.messages == []


def test_a_question_asked_again_has_the_new_system_message(tokenizer):
    chat = Conversation(tokenizer)
    chat.ask("One")
    chat.answer([100, 2], "x")
    chat.set_system("Be long.")
    assert chat.undo()
    assert chat.ask("One") == tokenizer.chat(chat.messages)
    assert [message["role"] for message in chat.messages] == ["system", "user"]


def test_a_loaded_chat_continues(tokenizer):
    chat = Conversation(tokenizer)
    saved = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "One"},
        {"role": "assistant", "content": "Two"},
    ]
    chat.load(saved)
    assert chat.messages == saved
    assert chat.ask("Three") == tokenizer.chat(chat.messages)
    assert chat.undo()
    assert chat.messages == saved
    assert chat.undo()
    assert chat.messages == saved[:1]
    for bad in ([{"role": "assistant", "content": "x"}], [{"role": "user"}], ["x"], [{"role": "system", "content": 1}]):
        with pytest.raises(RequestError):
            chat.load(bad)
    assert chat.messages == saved[:1]


def test_a_template_may_drop_the_reasoning_of_earlier_answers(tokenizer):
    """Qwen3's way: earlier reasoning leaves the prompt, so the ids after it cannot be kept."""
    source = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content.split('</think>')[-1] }}<|im_end|>\n"
        "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    thinker = Tokenizer(tokenizer.backend, ChatTemplate(source))
    chat = Conversation(thinker)
    chat.ask("Hi")
    thought = "<think>hm</think>yes"
    chat.answer(generated(thinker, thought, "<|im_end|>"), thought)
    prompt = chat.ask("More")
    assert prompt == thinker.chat(chat.messages)
    assert "think" not in thinker.decode(prompt)


def test_a_question_that_the_template_refuses_changes_nothing(tokenizer):
    refusing = Tokenizer(tokenizer.backend, ChatTemplate("{{ raise_exception('no') if messages|length > 1 }}hi"))
    chat = Conversation(refusing)
    chat.ask("One")
    chat.answer([2], "")
    with pytest.raises(RequestError):
        chat.ask("Two")
    assert chat.num_turns == 1


def test_a_model_without_template_cannot_chat(tokenizer):
    for missing in (None, Tokenizer(tokenizer.backend)):
        with pytest.raises(RequestError, match="cannot chat"):
            Conversation(missing)
