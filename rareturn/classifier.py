"""A published ensemble as an object: dialogues in, labels and probabilities out.

from classifier import DefenseClassifier

classifier = DefenseClassifier.from_pretrained("ORG/NAME")
classifier([{"speaker": "seeker", "text": "Whatever. It's not like anyone noticed."}])
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from rareturn.data.label_guide import LabelGuide, parse_label_guide
from rareturn.data.rendering import Renderer
from rareturn.data.rows import Row, Turn, turn_problem
from rareturn.decisions.probabilities import OUT_OF_SCOPE_LOGIT, blend, test_probabilities
from rareturn.decisions.rules import Decision, decide
from rareturn.errors import InputError
from rareturn.models import inference
from rareturn.models.inference import predict_logits, segment_name
from rareturn.models.loading import (
    LOADING,
    BaseModel,
    find_base_model,
    is_encoder,
    load_classifier,
    load_config,
    load_tokenizer,
    load_trained,
)
from rareturn.models.packing import PackedBatches, accept_packed, can_branch
from rareturn.models.probing import FrozenFeatures, LinearHead
from rareturn.models.training import RowBatches
from rareturn.runs.bundle import model_folders, read_bundle, read_vote

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Prediction:
    """What an ensemble says of one turn.

    Attributes:
        turn: the turn's place in its dialogue, counted from 0.
        label, label_name: the decision.
        probabilities: label name to probability, after temperature and blending, before bias and gate.
        decided_by: `gate` (the protected label was sure enough), `bias` (another label than the likeliest won),
            `argmax` (the likeliest), or `vote`.
    """

    turn: int
    label: int
    label_name: str
    probabilities: dict[str, float]
    decided_by: str

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


class _TrainedVoter:
    """The folds of one run of run_classification.py: adapters on one base, or whole models."""

    def __init__(self, run: Mapping[str, Any], folders: Sequence[Path], guide: LabelGuide, bases: _Bases):
        self.scope, self.guide = run.get("label_scope"), guide
        self.bf16 = bool(run["loader"].get("bf16"))
        self.base = bases.find(run)
        config = load_config(self.base)
        self.is_encoder = is_encoder(config)
        self.tokenizer = load_tokenizer(self.base)
        self.renderer = Renderer(self.tokenizer, guide, is_encoder=self.is_encoder, **run["window"])
        if run["prompt_fingerprint"] not in (None, self.renderer.fingerprint):
            raise InputError(
                f"{run['name']}: this program renders rows otherwise than the one that trained the run"
            )
        pad = self.tokenizer.pad_token_id
        self.models = [bases.load_fold(self.base, folder, guide, pad) for folder in folders]

    def logits(self, rows: Sequence[Row]) -> list[np.ndarray]:
        """Of each fold, float32 of shape (rows, num_labels)."""
        rendered = self.renderer.render(rows)
        outside = [
            label for label in self.guide.numbers if self.scope is not None and label not in self.scope
        ]
        results = []
        for model, adapter in self.models:
            if adapter is not None:
                model.set_adapter(adapter)
            if self.is_encoder:
                segments = segment_name(self.base, self.tokenizer)
                batches = RowBatches(self.tokenizer.pad_token_id, 1, 1, 32, segments)
            else:
                branches = can_branch(model, max(map(len, rendered)))
                batches = PackedBatches(1, 1, 4096, 1, branches)
            logits = predict_logits(
                model,
                rendered,
                batches.prediction_batches(rows, rendered),
                batches.collate,
                num_labels=len(self.guide.labels),
                bf16=self.bf16,
                alone=True,
            )
            logits[:, outside] = OUT_OF_SCOPE_LOGIT
            results.append(logits)
        return results


class _ProbeVoter:
    """The folds of one run of linear_probe.py: heads on one frozen model."""

    def __init__(self, run: Mapping[str, Any], folders: Sequence[Path], guide: LabelGuide, base: BaseModel):
        if run.get("features") is None:
            raise InputError(f"{run['name']}: features: missing, so its heads cannot be applied")
        self.frozen = FrozenFeatures(
            base,
            guide,
            layer=run["features"]["layer"],
            window=run["window"],
            batch_size=32,
            bf16=bool(run["loader"].get("bf16")),
            show_progress=False,
        )
        self.heads = [LinearHead.load(folder / "head.safetensors") for folder in folders]
        self.model = self.frozen.load()

    def logits(self, rows: Sequence[Row]) -> list[np.ndarray]:
        """Of each fold, float32 of shape (rows, num_labels)."""
        features = self.frozen.extract(rows, self.model)
        return [head.logits(features) for head in self.heads]


class _Bases:
    """Base models, each loaded once, whatever number of folds and runs stand on it."""

    def __init__(self, trust_remote_code: bool):
        self.trust_remote_code = trust_remote_code
        self.loaded: dict[BaseModel, Any] = {}

    def find(self, run: Mapping[str, Any]) -> BaseModel:
        """The run's base, as it was loaded in training.

        Raises:
            InputError: it cannot be had, or wants to run its own code and may not.
        """
        loading = {name: run["loader"][name] for name in LOADING if name in run["loader"]}
        if loading.pop("trust_remote_code", False) and not self.trust_remote_code:
            raise InputError(
                f"{run['name']}: {run['base_model']} runs code of its own; allow it by --trust_remote_code"
            )
        revision = run["base_revision"]
        packaged = revision is not None and ":" in revision
        base = find_base_model(
            run["base_model"],
            None if packaged else revision,
            trust_remote_code=self.trust_remote_code,
            **loading,
        )
        if packaged and base.revision != revision:
            logger.warning(f"{base.name}: the run was trained on {revision}, this is {base.revision}")
        return base

    def load_fold(
        self, base: BaseModel, folder: Path, guide: LabelGuide, pad_token_id: int
    ) -> tuple[Any, str | None]:
        """A fold's model, and the name of its adapter if it is one on a shared base."""
        if not (folder / "adapter_config.json").exists():
            model = load_trained(base, folder, guide.names, pad_token_id)
            name = None
        else:
            from peft import PeftModel

            model = self.loaded.get(base)
            name = f"fold{len(getattr(model, 'peft_config', ()))}"
            if model is None:
                classifier = load_classifier(base, guide.names, pad_token_id)
                model = self.loaded[base] = PeftModel.from_pretrained(classifier, folder, adapter_name=name)
                if not is_encoder(load_config(base)):
                    accept_packed(model)
            else:
                model.load_adapter(folder, adapter_name=name)
            return inference.place(model, base), name
        if not is_encoder(load_config(base)):
            accept_packed(model)
        return inference.place(model, base), name


class DefenseClassifier:
    """A decision rule over the blended probabilities of runs; see `from_pretrained`."""

    def __init__(self, bundle: Mapping[str, Any], voters: Sequence[Any], guide: LabelGuide):
        self.bundle, self.voters, self.guide = bundle, voters, guide
        self.decision = Decision.from_dict(
            {**bundle["decision"], "label_names": bundle["label_names"]}, "ensemble.json"
        )
        self.weights = [run["weight"] for run in bundle["runs"]]
        self.voting = read_vote(bundle)

    @classmethod
    def from_pretrained(cls, reference: str, trust_remote_code: bool = False) -> DefenseClassifier:
        """Load an ensemble: every base once, every fold's adapter or head on it.

        Args:
            reference: `ORG/NAME[@revision]` on the Hub, or the output folder of ensemble.py.

        Raises:
            InputError: no bundle there, a damaged one, or a model that cannot be had.
        """
        bundle, folder = read_bundle(str(reference))
        guide = parse_label_guide(bundle["label_guide"], f"{reference}: label_guide")
        bases = _Bases(trust_remote_code)
        voters: list[Any] = []
        for run in bundle["runs"]:
            folders = model_folders(run, folder)
            if (folders[0] / "head.safetensors").exists():
                voters.append(_ProbeVoter(run, folders, guide, bases.find(run)))
            else:
                voters.append(_TrainedVoter(run, folders, guide, bases))
        return cls(bundle, voters, guide)

    def predict_rows(self, rows: Sequence[Row]) -> tuple[np.ndarray, np.ndarray, list[str]]:
        """Labels int64 (rows,), blended probabilities (rows, num_labels), and by what each row was decided."""
        temperature = 1.0 if self.voting else self.decision.temperature
        runs = [test_probabilities(voter.logits(rows), temperature) for voter in self.voters]
        probabilities = blend(runs, self.weights, self.bundle["blend"])
        if self.voting:
            return self.voting.predict(runs), probabilities, ["vote"] * len(rows)
        labels = decide(probabilities, self.decision)
        gate = np.zeros(len(rows), dtype=bool)
        if self.decision.threshold is not None:
            gate = probabilities[:, self.decision.protected_class] >= self.decision.threshold
        likeliest = probabilities.argmax(axis=1)
        reasons = np.where(gate, "gate", np.where(labels == likeliest, "argmax", "bias"))
        return labels, probabilities, reasons.tolist()

    def __call__(self, dialogue: Sequence[Mapping[str, str]], turns: str = "all") -> list[Prediction]:
        """Classify a dialogue's turns of the target speaker.

        Args:
            dialogue: turns {"text", "speaker"}, oldest first.
            turns: `all`, or `last` for the last one only.

        Raises:
            InputError: a turn without text or with an unknown speaker.
        """
        checked = check_dialogue(dialogue, self.guide, "dialogue")
        rows = list(target_rows("dialogue", checked, self.guide, turns))
        return [prediction for _, prediction in self.predictions(rows)] if rows else []

    def predictions(self, rows: Sequence[Row]) -> Iterator[tuple[Row, Prediction]]:
        """Rows with what the ensemble says of their last turn."""
        labels, probabilities, reasons = self.predict_rows(rows)
        for row, label, values, reason in zip(rows, labels, probabilities, reasons, strict=True):
            named = {
                name: round(float(value), 6) for name, value in zip(self.guide.names, values, strict=True)
            }
            yield row, Prediction(len(row.turns) - 1, int(label), self.guide.names[label], named, reason)


def check_dialogue(dialogue: Any, guide: LabelGuide, where: str) -> tuple[Turn, ...]:
    """A dialogue's turns.

    Raises:
        InputError: not a list, empty, or one line a turn that is wrong.
    """
    if not isinstance(dialogue, (list, tuple)) or not dialogue:
        raise InputError(f"{where}: must be a list of turns")
    problems, turns = [], []
    for number, turn in enumerate(dialogue, 1):
        problem = turn_problem(turn, guide)
        if problem:
            problems.append(f"{where}: turn {number} {problem}")
        else:
            turns.append(Turn(turn["text"], turn["speaker"]))
    if problems:
        raise InputError(*problems)
    return tuple(turns)


def target_rows(dialogue_id: str, turns: tuple[Turn, ...], guide: LabelGuide, which: str) -> Iterator[Row]:
    """A row for every turn of the target speaker, or for the last of them."""
    places = [place for place, turn in enumerate(turns) if turn.speaker == guide.target_speaker]
    for place in places if which == "all" else places[-1:]:
        yield Row(f"{dialogue_id}#{place}", dialogue_id, turns[: place + 1])
