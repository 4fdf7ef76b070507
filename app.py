# /// script
# requires-python = ">=3.11"
# dependencies = ["rareturn[app]"]
# ///
"""Look at dialogues with their labels in a browser: why each turn got its label, and where an ensemble errs.

    python app.py --bundle ORG/NAME
On a laptop, with what `make demo` leaves, its errors and where it differs from one of its runs:
    python app.py --bundle outputs/demo --rows data/demo/train.json --compare outputs/demo-probe

The page is served to this machine alone, and what is typed or uploaded stays on it: no analytics, no share link, no
history in the browser; uploads are deleted after some minutes. `scripts/make_space.py` makes a private Space of it.
"""

from __future__ import annotations

import csv
import io
import json
import sys
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from rareturn.command_line import REQUIRED, flag, parse_arguments, run, start_logging
from rareturn.data.dialogues import Row
from rareturn.data.label_guide import LabelGuide
from rareturn.data.rendering import Rendered
from rareturn.data.rows import ColumnArguments, load_rows, open_source
from rareturn.data.utterances import table_columns
from rareturn.decisions.explaining import Explained, explain, percent
from rareturn.errors import InputError
from rareturn.files import packaged
from rareturn.reports.tables import render
from rareturn.runs.alignment import align_runs, check_shared, row_positions
from rareturn.runs.bundle import Bundle, read_bundle
from rareturn.runs.reading import read_run
from rareturn.runs.systems import read_system
from rareturn.runs.tables import make_table

ANY = -1  # in a filter
UPLOADS = [".json", ".jsonl", ".csv", ".tsv", ".parquet", ".txt"]
CONFIDENCES = {"any": (0, 1), "below 30 %": (0, 0.3), "30 to 50 %": (0.3, 0.5), "50 to 70 %": (0.5, 0.7), "70 to 90 %": (0.7, 0.9), "90 % and more": (0.9, 1)}  # fmt: skip
SHOWN = {"wrong": "wrong", "all": "all rows", "flips": "A and B differ", "a": "only A right", "b": "only B right"}  # fmt: skip


@dataclass(kw_only=True)
class AppArguments(ColumnArguments):
    """What is shown, and where."""

    _argument_group_name = "App"

    bundle: str = flag(REQUIRED, "ORG/NAME[@revision] on the Hub, or ensemble.py's output folder.")
    rows: str | None = flag(None, "The rows that its runs were trained on: shows its out-of-fold errors.")
    compare: str | None = flag(None, "A run, or ensemble.py's output folder: shows on which rows it differs.")
    trust_remote_code: list[str] = flag([], "Names of base models that may run Python code of their own.")
    server_name: str = flag("127.0.0.1", "Address to serve at; 0.0.0.0 lets other machines in.")
    server_port: int = flag(7860, "Port to serve at; gradio's own default.")

    def __post_init__(self) -> None:
        if self.compare and not self.rows:
            raise ValueError("--compare: flips are shown on the rows of --rows")


def read_dialogues(
    text: str, path: str | None, guide: LabelGuide, columns: Mapping[str, str]
) -> list[list[Row]]:
    """The rows to classify, by dialogue: of an uploaded file, else of a text.

    Either is what predict.py takes, or one dialogue: a list or a table of its turns, or lines `SPEAKER: text`. An
    InputError has a line for each thing that is wrong.
    """
    from rareturn.classifier import rows_by_dialogue, target_rows

    where, named = Path(path).name if path else "dialogue", table_columns(columns, guide)
    if path and path.endswith(".txt"):
        text, path = Path(path).read_text(encoding="utf-8", errors="replace"), None
    records, is_table = open_source(path or pasted_records(text, guide, named), "test", guide, columns)
    records = list(records)
    if is_table and named["dialogue_id"] not in records[0]:
        keys = {key: key if key in records[0] else named[key] for key in ("text", "speaker")}
        turns = [isinstance(turn, dict) and {key: turn.get(keys[key]) for key in keys} for turn in records]
        return [rows for rows in [target_rows(turns, guide, "all", where)] if rows]
    if not is_table:  # a single dialogue needs no id
        records = [
            {"id": f"{n}", **one} if isinstance(one, dict) else one for n, one in enumerate(records, 1)
        ]
    return [rows for rows in rows_by_dialogue(records, is_table, where, guide, columns, "all") if rows]


def pasted_records(text: str, guide: LabelGuide, named: Mapping[str, str]) -> list[Any]:
    """The records of a text: JSON, a table with a header, or lines `SPEAKER: text`; `named` are a table's columns."""
    text = text.strip()
    if text[:1] in ("[", "{"):
        try:
            content = json.loads(text)
        except (json.JSONDecodeError, RecursionError) as error:
            raise InputError(f"not valid JSON: {error}") from None
        return content if isinstance(content, list) else [content]
    header = text.partition("\n")[0]
    delimiter = "\t" if "\t" in header else ","
    if {named["speaker"], named["text"]} <= {cell.strip() for cell in header.split(delimiter)}:
        return list(csv.DictReader(io.StringIO(text), delimiter=delimiter, skipinitialspace=True))
    listed = () if isinstance(guide.speakers, str) else guide.speakers
    speakers, records = {name.casefold(): name for name in listed}, []
    for line in filter(None, map(str.strip, text.splitlines())):
        name, colon, words = line.partition(":")
        if not colon:
            raise InputError(f"{line[:60]!r}: every line must be SPEAKER: text")
        speaker = speakers.get(name.strip().casefold(), name.strip())
        records.append({named["speaker"]: speaker, named["text"]: words.strip()})
    return records


def first_seen(renderer: Any, row: Row) -> int:
    """The place of the first turn of a row that a model sees any of."""
    start, rendered = max(0, len(row.turns) - renderer.max_turns), renderer.render([row])[0]
    if not isinstance(rendered, Rendered):  # single turns
        return start
    if rendered.segment_ids is None:
        return rendered.start
    # Of a pair, the context's oldest tokens are cut away.
    for later in range(start + 1, len(row.turns)):
        fewer = renderer.render([replace(row, turns=row.turns[later:])])[0]
        if len(fewer) < len(rendered):
            return later - 1
    return len(row.turns) - 1


@dataclass
class Errors:
    """An ensemble's out-of-fold rows.

    Attributes:
        what: of A, the ensemble, and B, if it is compared: how its labels came about.
        rows: n of them; `fold`, `truth`, `predicted`, `other` (B's labels, None without B): int64 [n]
        explained: what the rule that was fitted on all rows says of each.
    """

    what: list[str]
    rows: list[Row]
    fold: np.ndarray
    truth: np.ndarray
    predicted: np.ndarray
    other: np.ndarray | None
    explained: list[Explained]

    def select(self, show: str, **wanted: Any) -> np.ndarray:
        """Places of rows, ascending: `show` is a key of SHOWN; `fold`, `truth` and `predicted` a number or ANY, and
        `confidence`, the probability of the predicted label, at least the one and below the other of two."""
        right = self.predicted == self.truth
        chosen = ~right if show == "wrong" else np.ones(len(self.rows), dtype=bool)
        if show in ("flips", "a", "b"):
            chosen = self.predicted != self.other
            chosen &= {"flips": chosen, "a": right, "b": self.other == self.truth}[show]
        low, high = wanted.pop("confidence", (0, 1))
        confidence = np.array(
            [one.probabilities[label] for one, label in zip(self.explained, self.predicted, strict=True)]
        )
        chosen &= (confidence >= low) & ((confidence < high) | (high == 1))
        for name, number in wanted.items():
            chosen &= (getattr(self, name) == number) | (number == ANY)
        return np.flatnonzero(chosen)

    def by_dialogue(self, places: np.ndarray) -> list[list[int]]:
        """Rows at these places by dialogue, as long as the file has them, each dialogue's in the order of its turns."""
        found: dict[str, list[int]] = {}
        for place in places.tolist():
            found.setdefault(self.rows[place].dialogue_id, []).append(place)
        return [sorted(group, key=lambda place: len(self.rows[place].turns)) for group in found.values()]


def read_errors(arguments: AppArguments, bundle: Bundle, folder: Path) -> Errors:
    """The bundle's out-of-fold rows, and what it and the system of `--compare` made of them.

    An InputError where rows, runs and predictions do not belong together.
    """
    references = [
        str(folder / run.model.folder)
        if run.model.folder
        else f"{run.reference.partition('@')[0]}@{run.revision}"
        for run in bundle.runs
    ]
    runs = [read_run(reference) for reference in references]
    rule, first = bundle.rule_for(runs, arguments.bundle), runs[0]
    explained = explain(rule, first.label_names, [[logits] for logits in align_runs(runs)])
    what, labels = ["the rule that was fitted on these rows"], [np.array([one.label for one in explained])]
    systems = [read_system(arguments.bundle, "argmax")] if (folder / "oof_predictions.json").is_file() else []
    systems += [read_system(arguments.compare, "argmax")] if arguments.compare else []
    for system in systems:
        check_shared(system.reference, system.info, first.reference, first.info)
        where = row_positions(system.reference, system.table, first.reference, first.oof)
        what.append(f"{system.reference}: {'argmax' if system.run else system.info['what']}")
        labels.append(system.predictions[0][where])
    known = load_rows(arguments.rows, bundle.guide, columns=arguments.columns)
    table = make_table(known, 0, np.zeros((len(known), 1)))
    rows = [known[place] for place in row_positions(arguments.rows, table, first.reference, first.oof)]
    compared = bool(arguments.compare)
    own = -2 if compared else -1
    return Errors(
        what[own:],
        rows,
        first.oof.fold,
        first.oof.label,
        labels[own],
        labels[-1] if compared else None,
        explained,
    )


def make_interface(arguments: AppArguments, bundle: Bundle, classifier: Any, errors: Errors | None) -> Any:
    """The page: a gradio `Blocks`."""
    import gradio as gr

    guide, names, template = bundle.guide, bundle.guide.names, "app.html.jinja"
    show = {"names": names, "runs": [run.name for run in bundle.runs]}
    # One thing at a time: models have one active adapter, tokenizers one borrower.
    alone = {
        "concurrency_id": "models",
        "concurrency_limit": 1,
        "show_progress": "minimal",
        "api_visibility": "private",
    }

    def classify(text: str, path: str | None, number: int) -> tuple:
        try:
            dialogues = read_dialogues(text, path, guide, arguments.columns)
            if not dialogues:
                raise InputError(f"no turn of {' or '.join(guide.targets) or 'anyone'} to classify")
        except InputError as error:
            return render(template, problems=error.lines()), gr.Dropdown(visible=False), path
        rows = dialogues[number := min(number, len(dialogues) - 1)]
        said = explain(classifier.rule, names, [voter.logits(rows) for voter in classifier.voters])
        cards = {
            row.turns.count - 1: {"said": one, "label": one.label}
            for row, one in zip(rows, said, strict=True)
        }
        ids = [(of_dialogue[0].dialogue_id, place) for place, of_dialogue in enumerate(dialogues)]
        choice = gr.Dropdown(ids, value=number, visible=len(ids) > 1)
        return render(template, turns=rows[0].turns.dialogue, cards=cards, start=0, **show), choice, path

    def browse(what: str, truth: int, predicted: int, fold: int, confidence: str, number: int = 0) -> tuple:
        wanted = {"truth": truth, "predicted": predicted, "fold": fold, "confidence": CONFIDENCES[confidence]}
        places = errors.select(what, **wanted)
        dialogues = errors.by_dialogue(places)
        number = max(0, min(number, len(dialogues) - 1))
        moves = gr.Button(interactive=number > 0), gr.Button(interactive=number < len(dialogues) - 1)
        pairs = Counter(zip(errors.truth[places].tolist(), errors.predicted[places].tolist(), strict=True))
        often = [f"{names[a]} as {names[b]} ({n})" for (a, b), n in pairs.most_common() if a != b][:3]
        lines = [f"{len(places)} of {len(errors.rows)} rows, in {len(dialogues)} dialogues"]
        lines += [f"Most often: {', '.join(often)}"] if often else []
        if not dialogues:
            return render(template, lines=lines), number, *moves
        cards, starts = {}, []
        for place in dialogues[number]:
            row = errors.rows[place]
            starts.append(min(first_seen(voter.renderer, row) for voter in classifier.voters))
            card = {"said": errors.explained[place], "saw": (starts[-1] + 1, len(row.turns))}
            compared = {"label": errors.predicted, "truth": errors.truth, "other": errors.other}
            card |= {key: int(labels[place]) for key, labels in compared.items() if labels is not None}
            cards[len(row.turns) - 1] = card
        lines.append(
            f"Dialogue {number + 1} of {len(dialogues)}: {row.dialogue_id}, fold {errors.fold[place]}"
        )
        shown = {"turns": row.turns, "cards": cards, "start": min(starts), "lines": lines}
        return render(template, **shown, **show), number, *moves

    def leaf(by: int) -> Callable:
        return lambda *given: browse(*given[:-1], given[-1] + by)

    other, target = guide.example_speakers
    example = f"{other}: How has your week been?\n{target}: Whatever. It's not like anyone noticed."
    gate = bundle.threshold and f", {names[bundle.protected_class]} from {percent(bundle.threshold)} on"
    about = f"{len(names)} labels, {len(bundle.runs)} runs, rule: {bundle.method}{gate or ''}."
    warning = "For research: often wrong, not a diagnostic instrument, not for decisions about people."
    with gr.Blocks(title=bundle.name, analytics_enabled=False, delete_cache=(300, 300)) as interface:
        gr.HTML(render(template, lines=[bundle.name, about, warning]))
        with gr.Tab("Classify"):
            how = "Dialogue: a line a turn, SPEAKER: text; or JSON, or a table with a header"
            text = gr.Textbox(example, label=how, lines=6, max_lines=16, autoscroll=False)
            with gr.Row():
                upload = gr.UploadButton("Upload a file", file_types=UPLOADS)
                button = gr.Button("Classify", variant="primary")
            choice, result, source = gr.Dropdown(label="Dialogue", visible=False), gr.HTML(), gr.State()
            outputs = [result, choice, source]
            button.click(lambda text: classify(text, None, 0), text, outputs, **alone)
            upload.upload(lambda path: classify("", path, 0), upload, outputs, **alone)
            choice.input(classify, [text, source, choice], outputs, **alone)
        if errors is None:
            return interface
        labels = [("any", ANY), *((name, number) for number, name in enumerate(names))]
        folds = [("any", ANY), *((str(fold), fold) for fold in np.unique(errors.fold).tolist())]
        kinds = [(title, key) for key, title in SHOWN.items()][: 2 if errors.other is None else None]
        letters = [f"{letter}: {what}" for letter, what in zip("AB", errors.what, strict=False)]
        with gr.Tab("Error browser"):
            gr.HTML(render(template, lines=["Out-of-fold rows", *letters]))
            with gr.Row():
                filters = [
                    gr.Dropdown(kinds, value="wrong", label="Show", min_width=120),
                    gr.Dropdown(labels, value=ANY, label="True label", min_width=120),
                    gr.Dropdown(labels, value=ANY, label="Predicted label", min_width=120),
                    gr.Dropdown(folds, value=ANY, label="Fold", min_width=120),
                    gr.Dropdown(list(CONFIDENCES), value="any", label="Confidence", min_width=120),
                ]
            found, number = gr.HTML(), gr.State(0)
            with gr.Row(elem_classes="pager"):
                moves = gr.Button("Previous", size="sm"), gr.Button("Next", size="sm")
            outputs = [found, number, *moves]
            gr.on([interface.load, *(item.change for item in filters)], browse, filters, outputs, **alone)
            for by, move in zip((-1, 1), moves, strict=True):
                move.click(leaf(by), [*filters, number], outputs, **alone)
    return interface


def main() -> None:
    # Arguments; those of a Space lie beside this file, since nobody starts it by hand.
    beside = Path(__file__).with_name("space.yaml")
    words = ["--config", str(beside)] if beside.exists() and not sys.argv[1:] else None
    (arguments,) = parse_arguments((AppArguments,), __doc__, words)

    # Logging
    start_logging()

    try:
        import gradio as gr
    except ImportError:
        raise InputError("the package gradio is missing: pip install -r requirements-app.txt") from None

    # Data
    bundle, folder = read_bundle(arguments.bundle)
    errors = read_errors(arguments, bundle, folder) if arguments.rows else None

    # Model
    from rareturn.classifier import DialogueClassifier

    classifier = DialogueClassifier.from_pretrained(arguments.bundle, arguments.trust_remote_code)

    # Interface
    interface = make_interface(arguments, bundle, classifier, errors)

    # Launch
    system = ["system-ui", "sans-serif"]  # gradio's own fonts would come from elsewhere
    print(f"open http://{arguments.server_name}:{arguments.server_port}")
    interface.launch(
        server_name=arguments.server_name,
        server_port=arguments.server_port,
        theme=gr.themes.Default(primary_hue="slate", font=system, font_mono=["ui-monospace", "monospace"]),
        css_paths=packaged("reports/templates/app.css"),
        share=False,
        run_history=False,
        footer_links=[],
        ssr_mode=False,
        quiet=True,
    )


if __name__ == "__main__":
    run(main)
