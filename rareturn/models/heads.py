"""Classification heads that transformers does not have.

Importing this module lets `AutoModelForSequenceClassification` load a saved `SegmentMeanClassifier` or `TurnClassifier`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
import transformers
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoConfig
from transformers.modeling_outputs import SequenceClassifierOutput

PASS_TOKENS = 50  # what a pass costs beside its tokens, in tokens: MiniLM on one core


class SegmentMeanConfig(transformers.PretrainedConfig):
    """Config of a `SegmentMeanClassifier`: `encoder` is the encoder's own config."""

    model_type = "segment_mean_classifier"
    sub_configs: ClassVar = {"encoder": AutoConfig}

    def __init__(self, encoder: Any = None, **options: Any):
        if isinstance(encoder, dict):
            encoder = AutoConfig.for_model(**encoder)
        self.encoder = encoder
        super().__init__(**options)


class SegmentMeanClassifier(transformers.PreTrainedModel):
    """A linear head on two averages of an encoder's token vectors: over the target's tokens and over the context's.

    Sentence encoders such as all-MiniLM are trained to carry meaning in averages, not in their first token; with a few
    hundred rows a head on the averages learns what a head on the first token cannot. Each average is scaled to length
    `SCALE`, so that the head can use the encoder's learning rate.
    """

    config_class = SegmentMeanConfig
    base_model_prefix = "encoder"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    NUM_VECTORS = 2
    SCALE = 20.0

    def __init__(self, config: SegmentMeanConfig, encoder: nn.Module | None = None):
        super().__init__(config)
        self.encoder = transformers.AutoModel.from_config(config.encoder) if encoder is None else encoder
        self.dropout = nn.Dropout(0.1)
        self.classifier = FloatHead(self.NUM_VECTORS * config.encoder.hidden_size, config.num_labels)
        nn.init.normal_(self.classifier.weight, std=0.02)
        nn.init.zeros_(self.classifier.bias)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        """Nothing: the encoder is pretrained, and the constructor initialises the head."""

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, segment_ids: Tensor | None = None, **inputs: Any
    ) -> SequenceClassifierOutput:
        """Logits of shape (rows, num_labels); the arguments have shape (rows, tokens).

        Segments are 0 on the target's tokens and 1 on the context's; `token_type_ids`, BERT's name for them, will do.
        """
        segments = inputs.pop("token_type_ids", segment_ids)
        if getattr(self.encoder.config, "type_vocab_size", 0) > 1:
            inputs["token_type_ids"] = segments
        hidden = self.encoder(input_ids=input_ids, attention_mask=attention_mask, **inputs).last_hidden_state
        averages = []
        for segment in (0, 1):
            weight = ((segments == segment) & (attention_mask == 1)).to(hidden.dtype)[..., None]
            average = (hidden * weight).sum(1) / weight.sum(1).clamp(min=1)
            averages.append(nn.functional.normalize(average, dim=-1) * self.SCALE)
        return SequenceClassifierOutput(logits=self.classifier(self.dropout(torch.cat(averages, dim=-1))))


class TurnConfig(SegmentMeanConfig):
    """Config of a `TurnClassifier`; the encoder's own counts the layers that are used."""

    model_type = "turn_classifier"
    __init__ = SegmentMeanConfig.__init__  # transformers would write one that takes no config as `encoder`


class TurnClassifier(SegmentMeanClassifier):
    """A linear head on the linear probe's four vectors of a row, made of embeddings of single turns.

    A batch, made by `turns.TurnBatches`, holds each of its turns once, whatever number of rows see it.
    """

    config_class = TurnConfig
    NUM_VECTORS = 4  # `turns.PARTS`

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, members: Tensor, starts: Tensor, **unused: Any
    ) -> SequenceClassifierOutput:
        """Logits of shape (rows, num_labels); for the arguments see `vectors`."""
        vectors = self.vectors(input_ids, attention_mask, members, starts)
        return SequenceClassifierOutput(logits=self.classifier(vectors))

    def vectors(self, input_ids: Tensor, attention_mask: Tensor, members: Tensor, starts: Tensor) -> Tensor:
        """What the head sees: float32 of shape (rows, 4 * hidden size).

        `input_ids` and `attention_mask` have shape (turns, tokens), the longest turn first; for the others see
        `gather_vectors`.
        """
        embeddings = []
        for begin, end, width in passes(attention_mask.sum(1).tolist()):
            ids, mask = input_ids[begin:end, :width], attention_mask[begin:end, :width]
            embeddings += embed_turns(self.encoder, ids, mask)
        return gather_vectors(torch.cat(embeddings), members, starts, self.NUM_VECTORS)


def passes(lengths: Sequence[int]) -> list[tuple[int, int, int]]:
    """First, end and width of the passes of turns in falling order of length: the least padding and `PASS_TOKENS`."""
    best: list[tuple[int, int]] = [(0, 0)]  # cost of the turns up to here, and where their last pass begins
    for end in range(1, len(lengths) + 1):
        costs = (best[at][0] + lengths[at] * (end - at) + PASS_TOKENS for at in range(end))
        best.append(min((cost, at) for at, cost in enumerate(costs)))
    found, end = [], len(lengths)
    while end:
        begin = best[end][1]
        found.append((begin, end, lengths[begin]))
        end = begin
    return found[::-1]


def embed_turns(
    encoder: nn.Module,
    input_ids: Tensor,
    attention_mask: Tensor,
    layers: int = 1,
    segment_ids: Tensor | None = None,
) -> list[Tensor]:
    """Means over the tokens of turns, special ones included, as sentence-transformers has them: float32 (turns, hidden).

    One for each of so many layers, of an encoder after `layers.stack_outputs`. Of pairs, whose `segment_ids` are 0 on the
    target, the mean over the target's tokens and then the maximum: (pairs, 2 x hidden).
    """
    hidden = encoder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state.float()
    seen = attention_mask if segment_ids is None else attention_mask * (segment_ids == 0)
    weight, parts = seen[..., None], hidden.chunk(layers, dim=1)
    means = [(part * weight).sum(1) / weight.sum(1) for part in parts]
    if segment_ids is None:
        return means
    maxima = [part.masked_fill(weight == 0, -torch.inf).amax(1) for part in parts]
    return [torch.cat(both, dim=1) for both in zip(means, maxima, strict=True)]


def gather_vectors(embeddings: Tensor, members: Tensor, starts: Tensor, parts: int) -> Tensor:
    """The parts of rows, (rows, parts * hidden size): each the mean of its turns' embeddings, zero where it has none.

    `members` holds the turns of one part after another, as places in `embeddings`, (turns, hidden size); `starts`, (rows
    * parts,), says where each part begins.
    """
    means = nn.functional.embedding_bag(members, embeddings, starts, mode="mean")
    return means.reshape(len(starts) // parts, -1)


class TrunkMemory:
    """Spares an encoder the frozen layers of turns whose output is known, where those of a whole pass are.

    `states` are the frozen layers' outputs, float (tokens, hidden size) a turn, by the bytes of its int64 tokens. Every
    frozen layer then gives the last one's output and computes nothing. With `keep`, what is computed is added; several
    encoders whose frozen layers are equal may share `states`.
    """

    def __init__(
        self,
        encoder: nn.Module,
        trunk: Sequence[nn.Module],
        states: dict[bytes, Tensor],
        keep: bool = False,
    ):
        self.states, self.keep = states, keep
        self.turns: list[bytes] = []  # of this pass
        self.output: Any = None  # of the last frozen layer in this pass, where it is known
        # How many None stand beside the hidden states where a layer gives a tuple; known after the first pass.
        self.beside: int | None = None
        encoder.register_forward_pre_hook(self._look_up, with_kwargs=True)
        for layer in trunk:
            layer.forward = functools.partial(self._forward, layer.forward)
        trunk[-1].register_forward_hook(self._learn)

    def _look_up(self, encoder: nn.Module, args: tuple, inputs: dict[str, Tensor]) -> None:
        mask = inputs["attention_mask"]
        rows = zip(inputs["input_ids"].cpu().numpy(), mask.sum(1).tolist(), strict=True)
        self.turns, self.output = [ids[:length].tobytes() for ids, length in rows], None
        if self.beside is not None and all(turn in self.states for turn in self.turns):
            known = [self.states[turn] for turn in self.turns]
            hidden = pad_sequence(known, batch_first=True).to(mask.device)
            self.output = (hidden, *[None] * (self.beside - 1)) if self.beside else hidden

    def _forward(self, compute: Callable, *args: Any, **inputs: Any) -> Any:
        return compute(*args, **inputs) if self.output is None else self.output

    def _learn(self, layer: nn.Module, args: tuple, output: Any) -> None:
        if self.output is not None:
            return
        self.beside = len(output) if isinstance(output, tuple) else 0
        if self.keep:
            for turn, hidden in zip(self.turns, output[0] if self.beside else output, strict=True):
                self.states[turn] = hidden[: len(turn) // 8].clone()


for config, model in ((SegmentMeanConfig, SegmentMeanClassifier), (TurnConfig, TurnClassifier)):
    AutoConfig.register(config.model_type, config)
    transformers.AutoModelForSequenceClassification.register(config, model)


class FloatHead(nn.Linear):
    """A classification head that computes in float32 under autocast and on a half-precision backbone alike."""

    def forward(self, hidden: Tensor) -> Tensor:
        """Logits, float32 of shape (rows, num_labels), of hidden states of shape (rows, hidden size)."""
        with torch.autocast(hidden.device.type, enabled=False):
            return nn.functional.linear(hidden.float(), self.weight.float(), self.bias)
