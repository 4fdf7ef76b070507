"""A causal language model that is asked: prompts in, log-probabilities of the labels out, and nothing is trained."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import nn
from tqdm.auto import tqdm
from transformers import set_seed

from rareturn.data.rendering import LABEL_CUE, Rendered
from rareturn.data.rows import Row
from rareturn.errors import InputError
from rareturn.models.inference import place
from rareturn.models.label_tokens import label_sequences
from rareturn.models.loading import BaseModel, is_encoder, load_config, load_language_model, load_tokenizer
from rareturn.models.packing import PackedBatches, can_branch, model_inputs


@dataclass
class PromptedModel:
    """The log-probabilities of the labels' numbers behind prompts.

    A prompt is the user's turn in the model's chat template, or, where it has none, stands alone with `LABEL_CUE` behind
    it. A rationale, if there is one, begins the model's own turn. Up to ten labels are one digit each; of more, 1 begins
    10, so that the end of the answer is scored with the number.

    Attributes:
        labels: the numbers that may be given.
        cot: whether a rationale of at most `max_new_tokens` comes first, `batch_size` of them at a time: the likeliest
            one at temperature 0, else sampled with the seed.
        known: what was found behind a prompt, which folds may share.
    """

    base: BaseModel
    labels: Sequence[int]
    bf16: bool
    cot: bool = False
    max_new_tokens: int = 0
    temperature: float = 0.0
    seed: int = 42
    batch_size: int = 1
    model: nn.Module | None = field(default=None, init=False)
    known: dict[str, tuple[np.ndarray, str]] = field(default_factory=dict, init=False)

    def __post_init__(self) -> None:
        self.config = load_config(self.base)
        if is_encoder(self.config):
            raise InputError(f"{self.base.name}: an encoder writes nothing; give a causal language model")
        self.tokenizer = load_tokenizer(self.base)
        self.has_chat = bool(self.tokenizer.chat_template)
        if self.cot and not self.has_chat:
            raise InputError(
                f"--cot: {self.base.name} has no chat template, so it cannot be asked to explain"
            )
        self.loader = self.base.loader | {"bf16": self.bf16}
        self.loader |= {"max_new_tokens": self.max_new_tokens} if self.cot else {}
        self.base = replace(self.base, head="label_tokens")  # only to be loaded as what it is
        self.end = "\n"  # what follows an answer
        if self.has_chat:
            said = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "ANSWER"}]
            self.end = (self._chat(said).rpartition("ANSWER")[2].split() or ["\n"])[0]

    @property
    def facts(self) -> list[Any]:
        """What decides how a prompt becomes tokens, the tokenizer's vocabulary aside."""
        return [self.tokenizer.chat_template, LABEL_CUE, self.end]

    def _chat(self, messages: list[dict[str, str]], **how: bool) -> str:
        # Models that may think first are told not to: --cot asks all models in the same way.
        return self.tokenizer.apply_chat_template(messages, tokenize=False, enable_thinking=False, **how)

    def text(self, prompt: str, rationale: str | None = None) -> str:
        """All that stands before a label's number."""
        if not self.has_chat:
            return f"{prompt}\n{LABEL_CUE}"
        begun = self._chat([{"role": "user", "content": prompt}], add_generation_prompt=True)
        return begun if rationale is None else f"{begun}{rationale}\n{LABEL_CUE}"

    def _ids(self, texts: Sequence[str]) -> list[list[int]]:
        bos = [self.tokenizer.bos_token_id]
        has_bos = not self.has_chat and bos != [None] and self.tokenizer("a")["input_ids"][:1] == bos
        found = self.tokenizer(list(texts), add_special_tokens=False, verbose=False)["input_ids"]
        return [bos * has_bos + ids for ids in found]

    def plan(self, prompts: Sequence[str]) -> None:
        """Find the labels' tokens; an InputError where two collide, or a prompt is too long, before the model is loaded."""
        stem, new_tokens = self.text("?", "!" if self.cot else None), self.max_new_tokens if self.cot else 0
        end = self.end if max(self.labels) > 9 else ""
        try:
            sequences = label_sequences(self.tokenizer, max(self.labels) + 1, stem, end)
        except InputError as error:
            raise InputError(f"{self.base.name}: {error}") from None
        longest = max(prompts, key=len, default="")
        tokens = len(self._ids([self.text(longest)])[0]) + new_tokens + max(map(len, sequences))
        limit = getattr(self.config.get_text_config(), "max_position_embeddings", None)
        if limit and tokens > limit:
            fewer = "fewer --shots, or a smaller --max_seq_length"
            raise InputError(f"{self.base.name}: reads {limit} tokens, but a prompt has {tokens}; {fewer}")
        self.sequences = [sequences[label] for label in self.labels]

    def answer(
        self, rows: Sequence[Row], prompts: Sequence[str], title: str
    ) -> tuple[np.ndarray, list[str], dict[str, int]]:
        """Log-probabilities, (rows, labels), the rationales, and (none here) how many answers were none."""
        if self.model is None:
            self.model = place(load_language_model(self.base), self.base)
        new = {prompt: row for row, prompt in zip(rows, prompts, strict=True) if prompt not in self.known}
        if new:
            written = self._rationales(list(new), f"{title}: rationales") if self.cot else [None] * len(new)
            found = self._logits(list(new.values()), list(map(self.text, new, written)), title)
            self.known |= zip(new, zip(found, written, strict=True), strict=True)
        logits, rationales = zip(*map(self.known.__getitem__, prompts), strict=True)
        return np.array(logits), list(rationales), {}

    def _logits(self, rows: Sequence[Row], texts: Sequence[str], title: str) -> np.ndarray:
        """Log-probabilities of each label's tokens behind each text, float64 (rows, labels), all in one pass.

        `rows`, one a text, say which texts are of one dialogue and begin alike. The output layer sees no more than the
        positions before a label's tokens.
        """
        model, sequences = self.model, self.sequences
        try:
            branches = can_branch(model)
        except InputError:
            raise InputError(f"{self.base.name}: this architecture's prompts cannot share a pass") from None
        begun = sorted({tokens[:end] for tokens in sequences for end in range(len(tokens))})
        alphabet = sorted({token for tokens in sequences for token in tokens})
        items = [
            Rendered((np.array([*ids, *first], dtype=np.int32),), 0, False)
            for ids in self._ids(texts)
            for first in begun
        ]
        # Attention grows with the square of a batch, and on a CPU it is slow; but the longest prompt has to have company.
        more = 1024 if model.device.type == "cpu" else 4096
        way = PackedBatches(tokens_per_batch=max(map(len, items)) + more, branches=branches)
        batches = way.prediction_batches([row for row in rows for _ in begun], items)
        found = np.zeros((len(items), len(alphabet)))
        with torch.inference_mode(), torch.autocast(model.device.type, torch.bfloat16, enabled=self.bf16):
            for batch in tqdm(batches, desc=title, unit="batch"):
                inputs = way.collate([items[index] for index in batch])
                inputs = {key: value.to(model.device) for key, value in inputs.items()}
                read = {"logits_to_keep": inputs["row_positions"]}
                logits = model(**model_inputs(model.base_model, inputs), **read).logits[0].float()
                found[batch] = logits.log_softmax(-1)[:, alphabet].cpu().numpy()
        found = found.reshape(len(texts), len(begun), len(alphabet))
        columns = [
            sum(
                found[:, begun.index(tokens[:end]), alphabet.index(tokens[end])] for end in range(len(tokens))
            )
            for tokens in sequences
        ]
        return np.stack(columns, axis=1)

    def _rationales(self, prompts: Sequence[str], title: str) -> list[str]:
        """What the model writes before it answers."""
        model, ids = self.model, self._ids(list(map(self.text, prompts)))
        how: dict[str, Any] = {"max_new_tokens": self.max_new_tokens, "do_sample": self.temperature > 0}
        how |= {"temperature": self.temperature} if self.temperature else {}
        how["pad_token_id"] = self.tokenizer.pad_token_id
        ends = (self.tokenizer.eos_token_id, self._ids([self.end])[0][0])
        how["eos_token_id"] = [token for token in ends if token is not None]
        order = sorted(range(len(ids)), key=lambda index: len(ids[index]))
        found = [""] * len(ids)
        set_seed(self.seed)
        with torch.inference_mode(), torch.autocast(model.device.type, torch.bfloat16, enabled=self.bf16):
            for begin in tqdm(range(0, len(order), self.batch_size), desc=title, unit="batch"):
                batch = order[begin : begin + self.batch_size]
                given = {"input_ids": [ids[index] for index in batch]}
                inputs = self.tokenizer.pad(given, padding_side="left", return_tensors="pt").to(model.device)
                written = model.generate(**inputs, **how)[:, inputs["input_ids"].shape[1] :]
                texts = self.tokenizer.batch_decode(written, skip_special_tokens=True)
                for index, text in zip(batch, texts, strict=True):
                    found[index] = text.partition(LABEL_CUE.strip())[0].strip()
        return found
