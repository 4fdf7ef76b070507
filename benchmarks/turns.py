"""How much faster an encoder trains on rows made of turns (`--pooling turns`) than on pairs: same rows, one process.

The fictional corpus, a minute or two of one core:
    OMP_NUM_THREADS=1 python benchmarks/turns.py --train_file data/demo/train.json --label_guide data/demo/label_guide.yaml
Real rows:
    OMP_NUM_THREADS=1 python benchmarks/turns.py --train_file train.json --num_dialogues 20

The baseline is `recipes/minilm/psydefconv.yaml`: pairs of target and context, 64 tokens, averaged, all layers trained. A
step has 16 rows on average everywhere. The settings take turns, an epoch each, for several rounds. Times are the
processor's, not the wall's, so that a shared machine favours none. A fold is a fifth of a run of five, added up from its
parts: the frozen layers once for all rows; a fold's start of the head (fitting included) and three epochs on four fifths of
the rows; and every row predicted once.
"""

# ruff: noqa: E402
from __future__ import annotations

import logging
import os
import statistics
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import sklearn.linear_model  # noqa: F401 (a fold has it loaded from drawing the folds)
import torch
from torch import nn
from tqdm import tqdm

sys.path[0] = str(Path(__file__).resolve().parent.parent)

from rareturn.command_line import REQUIRED, flag, parse_arguments, provenance, run, start_logging
from rareturn.data.label_guide import LabelGuide, load_label_guide
from rareturn.data.rows import Row, load_rows
from rareturn.files import write_json
from rareturn.models.heads import TrunkMemory
from rareturn.models.inference import segment_name
from rareturn.models.layers import freeze_trunk, layer_list
from rareturn.models.loading import (
    add_lora,
    find_base_model,
    load_classifier,
    load_tokenizer,
    trunk_layers,
)
from rareturn.models.probing import init_head
from rareturn.models.training import RowBatches
from rareturn.models.turns import TurnBatches, make_renderer, turn_states

ROWS_PER_STEP, TOKENS_PER_BATCH, NUM_EPOCHS, FOLDS = 16, 2048, 3, 5
WINDOW = {"max_turns": 30, "max_seq_length": 64, "window_stride": 10}


@dataclass
class ScriptArguments:
    """What is measured."""

    _argument_group_name = "Benchmark"

    train_file: str = flag(REQUIRED, "Labelled rows.")
    label_guide: str = flag("label_guides/dmrs.yaml", "The labels' YAML file.")
    model_name_or_path: str = flag("sentence-transformers/all-MiniLM-L6-v2", "Encoder: a Hub id or a folder.")
    num_dialogues: int | None = flag(None, "Dialogues to take, drawn by the seed. Default: all.")
    trainable_layers: list[int] = flag([4, 2, 1], "Settings with turns: layers trained, from the top.")
    lora_r: int | None = flag(
        None, "Rank of adapters on all products of these layers. Default: trained whole."
    )
    repeats: int = flag(3, "Rounds; medians are reported, and three leave out an outlier.")
    seed: int = flag(42, "Of the heads and the order.")
    output: str = flag("turns.json", "JSON file for all figures.")


class Setting:
    """One way to train: the recipe's pairs (0), or turns with so many layers trained."""

    def __init__(self, arguments: ScriptArguments, guide: LabelGuide, rows: list[Row], trained: int):
        self.name = f"turns, {trained} layers trained" if trained else "pairs, averaged"
        base = find_base_model(arguments.model_name_or_path, pooling="turns" if trained else "mean")
        tokenizer = load_tokenizer(base)
        torch.manual_seed(arguments.seed)
        self.model = load_classifier(base, guide.names, tokenizer.pad_token_id)
        self.batches: Any = RowBatches(
            tokenizer.pad_token_id, ROWS_PER_STEP, 1, 32, segment_name(base, tokenizer)
        )
        renderer, states, self.trunk = make_renderer(base, tokenizer, guide, WINDOW), None, 0.0
        self.rendered = renderer.render(rows)
        if trained:
            if cut := trunk_layers(base, trained):
                freeze_trunk(self.model, cut)
                start = time.process_time()
                _, states = turn_states(rows, renderer, base, cut, bf16=False, limit_gb=20)
                TrunkMemory(self.model.encoder, layer_list(self.model.encoder)[:cut], states)
                self.trunk = time.process_time() - start
            self.batches = TurnBatches(
                ROWS_PER_STEP, 1, TOKENS_PER_BATCH, arguments.repeats + 1, pad_token_id=tokenizer.pad_token_id
            )
            if arguments.lora_r:
                targets = ["query", "key", "value", "dense"]
                self.model = add_lora(self.model, arguments.lora_r, 2 * arguments.lora_r, 0.0, targets, cut)
        self.rows, self.labels = rows, torch.tensor([row.label for row in rows])
        self.plan = self.batches.plan(rows, self.rendered, arguments.seed)
        self.trained = [weight for weight in self.model.parameters() if weight.requires_grad]
        self.optimizer = torch.optim.AdamW(self.trained, lr=1e-5, fused=True)
        start = time.process_time()
        if trained:
            options = SimpleNamespace(class_weights="balanced", head_C=10.0)
            init_head(self.model, self.batches, rows, self.rendered, options, False, states)
        self.start = time.process_time() - start

    def epoch(self, number: int) -> float:
        """Seconds of an epoch's training."""
        self.model.train()
        start = time.process_time()
        for step in tqdm(self.plan(number), desc=self.name, unit="step", leave=False):
            for batch in step:
                inputs = self.batches.collate([self.rendered[index] for index in batch])
                nn.functional.cross_entropy(self.model(**inputs).logits, self.labels[batch]).backward()
            nn.utils.clip_grad_norm_(self.trained, 1.0)
            self.optimizer.step()
            self.optimizer.zero_grad()
        return time.process_time() - start

    def prediction(self) -> float:
        """Seconds of predicting all rows."""
        self.model.eval()
        start = time.process_time()
        with torch.inference_mode():
            for batch in self.batches.prediction_batches(self.rows, self.rendered):
                self.model(**self.batches.collate([self.rendered[index] for index in batch]))
        return time.process_time() - start

    def tokens(self) -> int:
        """Tokens of an epoch, without padding."""
        batches = [batch for step in self.plan(0) for batch in step]
        inputs = [self.batches.collate([self.rendered[index] for index in batch]) for batch in batches]
        return sum(int(batch["attention_mask"].sum()) for batch in inputs)


def main() -> None:
    (arguments,) = parse_arguments((ScriptArguments,), __doc__)
    start_logging(logging.WARNING)

    guide = load_label_guide(arguments.label_guide)
    rows = load_rows(arguments.train_file, guide)
    names = sorted({row.dialogue_id for row in rows})
    chosen = set(np.random.default_rng(arguments.seed).permutation(names)[: arguments.num_dialogues])
    rows = [row for row in rows if row.dialogue_id in chosen]
    with tempfile.TemporaryDirectory() as cache:  # so that no other run has filled it
        os.environ["XDG_CACHE_HOME"] = cache
        settings = [Setting(arguments, guide, rows, trained) for trained in (0, *arguments.trainable_layers)]
    epochs: dict[Setting, list[float]] = {setting: [] for setting in settings}
    predictions: dict[Setting, list[float]] = {setting: [] for setting in settings}
    for number in range(1, arguments.repeats + 1):
        for setting in settings:
            epochs[setting].append(setting.epoch(number))
            predictions[setting].append(setting.prediction())

    results = []
    for setting in settings:
        record: dict[str, Any] = {"name": setting.name, "tokens": setting.tokens(), "rounds": epochs[setting]}
        for key, found in (("epoch", epochs), ("prediction", predictions)):
            record[key] = statistics.median(found[setting])
            pairs = zip(found[settings[0]], found[setting], strict=True)
            record[f"{key}_ratio"] = statistics.median(theirs / own for theirs, own in pairs)
        record |= {"steps": len(setting.plan(0)), "start": setting.start, "trunk": setting.trunk}
        training = (1 - 1 / FOLDS) * (setting.start + NUM_EPOCHS * record["epoch"])
        record["fold"] = training + (record["prediction"] + setting.trunk) / FOLDS
        results.append(record)
    print(f"\n{arguments.model_name_or_path}, {torch.get_num_threads()} threads: {len(rows)} rows\n")
    print(
        "| setting | tokens | steps | trunk, s | start, s | epoch, s | epoch | prediction | fold |\n|---|"
        + "---:|" * 8
    )
    for item in results:
        seconds = " | ".join(f"{item[key]:.1f}" for key in ("trunk", "start", "epoch"))
        ratios = (item["epoch_ratio"], item["prediction_ratio"], results[0]["fold"] / item["fold"])
        print(
            f"| {item['name']} | {item['tokens']:,} | {item['steps']} | {seconds} | "
            + " | ".join(f"{r:.1f}x" for r in ratios)
            + " |"
        )
    write_json(Path(arguments.output), {"arguments": asdict(arguments), "results": results} | provenance())


if __name__ == "__main__":
    run(main)
