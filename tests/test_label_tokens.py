"""The label-token head: labels as the numbers that a causal language model writes."""

from __future__ import annotations

import pytest
from tiny_models import make_tokenizer

from rareturn.errors import InputError
from rareturn.models.label_tokens import label_sequences


def test_a_labels_tokens_are_those_of_its_number_behind_the_prefix():
    tokenizer = make_tokenizer()

    def ids(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    for prefix in ("Label:", "<eos>"):
        sequences = label_sequences(tokenizer, 9, prefix)
        assert all([*ids(prefix), *sequence] == ids(f"{prefix}{n}") for n, sequence in enumerate(sequences))
    assert all(map(len, sequences)) and len(set(sequences)) == 9


def test_labels_that_cannot_be_told_apart_and_prefixes_that_merge_are_refused():
    tokenizer = make_tokenizer()
    with pytest.raises(InputError, match="the tokens of 1 begin those of 10"):
        label_sequences(tokenizer, 11, "Label:")
    tokenizer.add_tokens(["=3"])
    with pytest.raises(InputError, match="3 behind 'Label=' changes the tokens before it"):
        label_sequences(tokenizer, 9, "Label=")
