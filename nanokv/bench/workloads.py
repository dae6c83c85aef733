"""Prompts of a bench: random token ids, so that prompts share the intended prefix and nothing else."""

from __future__ import annotations

import random


def random_prompts(count: int, length: int, vocab_size: int, seed: int = 0) -> list[list[int]]:
    """`count` prompts of `length` tokens without a common prefix."""
    return shared_prefix_prompts(count, length, 0, vocab_size, seed)


def shared_prefix_prompts(count: int, length: int, shared: int, vocab_size: int, seed: int = 0) -> list[list[int]]:
    """`count` prompts of `length` tokens that begin with the same `shared` tokens and differ from the next one on.

    Any two differ at index `shared`, provided that `count` is at most `vocab_size`; with shared == length all are the
    same. Equal arguments give equal prompts.
    """
    generator = random.Random(f"{seed} {length} {shared}")
    prefix = [generator.randrange(vocab_size) for _ in range(shared)]
    first = generator.randrange(vocab_size)
    prompts = []
    for index in range(count):
        tail = [generator.randrange(vocab_size) for _ in range(length - shared)]
        if tail:
            tail[0] = (first + index) % vocab_size
        prompts.append(prefix + tail)
    return prompts
