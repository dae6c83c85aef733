"""Stories, and conversations in ChatML: facts, questions about them, small talk."""

from __future__ import annotations

import random

from tiny.facts import ANSWER, NEW, TEXT, Fact, Level, Sentence, alias_fact, owner_fact, some_facts
from tiny.words import ALIASES, END, FIELDS, NAMES, STORY, STORY_BEGIN, STORY_END, TURN, count, fill, pick, possession

SMALL_TALK = {
    "Hello.": "Hello. I am glad to see you.",
    "Hi.": "Hello. I am glad to see you.",
    "How are you?": "I am well. Thank you.",
    "Thank you.": "You are welcome.",
    "What is your name?": "I am a tiny model.",
    "What can you do?": "I can remember facts and tell a story.",
}
NOTED, UNKNOWN, ASK_STORY = "I will remember it.", "I do not know.", "Tell me a story."


def story(rng: random.Random, level: Level, budget: int, taken: set[str]) -> list[Sentence]:
    return [[(sentence, TEXT)] for sentence in tell(rng, rng.randint(3, 9), taken)]


def tell(rng: random.Random, length: int, taken: set[str]) -> list[str]:
    """A beginning, `length` sentences and an end, all with the same two people, animal, thing and places."""
    a, b = pick(rng, NAMES, 2, set(taken))
    place, place2 = rng.sample(FIELDS["place"], 2)
    colour, thing = possession(rng, set(taken)).split()
    cast = {"a": a, "b": b, "place": place, "place2": place2, "colour": colour, "object": thing}
    cast["animal"] = rng.choice(FIELDS["animal"])
    middle = [STORY[line] for line in sorted(rng.sample(range(len(STORY)), length))]
    return [fill(rng, template, **cast) for template in (STORY_BEGIN, *middle, STORY_END)]


def turn(user: Sentence, assistant: Sentence) -> list[Sentence]:
    """One exchange in ChatML. A message has no space before its first word."""
    return [
        [(f"{TURN}user\n", TEXT), *bare(user), (f"{END}\n{TURN}assistant\n", TEXT)],
        [*bare(assistant), (END, TEXT), ("\n", TEXT)],
    ]


def bare(sentence: Sentence) -> Sentence:
    (first, kind), *rest = sentence
    return [(first.lstrip(" "), kind), *rest]


def chat(rng: random.Random, level: Level, budget: int, taken: set[str]) -> list[Sentence]:
    """One conversation as long as the budget: facts in one or several turns, questions, small talk, stories."""
    sentences: list[Sentence] = []
    answers: dict[str, Sentence] = {}
    used = 0
    while used < budget:
        action = rng.random()
        if not answers or (action < 0.3 and len(answers) < 2 * level.facts and len(taken) < 80):
            exchange = turn(*told_in_chat(rng, level, taken, answers))
        elif action < 0.7:
            question = rng.choice(list(answers)) if rng.random() < 0.6 else list(answers)[-1]
            exchange = turn([(question, TEXT)], answers[question])
        elif action < 0.76:
            (name,) = pick(rng, NAMES, 1, set(taken))
            question = rng.choice([f"What is the key of {name}?", f"What does {name} own?"])
            exchange = turn([(question, TEXT)], [(UNKNOWN, ANSWER)])
        elif action < 0.88:
            exchange = turn([(ASK_STORY, TEXT)], [(text, TEXT) for text in tell(rng, rng.randint(2, 5), taken)])
        else:
            question, answer = rng.choice(list(SMALL_TALK.items()))
            exchange = turn([(question, TEXT)], [(answer, TEXT)])
        sentences += exchange
        used += sum(count(text) for sentence in exchange for text, _ in sentence)
    return sentences


def told_in_chat(
    rng: random.Random, level: Level, taken: set[str], answers: dict[str, Sentence]
) -> tuple[Sentence, Sentence]:
    """A message with new facts and its answer: "I will remember it.", or the fact if the message ends with a question.

    answers   question -> answer; the new ones are added
    """
    told: list[Fact] = []
    if rng.random() < 0.3 and level.pairs > 1:
        for name, alias in zip(pick(rng, NAMES, 2, taken), pick(rng, ALIASES, 2, taken), strict=True):
            pair = alias_fact(name, alias), owner_fact(alias, possession(rng, taken))
            told += pair
            answers[f"What does {name} own?"] = [("You said", TEXT), *pair[0].say(ANSWER), *pair[1].say(ANSWER)]
        rng.shuffle(told)
    else:
        told = some_facts(rng, rng.randint(1, 4), taken)
        for fact in told:
            begin = "" if fact.head.startswith(" The") else "You said"
            answers[fact.question] = [(begin, TEXT), *fact.say(ANSWER)] if begin else fact.say(ANSWER)
    message = [fragment for fact in told for fragment in fact.say(NEW)]
    if rng.random() < 0.5:
        message.insert(0, ("Please remember this.", TEXT))
    if rng.random() < 0.25:
        question = rng.choice(list(answers)[-2:])
        return [*message, (f" {question}", TEXT)], answers[question]
    return message, [(NOTED, TEXT)]
