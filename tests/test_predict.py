"""predict.py and DialogueClassifier on an ensemble of tiny runs: a QLoRA-less decoder's adapters, an encoder, a probe."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from huggingface_hub import constants, model_info
from running import run_script, words_of
from tiny_models import make_tiny_decoder, make_tiny_encoder

import calibrate
import ensemble
import linear_probe
import predict
import run_classification
from rareturn import DialogueClassifier
from rareturn.errors import InputError
from rareturn.models import loading, probing
from rareturn.models.loading import load_classifier
from rareturn.runs.hub import may_travel, push_files

ROOT = Path(__file__).parent.parent
NUM_FOLDS = 3
TRAIN, TEST = str(ROOT / "data/demo/train.json"), str(ROOT / "data/demo/test.json")


@pytest.fixture(scope="module")
def system(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output folder of an ensemble of three runs of three folds."""
    place = tmp_path_factory.mktemp("system")
    make_tiny_decoder(place / "team/decoder"), make_tiny_encoder(place / "team/encoder")
    with contextlib.chdir(place):
        make_system(place)
    return place / "ensemble"


@pytest.fixture(autouse=True)
def beside_the_bases(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """The bases are folders of the working folder, spelled as on the Hub."""
    monkeypatch.chdir(request.getfixturevalue("system").parent)


def make_system(place: Path) -> None:
    """Train the runs and blend them."""
    decoder, encoder = "team/decoder", "team/encoder"
    data = {"train_file": TRAIN, "test_file": TEST, "num_folds": NUM_FOLDS}
    train = data | {
        "do_predict": True,
        "num_train_epochs": 1,
        "max_train_samples": 32,
        "learning_rate": 3e-3,
        "bf16": False,
    }
    window = {"max_seq_length": 512, "max_turns": 8, "window_stride": 4}
    for fold in range(NUM_FOLDS):
        lora = {"model_name_or_path": decoder, "lora_r": 4, "output_dir": place / "lora"}
        assert run_script(run_classification.main, **train, **window, **lora, fold=fold) == 0
        full = {"model_name_or_path": encoder, "tuning": "full", "pooling": "mean", "max_seq_length": 48}
        assert run_script(run_classification.main, **train, **full, output_dir=place / "full", fold=fold) == 0
    probe = {"model_name_or_path": encoder, "C": 1, "output_dir": place / "probe"}
    assert run_script(linear_probe.main, **data, **probe) == 0
    assert run_script(ensemble.main, **three_runs(place), output_dir=place / "ensemble") == 0


def three_runs(place: Path) -> dict[str, object]:
    """Flags of ensemble.py for the runs in a folder."""
    return {
        "runs": [place / "lora", place / "full", place / "probe"],
        "weights": [2, 1, 1],
        "method": "prior",
        "repeats": 1,
        "test_file": TEST,
    }


def read_lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_last_turns_get_what_the_ensemble_gave_them(system: Path, tmp_path: Path, monkeypatch):
    loads: list[str] = []
    load = load_classifier
    for module in (loading, probing):
        monkeypatch.setattr(
            module, "load_classifier", lambda base, *rest: loads.append(base.name) or load(base, *rest)
        )
    output = tmp_path / "labels.jsonl"
    flags = {"ensemble": system, "input": TEST, "turns": "last", "output": output, "rows_per_chunk": 7}
    assert run_script(predict.main, **flags) == 0
    # Three adapters, one load of their base; three whole models; one frozen encoder.
    assert sum("decoder" in name for name in loads) == 1 and len(loads) == 1 + NUM_FOLDS + 1
    lines, submitted = read_lines(output), json.loads((system / "prediction.json").read_text())
    assert [line["label"] for line in lines] == [row["label"] for row in submitted]
    assert [line["dialogue_id"] for line in lines] == [row["dialogue_id"] for row in submitted]
    assert [line["id"].partition("#")[0] for line in lines] == [row["id"] for row in submitted]
    rule = json.loads((system / "ensemble.json").read_text())["decision"]
    for line in lines:
        p = np.array(list(line["probabilities"].values()))
        assert p.sum() == pytest.approx(1, abs=1e-4)
        gated = rule["threshold"] is not None and p[rule["protected_class"]] >= rule["threshold"]
        expected = "gate" if gated else "argmax" if p.argmax() == line["label"] else "bias"
        assert line["decided_by"] == expected
        assert "text" not in line and "dialogue" not in line
    assert sorted(path.name for path in tmp_path.iterdir()) == ["labels.jsonl"]


def test_a_stopped_prediction_goes_on_and_gives_the_same_bytes(system: Path, tmp_path: Path, monkeypatch):
    whole, stopped, source = (tmp_path / name for name in ("whole.jsonl", "stopped.jsonl", "few.json"))
    dialogues = json.loads(Path(TEST).read_text())[:10]
    source.write_text(json.dumps(dialogues))
    flags = {"ensemble": system, "input": source, "rows_per_chunk": 10}
    assert run_script(predict.main, **flags, output=whole) == 0
    predictions, calls = DialogueClassifier.predictions, []

    def fail_at_third(self, rows):
        calls.append(len(rows))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return predictions(self, rows)

    monkeypatch.setattr(DialogueClassifier, "predictions", fail_at_third)
    assert run_script(predict.main, **flags, output=stopped) == 130
    part = tmp_path / ".stopped.jsonl.part-0"
    part.write_bytes(part.read_bytes() + b'[{"id": "half a li')
    assert run_script(predict.main, **flags, output=stopped) == 0
    seeker_turns = sum(t["speaker"] == "seeker" for row in dialogues for t in row["dialogue"])
    assert stopped.read_bytes() == whole.read_bytes()
    assert len(read_lines(whole)) == seeker_turns
    assert sum(calls) - calls[2] == seeker_turns, "no row twice"


def test_another_input_with_the_same_ids_is_not_gone_on_with(system: Path, tmp_path: Path, monkeypatch):
    """The input is a dataset folder: size and time of a file would tell nothing."""
    dialogues, text = json.loads(Path(TEST).read_text())[:6], "I have never told this to anyone."
    others = [
        row | {"dialogue": [*row["dialogue"][:-1], row["dialogue"][-1] | {"text": text}]} for row in dialogues
    ]
    for name, rows in (("one", dialogues), ("other", others)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "test.json").write_text(json.dumps(rows))
    flags = {"ensemble": system, "turns": "last", "rows_per_chunk": 2}
    output = tmp_path / "output.jsonl"
    assert run_script(predict.main, **flags, input=tmp_path / "other", output=tmp_path / "whole.jsonl") == 0
    predictions, calls = DialogueClassifier.predictions, []

    def fail_at_third(self, rows):
        calls.append(len(rows))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return predictions(self, rows)

    monkeypatch.setattr(DialogueClassifier, "predictions", fail_at_third)
    assert run_script(predict.main, **flags, input=tmp_path / "one", output=output) == 130
    assert run_script(predict.main, **flags, input=tmp_path / "other", output=output) == 0
    assert output.read_bytes() == (tmp_path / "whole.jsonl").read_bytes()


def test_a_process_without_its_part_is_noticed(tmp_path: Path):
    output = tmp_path / "labels.jsonl"
    for rank, chunks in enumerate((["[1]", "[3]"], ["[2]"])):
        progress = predict.Progress(output, rank, "job")
        for chunk in chunks:
            progress.write(chunk.encode())
        progress.file.close()
    part = predict.part_path(output, 1)
    whole = part.read_bytes()
    for change in (
        part.unlink,
        lambda: part.write_bytes(b"job\n"),
        lambda: part.write_bytes(b"other\n[2]\n"),
    ):
        change()
        with pytest.raises(InputError, match="does not hold all chunks of process 1"):
            predict.merge(output, "job", 2, 3)
        assert not output.exists() and not list(tmp_path.glob(".labels.jsonl.[0-9]*"))
    part.write_bytes(whole)
    predict.merge(output, "job", 2, 3)
    assert output.read_text() == "1\n2\n3\n" and list(tmp_path.iterdir()) == [output]


def test_use_cpu_hides_the_gpu_from_every_model(system: Path, tmp_path: Path, monkeypatch):
    # What torch says on a machine with a GPU; here a model that goes there fails.
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: os.environ["CUDA_VISIBLE_DEVICES"] != "")
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    flags = {"ensemble": system, "input": TEST, "turns": "last", "output": tmp_path / "labels.jsonl"}
    assert run_script(predict.main, **flags, use_cpu=True) == 0


@pytest.mark.parametrize("run", [0, 2])
def test_bf16_is_what_the_run_says_on_any_hardware(system: Path, run: int):
    folder = system.parent / f"bf16-{run}"
    folder.mkdir()
    bundle = json.loads((system / "ensemble.json").read_text())
    bundle["runs"][run]["loader"]["bf16"] = True
    (folder / "ensemble.json").write_text(json.dumps(bundle))
    voter = DialogueClassifier.from_pretrained(folder).voters[run]
    assert getattr(voter, "frozen", voter).bf16


def test_a_base_runs_its_own_code_only_if_it_is_named(system: Path):
    folder = system.parent / "own-code"
    folder.mkdir()
    bundle = json.loads((system / "ensemble.json").read_text())
    for run in bundle["runs"]:
        run["loader"]["trust_remote_code"] = True
    (folder / "ensemble.json").write_text(json.dumps(bundle))
    with pytest.raises(InputError, match="full: team/encoder runs code of its own"):
        DialogueClassifier.from_pretrained(folder, trust_remote_code=["team/decoder"])
    DialogueClassifier.from_pretrained(folder, trust_remote_code=["team/decoder", "team/encoder"])


def test_import_of_the_package_is_cheap():
    program = "import sys, rareturn; assert not {'torch', 'transformers'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=True)


def peak_memory_of_a_prediction(system: Path, source: Path, output: Path) -> int:
    """Bytes, of predict.py in a process of its own, over all turns of the source."""
    program = (
        "import resource, predict; from rareturn.command_line import run; run(predict.main); "
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)"
    )
    words = words_of(ensemble=system, input=source, output=output, use_cpu=True)
    # In the working folder, where the bases are.
    command, env = [sys.executable, "-c", program, *words], os.environ | {"PYTHONPATH": str(ROOT)}
    ended = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr[-3000:]
    return int(ended.stdout.splitlines()[-1])


@pytest.mark.soak
def test_ten_thousand_rows_need_the_memory_of_a_thousand(system: Path, tmp_path: Path):
    dialogues = json.loads(Path(TEST).read_text())
    peaks = []
    for num_rows in (1_000, 10_000):
        source, output = tmp_path / f"{num_rows}.jsonl", tmp_path / f"{num_rows}.out.jsonl"
        written = 0
        with open(source, "w") as file:
            for number in itertools.count():
                row = dialogues[number % len(dialogues)]
                turns = sum(turn["speaker"] == "seeker" for turn in row["dialogue"])
                if written + turns > num_rows:
                    break
                file.write(json.dumps({"id": f"{row['id']}-{number}", "dialogue": row["dialogue"]}) + "\n")
                written += turns
        peaks.append(peak_memory_of_a_prediction(system, source, output))
        assert len(read_lines(output)) == written > num_rows - 50
    print(f"\npeak memory: 1,000 rows {peaks[0] / 2**20:.0f} MiB, 10,000 rows {peaks[1] / 2**20:.0f} MiB")
    assert peaks[1] <= 1.1 * peaks[0]


def test_two_processes_give_the_lines_of_one(system: Path, tmp_path: Path, python: str):
    flags = {"ensemble": system, "input": TEST, "turns": "last", "rows_per_chunk": 6, "use_cpu": True}
    assert run_script(predict.main, **flags, output=tmp_path / "one.jsonl") == 0
    torchrun = [python, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command = [*torchrun, str(ROOT / "predict.py"), *words_of(**flags, output=tmp_path / "two.jsonl")]
    ended = subprocess.run(command, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr[-3000:]
    assert (tmp_path / "two.jsonl").read_bytes() == (tmp_path / "one.jsonl").read_bytes()


def test_as_a_library_and_from_jsonl(system: Path, tmp_path: Path):
    dialogue = [
        {"speaker": "supporter", "text": "How was the week?"},
        {"speaker": "seeker", "text": "Fine, I suppose. Nothing ever changes anyway."},
        {"speaker": "supporter", "text": "What would you like to change?"},
        {"speaker": "seeker", "text": "I might ask my sister to help with the move."},
    ]
    classifier = DialogueClassifier.from_pretrained(str(system))
    both = classifier(dialogue)
    assert [prediction.turn for prediction in both] == [1, 3]
    assert classifier(dialogue, turns="last")[0].label == both[1].label
    (tmp_path / "in.jsonl").write_text(json.dumps({"id": "d1", "dialogue": dialogue}) + "\n")
    output = tmp_path / "out.jsonl"
    assert run_script(predict.main, ensemble=system, input=tmp_path / "in.jsonl", output=output) == 0
    assert [line["label_name"] for line in read_lines(output)] == [
        prediction.label_name for prediction in both
    ]
    assert [line["id"] for line in read_lines(output)] == ["d1#1", "d1#3"]
    (tmp_path / "in.jsonl").write_text(json.dumps({"talk": "d1", "turns": dialogue}) + "\n")
    named = {"dialogue_id_column": "talk", "dialogue_column": "turns", "output": tmp_path / "named.jsonl"}
    assert run_script(predict.main, ensemble=system, input=tmp_path / "in.jsonl", **named) == 0
    assert read_lines(tmp_path / "named.jsonl") == [
        line | {"dialogue_id": "d1"} for line in read_lines(output)
    ]
    with pytest.raises(InputError, match="turn 1 has unknown speaker 'bot'"):
        classifier([{"speaker": "bot", "text": "hello"}])


def test_a_second_machine_sees_what_this_one_sees(system: Path, tmp_path: Path, hub_here, monkeypatch):
    place = system.parent
    where = {"hub_namespace": "team", "hub_name": "sys"}
    push = three_runs(place) | {"output_dir": tmp_path / "pushed", "push_to_hub": True} | where
    assert run_script(ensemble.main, **push) == 2, "a base that is a folder here"
    # The client's functions keep the address that they were imported with.
    monkeypatch.setattr(model_info.__self__, "endpoint", hub_here.url)
    for base in ("team/decoder", "team/encoder"):
        files = {path.name: path for path in (place / base).iterdir() if may_travel(path.name)}
        push_files(base, files, message="Base", kept_in=place / base)
    for run in ("lora", "full"):
        for fold in range(NUM_FOLDS):
            flags = {
                "model_name_or_path": "x",
                "output_dir": place / run,
                "fold": fold,
                "num_folds": NUM_FOLDS,
            }
            assert run_script(run_classification.main, **flags, **where, push_only=True) == 0
    probe = {
        "model_name_or_path": "team/encoder",
        "train_file": TRAIN,
        "test_file": TEST,
        "num_folds": NUM_FOLDS,
        "C": 1,
        "output_dir": place / "probe",
    }
    assert run_script(linear_probe.main, **probe, **where, push_only=True) == 0
    monkeypatch.chdir(tmp_path)
    assert run_script(ensemble.main, **push) == 0

    decisions = []
    for name, reference in (("here", place / "lora"), ("there", "team/sys-oof:lora")):
        output = tmp_path / f"{name}.json"
        flags = {"run": reference, "method": "prior", "repeats": 1, "output": output}
        assert run_script(calibrate.main, **flags) == 0
        decision = json.loads(output.read_text())
        (run,) = decision.pop("runs")
        decisions.append(decision)
    assert decisions[0] == decisions[1] and len(run["revision"]) == 40

    for name, first in (("here", place / "lora"), ("there", "team/sys-oof:lora")):
        flags = {"runs": [first, place / "full"], "method": "argmax", "repeats": 1, "test_file": TEST}
        assert run_script(ensemble.main, **flags, output_dir=tmp_path / f"ensemble-{name}") == 0
    for file in ("prediction.json", "prediction.zip"):
        assert (tmp_path / "ensemble-here" / file).read_bytes() == (
            tmp_path / "ensemble-there" / file
        ).read_bytes()

    for name, reference in (("here", system), ("pushed", tmp_path / "pushed"), ("there", "team/sys")):
        flags = {"ensemble": reference, "input": TEST, "turns": "last", "output": tmp_path / f"{name}.jsonl"}
        assert run_script(predict.main, **flags) == 0
        assert (tmp_path / f"{name}.jsonl").read_bytes() == (tmp_path / "here.jsonl").read_bytes()

    # After the push, without a network: every model and base is still on this disk.
    flags = {
        "ensemble": tmp_path / "pushed",
        "input": TEST,
        "turns": "last",
        "output": tmp_path / "off.jsonl",
    }
    with monkeypatch.context() as offline:
        offline.chdir(place)
        offline.setattr(model_info.__self__, "endpoint", "http://127.0.0.1:9")
        for variable in ("ENDPOINT", "HUGGINGFACE_CO_URL_TEMPLATE"):
            url = getattr(constants, variable).replace(hub_here.url, "http://127.0.0.1:9")
            offline.setattr(constants, variable, url)
        assert run_script(predict.main, **flags) == 0
    assert (tmp_path / "off.jsonl").read_bytes() == (tmp_path / "here.jsonl").read_bytes()

    texts = [turn["text"].encode() for row in json.loads(Path(TRAIN).read_text()) for turn in row["dialogue"]]
    long_texts = {text for text in texts if len(text) > 30}
    for (kind, repo_id), repo in hub_here.repos.items():
        assert repo.private, repo_id
        for path, content in hub_here.files(repo_id, kind).items():
            assert hub_here.writer.encode() not in content, f"{repo_id}/{path} holds the token"
            if path.endswith(".safetensors"):
                content = content[: 1 << 16]  # the header; behind it are numbers
            if not path.endswith(("tokenizer.json", "vocab.txt")):
                assert not any(text in content for text in long_texts), f"{repo_id}/{path} holds dialogue"


def test_refusals(system: Path, tmp_path: Path, capsys):
    (tmp_path / "cut.json").write_text(Path(TEST).read_text()[:9000])
    (tmp_path / "empty.jsonl").write_text("")
    (tmp_path / "wrong.jsonl").write_text('{"id": "x", "dialogue": [{"speaker": "seeker", "text": " "}]}\n')
    half = {"id": "x", "dialogue": [{"speaker": "seeker", "text": "so \ud83d"}]}
    (tmp_path / "half.jsonl").write_text(json.dumps(half) + "\n")
    (tmp_path / "half-id.jsonl").write_text(json.dumps(half | {"id": "\ud83d"}) + "\n")
    bundle = json.loads((system / "ensemble.json").read_text())

    def changed(name: str, change) -> Path:
        """A bundle beside the other one, so that its folders are found, with one thing changed."""
        folder = system.parent / name
        folder.mkdir(exist_ok=True)
        copy = json.loads(json.dumps(bundle))
        change(copy)
        (folder / "ensemble.json").write_text(json.dumps(copy))
        return folder

    cases = [
        (system, tmp_path / "cut.json", "not valid JSON"),
        (system, tmp_path / "empty.jsonl", "no turn of the target speaker 'seeker' to classify"),
        (system, tmp_path / "wrong.jsonl", "x: dialogue: turn 1 is empty"),
        (system, tmp_path / "none.jsonl", "no such file"),
        (tmp_path, TEST, "holds no ensemble.json"),
        ("nowhere", TEST, "no such folder, nor a repo ORG/NAME"),
        (changed("a", lambda b: b.update(schema_version=9)), TEST, "schema_version: Input should be 1"),
        (changed("b", lambda b: b["decision"].update(bias=[0.0])), TEST, "bias: 9 numbers expected"),
        (changed("c", lambda b: b["runs"][0].update(model=None)), TEST, "came without its models"),
        (
            changed("d", lambda b: b["runs"][0]["model"]["folds"][0].update(subfolder="../x")),
            TEST,
            "folds.0.subfolder: String should match pattern",
        ),
        (
            changed("e", lambda b: b["runs"][1]["loader"].update(trust_remote_code=True)),
            TEST,
            "--trust_remote_code",
        ),
        (changed("f", lambda b: b["runs"][1].update(prompt_fingerprint="0")), TEST, "renders rows otherwise"),
        (changed("h", lambda b: b["runs"][2].update(prompt_fingerprint="0")), TEST, "renders rows otherwise"),
        (system, tmp_path / "half.jsonl", "x: dialogue: turn 1 holds half a character"),
        (system, tmp_path / "half-id.jsonl", "id: holds half a character"),
        (
            changed(
                "g",
                lambda b: b["runs"][0]["model"]["folds"][0]["sha256"].update(
                    {"adapter_model.safetensors": "0"}
                ),
            ),
            TEST,
            "its SHA-256 is not that of the ensemble's weights",
        ),
    ]
    for ensemble_dir, source, message in cases:
        output = tmp_path / "out" / "labels.jsonl"
        output.parent.mkdir(exist_ok=True)
        flags = {"ensemble": ensemble_dir, "input": source, "output": output}
        assert run_script(predict.main, **flags) == 2, message
        lines = [line for line in capsys.readouterr().err.splitlines() if "predict.py: error: " in line]
        assert len(lines) == 1 and message in lines[0], (message, lines)
        assert not list(output.parent.iterdir()), message
