"""Linear probes: features of rows from a frozen or a trained model, and a logistic head on them.

Encoders: mean-pooled embeddings of single turns, each distinct turn encoded once, put together per row. Decoders: the
hidden state of the rendered prompt's last token, a dialogue's rows in one pass. Both are taken at `default_layer`,
or at a trained model's last layer.
"""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy
import torch
from safetensors import SafetensorError, safe_open
from torch import nn
from tqdm.auto import tqdm

from rareturn.data.label_guide import LabelGuide
from rareturn.data.rows import Row
from rareturn.decisions.probabilities import OUT_OF_SCOPE_LOGIT, log_softmax
from rareturn.errors import InputError
from rareturn.files import write_bytes
from rareturn.models.heads import FloatHead, embed_turns, gather_vectors
from rareturn.models.inference import place, predict_logits
from rareturn.models.layers import default_layer, keep_layers
from rareturn.models.loading import (
    BaseModel,
    is_encoder,
    load_classifier,
    load_config,
    load_tokenizer,
    load_trained,
)
from rareturn.models.packing import PackedBatches, can_branch, row_hidden_states
from rareturn.models.training import class_weights
from rareturn.models.turns import (
    PARTS,
    TurnBatches,
    TurnRenderer,
    TurnStates,
    make_renderer,
    pad_turns,
    share_turns,
)

logger = logging.getLogger(__name__)

HEAD_TENSORS = ("coef", "intercept", "mean", "scale")
INNER_FOLDS = 3
Splits = Iterable[tuple[np.ndarray, np.ndarray]]  # indices of rows to train on, and of rows to judge on


@dataclass
class FrozenFeatures:
    """Features of rows from a frozen model.

    An encoder gives four vectors a row (`turns.PARTS`): the target's embedding, the mean over the turns before it,
    the mean over the earlier turns of the target's speaker, and the last turn of another speaker; zeros where a row
    has no such turn. A turn's embedding is the mean over its tokens, special tokens included, as sentence-transformers
    does it. A decoder gives the hidden state of the last token of the row's prompt.

    Attributes:
        layer: whose output is taken, counted from 1; later ones are not run. None: two thirds up, rounded, and the last
            where the base is `adapted`, since training has shaped it for the labels.
        window: `max_turns`, `max_seq_length` (an encoder's is per turn) and `window_stride` of DESIGN 4.
        batch_size: turns in an encoder's forward pass.
    """

    base: BaseModel
    guide: LabelGuide
    layer: int | None
    window: Mapping[str, int]
    batch_size: int
    bf16: bool
    show_progress: bool = True
    adapted: bool = False  # models that were trained from the base stand in its place

    def __post_init__(self) -> None:
        config = load_config(self.base)
        num_layers = config.get_text_config().num_hidden_layers
        if self.base.pooling == "turns":  # a `TurnClassifier` has no others
            num_layers = default_layer(config)
        if self.layer is None:
            self.layer = num_layers if self.adapted else default_layer(config)
        if not 1 <= self.layer <= num_layers:
            raise InputError(f"--layer {self.layer}: {self.base.name} has layers 1 to {num_layers}")
        self.is_encoder, self.tokenizer = is_encoder(config), load_tokenizer(self.base)
        if self.is_encoder:
            self.renderer, self.parts = TurnRenderer(self.base, self.tokenizer, self.window), PARTS
        else:
            self.renderer = make_renderer(self.base, self.tokenizer, self.guide, self.window)
            self.parts = ("last_token",)

    def extract(self, rows: Sequence[Row], model: nn.Module | None = None) -> np.ndarray:
        """Features of rows, float32 (rows, features), by what `load` gave; None loads it for this call only."""
        model = self.load() if model is None else model
        rows_to_features = self._from_turns if self.is_encoder else self._from_prompts
        with torch.inference_mode(), torch.autocast(model.device.type, torch.bfloat16, enabled=self.bf16):
            features = rows_to_features(rows, model)
        if not np.isfinite(features).all():
            raise InputError(f"{self.base.name}: layer {self.layer} gives values that are not finite")
        return features

    def load(self, trained: Path | None = None) -> nn.Module:
        """The base, or the model in a folder that was trained from it, up to the layer whose output is taken."""
        # The head that comes with it is not used, but these loaders know quantization and dtype.
        what = self.guide.names, self.tokenizer.pad_token_id
        model = (
            load_classifier(self.base, *what) if trained is None else load_trained(self.base, trained, *what)
        )
        return self.cut(place(model, self.base))

    def cut(self, model: nn.Module) -> nn.Module:
        """The classifier, without its later layers, in a PEFT model or on its own."""
        classifier = model.get_base_model() if hasattr(model, "get_base_model") else model
        keep_layers(classifier.base_model, self.layer)
        if self.is_encoder:
            classifier.base_model.config.num_hidden_layers = self.layer  # as `layer_list` finds them
        return classifier

    def _from_turns(self, rows: Sequence[Row], model: nn.Module) -> np.ndarray:
        """An encoder's features: every distinct turn is embedded once, then averaged per row."""
        turns, members, starts = share_turns(self.renderer.render(rows))
        batches = [turns[at : at + self.batch_size] for at in range(0, len(turns), self.batch_size)]
        embeddings = []
        for batch in tqdm(batches, desc="turns", unit="batch", disable=not self.show_progress):
            inputs = pad_turns(batch, self.tokenizer.pad_token_id)
            inputs = {name: value.to(model.device) for name, value in inputs.items()}
            embeddings.append(embed_turns(model.base_model, **inputs).cpu())
        return gather_vectors(torch.cat(embeddings), members, starts, len(PARTS)).numpy()

    def _from_prompts(self, rows: Sequence[Row], model: nn.Module) -> np.ndarray:
        """A decoder's features, a dialogue's rows in one pass."""
        rendered = self.renderer.render(rows)
        try:
            branches = can_branch(model)
        except InputError:
            raise InputError(f"{self.base.name}: this architecture's last token cannot be probed") from None
        way = PackedBatches(branches=branches)
        batches = way.prediction_batches(rows, rendered)
        features = np.zeros((len(rows), model.config.get_text_config().hidden_size), dtype=np.float32)
        for batch in tqdm(batches, desc="rows", unit="batch", disable=not self.show_progress):
            inputs = way.collate([rendered[index] for index in batch])
            inputs = {key: value.to(model.device) for key, value in inputs.items()}
            features[batch] = row_hidden_states(model.base_model, inputs).float().cpu().numpy()
        return features


@dataclass(frozen=True)
class LinearHead:
    """Logits = ((features - mean) / scale) · coef + intercept, natural logits of a multinomial logistic regression."""

    coef: np.ndarray  # float32 (num_labels, features); zero for a label that was not trained on
    intercept: np.ndarray  # float32 (num_labels,); `OUT_OF_SCOPE_LOGIT` for such a label
    mean: np.ndarray  # float32 (features,), as `scale`
    scale: np.ndarray
    C: float  # inverse strength of the L2 penalty

    def logits(self, features: np.ndarray) -> np.ndarray:
        """float32 of shape (rows, num_labels)."""
        return ((features - self.mean) / self.scale) @ self.coef.T + self.intercept

    def save(self, path: str | os.PathLike) -> None:
        """Write safetensors, with C in the metadata."""
        tensors = {name: getattr(self, name) for name in HEAD_TENSORS}
        write_bytes(path, safetensors.numpy.save(tensors, {"C": repr(self.C)}))

    @classmethod
    def load(cls, path: str | os.PathLike) -> LinearHead:
        """Read what `save` wrote."""
        try:
            with safe_open(path, "numpy") as file:
                tensors = {name: file.get_tensor(name) for name in HEAD_TENSORS}
                return cls(**tensors, C=float(file.metadata()["C"]))
        except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
            raise InputError(f"{path}: cannot read the head: {error}") from None


def fit_head(
    features: np.ndarray,
    labels: np.ndarray,
    *,
    num_labels: int,
    block_size: int,
    weights: str,
    C: float,
    has_bias: bool = True,
) -> LinearHead:
    """Logistic head on standardised features, float32 (rows, features); for `weights` see `training.class_weights`.

    Every feature is centred, and every block of `block_size` is divided by one number so that its total variance is
    1 / blocks: blocks weigh the same, rows have mean squared length 1, and a value of C means the same for every model.
    A head without bias is fitted to features that are not centred, and has zeros for `mean` and `intercept`.
    """
    from sklearn.linear_model import LogisticRegression
    from threadpoolctl import threadpool_limits

    classes = np.unique(labels)
    if len(classes) < 2:
        raise InputError(f"all {len(labels)} training rows have label {classes[0]}: nothing to tell apart")
    mean = features.mean(axis=0, dtype=np.float64) * has_bias
    variance = np.square(features - mean).mean(axis=0)
    starts = np.arange(0, len(variance), block_size)
    scale = np.repeat(np.sqrt(np.add.reduceat(variance, starts) * len(starts)), block_size)
    scale[scale == 0] = 1.0
    mean, scale = mean.astype(np.float32), scale.astype(np.float32)
    by_label = class_weights(np.bincount(labels, minlength=num_labels), weights)
    by_class = {label: by_label[label] for label in classes}
    model = LogisticRegression(C=C, class_weight=by_class, max_iter=2000, fit_intercept=has_bias)
    # The products are too narrow for several threads to help, and one gives the same bits on any number of cores.
    with threadpool_limits(1):
        model.fit((features - mean) / scale, labels)
    coef, intercept = model.coef_, model.intercept_
    if len(classes) == 2:  # scikit-learn has one vector there: the log odds of the second label
        halves = np.array([-0.5, 0.5])
        coef, intercept = halves[:, None] * coef, halves * intercept
    all_coef = np.zeros((num_labels, features.shape[1]), dtype=np.float32)
    all_intercept = np.full(num_labels, OUT_OF_SCOPE_LOGIT, dtype=np.float32)
    all_coef[classes], all_intercept[classes] = coef, intercept
    return LinearHead(all_coef, all_intercept, mean, scale, float(C))


def inner_folds(labels: np.ndarray, groups: Sequence[str], is_variant: np.ndarray, seed: int) -> Splits:
    """Training rows split by dialogue.

    Variants are trained on with their dialogue and never judged. Nor is a row whose label is not trained on, since no
    value of C can help it.
    """
    from sklearn.model_selection import StratifiedGroupKFold

    count = len(set(groups))
    if count < INNER_FOLDS:
        raise InputError(f"{count} training dialogues are too few to choose among values of C: give one --C")
    splitter = StratifiedGroupKFold(INNER_FOLDS, shuffle=True, random_state=seed)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The least populated class", category=UserWarning)
        for train, judged in splitter.split(labels, labels, groups):
            yield train, judged[~is_variant[judged] & np.isin(labels[judged], labels[train])]


def choose_C(
    features: np.ndarray, labels: np.ndarray, splits: Splits, candidates: Sequence[float], **fitting: Any
) -> tuple[float, dict[float, float]]:
    """The C with the least log loss on the judged parts of `splits` (`inner_folds`), and the losses that were tried.

    Log loss and not macro F1: with few rows of a rare label the F1 of neighbouring candidates differs by chance alone.
    It is not weighted by class, or the penalty would be so strong that rare labels are predicted everywhere.
    Candidates, in ascending order, after the first that is worse take longest and are not tried; a single one is given
    back. `fitting` is the rest of `fit_head`'s arguments.
    """
    if len(candidates) == 1:
        return candidates[0], {}
    losses: dict[float, float] = {}
    splits = list(splits)
    for C in candidates:
        of_rows = []
        for train, judged in splits:
            head = fit_head(features[train], labels[train], C=C, **fitting)
            log_p = log_softmax(head.logits(features[judged]))
            of_rows.append(-log_p[np.arange(len(judged)), labels[judged]])
        losses[C] = float(np.concatenate(of_rows).mean())
        if losses[C] > min(losses.values()):
            break
    return min(losses, key=losses.__getitem__), losses


def init_head(
    model: nn.Module,
    batches: Any,
    rows: Sequence[Row],
    rendered: Sequence[Any],
    options: Any,
    bf16: bool,
    states: Any = None,
) -> None:
    """Give a model, or a PEFT model around one, the logistic head on what its head sees of the rows.

    For a `TurnClassifier` or a decoder of packed rows; an InputError for others. `options` are the flags of
    run_classification.py: `class_weights` and `head_C`, which `fit_head` takes; `states` are those of the frozen layers.
    Linear probing, then fine-tuning (Kumar et al. 2022, arXiv 2202.10054). A decoder needs it more than an encoder: a
    few of its coordinates are orders of magnitude larger than the rest, so a random head starts far off.
    """
    heads = [module for module in model.modules() if isinstance(module, FloatHead)]  # PEFT keeps two
    if not (heads and isinstance(batches, PackedBatches)):
        raise InputError("--head_init probe needs --pooling turns, or a decoder of packed dialogues")
    by_turns, width = isinstance(batches, TurnBatches), heads[0].in_features
    if isinstance(states, TurnStates):
        features = states.vectors(rendered).numpy()
    else:
        features, seen = np.zeros((len(rows), width), dtype=np.float32), []
        hooks = [
            head.register_forward_pre_hook(lambda head, inputs: seen.append(inputs[0])) for head in heads
        ]
        predict_logits(model, batches, rows, rendered, bf16=bf16, description="head", alone=True)
        for hook in hooks:
            hook.remove()
        for batch, vectors in zip(batches.prediction_batches(rows, rendered), seen, strict=True):
            features[batch] = vectors.float().cpu().numpy()
    labels, has_bias = np.array([row.label for row in rows]), heads[0].bias is not None
    fitting = {"weights": options.class_weights, "C": options.head_C, "has_bias": has_bias}
    fitting["block_size"] = width // len(PARTS) if by_turns else 1
    head = fit_head(features, labels, num_labels=model.config.num_labels, **fitting)
    weight = head.coef.astype(np.float64) / head.scale
    for module in heads:  # the one to train and the one that it stands for
        module.weight.data = torch.from_numpy(weight).to(module.weight)
        if has_bias:
            module.bias.data = torch.from_numpy(head.intercept - weight @ head.mean).to(module.bias)
