"""A published ensemble as an object: dialogues in, labels and probabilities out.

from rareturn import DialogueClassifier

classifier = DialogueClassifier.from_pretrained("ORG/NAME")
classifier([{"speaker": "seeker", "text": "Whatever. It's not like anyone noticed."}])
"""

from __future__ import annotations

import dataclasses
import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from rareturn.data.label_guide import LabelGuide
from rareturn.data.rendering import Renderer
from rareturn.data.rows import Row, Turn, turn_problem
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
from rareturn.runs.bundle import Bundle, BundledRun, model_folders, read_bundle

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Prediction:
    """What an ensemble says of one turn.

    Attributes:
        turn: the turn's place in its dialogue, counted from 0.
        label, label_name: the decision.
        probabilities: label name to probability, after temperature and blending, before bias and gate.
        decided_by: as in `rules.Prediction`.
    """

    turn: int
    label: int
    label_name: str
    probabilities: dict[str, float]
    decided_by: str

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return dataclasses.asdict(self)


def _check_prompt(run: BundledRun, renderer: Renderer | None) -> None:
    """Refuse a run whose rows would be rendered in another way than in training."""
    if run.prompt_fingerprint not in (None, renderer and renderer.fingerprint):
        raise InputError(f"{run.name}: this program renders rows otherwise than the one that trained the run")


class _TrainedVoter:
    """The folds of one run of run_classification.py: adapters on one base, or whole models."""

    def __init__(self, run: BundledRun, folders: Sequence[Path], guide: LabelGuide, bases: _Bases):
        self.bf16, self.base = run.loader.bf16, bases.find(run)
        self.is_encoder = is_encoder(load_config(self.base))
        self.tokenizer = load_tokenizer(self.base)
        self.renderer = Renderer(self.tokenizer, guide, is_encoder=self.is_encoder, **run.window.model_dump())
        _check_prompt(run, self.renderer)
        self.scope = run.label_scope
        pad = self.tokenizer.pad_token_id
        self.models = [bases.load_fold(self.base, folder, guide, pad) for folder in folders]

    def logits(self, rows: Sequence[Row]) -> list[np.ndarray]:
        """Of each fold, float32 of shape (rows, num_labels)."""
        rendered = self.renderer.render(rows)
        results = []
        for model, adapter in self.models:
            if adapter is not None:
                model.set_adapter(adapter)
            if self.is_encoder:
                segments = segment_name(self.base, self.tokenizer)
                batches = RowBatches(self.tokenizer.pad_token_id, 1, 1, 32, segments)
            else:
                branches = can_branch(model)
                batches = PackedBatches(branches=branches)
            how = {"scope": self.scope, "bf16": self.bf16, "alone": True}
            results.append(predict_logits(model, batches, rows, rendered, **how))
        return results


class _ProbeVoter:
    """The folds of one run of linear_probe.py: heads on one frozen model."""

    def __init__(self, run: BundledRun, folders: Sequence[Path], guide: LabelGuide, base: BaseModel):
        if run.features is None:
            raise InputError(f"{run.name}: features: missing, so its heads cannot be applied")
        self.frozen = FrozenFeatures(
            base,
            guide,
            layer=run.features.layer,
            window=run.window.model_dump(),
            batch_size=32,
            bf16=run.loader.bf16,
            show_progress=False,
        )
        _check_prompt(run, self.frozen.renderer)
        self.heads = [LinearHead.load(folder / "head.safetensors") for folder in folders]
        self.model = self.frozen.load()

    def logits(self, rows: Sequence[Row]) -> list[np.ndarray]:
        """Of each fold, float32 of shape (rows, num_labels)."""
        features = self.frozen.extract(rows, self.model)
        return [head.logits(features) for head in self.heads]


class _Bases:
    """Base models, each loaded once, whatever number of folds and runs stand on it.

    Args:
        trust_remote_code: names of the bases that may run code of their own.
    """

    def __init__(self, trust_remote_code: Sequence[str]):
        self.trusted = trust_remote_code
        self.loaded: dict[BaseModel, Any] = {}

    def find(self, run: BundledRun) -> BaseModel:
        """The run's base, as it was loaded in training.

        Raises:
            InputError: it cannot be had, or wants to run its own code and may not.
        """
        name, revision = run.base_model, run.base_revision
        if run.loader.trust_remote_code and name not in self.trusted:
            raise InputError(
                f"{run.name}: {name} runs code of its own; allow it by --trust_remote_code {name}"
            )
        loading = run.loader.model_dump(include=set(LOADING))
        if re.fullmatch("[0-9a-f]{40}", revision or "") and not Path(name).is_dir():
            return BaseModel(name, revision, name, **loading)  # pinned: no need to ask the Hub
        packaged = revision is not None and ":" in revision
        base = find_base_model(name, None if packaged else revision, **loading)
        if packaged and base.revision != revision:
            logger.warning(f"{base.name}: the run was trained on {revision}, this is {base.revision}")
        return base

    def load_fold(
        self, base: BaseModel, folder: Path, guide: LabelGuide, pad_token_id: int
    ) -> tuple[Any, str | None]:
        """A fold's model, and the name of its adapter if it is one on a shared base."""
        name, model = None, None
        if not (folder / "adapter_config.json").exists():
            model = load_trained(base, folder, guide.names, pad_token_id)
        elif base in self.loaded:
            shared = self.loaded[base]
            name = f"fold{len(shared.peft_config)}"
            shared.load_adapter(folder, adapter_name=name)
            return inference.place(shared, base), name
        else:
            from peft import PeftModel

            name, classifier = "fold0", load_classifier(base, guide.names, pad_token_id)
            model = self.loaded[base] = PeftModel.from_pretrained(classifier, folder, adapter_name=name)
        if not is_encoder(load_config(base)):
            accept_packed(model)
        return inference.place(model, base), name


class DialogueClassifier:
    """A decision rule over the blended probabilities of runs; see `from_pretrained`."""

    def __init__(self, bundle: Bundle, voters: Sequence[Any]):
        self.rule, self.guide, self.voters = bundle.rule(), bundle.guide, voters

    @classmethod
    def from_pretrained(cls, reference: str, trust_remote_code: Sequence[str] = ()) -> DialogueClassifier:
        """Load an ensemble: every base once, every fold's adapter or head on it.

        Args:
            reference: `ORG/NAME[@revision]` on the Hub, or the output folder of ensemble.py.
            trust_remote_code: names of base models that may run Python code of their own.

        Raises:
            InputError: no bundle there, a damaged one, or a model that cannot be had.
        """
        bundle, folder = read_bundle(str(reference))
        bases = _Bases(trust_remote_code)
        voters: list[Any] = []
        for run in bundle.runs:
            folders = model_folders(run, folder)
            if (folders[0] / "head.safetensors").exists():
                voters.append(_ProbeVoter(run, folders, bundle.guide, bases.find(run)))
            else:
                voters.append(_TrainedVoter(run, folders, bundle.guide, bases))
        return cls(bundle, voters)

    def __call__(self, dialogue: Sequence[Mapping[str, str]], turns: str = "all") -> list[Prediction]:
        """Classify a dialogue's turns of the target speaker.

        Args:
            dialogue: turns {"text", "speaker"}, oldest first.
            turns: `all`, or `last` for the last one only.

        Raises:
            InputError: a turn without text or with an unknown speaker.
        """
        checked = check_dialogue(dialogue, self.guide, "dialogue")
        rows = list(target_rows("dialogue", "dialogue", checked, self.guide, turns))
        return [prediction for _, prediction in self.predictions(rows)] if rows else []

    def predictions(self, rows: Sequence[Row]) -> Iterator[tuple[Row, Prediction]]:
        """Rows with what the ensemble says of their last turn."""
        said, names = self.rule.predict([voter.logits(rows) for voter in self.voters]), self.guide.names
        for row, label, values, reason in zip(
            rows, said.labels, said.probabilities, said.decided_by, strict=True
        ):
            named = {name: round(float(value), 6) for name, value in zip(names, values, strict=True)}
            yield row, Prediction(len(row.turns) - 1, int(label), names[label], named, reason)


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


def target_rows(
    row_id: str, dialogue_id: str, turns: tuple[Turn, ...], guide: LabelGuide, which: str
) -> Iterator[Row]:
    """A row for every turn of the target speaker, or for the last of them; ids are `<row_id>#<turn>`."""
    places = [place for place, turn in enumerate(turns) if turn.speaker == guide.target_speaker]
    for place in places if which == "all" else places[-1:]:
        yield Row(f"{row_id}#{place}", dialogue_id, turns[: place + 1])
