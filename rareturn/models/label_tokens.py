"""Labels as the numbers that a language model writes."""

from __future__ import annotations

import itertools
from typing import Any

from rareturn.errors import InputError


def label_sequences(tokenizer: Any, num_labels: int, prefix: str) -> list[tuple[int, ...]]:
    """The token ids with which each label's number continues `prefix`, a text.

    Number and prefix are tokenised together, so that the ids are those that the model has seen in such a place; the
    prefix's own tokens and then a label's are the tokens of both. An InputError where they are not, because the end of
    the prefix merges with a number, and where two labels cannot be told apart, because one's tokens begin the other's.
    """

    def ids(text: str) -> tuple[int, ...]:
        return tuple(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])

    stem, sequences, end = ids(prefix), [], f"{prefix[-20:]!r}"
    for label in range(num_labels):
        both = ids(f"{prefix}{label}")
        if both[: len(stem)] != stem or len(both) == len(stem):
            raise InputError(f"label tokens: {label} behind {end} changes the tokens before it")
        sequences.append(both[len(stem) :])
    # Among sorted sequences, one that begins another also begins its successor.
    order = sorted(range(num_labels), key=sequences.__getitem__)
    for one, other in itertools.pairwise(order):
        if sequences[other][: len(sequences[one])] == sequences[one]:
            raise InputError(f"label tokens: behind {end}, the tokens of {one} begin those of {other}")
    return sequences
