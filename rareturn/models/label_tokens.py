"""Labels as the numbers that a language model writes: their tokens, and a classifier that reads its logits there.

A causal language model has a logit for every token that may come next. Behind a row and `LABEL_CUE`, those of the labels'
numbers are class logits: the head needs no new weights, and a model of its own code that has no
`*ForSequenceClassification` will do.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import SequenceClassifierOutput

from rareturn.data.rendering import LABEL_CUE
from rareturn.errors import InputError


def label_sequences(tokenizer: Any, num_labels: int, prefix: str, end: str = "") -> list[tuple[int, ...]]:
    """The token ids with which each label's number, and then `end`, continues `prefix`, a text.

    Number and prefix are tokenised together, so that the ids are those that the model has seen in such a place; the
    prefix's own tokens and then a label's are the tokens of both. An InputError where they are not, because the end of
    the prefix merges with a number, and where two labels cannot be told apart, because one's tokens begin the other's.
    """

    def ids(text: str) -> tuple[int, ...]:
        return tuple(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])

    stem, sequences, place = ids(prefix), [], f"{prefix[-20:]!r}"
    for label in range(num_labels):
        both = ids(f"{prefix}{label}{end}")
        if both[: len(stem)] != stem or len(both) == len(stem):
            raise InputError(f"label tokens: {label} behind {place} changes the tokens before it")
        sequences.append(both[len(stem) :])
    # Among sorted sequences, one that begins another also begins its successor.
    order = sorted(range(num_labels), key=sequences.__getitem__)
    for one, other in itertools.pairwise(order):
        if sequences[other][: len(sequences[one])] == sequences[one]:
            problem = f"the tokens of {one} begin those of {other}, so they cannot be told apart"
            raise InputError(f"label tokens: behind {place}, {problem}")
    return sequences


def label_tokens(tokenizer: Any, num_labels: int) -> list[int]:
    """The token of each label's number behind `LABEL_CUE`; an InputError where one takes more than one token."""
    sequences = label_sequences(tokenizer, num_labels, LABEL_CUE)
    if long := [label for label, ids in enumerate(sequences) if len(ids) > 1]:
        raise InputError(f"--head label_tokens: to this model's tokenizer {long[0]} is more than one token")
    return [ids[0] for ids in sequences]


def read_at_label_tokens(model: nn.Module, tokens: Sequence[int]) -> nn.Module:
    """The causal language model itself, whose forward now gives class logits: those of `tokens` behind each row.

    Only these rows of its output matrix are multiplied, and in float32, as in a `heads.FloatHead`. Weights, their names
    and what is saved stay a causal language model's.
    """

    class LabelTokenClassifier(type(model)):
        def forward(
            self, input_ids: Tensor | None = None, attention_mask: Tensor | None = None, **unused: Any
        ) -> SequenceClassifierOutput:
            """Logits of shape (rows, num_labels), of right-padded rows; the arguments have shape (rows, tokens)."""
            backbone = {"input_ids": input_ids, "attention_mask": attention_mask, "use_cache": False}
            hidden = self.base_model(**backbone).last_hidden_state
            last = attention_mask.sum(1) - 1
            return SequenceClassifierOutput(logits=self.score(hidden[torch.arange(len(last)), last]))

        def score(self, hidden: Tensor) -> Tensor:
            """Logits, float32 of shape (rows, num_labels), of rows' last hidden states, (rows, hidden size)."""
            output, config = self.get_output_embeddings(), self.config.get_text_config()
            bias = None if output.bias is None else output.bias[tokens].float()
            with torch.autocast(hidden.device.type, enabled=False):
                logits = nn.functional.linear(hidden.float(), output.weight[tokens].float(), bias)
            # What Cohere, Granite and Gemma do to their logits.
            logits = logits * getattr(self, "logit_scale", 1.0) / getattr(config, "logits_scaling", 1.0)
            cap = getattr(config, "final_logit_softcapping", None)
            return logits if cap is None else cap * torch.tanh(logits / cap)

    LabelTokenClassifier.__name__ = type(model).__name__  # saved with the model
    model.__class__ = LabelTokenClassifier
    model.loss_type = "ForSequenceClassification"  # or Trainer would not count the first row of a batch
    return model
