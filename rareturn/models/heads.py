"""Classification heads that transformers does not have.

Importing this module lets `AutoModelForSequenceClassification` load a saved `SegmentMeanClassifier`.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
import transformers
from torch import Tensor, nn
from transformers import AutoConfig
from transformers.modeling_outputs import SequenceClassifierOutput


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
    SCALE = 20.0

    def __init__(self, config: SegmentMeanConfig, encoder: nn.Module | None = None):
        super().__init__(config)
        self.encoder = transformers.AutoModel.from_config(config.encoder) if encoder is None else encoder
        self.dropout = nn.Dropout(0.1)
        self.classifier = FloatHead(2 * config.encoder.hidden_size, config.num_labels)
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


AutoConfig.register(SegmentMeanConfig.model_type, SegmentMeanConfig)
transformers.AutoModelForSequenceClassification.register(SegmentMeanConfig, SegmentMeanClassifier)


class FloatHead(nn.Linear):
    """A classification head that computes in float32 under autocast and on a half-precision backbone alike."""

    def forward(self, hidden: Tensor) -> Tensor:
        """Logits, float32 of shape (rows, num_labels), of hidden states of shape (rows, hidden size)."""
        with torch.autocast(hidden.device.type, enabled=False):
            return nn.functional.linear(hidden.float(), self.weight.float(), self.bias)
