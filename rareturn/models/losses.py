"""Losses for classes of unequal size, and how the rows of an optimizer step are summed up. docs/LOSSES.md compares them.

A loss takes logits (rows, classes), float32, and labels (rows,), int64, and gives a value a row, (rows,); smoothing ε
puts (1 - ε) · onehot + ε / classes in place of the label. Classes are those of the scope, counted from 0; a class's
`counts` are its rows in the fold's training part.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from rareturn.data.label_guide import LabelGuide
from rareturn.errors import InputError
from rareturn.models.training import class_weights

Loss = Callable[..., Tensor]


def cross_entropy(logits: Tensor, labels: Tensor, *, smoothing: float = 0.0) -> Tensor:
    """-log p_y of the softmax."""
    return functional.cross_entropy(logits, labels, reduction="none", label_smoothing=smoothing)


def focal(logits: Tensor, labels: Tensor, *, gamma: float, smoothing: float = 0.0) -> Tensor:
    """(1 - p_y)^gamma · -log p_y: rows that the model is sure of count less (Lin et al. 2017, arXiv 1708.02002, eq. 4)."""
    p = logits.softmax(-1).gather(-1, labels[:, None])[:, 0]
    unsure = (1 - p).clamp(min=torch.finfo(p.dtype).eps)  # its power has no gradient at 0 where gamma < 1
    return unsure**gamma * cross_entropy(logits, labels, smoothing=smoothing)


def logit_adjusted(
    logits: Tensor, labels: Tensor, *, counts: Tensor, tau: float, smoothing: float = 0.0
) -> Tensor:
    """Cross-entropy of z + τ · log π, π being the classes' shares of the rows (Menon et al. 2021, arXiv 2007.07314, eq. 10).

    With τ = 1 it is the balanced softmax (Ren et al. 2020, arXiv 2007.10740). Predictions take z alone. A class
    without rows counts as one row, since log 0 would make a smoothed loss infinite.
    """
    log_prior = (counts.clamp(min=1) / counts.sum()).log().to(logits)
    return cross_entropy(logits + tau * log_prior, labels, smoothing=smoothing)


def ldam(
    logits: Tensor, labels: Tensor, *, counts: Tensor, margin: float, scale: float, smoothing: float = 0.0
) -> Tensor:
    """Cross-entropy of s · (z - Δ · onehot(y)), Δ_y = C · n_y^(-1/4), C such that the rarest class has `margin`.

    Cao et al. 2019, arXiv 1906.07413; a class without rows has no label to take a margin from.
    """
    margins = margin * (counts[counts > 0].min() / counts.clamp(min=1)) ** 0.25
    taken = functional.one_hot(labels, logits.shape[-1]) * margins.to(logits)
    return cross_entropy(scale * (logits - taken), labels, smoothing=smoothing)


def distance(
    logits: Tensor, labels: Tensor, *, distances: Tensor, beta: float, smoothing: float = 0.0
) -> Tensor:
    """Cross-entropy against soft labels, q_c ∝ exp(-β · d(y, c)): a near miss costs less than a far one.

    Bertinetto et al. 2020, arXiv 1912.09393, section 3.2; over ordered labels it is Díaz & Marathe 2019 (SORD). The
    distances, (classes, classes), are not rescaled.
    """
    soft = (-beta * distances).softmax(-1).to(logits)
    return functional.cross_entropy(logits, soft[labels], reduction="none", label_smoothing=smoothing)


def find_loss(options: Any, counts: np.ndarray, guide: LabelGuide, scope: Sequence[int]) -> dict[str, Any]:
    """What the flags say of the loss, as `WeightedTrainer` takes it; an InputError where the guide lacks what it needs.

    `counts`, (num_labels,), are the rows of each label in the fold's training part; `scope` are the ascending labels.
    """
    seen, name, loss = torch.from_numpy(counts)[list(scope)], options.loss, cross_entropy
    if name == "focal":
        loss = functools.partial(focal, gamma=options.focal_gamma)
    elif name in ("logit_adjusted", "balanced_softmax"):
        tau = options.tau if name == "logit_adjusted" else 1.0
        loss = functools.partial(logit_adjusted, counts=seen, tau=tau)
    elif name == "ldam":
        loss = functools.partial(ldam, counts=seen, margin=options.ldam_margin, scale=options.ldam_scale)
    elif name == "distance":
        if guide.distances is None:
            raise InputError("--loss distance: the label guide has no `distances`")
        between = torch.tensor(guide.distances)[list(scope)][:, list(scope)]
        loss = functools.partial(distance, distances=between, beta=options.distance_beta)
    start = (0.8 if name == "ldam" else 0.0) if options.drw_start is None else options.drw_start
    weights = class_weights(counts, options.class_weights)
    more = {"label_scope": scope, "drw_start": start, "r_drop_alpha": options.r_drop_alpha}
    return {"loss": loss, "class_weights": weights, **more}


def step_loss(
    outputs: dict[str, Tensor],
    labels: Tensor,
    num_items_in_batch: Tensor | int | None = None,
    *,
    class_weights: np.ndarray,
    loss: Loss = cross_entropy,
    label_smoothing_factor: float = 0.0,
    label_scope: Sequence[int] | None = None,
    r_drop_alpha: float = 0.0,
) -> Tensor:
    """Sum over the rows of w_y · loss, divided by the rows of the optimizer step (None, in evaluation: those given).

    Dividing by `num_items_in_batch`, which `Trainer` counts over all micro-batches (and processes) of the step, makes
    16x1 and 1x16 rows the same step; a mean over each micro-batch would not, and at one row a micro-batch would cancel
    the weights. Logits of shape (rows, num_labels) have any floating type; the loss is float32. `label_scope` are the
    ascending labels that a specialist tells apart; the others' logits stay out of the softmax.

    With logits of two passes, (2, rows, num_labels), the loss is the mean of both, plus `r_drop_alpha` · ½ (KL(p ‖ q) +
    KL(q ‖ p)) for each row, without class weights (R-Drop, Liang et al. 2021, arXiv 2106.14448, whose own code takes
    the mean of the two losses where the paper has their sum).
    """
    scope = torch.tensor(label_scope or range(len(class_weights)), device=labels.device)
    weights = torch.tensor(class_weights, dtype=torch.float32, device=labels.device)
    logits, places = outputs["logits"].float()[..., scope], torch.searchsorted(scope, labels)
    passes = logits.reshape(-1, len(labels), len(scope))
    row_loss = sum(loss(one, places, smoothing=label_smoothing_factor) for one in passes) / len(passes)
    total = (weights[labels] * row_loss).sum()
    if r_drop_alpha:
        log_p, log_q = passes.log_softmax(-1)
        total = total + r_drop_alpha * ((log_p.exp() - log_q.exp()) * (log_p - log_q)).sum() / 2
    return total / (len(labels) if num_items_in_batch is None else num_items_in_batch)
