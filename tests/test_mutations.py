"""Two hundred damaged inputs: each ends in success or in one-line errors with exit status 2, and leaves nothing half-written."""

from __future__ import annotations

import copy
import json
import random
import shutil
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from running import run_script

import augment
import calibrate
import ensemble
import predict
import run_classification
from rareturn.command_line import provenance
from rareturn.data.folds import write_folds
from rareturn.data.label_guide import load_label_guide
from rareturn.data.rows import Row, Turn
from rareturn.files import write_json
from rareturn.runs.folder import metrics_path, table_path, write_run_info
from rareturn.runs.tables import make_table, write_table

ROOT = Path(__file__).parent.parent
GUIDE = load_label_guide("label_guides/dmrs.yaml")
JUNK: list[Any] = [
    *(
        None,
        True,
        -1,
        0,
        7,
        10**12,
        1.5,
        float("nan"),
        "",
        " ",
        "x",
        "../../x",
        "é" * 40,
        [],
        [1],
        {},
        {"a": 1},
        "\x00",
        "0" * 300,
    ),
]


def mutate(content: Any, rng: random.Random) -> Any:
    """A copy with one place changed: replaced by junk, removed, or doubled."""
    content = copy.deepcopy(content)
    node = content
    while True:
        keys = list(node) if isinstance(node, dict) else list(range(len(node)))
        key = rng.choice(keys)
        if isinstance(node[key], (dict, list)) and node[key] and rng.random() < 0.7:
            node = node[key]
            continue
        kind = rng.random()
        if kind < 0.7:
            node[key] = rng.choice(JUNK)
        elif kind < 0.9:
            del node[key]
        elif isinstance(node, list):
            node.append(copy.deepcopy(node[key]))
        else:
            node[f"{key}_"] = node[key]
        return content


def damage(data: bytes, rng: random.Random) -> bytes:
    """Bytes cut short, or a few of them changed."""
    if rng.random() < 0.4:
        return data[: rng.randrange(len(data))]
    changed = bytearray(data)
    for _ in range(rng.randint(1, 8)):
        changed[rng.randrange(len(changed))] = rng.randrange(256)
    return bytes(changed)


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 60 rows in 15 dialogues, with tables and test tables of three folds."""
    folder = tmp_path_factory.mktemp("runs") / "anchor"
    rng = np.random.default_rng(0)
    rows = [
        Row(f"r{index}", f"d{index // 4}", (Turn("a", "seeker"),), int(label))
        for index, label in enumerate(np.concatenate([np.arange(9), rng.integers(0, 9, 51)]))
    ]
    test = [Row(f"t{index}", f"d{index}", (Turn("hello there", "seeker"),)) for index in range(6)]
    folds = {row.id: int(row.dialogue_id[1:]) % 3 for row in rows}
    info = {
        **{"name": "anchor", "label_names": GUIDE.names, "positive_labels": list(GUIDE.positive), "seed": 42},
        **{
            "num_folds": 3,
            "fold_seed": 42,
            "fold_groups": "dialogue",
            "base_model": "x",
            "base_revision": None,
        },
        **{"recipe": {}, "data_fingerprint": "0", "prompt_fingerprint": None, "label_guide": GUIDE.to_dict()},
        **provenance(),
    }
    write_folds(folder, folds, num_folds=3, fold_seed=42, fold_groups="dialogue")
    write_run_info(folder, info)
    for fold in range(3):
        held_out = [row for row in rows if folds[row.id] == fold]
        for split, part in (("oof", held_out), ("test", test)):
            logits = rng.normal(size=(len(part), 9)) + 2 * np.eye(9)[[max(row.label, 0) for row in part]]
            write_table(table_path(folder, split, fold), make_table(part, fold, logits))
        write_json(metrics_path(folder, fold), {"macro_f1_positive": 0.1, "fold": fold})
    records = [
        {
            "id": row.id,
            "dialogue_id": row.dialogue_id,
            "current_text": "hello there",
            "dialogue": [row.turns[0]._asdict()],
        }
        for row in test
    ]
    (folder.parent / "test.json").write_text(json.dumps(records))
    return folder


def as_json(content: Any) -> bytes:
    return json.dumps(content).encode()


def test_two_hundred_damaged_inputs(run_dir: Path, tmp_path: Path, monkeypatch, capsys):
    test_file = run_dir.parent / "test.json"
    words = ["--run", run_dir, "--method", "prior", "--repeats", 1, "--output", tmp_path / "decision.json"]

    assert run_script(calibrate.main, *words) == 0
    decision = json.loads((tmp_path / "decision.json").read_text())
    words = [
        "--runs",
        run_dir,
        "--decision",
        tmp_path / "decision.json",
        "--repeats",
        1,
        "--test_file",
        test_file,
    ]
    assert run_script(ensemble.main, *words, output_dir=tmp_path / "whole") == 0
    bundle = json.loads((tmp_path / "whole" / "ensemble.json").read_text())
    bundle["runs"][0]["model"] = {"folder": "../x", "folds": [{"subfolder": "fold-0", "sha256": {}}]}
    bundle["runs"][0] |= {
        "loader": {"quantization": "none"},
        "window": {"max_turns": 30, "max_seq_length": 64, "window_stride": 10},
    }
    rows = json.loads((ROOT / "data/demo/train.json").read_text())[:40]
    recipe = yaml.safe_load((ROOT / "recipes/qwen3-8b/anchor.yaml").read_text()) | {
        "model_name_or_path": "./none"
    }
    info, folds = (json.loads((run_dir / name).read_text()) for name in ("run.json", "folds.json"))
    table = (run_dir / "oof/fold-1.parquet").read_bytes()

    def calibrated(name: str, data: bytes, place: Path) -> tuple[Callable, list[object]]:
        broken = place / "anchor"
        shutil.copytree(run_dir, broken)
        (broken / name).write_bytes(data)
        return calibrate.main, [
            "--run",
            broken,
            "--method",
            "argmax",
            "--repeats",
            1,
            "--output",
            place / "out" / "d.json",
        ]

    def decided(data: bytes, place: Path) -> tuple[Callable, list[object]]:
        (place / "decision.json").write_bytes(data)
        return ensemble.main, [
            *("--runs", run_dir, "--decision", place / "decision.json", "--repeats", 1),
            *("--test_file", place / "none.json", "--output_dir", place / "out"),
        ]

    def predicted(data: bytes, place: Path) -> tuple[Callable, list[object]]:
        (place / "bundle").mkdir()
        (place / "bundle" / "ensemble.json").write_bytes(data)
        (place / "out").mkdir()
        return predict.main, [
            "--ensemble",
            place / "bundle",
            "--input",
            test_file,
            "--output",
            place / "out" / "l.jsonl",
        ]

    def augmented(data: bytes, place: Path) -> tuple[Callable, list[object]]:
        (place / "train.json").write_bytes(data)
        return augment.main, [
            "--train_file",
            place / "train.json",
            "--output_file",
            place / "out" / "a.jsonl",
            "--k",
            1,
        ]

    def trained(data: bytes, place: Path) -> tuple[Callable, list[object]]:
        (place / "recipe.yaml").write_bytes(data)
        return run_classification.main, [
            "--config",
            place / "recipe.yaml",
            "--train_file",
            ROOT / "data/demo/train.json",
            "--output_dir",
            place / "out",
        ]

    kinds: dict[str, tuple[int, Callable[[random.Random], bytes], Callable]] = {
        "rows": (40, lambda rng: as_json(mutate(rows, rng)), augmented),
        "rows, bytes": (15, lambda rng: damage(as_json(rows), rng), augmented),
        "recipe": (20, lambda rng: yaml.safe_dump(mutate(recipe, rng)).encode(), trained),
        "recipe, bytes": (10, lambda rng: damage(yaml.safe_dump(recipe).encode(), rng), trained),
        "run.json": (25, lambda rng: as_json(mutate(info, rng)), lambda d, p: calibrated("run.json", d, p)),
        "folds.json": (
            10,
            lambda rng: as_json(mutate(folds, rng)),
            lambda d, p: calibrated("folds.json", d, p),
        ),
        "table": (25, lambda rng: damage(table, rng), lambda d, p: calibrated("oof/fold-1.parquet", d, p)),
        "decision.json": (25, lambda rng: as_json(mutate(decision, rng)), decided),
        "ensemble.json": (25, lambda rng: as_json(mutate(bundle, rng)), predicted),
        "ensemble.json, bytes": (5, lambda rng: damage(as_json(bundle), rng), predicted),
    }
    assert sum(count for count, _, _ in kinds.values()) == 200
    endings, escaped = {0: 0, 2: 0}, []
    for kind, (count, make, prepare) in kinds.items():
        for number in range(count):
            place = tmp_path / "cases" / f"{kind.replace(' ', '').replace(',', '-')}-{number}"
            place.mkdir(parents=True)
            main, words = prepare(make(random.Random(f"{kind} {number}")), place)
            capsys.readouterr()
            try:
                status = run_script(main, *words)
            except Exception as error:
                frame = traceback.extract_tb(error.__traceback__)[-1]
                escaped.append(
                    f"{place.name}: {type(error).__name__}: {str(error)[:200]} ({frame.filename}:{frame.lineno})"
                )
                continue
            error_output = capsys.readouterr().err
            assert status in endings, (place.name, status, error_output[-500:])
            endings[status] += 1
            lines = [line for line in error_output.splitlines() if ".py: error: " in line]
            assert "Traceback" not in error_output, place.name
            if status == 2:
                assert 1 <= len(lines) <= 21, (place.name, error_output[-500:])
                assert not (place / "out").exists() or not list((place / "out").iterdir()), place.name
            shutil.rmtree(place)
    assert not escaped, "\n".join(escaped)
    assert endings[2] > 100, endings
