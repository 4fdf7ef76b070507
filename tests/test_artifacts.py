"""Runs on disk and on the Hub, through the real client and the server in `hub_server.py`."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from hub_server import HubServer
from huggingface_hub import DatasetCard, constants

from rareturn.data.folds import read_folds, write_folds
from rareturn.errors import InputError
from rareturn.files import read_json, write_bytes, write_json
from rareturn.runs.bundle import read_bundle
from rareturn.runs.folder import adapter_dir, complete_folds, metrics_path, table_path, write_run_info
from rareturn.runs.hub import PushError, push_files, resolve_revision
from rareturn.runs.publish import dataset_card, public_info, pull_adapters, push_fold, push_run
from rareturn.runs.reading import read_run
from rareturn.runs.references import Reference, parse_reference
from rareturn.runs.schemas import RunInfo
from rareturn.runs.tables import LogitTable, read_table, write_table

ROOT = Path(__file__).parent.parent
LABELS = ["none", "humor", "denial"]
INFO = {
    "name": "anchor",
    "label_names": LABELS,
    "positive_labels": [1, 2],
    "num_folds": 3,
    "fold_seed": 42,
    "fold_groups": "dialogue",
    "seed": 7,
    "base_model": "tiny/base",
    "base_revision": None,
    "recipe": {"learning_rate": 1e-4},
    "data_fingerprint": "00",
    "prompt_fingerprint": None,
    "packages": {"numpy": "2.4"},
    "command": "linear_probe.py --output_dir anchor",
    "git_commit": None,
}
FOLDS = {f"r{row}": (row // 2) % 3 for row in range(24)}


def make_table(ids: list[str], fold: int, *, labelled: bool = True, num_labels: int = 3) -> LogitTable:
    logits = np.random.default_rng(fold).normal(size=(len(ids), num_labels)).astype(np.float32)
    label = [int(row_id[1:]) % num_labels if labelled else -1 for row_id in ids]
    dialogues = [f"d{int(row_id[1:]) // 2}" for row_id in ids]
    return LogitTable(ids, dialogues, np.full(len(ids), fold), np.array(label), logits)


def make_run(
    run_dir: Path, *, name: str = "anchor", tests: bool = True, adapters: bool = True, **changes: object
) -> Path:
    """A complete run folder of three folds, with a few bytes for each adapter."""
    info = {**INFO, "name": name, **changes}
    write_run_info(run_dir, info)
    folds = {key: info[key] for key in ("num_folds", "fold_seed", "fold_groups")}
    write_folds(run_dir, FOLDS, **folds)
    for fold in range(3):
        held_out = [row_id for row_id in FOLDS if FOLDS[row_id] == fold]
        write_table(table_path(run_dir, "oof", fold), make_table(held_out, fold))
        if tests:
            table = make_table([f"t{row}" for row in range(5)], fold, labelled=False)
            write_table(table_path(run_dir, "test", fold), table)
        adapter = adapter_dir(run_dir, fold)
        if adapters:
            write_bytes(adapter / "adapter_model.safetensors", f"{name} {fold}".encode() * 1000)
            write_json(adapter / "adapter_config.json", {"r": 8, "fold": fold})
            write_bytes(adapter / "training_args.bin", b"a pickle")
            write_bytes(adapter / "README.md", b"[More Information Needed]")
        write_json(metrics_path(run_dir, fold), {"accuracy": 0.5})
    return run_dir


def edit(path: Path, **changes: object) -> None:
    content = json.loads(path.read_text())
    path.write_text(json.dumps({**content, **changes}))


def rewrite(path: Path, **columns: object) -> None:
    """Replace columns of a Parquet file, or drop those given as None, with no check."""
    table = pq.read_table(path)
    for name, values in columns.items():
        place = table.schema.names.index(name)
        table = table.remove_column(place)
        if values is not None:
            table = table.add_column(place, name, values)
    pq.write_table(table, path)


def push_all(run_dir: Path, name: str = "demo", **options: object) -> dict[str, str]:
    for fold in complete_folds(run_dir, 3):
        push_fold(run_dir, fold, "org", name)
    return push_run(run_dir, "org", name, model_card="---\ntags: [x]\n---\n# Card\n", **options)


# -------------------------------------------------------------------------------------------------------------- on disk


def test_table_round_trip_and_equal_bytes(tmp_path: Path) -> None:
    table = make_table(["r1", "r2", "r3"], 1)
    write_table(tmp_path / "a.parquet", table)
    write_table(tmp_path / "b.parquet", table)
    assert (tmp_path / "a.parquet").read_bytes() == (tmp_path / "b.parquet").read_bytes()
    again = read_table(tmp_path / "a.parquet")
    assert again.id == table.id and again.dialogue_id == table.dialogue_id
    np.testing.assert_array_equal(again.logits, table.logits)
    assert again.logits.dtype == np.float32 and again.fold.dtype == again.label.dtype == np.int64
    schema = pq.read_schema(tmp_path / "a.parquet")
    assert {name: str(schema.field(name).type) for name in schema.names} == {
        "id": "string",
        "dialogue_id": "string",
        "fold": "int32",
        "label": "int32",
        "logits": "list<element: float>",
    }
    assert os.listdir(tmp_path) == ["a.parquet", "b.parquet"] or len(os.listdir(tmp_path)) == 2


def test_empty_table_round_trip(tmp_path: Path) -> None:
    write_table(tmp_path / "a.parquet", make_table([], 0))
    assert len(read_table(tmp_path / "a.parquet")) == 0


def test_a_table_with_a_logit_that_is_not_finite_is_not_written(tmp_path: Path) -> None:
    table = make_table(["r1", "r2"], 0)
    table.logits[1, 2] = np.inf
    with pytest.raises(InputError, match="'r2': logits are not finite"):
        write_table(tmp_path / "a.parquet", table)
    assert not list(tmp_path.iterdir())


def test_tables_of_other_tools_are_read(tmp_path: Path) -> None:
    """Wider types, more columns, several row groups: as pandas or another team's script writes them."""
    path = tmp_path / "a.parquet"
    table = pa.table(
        {
            "logits": pa.array([[1, 2], [3, 4], [5, 6]], pa.large_list(pa.float64())),
            "fold": pa.array([0, 0, 0], pa.int64()),
            "label": pa.array([1, 0, -1], pa.int8()),
            "id": pa.array(["a", "b", "c"], pa.large_string()),
            "dialogue_id": pa.array(["x", "x", "y"], pa.large_string()),
            "seconds": [0.1, 0.2, 0.3],
        }
    )
    pq.write_table(table, path, row_group_size=2)
    read = read_table(path)
    np.testing.assert_array_equal(read.logits, np.float32([[1, 2], [3, 4], [5, 6]]))
    assert read.label.tolist() == [1, 0, -1]


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"label": None}, "no column 'label'"),
        ({"fold": pa.array([0.0, 0.0, 0.0])}, "column 'fold': integers expected"),
        ({"id": pa.array([1, 2, 3])}, "column 'id': strings expected"),
        ({"logits": pa.array(["1", "2", "3"])}, "column 'logits': lists of float32 expected"),
        ({"id": pa.array(["r1", "r2", "r1"])}, "row 'r1': id: appears more than once"),
        ({"label": pa.array([0, None, 1], pa.int32())}, "row 'r2': label: empty"),
        ({"logits": pa.array([[1.0, 2.0], None, [3.0, 4.0]], pa.list_(pa.float32()))}, "'r2': logits: empty"),
        (
            {"logits": pa.array([[1.0, 2.0], [1.0], [3.0, 4.0]], pa.list_(pa.float32()))},
            "'r2': logits: not 2 numbers, as in the first row",
        ),
        ({"logits": pa.array([[1.0], [2.0], [np.nan]], pa.list_(pa.float32()))}, "'r3': logits: not finite"),
        ({"logits": pa.array([[1.0], [None], [2.0]], pa.list_(pa.float32()))}, "'r2': logits: not finite"),
        ({"logits": pa.array([[1.0], [1e300], [2.0]], pa.list_(pa.float64()))}, "'r2': logits: not finite"),
    ],
)
def test_bad_tables_name_file_and_row(tmp_path: Path, columns: dict, message: str) -> None:
    path = tmp_path / "fold-0.parquet"
    write_table(path, make_table(["r1", "r2", "r3"], 0))
    rewrite(path, **columns)
    with pytest.raises(InputError) as caught:
        read_table(path)
    assert str(caught.value).startswith(f"{path}: ") and message in str(caught.value)


def test_mutated_parquet_files_are_refused_in_one_line(tmp_path: Path) -> None:
    """Cut short or with a few bytes changed: an error, or (outside the checked pages) the same numbers."""
    path = tmp_path / "fold-0.parquet"
    table = make_table([f"r{row}" for row in range(50)], 0)
    write_table(path, table)
    whole = path.read_bytes()
    random = np.random.default_rng(0)
    refused = 0
    for case in range(120):
        data = bytearray(whole)
        if case % 3 == 0:
            del data[random.integers(len(data)) :]
        for position in random.integers(len(data), size=3) if data else []:
            data[position] = random.integers(256)
        path.write_bytes(data)
        try:
            read = read_table(path)
        except InputError as error:
            refused += 1
            assert "\n" not in str(error)
        else:
            assert read.logits.shape[0] in (0, 50)
    assert refused > 60


@pytest.mark.parametrize("content", ["", "{", "[1, 2", '{"a": NaN}', "\xff", "[" * 100_000])
def test_bad_json_is_one_line(tmp_path: Path, content: str) -> None:
    path = tmp_path / "run.json"
    path.write_bytes(content.encode("latin-1"))
    with pytest.raises(InputError, match="not a JSON file"):
        read_json(path)


def test_writing_leaves_the_old_file_or_the_new_one(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "file.json"
    write_json(path, {"a": 1})
    with pytest.raises(ValueError):
        write_json(path, {"a": float("nan")})
    write_json(path, {"a": 2}, overwrite=False)
    assert read_json(path) == {"a": 1}
    write_json(path, {"a": 3})
    assert read_json(path) == {"a": 3}
    assert list(path.parent.iterdir()) == [path]


def test_a_full_disk_is_one_clear_line(tmp_path: Path) -> None:
    """RLIMIT_FSIZE stops a write as a full disk does, without needing the right to mount one."""
    path = tmp_path / "a.json"
    write_json(path, {"a": 1})
    program = (
        "import resource, signal, sys\n"
        "from rareturn.errors import InputError\n"
        "from rareturn.files import write_bytes\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))\n"
        "try: write_bytes(sys.argv[1], b'x' * 100_000)\n"
        "except InputError as error: print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", program, path], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == f"{path}: cannot write: File too large\n", done.stderr
    assert read_json(path) == {"a": 1} and list(tmp_path.iterdir()) == [path]


def test_a_place_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot write"):
        write_bytes(tmp_path / "file" / "a.txt", b"a")
    (tmp_path / "folder").mkdir()
    with pytest.raises(InputError, match="cannot write"):
        write_bytes(tmp_path / "folder", b"a")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "folder"]


def test_run_info_is_written_once_and_guards_the_folder(tmp_path: Path) -> None:
    info = {**INFO, "identity": {"digest": "1", "flags": {"seed": 7}}}
    write_run_info(tmp_path, info)
    write_run_info(tmp_path, {**info, "command": "the next fold"})
    assert read_json(tmp_path / "run.json") == info
    other = {"digest": "2", "flags": {"seed": 8}}
    with pytest.raises(InputError, match=r"--seed: 7 there, 8 asked for; use another --output_dir"):
        write_run_info(tmp_path, {**info, "seed": 8, "identity": other})


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("name", None, "name: Input should be a valid string"),
        ("name", "../up", "name: '../up'"),
        ("label_names", ["a"], "at least 2 items"),
        ("label_names", ["a", "a"], "different values expected"),
        ("label_names", [["a"], {}], "label_names.0: Input should be a valid string"),
        ("positive_labels", [3], "numbers of 0..2"),
        ("positive_labels", [True, 2], "positive_labels.0: Input should be a valid integer"),
        ("positive_labels", [{}], "positive_labels.0: Input should be a valid integer"),
        ("num_folds", True, "num_folds: Input should be a valid integer"),
        ("num_folds", 0, "greater than or equal to 1"),
        ("fold_groups", "rows", "'dialogue' or 'none'"),
        ("recipe", [], "recipe: Input should be a valid dictionary"),
        ("base_revision", 3, "base_revision: Input should be a valid string"),
    ],
)
def test_run_json_is_checked(tmp_path: Path, key: str, value: object, message: str) -> None:
    make_run(tmp_path, adapters=False)
    edit(tmp_path / "run.json", **{key: value})
    with pytest.raises(InputError, match=r"run\.json") as caught:
        read_run(tmp_path)
    assert message in str(caught.value)


def test_run_json_without_keys_lists_them_all(tmp_path: Path) -> None:
    make_run(tmp_path, adapters=False)
    (tmp_path / "run.json").write_text('{"name": "anchor"}')
    with pytest.raises(InputError) as caught:
        read_run(tmp_path)
    required = sum(field.is_required() for field in RunInfo.model_fields.values())
    assert len(caught.value.problems) == required - 1 == 14


def test_folds_json_counts_if_it_is_there(tmp_path: Path) -> None:
    """Other rows and another split are refused where the rows are read: see test_folds.py."""
    facts = {"num_folds": 3, "fold_seed": 42, "fold_groups": "dialogue"}
    for folds in (FOLDS, {row_id: (fold + 1) % 3 for row_id, fold in FOLDS.items()}):
        write_folds(tmp_path, folds, **facts)
        assert read_folds(tmp_path / "folds.json") == {**facts, "folds": FOLDS}
    edit(tmp_path / "folds.json", folds={**FOLDS, "r3": 3})
    with pytest.raises(InputError, match=r"row 'r3': fold 3 is not one of 0..2"):
        read_folds(tmp_path / "folds.json")


def test_read_run_aligns_with_folds_json(tmp_path: Path) -> None:
    run = read_run(make_run(tmp_path), require_test=True)
    assert run.oof.id == list(FOLDS) and run.oof.fold.tolist() == list(FOLDS.values())
    assert (run.name, run.revision, run.num_labels, run.positive_labels) == ("anchor", None, 3, [1, 2])
    assert [table.fold[0] for table in run.test] == [0, 1, 2] and run.test[0].id == [
        f"t{row}" for row in range(5)
    ]
    fold_0 = read_table(table_path(tmp_path, "oof", 0))
    np.testing.assert_array_equal(
        run.oof.logits[[run.oof.id.index(row_id) for row_id in fold_0.id]], fold_0.logits
    )


def test_a_folder_of_another_kind_is_said_to_be_one(tmp_path: Path) -> None:
    run_dir = make_run(tmp_path / "anchor")
    (tmp_path / "ensemble").mkdir()
    (tmp_path / "ensemble/ensemble.json").write_text("{}")
    for folder, said in (
        (adapter_dir(run_dir, 0), "is a part of a run, which is anchor"),
        (run_dir / "fold-0", "is a part of a run, which is anchor"),
        (tmp_path / "ensemble", "is an ensemble, not a run; name the runs"),
        (tmp_path, "is not a run: it holds no run.json"),
    ):
        with pytest.raises(InputError, match=said):
            read_run(folder)
    with pytest.raises(InputError, match=r"holds no ensemble.json; it is a run: make an ensemble of it"):
        read_bundle(str(run_dir))


def test_an_incomplete_run_names_its_missing_folds(tmp_path: Path) -> None:
    make_run(tmp_path)
    table_path(tmp_path, "test", 1).unlink()
    assert complete_folds(tmp_path, 3) == [0, 1, 2]
    assert read_run(tmp_path).test == []
    with pytest.raises(InputError, match="the test table of fold 1 is missing"):
        read_run(tmp_path, require_test=True)
    for fold in (0, 2):
        table_path(tmp_path, "oof", fold).unlink()
    with pytest.raises(InputError, match="the oof table of folds 0, 2 is missing"):
        read_run(tmp_path)


@pytest.mark.parametrize(
    ("ids", "fold", "changes", "message"),
    [
        (["r0", "r1"], 0, {}, "row 'r6' of folds.json is missing"),
        (["r0", "r2"], 0, {}, "row 'r2' belongs to fold 1"),
        (["r0", "x"], 0, {}, "row 'x' is in no fold"),
        (["r0"], 1, {}, "fold: not the fold of its file"),
        (["r0"], 0, {"num_labels": 4}, "4 logits a row for 3 labels"),
        (["r0"], 0, {"labelled": False}, "row 'r0': label: not one of 0..2"),
    ],
)
def test_tables_that_do_not_fit_the_run(
    tmp_path: Path, ids: list[str], fold: int, changes: dict, message: str
) -> None:
    make_run(tmp_path)
    table = make_table([row_id if row_id != "x" else "r99" for row_id in ids], fold, **changes)
    table.id = ids
    write_table(table_path(tmp_path, "oof", 0), table)
    with pytest.raises(InputError) as caught:
        read_run(tmp_path)
    assert message in str(caught.value)


def test_a_dialogue_in_two_folds_is_refused_unless_folds_are_of_rows(tmp_path: Path) -> None:
    for fold_groups, run_dir in (("dialogue", tmp_path / "a"), ("none", tmp_path / "b")):
        make_run(run_dir, fold_groups=fold_groups)
        table = read_table(table_path(run_dir, "oof", 0))
        table.dialogue_id[0] = "d1"
        write_table(table_path(run_dir, "oof", 0), table)
    assert read_run(tmp_path / "b").oof.id == list(FOLDS)
    with pytest.raises(InputError, match="dialogue 'd1' is in folds 0 and 1"):
        read_run(tmp_path / "a")


def test_test_tables_must_hold_the_same_rows(tmp_path: Path) -> None:
    make_run(tmp_path)
    ids = [f"t{row}" for row in range(5)]
    write_table(table_path(tmp_path, "test", 2), make_table(ids[::-1], 2, labelled=False))
    with pytest.raises(InputError, match="test fold 2: other rows, or in another order, than fold 0"):
        read_run(tmp_path)


NO_REFERENCES = """
nowhere|org/name|org/name-oof:|org/name-oof:../x|../x:run|org/..:run|a/b:c@|a/b:c@../d|a/b:c@x y|a/b/c:run|-a/b:run
a/b--c:run|a/b.git:run|a/b:.run|http://h/a:b|a/b:\0
"""


@pytest.mark.parametrize("reference", re.split(r"[|\n]", NO_REFERENCES.strip()))
def test_references_that_are_none(reference: str) -> None:
    with pytest.raises(InputError):
        parse_reference(reference)


def test_references(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert parse_reference("org/x-oof:anchor@refs/pr/1") == Reference(
        repo_id="org/x-oof", run="anchor", revision="refs/pr/1"
    )
    monkeypatch.chdir(tmp_path)
    (tmp_path / "org" / "x-oof:anchor").mkdir(parents=True)
    assert parse_reference("org/x-oof:anchor").folder == Path("org/x-oof:anchor")


# ----------------------------------------------------------------------------------------------------------- on the Hub


def test_push_then_read_gives_the_local_run(tmp_path: Path, hub_here: HubServer) -> None:
    run_dir = make_run(tmp_path / "anchor")
    shas = push_all(run_dir)
    local = read_run(run_dir, require_test=True)
    pulled = read_run("org/demo-oof:anchor", require_test=True)
    assert pulled.revision == shas["org/demo-oof"] == resolve_revision("org/demo-oof", repo_type="dataset")
    assert (pulled.info, pulled.folds, pulled.oof.id) == (local.info, local.folds, local.oof.id)
    np.testing.assert_array_equal(pulled.oof.logits, local.oof.logits)
    for one, other in zip(pulled.test, local.test, strict=True):
        np.testing.assert_array_equal(one.logits, other.logits)

    model = hub_here.files("org/demo-anchor")
    assert set(model) == {".gitattributes", "README.md", "run.json", "folds.json"} | {
        f"fold-{fold}/{name}"
        for fold in range(3)
        for name in ("adapter_model.safetensors", "adapter_config.json", "metrics.json")
    }
    for fold in range(3):
        adapter = adapter_dir(run_dir, fold) / "adapter_model.safetensors"
        assert model[f"fold-{fold}/adapter_model.safetensors"] == adapter.read_bytes()
    assert all(repo.private for repo in hub_here.repos.values())
    assert [commit.message for commit in hub_here.commits("org/demo-anchor")] == [
        "initial commit",
        *(f"anchor: fold {fold}" for fold in range(3)),
        "anchor: run and card",
    ]
    (collection,) = hub_here.collections.values()
    assert collection["private"] and [item["id"] for item in collection["items"]] == [
        "org/demo-anchor",
        "org/demo-oof",
    ]

    # Pushed again: nothing is committed, the same SHAs come back, the collection stays.
    assert push_all(run_dir) == shas
    assert len(hub_here.commits("org/demo-anchor")) == len(hub_here.commits("org/demo-oof", "dataset")) == 5
    assert len(hub_here.collections) == 1 and len(collection["items"]) == 2


def test_a_pinned_revision_is_read_after_the_run_has_changed(tmp_path: Path, hub_here: HubServer) -> None:
    run_dir = make_run(tmp_path / "anchor")
    first = push_all(run_dir)["org/demo-oof"]
    before = read_run(run_dir)
    table = read_table(table_path(run_dir, "oof", 1))
    table.logits += 1
    write_table(table_path(run_dir, "oof", 1), table)
    push_fold(run_dir, 1, "org", "demo")
    pinned = read_run(f"org/demo-oof:anchor@{first}")
    np.testing.assert_array_equal(pinned.oof.logits, before.oof.logits)
    newest = read_run("org/demo-oof:anchor")
    assert pinned.revision == first != newest.revision
    assert (newest.oof.logits != before.oof.logits).any()


def test_pulled_runs_are_checked_like_local_ones(tmp_path: Path, hub_here: HubServer) -> None:
    push_all(make_run(tmp_path / "anchor", tests=False))
    assert read_run("org/demo-oof:anchor").test == []
    with pytest.raises(InputError, match="the test table of folds 0, 1, 2 is missing"):
        read_run("org/demo-oof:anchor", require_test=True)
    with pytest.raises(InputError, match="org/demo-oof has no run 'other'"):
        read_run("org/demo-oof:other")
    with pytest.raises(InputError, match="no such repo on the Hub"):
        read_run("org/nothing-oof:anchor")
    with pytest.raises(InputError, match="no revision 'v9'"):
        read_run("org/demo-oof:anchor@v9")
    hub_here.put("org/demo-oof", {"data/anchor/run.json": b'{"name": "anchor"}'}, "dataset")
    with pytest.raises(InputError, match=r"run\.json: label_names: Field required"):
        read_run("org/demo-oof:anchor")
    hub_here.put("org/demo-oof", {"data/anchor/oof-fold-1.parquet": b"PAR1"}, "dataset")
    hub_here.put("org/demo-oof", {"data/anchor/run.json": json.dumps(INFO).encode()}, "dataset")
    with pytest.raises(InputError, match="not a readable Parquet file"):
        read_run("org/demo-oof:anchor")


def test_a_pushed_run_json_names_no_folder_of_this_machine(tmp_path: Path, hub_here: HubServer) -> None:
    private = "/home/somebody/private data"
    words = [
        "linear_probe.py",
        "--train_file",
        f"{private}/train.json",
        f"--output_dir={private}/anchor",
        "--C",
        "1",
    ]
    recipe = {"train_file": f"{private}/train.json", "files": [f"{private}/a.json", "b/c.json"], "C": [0.1]}
    run_dir = make_run(tmp_path / "anchor", command=shlex.join(words), recipe=recipe)
    push_all(run_dir)
    for repo, kind, path in (
        ("org/demo-anchor", "model", "run.json"),
        ("org/demo-oof", "dataset", "data/anchor/run.json"),
    ):
        content = hub_here.files(repo, kind)[path].decode()
        assert "somebody" not in content and json.loads(content)["label_names"] == LABELS
    pulled = read_run("org/demo-oof:anchor").info
    assert pulled["command"] == "linear_probe.py --train_file train.json --output_dir=anchor --C 1"
    assert pulled["recipe"] == {"train_file": "train.json", "files": ["a.json", "b/c.json"], "C": [0.1]}
    # It is the same run: on disk all is as it was, and the two are compared without their folders.
    assert read_run(run_dir).info["recipe"] == recipe
    assert public_info(read_run(run_dir).info) == pulled == public_info(pulled)


def test_a_public_repo_is_warned_of_once(
    tmp_path: Path, hub_here: HubServer, caplog: pytest.LogCaptureFixture
) -> None:
    for repo, kind in (("org/open-anchor", "model"), ("org/open-oof", "dataset")):
        hub_here.create(repo, kind, private=False)
    push_all(make_run(tmp_path / "anchor"), name="open")
    warnings = [record.getMessage() for record in caplog.records if "is public" in record.getMessage()]
    assert [warning.split()[0] for warning in warnings] == ["org/open-anchor", "org/open-oof"]


def test_a_private_repo_needs_a_token_and_no_error_shows_it(
    tmp_path: Path, hub_here: HubServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_dir = make_run(tmp_path / "anchor")
    push_all(run_dir)
    monkeypatch.setenv("HF_TOKEN", "hf_unknownunknownunknown")
    with pytest.raises(InputError) as caught:
        read_run("org/demo-oof:anchor")
    with pytest.raises(PushError, match="no valid token") as pushed:
        push_fold(run_dir, 0, "org", "other")
    assert "unknownunknown" not in f"{caught.value} {pushed.value}"


def test_a_token_in_a_file_stops_the_push(tmp_path: Path, hub_here: HubServer) -> None:
    run_dir = make_run(tmp_path / "anchor", command=f"linear_probe.py --hub_token {hub_here.writer}")
    push_fold(run_dir, 0, "org", "demo")
    with pytest.raises(InputError, match="has the Hub token in it"):
        push_run(run_dir, "org", "demo", model_card="# Card\n")
    pushed = b"".join(
        data for repo in hub_here.repos.values() for data in hub_here.files(repo.id, repo.type).values()
    )
    assert hub_here.writer.encode() not in pushed


def test_only_safe_kinds_of_files_travel(tmp_path: Path, hub_here: HubServer) -> None:
    with pytest.raises(InputError, match=r"a\.bin is not pushed"):
        push_files("org/x", {"a.bin": b"pickle"}, message="m", kept_in=tmp_path)
    push_all(make_run(tmp_path / "anchor"))
    hub_here.put("org/demo-anchor", {"fold-0/adapter_model.bin": b"pickle", "fold-0/code.py": b"import os"})
    folder, sha = pull_adapters("org/demo-anchor", ["fold-0", "fold-2"])
    assert sorted(
        path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()
    ) == sorted(
        f"fold-{fold}/{name}"
        for fold in (0, 2)
        for name in ("adapter_config.json", "adapter_model.safetensors", "metrics.json")
    )
    assert sha == hub_here.commits("org/demo-anchor")[-1].oid
    with pytest.raises(InputError, match="fold-3 holds no safetensors"):
        pull_adapters("org/demo-anchor", ["fold-0", "fold-3"])


@pytest.mark.parametrize(
    "path", ["../../evil.json", "data/anchor/../../../evil.json", "/evil.json", "data\\evil.json"]
)
def test_paths_of_a_pulled_repo_stay_in_its_folder(tmp_path: Path, hub_here: HubServer, path: str) -> None:
    push_all(make_run(tmp_path / "anchor"))
    hub_here.put("org/demo-oof", {path: b"{}"}, "dataset")
    with pytest.raises(InputError, match="unsafe path"):
        read_run("org/demo-oof:anchor")
    assert not list(tmp_path.rglob("evil.json"))


def test_the_dataset_card_keeps_what_others_wrote(tmp_path: Path, hub_here: HubServer) -> None:
    theirs = (
        "---\nlicense: cc-by-nc-4.0\nconfigs:\n- config_name: team-b\n  data_files:\n"
        "  - split: oof\n    path: theirs/*.parquet\n---\n# Our tables\r\n\nProse with --- in it, é and 漢.\n"
    )
    hub_here.put("org/demo-oof", {"README.md": theirs.encode(), "theirs/a.parquet": b"x"}, "dataset")
    push_all(make_run(tmp_path / "a", name="anchor"))
    push_all(make_run(tmp_path / "b", name="second", tests=False))
    files = hub_here.files("org/demo-oof", "dataset")
    header, prose = files["README.md"].decode().removeprefix("---\n").split("---\n", 1)
    assert prose == theirs.split("---\n", 2)[2] and files["theirs/a.parquet"] == b"x"
    metadata = yaml.safe_load(header)
    assert metadata["license"] == "cc-by-nc-4.0"
    assert metadata["configs"] == [
        {"config_name": "team-b", "data_files": [{"split": "oof", "path": "theirs/*.parquet"}]},
        {
            "config_name": "anchor",
            "data_files": [
                {"split": "oof", "path": "data/anchor/oof-fold-*.parquet"},
                {"split": "test", "path": "data/anchor/test-fold-*.parquet"},
            ],
        },
        {
            "config_name": "second",
            "data_files": [{"split": "oof", "path": "data/second/oof-fold-*.parquet"}],
        },
    ]


@pytest.mark.parametrize(
    ("present", "prose"),
    [
        (b"", ""),
        (b"# Prose\n", "# Prose\n"),
        (b"---\n---\n", "---\n---\n"),  # to the Hub no header
        (b"---\r\nlicense: mit\r\n---\r\nx", "x"),
        (b"--- no header\nx\n---\n", "--- no header\nx\n---\n"),
    ],
)
def test_dataset_cards_of_every_shape(present: bytes, prose: str) -> None:
    content = dataset_card(present, "org/x-oof", "anchor", has_test=True, facts={})
    card = DatasetCard(content.decode())
    assert [config["config_name"] for config in card.data["configs"]] == ["anchor"]
    assert card.text == prose
    assert card.data.license == ("mit" if b"license" in present else None)
    assert dataset_card(content, "org/x-oof", "anchor", has_test=True, facts={}) == content


def test_the_facts_of_several_runs_meet_in_the_dataset_card() -> None:
    facts = {"license": ["odbl"], "language": ["de"], "datasets": ["org/calls"], "base_model": ["org/a"]}
    first = dataset_card(None, "org/x-oof", "anchor", has_test=True, facts=facts)
    data = DatasetCard(first.decode()).data
    assert (data.license, data.language, data.task_categories) == ("odbl", ["de"], ["text-classification"])
    assert (data.source_datasets, data["datasets"], data["base_model"]) == (
        ["org/calls"],
        ["org/calls"],
        ["org/a"],
    )
    assert dataset_card(first, "org/x-oof", "anchor", has_test=True, facts=facts) == first
    facts = {"license": ["mit"], "datasets": ["org/calls"], "base_model": ["org/b"]}
    data = DatasetCard(dataset_card(first, "org/x-oof", "b", has_test=True, facts=facts).decode()).data
    assert (data.license, data["datasets"], data["base_model"]) == (
        ["odbl", "mit"],
        ["org/calls"],
        ["org/a", "org/b"],
    )
    theirs = b"---\nlicense: other\nlanguage: en\n---\n# Ours\n"
    data = DatasetCard(dataset_card(theirs, "org/x-oof", "b", has_test=True, facts={}).decode()).data
    assert (data.license, data.language) == ("other", "en")


def test_a_new_dataset_card_names_the_run_and_its_splits() -> None:
    card = DatasetCard(dataset_card(None, "org/x-oof", "anchor", has_test=False, facts={}).decode())
    files = [{"split": "oof", "path": "data/anchor/oof-fold-*.parquet"}]
    assert card.data["configs"] == [{"config_name": "anchor", "data_files": files}]
    assert card.data.tags == ["rareturn"] and card.text.startswith("\n# x: logits\n")
    assert 'load_dataset("org/x-oof", "anchor", split="oof")' in card.text


@pytest.mark.parametrize("header", ["a: [", "configs: all", "configs: [1]", "- a"])
def test_a_broken_dataset_card_is_not_overwritten(tmp_path: Path, hub_here: HubServer, header: str) -> None:
    theirs = f"---\n{header}\n---\nprose\n".encode()
    hub_here.put("org/demo-oof", {"README.md": theirs}, "dataset")
    with pytest.raises(PushError, match=r"README.*stays on disk"):
        push_all(make_run(tmp_path / "anchor"))
    assert hub_here.files("org/demo-oof", "dataset")["README.md"] == theirs


def test_incomplete_folds_and_bad_names_are_not_pushed(tmp_path: Path, hub_here: HubServer) -> None:
    run_dir = make_run(tmp_path / "anchor")
    metrics_path(run_dir, 1).unlink()
    with pytest.raises(InputError, match="fold 1 is not complete"):
        push_fold(run_dir, 1, "org", "demo")
    for namespace, name in (
        ("..", "demo"),
        ("org", "../demo"),
        ("org/x", "demo"),
        ("org", ""),
        ("org", "x" * 95),
    ):
        with pytest.raises(InputError):
            push_fold(run_dir, 0, namespace, name)
    assert not hub_here.repos


def test_a_cached_run_is_read_offline(
    tmp_path: Path, hub_here: HubServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    sha = push_all(make_run(tmp_path / "anchor"))["org/demo-oof"]
    online = read_run("org/demo-oof:anchor")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    seen = len(hub_here.requests)
    np.testing.assert_array_equal(read_run(f"org/demo-oof:anchor@{sha}").oof.logits, online.oof.logits)
    with pytest.raises(InputError, match="cannot be read from the Hub"):
        read_run("org/demo-oof:other")
    assert len(hub_here.requests) == seen


def test_datasets_and_peft_read_the_repos(python: str, tmp_path: Path, hub: HubServer) -> None:
    """As another team would, in a fresh process with an empty cache: `load_dataset` and `PeftModel.from_pretrained`."""
    program = """
import sys
import numpy as np, torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import Qwen3Config, Qwen3ForSequenceClassification
from rareturn.runs.folder import adapter_dir
from rareturn.runs.publish import push_fold, push_run
from rareturn.runs.reading import read_run

torch.manual_seed(0)
config = Qwen3Config(vocab_size=64, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
                     num_key_value_heads=1, head_dim=8, num_labels=3, pad_token_id=0)
base = Qwen3ForSequenceClassification(config).eval()
base.save_pretrained("base")
tuned = get_peft_model(base, LoraConfig(r=4, target_modules=["q_proj"], task_type="SEQ_CLS", modules_to_save=["score"]))
for parameter in tuned.parameters():
    if parameter.requires_grad:
        torch.nn.init.normal_(parameter, std=0.5)
tokens = torch.arange(1, 9).reshape(1, 8)
expected = tuned.eval()(input_ids=tokens).logits.detach()
for fold in range(3):
    tuned.save_pretrained(adapter_dir("anchor", fold))
    push_fold("anchor", fold, "org", "demo")
shas = push_run("anchor", "org", "demo", model_card="# Card\\n")

loaded = Qwen3ForSequenceClassification.from_pretrained("base")
loaded = PeftModel.from_pretrained(loaded, "org/demo-anchor", subfolder="fold-1", revision=shas["org/demo-anchor"])
assert torch.equal(loaded.eval()(input_ids=tokens).logits, expected)

from datasets import load_dataset
for split, rows in (("oof", 24), ("test", 15)):
    table = load_dataset("org/demo-oof", "anchor", split=split)
    assert table.column_names == ["id", "dialogue_id", "fold", "label", "logits"] and len(table) == rows, table
run = read_run("anchor")
oof = load_dataset("org/demo-oof", "anchor", split="oof", revision=shas["org/demo-oof"])
position = {row_id: number for number, row_id in enumerate(run.oof.id)}
for row in oof:
    assert np.array_equal(np.float32(row["logits"]), run.oof.logits[position[row["id"]]])
"""
    make_run(tmp_path / "anchor", adapters=False)
    done = subprocess.run(
        [python, "-c", program],
        cwd=tmp_path,
        env={**hub.env, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    routes = {route for _, route, _, _ in hub.requests}
    assert {"resolve", "tree", "info", "commit", "upload"} <= routes
