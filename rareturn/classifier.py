"""A published ensemble as an object: dialogues in, labels and probabilities out.

from rareturn import DialogueClassifier

classifier = DialogueClassifier.from_pretrained("ORG/NAME")
classifier([{"speaker": "seeker", "text": "Whatever. It's not like anyone noticed."}])
"""

from __future__ import annotations

import itertools
import json
import logging
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from rareturn.data.dialogues import HALF, LONE_SURROGATE, Dialogue, Row, Turns, turn_problem, turns_of
from rareturn.data.label_guide import LabelGuide
from rareturn.data.rendering import Renderer
from rareturn.data.rows import row_columns
from rareturn.data.utterances import read_table
from rareturn.errors import InputError
from rareturn.models import loading
from rareturn.models.inference import place, predict_logits, segment_name
from rareturn.models.loading import BaseModel, is_encoder
from rareturn.models.packing import PackedBatches, accept_packed, can_branch
from rareturn.models.probing import PAIR_PARTS, FrozenFeatures, LinearHead
from rareturn.models.training import RowBatches
from rareturn.models.turns import TurnBatches, TurnRenderer, make_renderer, share_layers
from rareturn.runs.bundle import Bundle, BundledRun, model_folders, read_bundle

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Prediction:
    """What an ensemble says of one turn, whose place in its dialogue is counted from 0.

    Attributes:
        probabilities: label name to probability, after temperature and blending, before bias and gate.
        decided_by: as in `rules.Prediction`.
    """

    turn: int
    label: int
    label_name: str
    probabilities: dict[str, float]
    decided_by: str


def _check_prompt(run: BundledRun, renderer: Renderer | TurnRenderer) -> None:
    """Refuse a run whose rows would be rendered in another way than in training."""
    if run.prompt_fingerprint not in (None, renderer.fingerprint):
        raise InputError(f"{run.name}: this program renders rows otherwise than the one that trained the run")


class _TrainedVoter:
    """The folds of one run of run_classification.py: adapters on one base, or whole models."""

    def __init__(
        self, run: BundledRun, folders: Sequence[Path], guide: LabelGuide, base: BaseModel, bases: _Bases
    ):
        self.bf16, tokenizer = run.loader.bf16, loading.load_tokenizer(base)
        self.is_encoder = is_encoder(loading.load_config(base))
        self.renderer = make_renderer(base, tokenizer, guide, run.window.model_dump())
        _check_prompt(run, self.renderer)
        self.scope = run.label_scope
        self.batches = RowBatches(tokenizer.pad_token_id, 1, 1, 32, segment_name(base, tokenizer))
        if base.pooling == "turns":
            self.batches = TurnBatches(pad_token_id=tokenizer.pad_token_id)
        self.models = [bases.load_fold(base, folder, guide, tokenizer.pad_token_id) for folder in folders]
        self.turn_encoders = []
        if base.pooling == "turns":
            whole = [model if adapter is None else model.get_base_model() for model, adapter in self.models]
            self.turn_encoders = [model.encoder for model in whole]

    def logits(self, rows: Sequence[Row]) -> list[np.ndarray]:
        """Of each fold, float32 of shape (rows, num_labels)."""
        rendered, results = self.renderer.render(rows), []
        for model, adapter in self.models:
            if adapter is not None:
                model.set_adapter(adapter)
            batches = self.batches if self.is_encoder else PackedBatches(branches=can_branch(model))
            how = {"scope": self.scope, "bf16": self.bf16, "alone": True}
            results.append(predict_logits(model, batches, rows, rendered, **how))
        return results


class _ProbeVoter:
    """The folds of one run of linear_probe.py: heads on one frozen model, or each on its own trained one."""

    def __init__(self, run: BundledRun, folders: Sequence[Path], guide: LabelGuide, base: BaseModel):
        if run.features is None:
            raise InputError(f"{run.name}: features: missing, so its heads cannot be applied")
        taken = {"layer": run.features.layer, "window": run.window.model_dump(), "bf16": run.loader.bf16}
        taken["pairs"] = run.features.parts == list(PAIR_PARTS)
        self.frozen = FrozenFeatures(base, guide, **taken, batch_size=32, show_progress=False)
        self.renderer = self.frozen.renderer
        _check_prompt(run, self.renderer)
        self.heads = [LinearHead.load(folder / "head.safetensors") for folder in folders]
        self.bf16, self.turn_encoders = run.loader.bf16, []
        self.is_adapted = any((folders[0] / name).exists() for name in ("adapter_config.json", "config.json"))
        if not self.is_adapted:
            model = self.frozen.load()
            self.models: list[tuple[Any, str | None]] = [(model, None)] * len(folders)
            # Shared layers give the output of the last of them, which will not do where others are read too.
            self.turn_encoders = [model.base_model] * (self.frozen.by_turns and len(self.frozen.layers) == 1)
            return
        bases, pad = _Bases(()), self.frozen.tokenizer.pad_token_id  # its own: their upper layers are cut off
        self.models = [bases.load_fold(base, folder, guide, pad) for folder in folders]
        for model in {id(model): model for model, _ in self.models}.values():
            self.frozen.cut(model)

    def logits(self, rows: Sequence[Row]) -> list[np.ndarray]:
        """Of each fold, float32 of shape (rows, num_labels)."""
        features, results = None, []
        for head, (model, adapter) in zip(self.heads, self.models, strict=True):
            if adapter is not None:
                model.set_adapter(adapter)
            if features is None or self.is_adapted:
                features = self.frozen.extract(rows, model if adapter is None else model.get_base_model())
            results.append(head.logits(features))
        return results


class _Bases:
    """Base models, each loaded once, whatever number of folds and runs stand on it.

    `trusted` are the names of those that may run code of their own.
    """

    def __init__(self, trusted: Sequence[str]):
        self.trusted = trusted
        self.loaded: dict[BaseModel, Any] = {}

    def find(self, run: BundledRun) -> BaseModel:
        """The run's base, as it was loaded in training; an InputError where it wants to run its own code and may not."""
        name, revision = run.base_model, run.base_revision
        if run.loader.trust_remote_code and name not in self.trusted:
            advice = f"allow it by --trust_remote_code {name}"
            raise InputError(f"{run.name}: {name} runs code of its own; {advice}")
        how = run.loader.model_dump(include=set(loading.LOADING))
        if re.fullmatch("[0-9a-f]{40}", revision or "") and not Path(name).is_dir():
            return BaseModel(name, revision, name, **how)  # pinned: no need to ask the Hub
        packaged = revision is not None and ":" in revision
        base = loading.find_base_model(name, None if packaged else revision, **how)
        if packaged and base.revision != revision:
            logger.warning(f"{base.name}: the run was trained on {revision}, this is {base.revision}")
        return base

    def load_fold(self, base: BaseModel, folder: Path, guide: LabelGuide, pad: int) -> tuple[Any, str | None]:
        """A fold's model, and the name of its adapter if it is one on a shared base."""
        name, model = None, self.loaded.get(base)
        if not (folder / "adapter_config.json").exists():
            model = loading.load_trained(base, folder, guide.names, pad)
        elif model is not None:
            name = f"fold{len(model.peft_config)}"
            model.load_adapter(folder, adapter_name=name)
            return place(model, base), name
        else:
            from peft import PeftModel

            name, classifier = "fold0", loading.load_classifier(base, guide.names, pad)
            model = self.loaded[base] = PeftModel.from_pretrained(classifier, folder, adapter_name=name)
        if not is_encoder(loading.load_config(base)):
            accept_packed(model)
        return place(model, base), name


class DialogueClassifier:
    """A decision rule over the blended probabilities of runs; see `from_pretrained`."""

    def __init__(self, bundle: Bundle, voters: Sequence[Any]):
        self.rule, self.guide, self.voters = bundle.rule(), bundle.guide, voters
        self.shared = []  # the output of layers that several encoders have in common, for the turns of one call
        for bf16 in (False, True):
            alike = [voter.turn_encoders for voter in voters if voter.bf16 == bf16]
            self.shared += share_layers(list(itertools.chain.from_iterable(alike)))

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
        bases, voters = _Bases(trust_remote_code), []
        for run in bundle.runs:
            what = run, model_folders(run.model, folder), bundle.guide, bases.find(run)
            is_probe = (what[1][0] / "head.safetensors").exists()
            voters.append(_ProbeVoter(*what) if is_probe else _TrainedVoter(*what, bases))
        return cls(bundle, voters)

    def __call__(self, dialogue: Sequence[Mapping[str, str]], turns: str = "all") -> list[Prediction]:
        """Classify a dialogue's turns of the target speaker.

        Args:
            dialogue: turns {"text", "speaker"}, oldest first; an InputError if one has no text or an unknown speaker.
            turns: `all`, or `last` for the last one only.
        """
        rows = target_rows(dialogue, self.guide, turns, "dialogue")
        return [prediction for _, prediction in self.predictions(rows)] if rows else []

    def predictions(self, rows: Sequence[Row]) -> Iterator[tuple[Row, Prediction]]:
        """Rows with what the ensemble says of their last turn."""
        for states in self.shared:
            states.clear()
        said, names = self.rule.predict([voter.logits(rows) for voter in self.voters]), self.guide.names
        for row, label, values, reason in zip(
            rows, said.labels, said.probabilities, said.decided_by, strict=True
        ):
            named = {name: round(float(value), 6) for name, value in zip(names, values, strict=True)}
            yield row, Prediction(len(row.turns) - 1, int(label), names[label], named, reason)


def target_rows(
    dialogue: Any, guide: LabelGuide, which: str, where: str, row_id: str = "", dialogue_id: str = ""
) -> list[Row]:
    """A row for every turn of the target speaker, or for the last of them; ids are `<row_id>#<turn>`.

    An InputError where the dialogue is not a list or empty, or one line a turn that is wrong.
    """
    if not isinstance(dialogue, (list, tuple)) or not dialogue:
        raise InputError(f"{where}: must be a list of turns")
    found = enumerate((turn_problem(turn, guide) for turn in dialogue), 1)
    problems = [f"{where}: turn {number} {problem}" for number, problem in found if problem]
    if problems:
        raise InputError(*problems)
    turns = Dialogue(turns_of([(turn["text"], turn["speaker"]) for turn in dialogue], guide))
    places = [place for place, turn in enumerate(dialogue) if guide.is_target(turn["speaker"])]
    places = places if which == "all" else places[-1:]
    return [Row(f"{row_id}#{place}", dialogue_id, Turns(turns, place + 1)) for place in places]


def rows_by_dialogue(
    records: Iterable[Any],
    is_table: bool,
    where: str,
    guide: LabelGuide,
    columns: Mapping[str, str],
    which: str,
) -> Iterator[list[Row]]:
    """The rows to classify, in the order of the input: of what `open_source` gives, or of records in that form.

    An InputError, while iterating, at a dialogue that is wrong.
    """
    if is_table:
        rows = read_table(records, where, guide, columns, None).rows
        for _, of_dialogue in itertools.groupby(rows, key=lambda row: row.dialogue_id):
            yield list(of_dialogue)[0 if which == "all" else -1 :]
        return
    columns = row_columns(columns)
    for number, record in enumerate(records, 1):
        place = f"{where}: dialogue {number}"
        if not isinstance(record, dict):
            raise InputError(f"{place}: not an object with fields")
        row_id = record.get(columns["id"], record.get(columns["dialogue_id"]))
        dialogue_id = record.get(columns["dialogue_id"], row_id)
        for key, value in (("id", row_id), ("dialogue_id", dialogue_id)):
            if not isinstance(value, str) or not value.strip():
                raise InputError(f"{place}: {key}: an id or a dialogue_id must be there, and be a text")
            if LONE_SURROGATE.search(value):
                raise InputError(f"{place}: {key}: {HALF}")
        dialogue = record.get(columns["dialogue"])
        place = f"{where}: {row_id}: {columns['dialogue']}"
        if isinstance(dialogue, str):  # CSV has no lists
            try:
                dialogue = json.loads(dialogue)
            except (json.JSONDecodeError, RecursionError):
                raise InputError(f"{place}: not valid JSON") from None
        yield target_rows(dialogue, guide, which, place, row_id, dialogue_id)
