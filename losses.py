"""The weighted, smoothed cross-entropy of a long-tailed task, normalised over the whole optimizer step."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import nn

CLASS_WEIGHTS = ("none", "inverse_sqrt", "balanced")


def class_weights(counts: np.ndarray, method: str = "inverse_sqrt") -> np.ndarray:
    """Weights of the classes, scaled so that their mean over the training rows is 1.

    Ratios are 1/sqrt(n_c) for `inverse_sqrt` (paper, 'Loss & Training'), 1/n_c for `balanced`, 1 for `none`. With mean
    1 over the rows the loss keeps the size, and so the learning rate the meaning, that it has without weights.

    Args:
        counts: rows per class in the fold's training part, shape (num_labels,).

    Returns:
        float64 of shape (num_labels,); a class without rows has weight 0.
    """
    exponent = {"none": 0.0, "inverse_sqrt": -0.5, "balanced": -1.0}[method]
    weights = np.where(counts > 0, np.maximum(counts, 1).astype(np.float64) ** exponent, 0.0)
    return weights * (counts.sum() / (weights * counts).sum())


class WeightedCrossEntropy:
    """A `compute_loss_func` for `Trainer`: sum over the rows of w_y · CE_ε, divided by the rows of the optimizer step.

    CE_ε is cross-entropy against (1 - ε) · onehot(y) + ε / C, with the row's class weight on the whole of it. Dividing
    by `num_items_in_batch`, which `Trainer` counts over all micro-batches (and processes) of the step, makes 16x1 and
    1x16 rows one and the same step; a mean over each micro-batch would not, and at one row a micro-batch would cancel
    the weights. `outputs.logits` may be any floating type; the loss is float32.

    Args:
        weights: of the classes, shape (num_labels,), as `class_weights` gives them.
        label_scope: the labels that a specialist tells apart; the others' logits stay out of the softmax.
    """

    def __init__(
        self,
        weights: np.ndarray,
        label_smoothing_factor: float = 0.0,
        label_scope: Sequence[int] | None = None,
    ):
        scope = list(range(len(weights)) if label_scope is None else label_scope)
        self.scope = torch.tensor(scope)
        self.weights = torch.tensor(weights, dtype=torch.float32)
        self.place = torch.full((len(weights),), -1).scatter(0, self.scope, torch.arange(len(scope)))
        self.label_smoothing_factor = label_smoothing_factor

    def __call__(
        self, outputs: dict, labels: torch.Tensor, num_items_in_batch: torch.Tensor | int | None = None
    ) -> torch.Tensor:
        """Loss of a micro-batch; `num_items_in_batch` None (evaluation) divides by its own rows.

        Args:
            outputs: with `logits` of shape (rows, num_labels).
            labels: class indices of shape (rows,).
        """
        if self.weights.device != labels.device:
            self.scope, self.weights, self.place = (
                tensor.to(labels.device) for tensor in (self.scope, self.weights, self.place)
            )
        log_probabilities = nn.functional.log_softmax(outputs["logits"].float()[:, self.scope], dim=-1)
        chosen = log_probabilities.gather(1, self.place[labels][:, None]).squeeze(1)
        smoothing = self.label_smoothing_factor
        row_loss = -(1 - smoothing) * chosen - smoothing * log_probabilities.mean(dim=-1)
        total = (self.weights[labels] * row_loss).sum()
        return total / (len(labels) if num_items_in_batch is None else num_items_in_batch)
