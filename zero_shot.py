# /// script
# requires-python = ">=3.11"
# dependencies = ["rareturn"]
# ///
"""A prompted large model as a run: the tables that linear_probe.py makes, and nothing is trained.

A local model gives the log-probabilities of the labels' numbers behind the prompt, all rows of a dialogue in one pass:
    python zero_shot.py --model_name_or_path Qwen/Qwen3-8B --train_file AIMH/PsyDefConv:Splits/train.json \\
        --test_file AIMH/PsyDefConv:Splits/test.json --shots 9 --output_dir outputs/zero-shot
A model behind an OpenAI-compatible endpoint, which gets the text of every row, gives them too, or votes:
    python zero_shot.py --model gpt-5-mini --base_url https://api.openai.com/v1 --samples 5 --max_requests 20000 \\
        --train_file AIMH/PsyDefConv:Splits/train.json --output_dir outputs/gpt-5-mini
The fictional corpus on a laptop, minutes:
    python zero_shot.py --model_name_or_path "$(python scripts/packaged_model.py smollm2-135m)" \\
        --label_guide data/demo/label_guide.yaml --train_file data/demo/train.json --output_dir outputs/demo-zero-shot

A fold's prompts differ by --shots alone, which are rows of the other folds. Complete folds are skipped. Beside a table of
--cot lies `fold-<k>.rationales.jsonl`, which is never pushed.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import re
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import numpy as np

from rareturn.command_line import (
    REQUIRED,
    HubArguments,
    LoaderArguments,
    flag,
    parse_arguments,
    run,
    start_logging,
)
from rareturn.data.folds import FoldDataArguments, RunData, read_run_data, write_folds
from rareturn.data.label_guide import Label
from rareturn.data.rendering import render_turn, window_start
from rareturn.data.rows import Row, Turn
from rareturn.data.shots import balanced_shots, similar_shots
from rareturn.decisions.probabilities import OUT_OF_SCOPE_LOGIT, log_probabilities, log_softmax
from rareturn.endpoint import Asking, Choice, Endpoint, prompt_template
from rareturn.errors import InputError, first_line
from rareturn.files import write_bytes, write_json
from rareturn.reports.cards import print_closing_table
from rareturn.reports.push import check_push, push_folds
from rareturn.runs import folder
from rareturn.runs.references import check_name
from rareturn.runs.tables import make_table, rows_digest, write_table

logger = logging.getLogger(__name__)

AROUND = " \n\"'`*"  # a label in an answer
SHOT_TURNS = 6  # of an example, its target included: eight examples then take about as much as two long rows


@dataclass(kw_only=True)
class ZeroShotArguments(LoaderArguments, FoldDataArguments):
    """Rows, folds, the model and what it is asked."""

    _argument_group_name = "Prompted model"

    model_name_or_path: str | None = flag(None, "Local causal language model: a Hub id or a folder.")
    model: str | None = flag(None, "Or a model behind --base_url, by its name there: it gets the text.")
    output_dir: str = flag(REQUIRED, "The run's folder.")
    run_name: str | None = flag(None, "Name of the run. Default: the output folder's name.")
    prompt: str = flag(
        "zero_shot", "zero_shot; zero_shot_rules, with decision rules; or your own FILE.jinja."
    )
    shots: int = flag(
        0, f"Examples in a prompt, from other folds' dialogues, each of {SHOT_TURNS} turns at most."
    )
    shot_selection: Literal["balanced", "similar"] = flag(
        "balanced", "balanced: label by label, drawn with --seed; similar: by tf-idf over the whole dialogue."
    )
    cot: bool = flag(False, "Let the model write a rationale before it answers.")
    temperature: float | None = flag(None, "Default: 0, the likeliest answer, but 1 for several --samples.")
    samples: int = flag(1, "Answers of --model, as votes where it gives no log-probabilities.")
    seed: int = flag(42, "Draws shots, and samples.")
    max_seq_length: int = flag(
        1024, "Tokens of a row's turns, four bytes each; the oldest turns are cut first."
    )
    bf16: bool | None = flag(None, "bf16 autocast. Default: on a GPU, never on a CPU.")
    per_device_eval_batch_size: int = flag(8, "Rationales that a local model writes at a time.")

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.model_name_or_path is None) == (self.model is None):
            raise ValueError(
                "give --model_name_or_path for a local model, or --model for one behind --base_url"
            )
        for name in ("augmented_file", "extra_train_file"):
            if getattr(self, name):
                raise ValueError(f"--{name}: nothing is trained; leave it out")
        if self.model_name_or_path and self.samples > 1:
            raise ValueError("--samples: a local model gives log-probabilities; leave it out")
        least_of = {"max_turns": 1, "window_stride": 1, "max_seq_length": 8, "samples": 1, "shots": 0}
        for name, least in least_of.items():
            if getattr(self, name) < least:
                raise ValueError(f"--{name} must be {least} or more, not {getattr(self, name)}")
        if self.temperature is None:
            self.temperature = float(self.samples > 1)
        if not 0 <= self.temperature <= 2:
            raise ValueError(f"--temperature must be between 0 and 2, not {self.temperature}")


@dataclass
class Part:
    """Rows that a fold's table is made of, with their prompts."""

    fold: int
    split: str  # oof or test
    rows: Sequence[Row]
    prompts: list[str]


def make_parts(arguments: ZeroShotArguments, data: RunData, run_dir: Path) -> list[Part]:
    """What is still to be asked."""
    digest, parts = rows_digest(data.test), []
    for fold in range(arguments.num_folds):
        wanted = {} if folder.fold_is_complete(run_dir, fold) else {"oof": data.held_out_part(fold)}
        if data.test and not folder.test_table_is_current(run_dir, fold, digest):
            wanted = {"test": data.test} | wanted
        for split, rows in wanted.items():
            parts.append(Part(fold, split, rows, make_prompts(arguments, data, fold, rows)))
    return parts


def make_prompts(arguments: ZeroShotArguments, data: RunData, fold: int, rows: Sequence[Row]) -> list[str]:
    """The rows' prompts, with examples that a model of this fold might have been trained on."""
    from jinja2 import TemplateError

    def shown(row: Row, max_turns: int) -> dict[str, Any]:
        """What a template sees of a row."""
        room, seen = 4 * arguments.max_seq_length, row.turns[-max_turns:]
        lengths = [0] * (len(row.turns) - len(seen)) + [len(turn.text.encode()) for turn in seen]
        start = window_start(lengths, room, max_turns, min(arguments.window_stride, max_turns))
        *context, (text, speaker) = row.turns[start:]
        # A target that is too long loses its beginning, as in training.
        turns = [*context, Turn(text.encode()[-room:].decode(errors="ignore"), speaker)]
        dialogue = "".join(map(render_turn, turns)).strip()
        return {"dialogue": dialogue, "speaker": speaker.upper()}

    pool = data.training_part(fold) if arguments.shots else []
    chosen: Any = [[] for _ in rows]
    if arguments.shots and arguments.shot_selection == "similar":
        chosen = similar_shots(rows, pool, arguments.shots)
    elif arguments.shots:
        chosen = balanced_shots(rows, pool, arguments.shots, arguments.seed)
    template, labels = prompt_template(arguments.prompt), [data.guide.labels[label] for label in data.scope]
    parts = {"guide": data.guide, "labels": labels, "cot": arguments.cot}
    prompts = []
    for row, shots in zip(rows, chosen, strict=True):
        turns = min(SHOT_TURNS, arguments.max_turns)
        examples = [shown(shot, turns) | {"label": shot.label} for shot in shots]
        try:
            prompts.append(template.render(parts, shots=examples, **shown(row, arguments.max_turns)))
        except TemplateError as error:
            raise InputError(f"{arguments.prompt}: {first_line(error)}") from None
    return prompts


def local_model(arguments: ZeroShotArguments, labels: Sequence[Label], endpoint: Endpoint) -> Any:
    """A model of this machine, not loaded yet."""
    import torch
    import transformers

    from rareturn.models import loading
    from rareturn.models.prompted import PromptedModel

    transformers.utils.logging.set_verbosity_error()
    flags = {name: getattr(arguments, name) for name in loading.LOADING if hasattr(arguments, name)}
    base = loading.find_base_model(arguments.model_name_or_path, arguments.model_revision, **flags)
    how: dict[str, Any] = {name: getattr(arguments, name) for name in ("cot", "temperature", "seed", "bf16")}
    if arguments.bf16 is None:
        how["bf16"] = arguments.dtype == "float32" and torch.cuda.is_available()
    how |= {"max_new_tokens": endpoint.max_new_tokens, "batch_size": arguments.per_device_eval_batch_size}
    return PromptedModel(base, [label.number for label in labels], **how)


class RemoteModel:
    """Answers by a model behind an endpoint."""

    def __init__(self, arguments: ZeroShotArguments, labels: Sequence[Label], endpoint: Endpoint):
        self.labels, self.endpoint, self.facts = labels, endpoint, []
        endpoint.model, endpoint.seed = arguments.model, arguments.seed
        numbers = [label.number for label in labels]
        properties = {"rationale": {"type": "string"}} if arguments.cot else {}
        properties |= {"label": {"type": "integer", "enum": numbers}}
        schema = {"type": "object", "properties": properties, "required": list(properties)}
        # A number above 9 may be several tokens, of which the first says little.
        logprobs = max(numbers) < 10
        how = {"logprobs": logprobs, "one_will_do": logprobs and not arguments.cot}
        how |= {"samples": arguments.samples, "schema": schema | {"additionalProperties": False}}
        self.how = Asking(arguments.temperature, **how)
        self.base = SimpleNamespace(name=arguments.model, revision=None, weights_digest=None)
        self.loader = {"host": endpoint.host, "max_new_tokens": endpoint.max_new_tokens}

    def plan(self, prompts: Sequence[str]) -> None:
        """Say what is going to be asked, and refuse where that is too much."""
        self.endpoint.plan((prompt, self.how) for prompt in dict.fromkeys(prompts))

    def answer(
        self, rows: Sequence[Row], prompts: Sequence[str], title: str
    ) -> tuple[np.ndarray, list[str], dict[str, int]]:
        """Log-probabilities, (rows, labels), what the model wrote, and how many answers were none."""
        found, counts = self.endpoint.ask(prompts, self.how, title), Counter()
        probabilities = [label_probabilities(choices, self.labels, counts) for choices in found]
        written = ["\n\n".join(choice["text"] for choice in choices) for choices in found]
        return log_probabilities(np.array(probabilities)), written, counts


def find_label(text: str, labels: Sequence[Label]) -> int | None:
    """The one label that an answer names, by number or name; None where it names none, several, or another number."""
    text = re.sub(r"(?s)^.*</think>", "", text)
    with contextlib.suppress(ValueError, KeyError, TypeError, RecursionError):  # no JSON, which is fine
        text = f"label: {json.loads(text[text.index('{') : text.rindex('}') + 1])['label']}"
    # What stands behind the last "Label:", in its line, is the answer; else the whole text has to name one label.
    *before, text = re.split(r"(?i)\blabel\W{0,3}:", text)
    text = text.strip(AROUND).partition("\n")[0] if before else text
    names = {label.name.casefold(): label.number for label in labels if not label.name.isdecimal()}
    found = set()
    for name in sorted(names, key=len, reverse=True):  # a name may hold another, or a number
        pattern = rf"(?i)(?<!\w){re.escape(name)}(?!\w)"
        text, times = re.subn(pattern, " ", text)
        found |= {names[name]} if times else set()
    found |= {int(number) for number in re.findall(r"(?<![\w.,-])\d+(?!\w|[.,]\d)", text)}
    return found.pop() if len(found) == 1 and found <= {label.number for label in labels} else None


def label_probabilities(
    choices: Sequence[Choice], labels: Sequence[Label], counts: Counter[str]
) -> np.ndarray:
    """Probabilities of the labels from the answers to a prompt; what is no answer is counted, and the rest are votes.

    A vote has the distribution of the token that it wrote the label's number with, if log-probabilities came with it;
    numbers that are not among the likeliest tokens are as likely as the last of these. Without, one more vote is spread
    over all labels: a single answer then has a bit over half, and no label is ruled out in a blend.
    """
    numbers = [label.number for label in labels]
    shares, is_certain = [], False
    for choice in choices:
        label = None
        if choice["refused"]:
            counts["refused"] += 1
        elif choice["finish"] == "length":
            counts["cut_off"] += 1
        elif (label := find_label(choice["text"], labels)) is None:
            counts["unparsable"] += 1
        else:
            share = np.array([float(number == label) for number in numbers])
            for token, others in reversed(choice.get("tokens", ())):
                if others and token.strip(AROUND) == str(label):
                    said = [(other.strip(AROUND), np.exp(value)) for other, value in others.items()]
                    share = np.array([sum(p for other, p in said if other == str(one)) for one in numbers])
                    share[share == 0] = min(p for _, p in said)
                    break
            else:
                is_certain = True
            shares.append(share / share.sum())
    if not shares:
        counts["rows_without_answer"] += 1
    spread = np.full(len(labels), float(is_certain or not shares) / len(labels))
    return (np.sum(shares, axis=0) + spread) / (len(shares) + spread.sum())


def main() -> None:
    # Arguments
    arguments, endpoint, hub = parse_arguments((ZeroShotArguments, Endpoint, HubArguments), __doc__)
    run_dir = Path(arguments.output_dir)
    run_name = check_name(arguments.run_name or run_dir.resolve().name, "--run_name")
    if hub.push_only:
        return push_folds(run_dir, hub)
    check_push(hub, run_name)

    # Logging
    start_logging()
    started = time.perf_counter()

    # Data
    data = read_run_data(arguments, run_dir)
    labels = [data.guide.labels[label] for label in data.scope]

    # Model
    model = (RemoteModel if arguments.model else local_model)(arguments, labels, endpoint)
    template = Path(prompt_template(arguments.prompt).filename).read_text(encoding="utf-8")
    asked = [template, render_turn(Turn("text", "speaker")), SHOT_TURNS, *model.facts]
    facts: dict[str, Any] = {"seed": arguments.seed, "loader": model.loader | {"tuning": "prompted"}}
    facts["prompt_fingerprint"] = hashlib.sha256(json.dumps(asked).encode()).hexdigest()
    info = folder.describe_run(run_name, data, model.base, arguments, **facts)
    folder.check_same_run(run_dir, info, arguments)
    parts = make_parts(arguments, data, run_dir)
    if not parts:
        logger.info(f"{run_dir} is complete: nothing to ask")
        print_closing_table(run_dir, info)
        return push_folds(run_dir, hub) if hub.push_to_hub else None
    model.plan([prompt for part in parts for prompt in part.prompts])

    # Ask, evaluate, save
    totals: Counter[str] = Counter()
    for part in parts:
        began = time.perf_counter()
        found, written, counts = model.answer(part.rows, part.prompts, f"fold {part.fold}, {part.split}")
        logits = np.full((len(part.rows), len(data.guide.labels)), OUT_OF_SCOPE_LOGIT)
        logits[:, data.scope] = log_softmax(found)
        # The first thing written, so that a mistake in the input leaves no folder behind.
        write_folds(run_dir, data.folds, **arguments.split)
        folder.write_run_info(run_dir, info, arguments)
        path = folder.table_path(run_dir, part.split, part.fold)
        if arguments.cot:
            said = [{"id": row.id, "text": text} for row, text in zip(part.rows, written, strict=True)]
            lines = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in said)
            write_bytes(path.with_suffix(".rationales.jsonl"), lines.encode())
        write_table(path, make_table(part.rows, part.fold, logits))
        if part.split == "oof":
            seconds = round(time.perf_counter() - began, 1)
            folder.write_fold_metrics(run_dir, info, part.fold, seconds=seconds, **counts)
        totals.update({f"{part.split}_{name}": count for name, count in counts.items()})
    overall = print_closing_table(run_dir, info)
    seconds = round(time.perf_counter() - started, 1)
    write_json(run_dir / "metrics.json", overall | {"seconds": seconds, "answers": totals})
    unusable = ", ".join(f"{count} {name}" for name, count in sorted(totals.items()) if count)
    print(f"{seconds} s in all; no label in: {unusable or 'no answer'}")

    # Push
    if hub.push_to_hub:
        push_folds(run_dir, hub)


if __name__ == "__main__":
    run(main)
