"""Linear probes: features of rows from a frozen or a trained model, and a logistic head on them.

Encoders: mean-pooled embeddings of single turns, each distinct turn encoded once, put together per row; or the target's
tokens as an encoder sees them beside their context. Decoders: the hidden state of the rendered prompt's last token, a
dialogue's rows in one pass. Both are taken at `default_layer`, at a trained model's last layer, or at those that are asked
for; the layers that a pass computes on the way are kept on disk.
"""

from __future__ import annotations

import functools
import itertools
import logging
import os
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from tqdm.auto import tqdm

from rareturn.data.folds import RunData
from rareturn.data.label_guide import LabelGuide
from rareturn.data.rows import Row
from rareturn.decisions.probabilities import OUT_OF_SCOPE_LOGIT, log_softmax
from rareturn.errors import InputError
from rareturn.files import file_digest, write_bytes
from rareturn.models.heads import FloatHead, TrunkMemory, embed_turns, gather_vectors
from rareturn.models.inference import place, predict_logits
from rareturn.models.layers import default_layer, keep_layers, layer_list, stack_outputs
from rareturn.models.loading import (
    BaseModel,
    is_encoder,
    load_classifier,
    load_config,
    load_tokenizer,
    load_trained,
)
from rareturn.models.packing import PackedBatches, can_branch, hidden_states
from rareturn.models.training import RowBatches, class_weights
from rareturn.models.trunk import (
    INDEX,
    TOKENS_PER_BATCH,
    cache_folder,
    cached_parts,
    read_parts,
    sequences_digest,
    write_parts,
)
from rareturn.models.turns import (
    PARTS,
    TurnBatches,
    TurnRenderer,
    TurnStates,
    cached_cut,
    make_renderer,
    pad_turns,
    render,
    share_turns,
)

logger = logging.getLogger(__name__)

HEAD_TENSORS = ("coef", "intercept", "mean", "scale")
INNER_FOLDS = 3
PAIR_PARTS = ("target_mean", "target_maximum")
Splits = Iterable[tuple[np.ndarray, np.ndarray]]  # indices of rows to train on, and of rows to judge on


@dataclass
class FrozenFeatures:
    """Features of rows from a frozen model: those of one layer, or of several, one behind another.

    An encoder gives four vectors a row (`turns.PARTS`): the target's embedding, the mean over the turns before it,
    the mean over the earlier turns of the target's speaker, and the last turn of another speaker; zeros where a row
    has no such turn. A turn's embedding is the mean over its tokens, special tokens included, as sentence-transformers
    does it. With `pairs` it reads the target together with its context, as run_classification.py has it by default, and
    gives two vectors: the mean and the maximum over the target's tokens (the mean is late chunking, Günther et al. 2024,
    arXiv 2409.04701). A decoder gives the hidden state of the last token of the row's prompt.

    Attributes:
        layer: whose output is taken, counted from 1; those after the last are not run. None: two thirds up, rounded, and
            the last where the base is `adapted`, since training has shaped it for the labels.
        window: `max_turns`, `max_seq_length` (an encoder's is per turn, or per pair) and `window_stride` of DESIGN 4.
        batch_size: turns, or pairs, in an encoder's forward pass.
    """

    base: BaseModel
    guide: LabelGuide
    layer: int | Sequence[int] | None
    window: Mapping[str, int]
    batch_size: int
    bf16: bool
    show_progress: bool = True
    adapted: bool = False  # models that were trained from the base stand in its place
    pairs: bool = False

    def __post_init__(self) -> None:
        config = load_config(self.base)
        text = config.get_text_config()
        self.hidden_size, self.num_layers = text.hidden_size, text.num_hidden_layers
        if self.base.pooling == "turns":  # a `TurnClassifier` has no others
            self.num_layers = default_layer(config)
        if self.layer is None:
            self.layer = self.num_layers if self.adapted else default_layer(config)
        self.layers = (self.layer,) if isinstance(self.layer, int) else tuple(self.layer)
        for layer in self.layers:
            if not 1 <= layer <= self.num_layers:
                raise InputError(f"--layer {layer}: {self.base.name} has layers 1 to {self.num_layers}")
        self.is_encoder, self.tokenizer = is_encoder(config), load_tokenizer(self.base)
        self.by_turns = self.is_encoder and not self.pairs
        if self.pairs and not self.is_encoder:
            raise InputError("--pairs: is for encoders; a decoder reads its context anyway")
        if self.by_turns:
            self.renderer, self.parts = TurnRenderer(self.base, self.tokenizer, self.window), PARTS
        else:
            base = replace(self.base, pooling="native")
            self.renderer = make_renderer(base, self.tokenizer, self.guide, self.window)
            self.parts = PAIR_PARTS if self.pairs else ("last_token",)

    def extract(self, rows: Sequence[Row], model: nn.Module | None = None) -> np.ndarray:
        """Features of rows, float32 (rows, features), by what `load` gave; None loads it for this call only."""
        model, rendered = self.load() if model is None else model, self.renderer.render(rows)
        passes, of_pass = self._passes(rows, rendered, model, self.layers)
        found = [of_pass(*one) for one in tqdm(passes, unit="batch", disable=not self.show_progress)]
        return self._join({name: torch.cat([one[name] for one in found]) for name in found[0]}, rendered)

    def extract_cached(
        self, parts: Sequence[Sequence[Row]], data: RunData, trained: Path | None, limit_gb: float
    ) -> list[np.ndarray | None]:
        """`extract` of parts of a run's rows, each on its own; None of an empty one. See `trunk.cached_parts`.

        A pass leaves the features of every layer that it comes by. Where run_classification.py has left the output of
        frozen layers for the run's rows, these are not computed again.
        """
        base = replace(self.base, pooling="turns") if self.is_encoder else self.base
        named = {number: part for number, part in enumerate(parts) if part}
        rendered = {number: self.renderer.render(rows) for number, rows in named.items()}
        weights = [file_digest(path) for path in sorted(trained.glob("*.safetensors"))] if trained else []
        lowest, highest = self.layers[0], self.layers[-1]

        @functools.cache
        def source(layers: tuple[int, ...], cut: int) -> tuple[dict[int, Any], nn.Module, Any]:
            of_parts, upper, states = rendered, None, None
            if cut:
                of_parts, upper, states = render(named, data, self.renderer, base, cut, limit_gb, self.bf16)
            if states is not None:
                logger.info(f"{cut} of {highest} layers are in the cache of frozen layers")
            model = self.load(trained, layers, None if self.is_encoder else upper)
            if self.is_encoder and states is not None:
                TrunkMemory(model.base_model, layer_list(model.base_model)[:cut], states)
            return of_parts, model, states

        def of_part(number: int) -> np.ndarray:
            rows, own = named[number], rendered[number]
            sequences = share_turns(own)[0] if self.by_turns else [row.input_ids for row in own]
            facts = {"weights": weights, "batch_size": self.batch_size, "parts": self.parts}
            name = functools.partial(cache_folder, self.base, sequences_digest(sequences), self.bf16, **facts)
            spans = itertools.product(range(1, lowest + 1), range(highest, self.num_layers + 1))
            span = next((span for span in spans if (name(features=span) / INDEX).exists()), None)
            alone = trained or span or self.pairs or not limit_gb
            cut = 0 if alone else cached_cut(data.rows, self.renderer, base, lowest, self.bf16)
            first, last = span or (lowest if trained else max(cut, 1), highest)
            layers = tuple(range(first, last + 1))

            def compute(folder: Path) -> None:
                of_parts, model, states = source(layers, cut)
                passes, of_pass = self._passes(rows, of_parts[number], model, layers, states)
                write_parts(folder, passes, 4 * self.hidden_size, of_pass)

            what = f"features of layers {first} to {last}: {len(rows):,} rows"
            size = 4 * self.hidden_size * len(layers) * len(sequences) * (2 if self.pairs else 1)
            files = cached_parts(name(features=(first, last)), what, size, limit_gb, compute)
            if files is None:
                return self.extract(rows, source(self.layers, 0)[1])
            keys = [*map(str, self.layers), *([] if self.by_turns else ["rows"])]
            return self._join(read_parts(files, keys), own)

        return [of_part(number) if part else None for number, part in enumerate(parts)]

    def load(self, trained: Path | None = None, layers: Sequence[int] = (), base: Any = None) -> nn.Module:
        """The base, or the model in a folder that was trained from it, up to the last layer that is read.

        `layers` are those that are read, if not the features'; `base` stands for the whole one.
        """
        # The head that comes with it is not used, but these loaders know quantization and dtype.
        what, base = (self.guide.names, self.tokenizer.pad_token_id), base or self.base
        model = load_classifier(base, *what) if trained is None else load_trained(base, trained, *what)
        return self.cut(place(model, base), layers)

    def cut(self, model: nn.Module, layers: Sequence[int] = ()) -> nn.Module:
        """The classifier, in a PEFT model or on its own, without the layers after the last that is read."""
        classifier = model.get_base_model() if hasattr(model, "get_base_model") else model
        layers = layers or self.layers
        if len(layers) > 1:
            stack_outputs(classifier.base_model, layers)
        keep_layers(classifier.base_model, layers[-1])
        if self.is_encoder:
            classifier.base_model.config.num_hidden_layers = layers[-1]  # as `layer_list` finds them
        return classifier

    def _passes(
        self,
        rows: Sequence[Row],
        rendered: Sequence,
        model: nn.Module,
        layers: Sequence[int],
        states: Any = None,
    ) -> tuple[list[tuple[Any, int, int]], Callable[..., dict[str, Tensor]]]:
        """Forward passes, as `trunk.write_parts` takes them, and what gives the layers' outputs in one, by layer."""
        if self.by_turns:
            turns, *_ = share_turns(rendered)  # every distinct turn is embedded once
            batches = [turns[at : at + self.batch_size] for at in range(0, len(turns), self.batch_size)]
            sizes = [sum(map(len, batch)) for batch in batches]
        elif self.pairs:
            way = RowBatches(self.tokenizer.pad_token_id, 1, 1, self.batch_size, "segment_ids")
            batches = way.prediction_batches(rows, rendered)
            sizes = [sum(len(rendered[index]) for index in batch) for batch in batches]
        else:
            try:
                way = PackedBatches(
                    branches=can_branch(model), states=states, tokens_per_batch=TOKENS_PER_BATCH
                )
            except InputError:
                problem = f"{self.base.name}: this architecture's last token cannot be probed"
                raise InputError(problem) from None
            batches = way.prediction_batches(rows, rendered)  # a dialogue's rows in one pass
            sizes = [sum(len(rendered[index]) for index in batch) for batch in batches]

        def of_pass(batch: Sequence[Any], begin: int, end: int) -> dict[str, Tensor]:
            if self.by_turns:
                inputs = pad_turns(batch, self.tokenizer.pad_token_id)
            else:
                inputs = way.collate([rendered[index] for index in batch])
            inputs = {key: value.to(model.device) for key, value in inputs.items()}
            with torch.inference_mode(), torch.autocast(model.device.type, torch.bfloat16, enabled=self.bf16):
                if self.is_encoder:
                    outputs = embed_turns(model.base_model, **inputs, layers=len(layers))
                else:
                    hidden = hidden_states(model.base_model, inputs).unflatten(0, (len(layers), -1))
                    outputs = hidden[:, inputs["row_positions"]]
            places = {} if self.by_turns else {"rows": torch.tensor(batch)}
            return places | {str(n): output.float().cpu() for n, output in zip(layers, outputs, strict=True)}

        ends = np.cumsum(sizes).tolist()
        return list(zip(batches, [0, *ends[:-1]], ends, strict=True)), of_pass

    def _join(self, outputs: dict[str, Tensor], rendered: Sequence[Any]) -> np.ndarray:
        """Features of rows from the outputs of all passes."""
        of_layers = [outputs[str(layer)] for layer in self.layers]
        if self.by_turns:
            _, members, starts = share_turns(rendered)
            of_layers = [gather_vectors(vectors, members, starts, len(PARTS)) for vectors in of_layers]
        else:
            of_layers = [vectors[torch.argsort(outputs["rows"])] for vectors in of_layers]
        features = torch.cat(of_layers, dim=1).numpy()
        if not np.isfinite(features).all():
            raise InputError(f"{self.base.name}: layer {self.layer} gives values that are not finite")
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


def inner_folds(labels: np.ndarray, groups: Sequence[str], judged: np.ndarray, seed: int) -> Splits:
    """Training rows split by dialogue; the second part of each holds those alone that may be `judged`, and not a row
    whose label is not trained on, since no value of C can help it."""
    from sklearn.model_selection import StratifiedGroupKFold

    count = len(set(groups))
    if count < INNER_FOLDS:
        raise InputError(f"{count} training dialogues are too few to choose among values of C: give one --C")
    splitter = StratifiedGroupKFold(INNER_FOLDS, shuffle=True, random_state=seed)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The least populated class", category=UserWarning)
        for train, other in splitter.split(labels, labels, groups):
            yield train, other[judged[other] & np.isin(labels[other], labels[train])]


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
