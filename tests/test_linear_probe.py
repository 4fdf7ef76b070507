"""linear_probe.py as a user runs it, and probing.py against slow and plain computations of the same things."""

from __future__ import annotations

import functools
import json
import logging
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import PeftModel
from running import run_script, words_of
from sklearn.linear_model import LogisticRegression
from tiny_models import make_tiny_decoder, make_tiny_encoder
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
)

import ensemble
import linear_probe
import predict
import run_classification
from rareturn.data.label_guide import load_label_guide
from rareturn.data.rendering import LABEL_CUE, Renderer
from rareturn.data.rows import Row, Turn, load_rows
from rareturn.decisions.metrics import scores
from rareturn.decisions.probabilities import softmax
from rareturn.errors import InputError
from rareturn.files import read_json
from rareturn.models import probing
from rareturn.models.loading import find_base_model
from rareturn.models.probing import (
    FrozenFeatures,
    LinearHead,
    choose_C,
    fit_head,
    inner_folds,
)
from rareturn.models.turns import position_limit
from rareturn.runs.folder import metrics_path
from rareturn.runs.reading import read_run

ROOT = Path(__file__).parent.parent
TRAIN, TEST = ROOT / "data/demo/train.json", ROOT / "data/demo/test.json"
GUIDE = load_label_guide("label_guides/dmrs.yaml")
WINDOW = {"max_turns": 30, "max_seq_length": 1024, "window_stride": 10}


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return make_tiny_encoder(tmp_path_factory.mktemp("encoder"), num_hidden_layers=3)


@pytest.fixture(scope="module")
def decoder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return make_tiny_decoder(tmp_path_factory.mktemp("decoder"), num_hidden_layers=3)


@pytest.fixture(scope="module")
def demo() -> list[Row]:
    return load_rows(str(TRAIN), GUIDE)


def words(model: str, output_dir: Path, **flags: object) -> list[str]:
    settings = {"model_name_or_path": model, "train_file": TRAIN, "output_dir": output_dir, "num_folds": 3}
    return words_of(**settings | {"C": [1, 10]} | flags)


def run(model: str, output_dir: Path, **flags: object) -> int:
    """The script in this process, as from its command line; its exit status."""
    return run_script(linear_probe.main, *words(model, output_dir, **flags))


def files_under(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def frozen_features(model: str, **options: object) -> FrozenFeatures:
    settings = {"layer": None, "window": WINDOW, "batch_size": 16, "bf16": False} | options
    return FrozenFeatures(find_base_model(model), GUIDE, **settings)


# ------------------------------------------------------------------------------------------------------ the command line


def test_a_run_from_its_command_line_is_whole_and_is_not_done_twice(python, encoder, tmp_path, capsys):
    run_dir = tmp_path / "probe"
    command = [python, ROOT / "linear_probe.py", *words(encoder, run_dir, test_file=TEST, seed=7)]
    first = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert first.returncode == 0, first.stderr
    made = files_under(run_dir)
    assert sorted(made) == sorted(
        ["run.json", "folds.json", "metrics.json"]
        + [f"{split}/fold-{fold}.parquet" for split in ("oof", "test") for fold in range(3)]
        + [f"fold-{fold}/{name}" for name in ("metrics.json", "head.safetensors") for fold in range(3)]
    )
    made_run = read_run(run_dir, require_test=True)
    assert len(made_run.oof) == 230 and [len(table) for table in made_run.test] == [40, 40, 40]
    assert made_run.info["seed"] == 7 and made_run.info["label_scope"] is None and made_run.name == "probe"
    assert made_run.info["features"] == {"layer": 2, "parts": ["target", "context", "history", "previous"]}
    assert made_run.info["recipe"]["C"] == [1.0, 10.0] and "output_dir" not in made_run.info["recipe"]
    metrics = read_json(run_dir / "metrics.json")
    expected = scores(made_run.oof.label, made_run.oof.logits.argmax(axis=1), 9, range(1, 9))
    assert metrics["macro_f1_positive"] == pytest.approx(expected["macro_f1_positive"])
    assert metrics["seconds"] > 0 and metrics["peak_memory_bytes"] > 1 << 20
    last = first.stdout.splitlines()[-2].split()
    assert last[:3] == ["all", "folds", "230"] and float(last[3]) == round(metrics["macro_f1_positive"], 4)

    # One fold is lost: it alone is made again.
    for name in ("metrics.json", "head.safetensors"):
        (run_dir / "fold-1" / name).unlink()
    capsys.readouterr()
    assert run(encoder, run_dir, test_file=TEST, seed=7) == 0
    assert [line[:6] for line in capsys.readouterr().out.splitlines() if ", C " in line] == ["fold 1"]
    again = files_under(run_dir)
    assert again.keys() == made.keys()
    assert all(again[name] == made[name] for name in made if "fold-1" not in name and name != "metrics.json")
    np.testing.assert_allclose(read_run(run_dir).oof.logits, made_run.oof.logits, atol=0.02)


def test_a_complete_run_is_skipped_and_another_recipe_refused(encoder, tmp_path, capsys):
    assert run(encoder, tmp_path / "run") == 0
    made = files_under(tmp_path / "run")
    capsys.readouterr()
    assert run(encoder, tmp_path / "run") == 0
    assert "all folds" in capsys.readouterr().out
    assert files_under(tmp_path / "run") == made
    assert run(encoder, tmp_path / "run", class_weights="none") == 2
    assert capsys.readouterr().err == (
        f'linear_probe.py: error: {tmp_path}/run/run.json: --class_weights: "balanced" there, "none" asked for; '
        "use another --output_dir\n"
    )
    assert files_under(tmp_path / "run") == made
    # A test file may come later: only its tables are made, with the heads that are there.
    assert run(encoder, tmp_path / "run", test_file=TEST) == 0
    later = files_under(tmp_path / "run")
    assert later.keys() - made.keys() == {f"test/fold-{fold}.parquet" for fold in range(3)}
    assert all(later[name] == made[name] for name in made)


def test_the_same_seed_gives_the_same_bytes(decoder, tmp_path):
    for name in ("a", "b"):
        assert run(decoder, tmp_path / name, run_name="run", max_turns=4, window_stride=4) == 0
    one, other = files_under(tmp_path / "a"), files_under(tmp_path / "b")
    assert one.keys() == other.keys()
    for name in one:
        assert one[name] == other[name] or Path(name).name in ("metrics.json", "run.json"), name


def test_a_head_is_applied_without_this_project_s_training_code(encoder, tmp_path, demo):
    assert run(encoder, tmp_path / "run", test_file=TEST) == 0
    made = read_run(tmp_path / "run")
    test = load_rows(str(TEST), GUIDE, require_labels=False)
    features = frozen_features(encoder).extract(demo + test)
    rows = {row.id: index for index, row in enumerate(demo)}
    for fold in range(3):
        from safetensors.numpy import load_file

        tensors = load_file(tmp_path / "run" / f"fold-{fold}" / "head.safetensors")
        assert {name: str(tensor.dtype) for name, tensor in tensors.items()} == dict.fromkeys(
            ("coef", "intercept", "mean", "scale"), "float32"
        )
        logits = (features - tensors["mean"]) / tensors["scale"] @ tensors["coef"].T + tensors["intercept"]
        table = made.oof.take(np.flatnonzero(made.oof.fold == fold))
        np.testing.assert_allclose(logits[[rows[row_id] for row_id in table.id]], table.logits, atol=1e-4)
        np.testing.assert_allclose(logits[len(demo) :], made.test[fold].logits, atol=1e-4)
        head = LinearHead.load(tmp_path / "run" / f"fold-{fold}" / "head.safetensors")
        metrics = read_json(metrics_path(tmp_path / "run", fold))
        losses = metrics["inner_log_loss"]
        assert head.C == metrics["C"] == float(min(losses, key=losses.get))


@pytest.mark.parametrize("scope", [["1-8"], ["2", "7"]])
def test_a_specialist_learns_its_labels_and_predicts_all_rows(scope, encoder, tmp_path):
    assert run(encoder, tmp_path / "run", label_scope=scope) == 0
    made = read_run(tmp_path / "run")
    labels = list(range(1, 9)) if scope == ["1-8"] else [2, 7]
    assert made.info["label_scope"] == labels
    assert len(made.oof) == 230
    outside = [label for label in range(9) if label not in labels]
    assert (made.oof.logits[:, outside] == -1e4).all()
    assert (made.oof.logits[:, labels] > -100).all()
    assert set(made.oof.logits.argmax(axis=1)) <= set(labels)
    in_scope = np.isin(made.oof.label, labels)
    for fold in range(3):
        metrics = read_json(metrics_path(tmp_path / "run", fold))
        assert metrics["train_rows"] == (in_scope & (made.oof.fold != fold)).sum()
        assert metrics["held_out_rows"] == (made.oof.fold == fold).sum()


def test_variants_are_trained_on_where_their_source_is_and_nowhere_judged(encoder, tmp_path, demo):
    records = json.loads(TRAIN.read_text(encoding="utf-8"))
    variants = []
    for row in records:
        if row["label"] in (2, 5, 8):
            text = f"Well, {row['current_text']}"
            turns = [*row["dialogue"][:-1], {"text": text, "speaker": "seeker"}]
            changes = {
                "id": f"{row['id']}#aug0",
                "current_text": text,
                "dialogue": turns,
                "augmented_from": row["id"],
            }
            variants.append(row | changes)
    augmented = tmp_path / "augmented.jsonl"
    augmented.write_text("".join(json.dumps(row) + "\n" for row in variants))
    assert run(encoder, tmp_path / "run", augmented_file=augmented) == 0
    made = read_run(tmp_path / "run")
    assert sorted(made.oof.id) == sorted(row.id for row in demo)
    for fold in range(3):
        metrics = read_json(metrics_path(tmp_path / "run", fold))
        sources = [row["augmented_from"] for row in variants if made.folds[row["augmented_from"]] != fold]
        assert metrics["train_rows"] == (made.oof.fold != fold).sum() + len(sources)


def test_extra_rows_train_every_fold_and_leave_the_rest_in_the_cache(
    encoder, tmp_path, demo, monkeypatch, caplog
):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    caplog.set_level(logging.INFO)
    examples = tmp_path / "examples.csv"
    lines = [
        f"e{number},supporter,How so?,\ne{number},seeker,Because {number},{number % 9}"
        for number in range(18)
    ]
    examples.write_text("\n".join(["dialogue_id,speaker,text,label", *lines]) + "\n")
    assert run(encoder, tmp_path / "plain", C=[1]) == 0
    computed = [text for text in caplog.messages if "computed once" in text]
    assert any(f": {len(demo)} rows" in text for text in computed)
    caplog.clear()
    assert run(encoder, tmp_path / "extra", extra_train_file=examples, C=[1]) == 0
    computed = [text for text in caplog.messages if "computed once" in text]
    assert len(computed) == 1 and ": 18 rows" in computed[0]
    plain, made = read_run(tmp_path / "plain"), read_run(tmp_path / "extra")
    assert made.folds == plain.folds and made.oof.id == plain.oof.id
    # The head of fold 1 by hand: the features of its training rows and of all examples.
    rows = [row for row in demo if made.folds[row.id] != 1] + load_rows(str(examples), GUIDE)
    assert read_json(metrics_path(tmp_path / "extra", 1))["train_rows"] == len(rows)
    frozen = frozen_features(encoder)
    labels = np.array([row.label for row in rows])
    options = {"num_labels": 9, "block_size": frozen.hidden_size, "weights": "balanced"}
    expected = fit_head(frozen.extract(rows), labels, C=1.0, **options)
    head = LinearHead.load(tmp_path / "extra/fold-1/head.safetensors")
    np.testing.assert_allclose(head.coef, expected.coef, atol=1e-4)


def test_extra_rows_of_a_dialogue_that_is_judged_are_refused(encoder, tmp_path, demo, capsys):
    examples, name = tmp_path / "examples.csv", demo[0].dialogue_id
    examples.write_text(f"dialogue_id,speaker,text,label\n{name},seeker,Fine.,3\nnew,seeker,Fine.,3\n")
    assert run(encoder, tmp_path / "run", extra_train_file=examples) == 2
    why = "is in another file too; extra rows are of other dialogues"
    assert capsys.readouterr().err == f"linear_probe.py: error: {examples}: dialogue {name!r} {why}\n"
    # Rows of the corpus under other ids; a short text may well be said twice.
    text = next(row.turns[-1].text for row in demo if len(row.turns[-1].text) > 60)
    lines = ["dialogue_id,speaker,text,label", f"new,seeker,{demo[0].turns[-1].text[:9]},3"]
    examples.write_text("\n".join([*lines, f'newer,seeker,"{text.upper()}",3', ""]))
    assert run(encoder, tmp_path / "run", extra_train_file=examples) == 2
    assert f"{examples}: row 'newer/0' says what row " in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("flags", "line"),
    [
        ({"train_file": "absent.json"}, "absent.json: no such file"),
        ({"test_file": "absent.json"}, "absent.json: no such file"),
        ({"model_name_or_path": "./absent"}, "./absent: no such model folder"),
        ({"label_scope": ["4"]}, "--label_scope: a classifier needs two labels at least"),
        ({"num_folds": 99}, "99 folds cannot be made of 38 dialogues"),
        ({"C": [1, 0]}, "--C: every value must be a positive number, not [1.0, 0.0]"),
        ({"push_only": "true"}, "--push_only needs --hub_namespace and --hub_name"),
        ({"max_turns": 0}, "--max_turns must be 1 or more, not 0"),
        (
            {"label_guide": "absent.yaml"},
            "absent.yaml: cannot read the label guide: No such file or directory",
        ),
        ({"run_name": "a/b"}, "--run_name 'a/b': letters, digits, '_', '.', '-' only"),
    ],
)
def test_a_mistake_is_one_line_and_leaves_nothing(flags, line, encoder, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert run(encoder, tmp_path / "run", **flags) == 2
    errors = [shown for shown in capsys.readouterr().err.splitlines() if "error" in shown]
    assert len(errors) == 1 and errors[0].startswith(f"linear_probe.py: error: {line}")
    assert list(tmp_path.iterdir()) == []


def test_mistakes_found_after_the_model_is_known(encoder, decoder, tmp_path, capsys):
    assert run(encoder, tmp_path / "run", layer=4) == 2
    assert f"--layer 4: {encoder} has layers 1 to 3\n" in capsys.readouterr().err
    assert run(decoder, tmp_path / "run", pairs="true") == 2
    assert "--pairs: is for encoders; a decoder reads its context anyway\n" in capsys.readouterr().err
    assert run(decoder, tmp_path / "run", max_seq_length=100) == 2
    assert "max_seq_length 100 leaves" in capsys.readouterr().err
    records = json.loads(TRAIN.read_text(encoding="utf-8"))[:24]
    for number, row in enumerate(records):
        row |= {"dialogue_id": f"d{number % 2}", "label": [0, 0, 7, 7][number % 4]}
    (tmp_path / "few.json").write_text(json.dumps(records))
    assert run(encoder, tmp_path / "run", train_file=tmp_path / "few.json", fold_groups="none") == 2
    message = "2 training dialogues are too few to choose among values of C: give one --C\n"
    assert capsys.readouterr().err.endswith(message)
    assert [path.name for path in tmp_path.iterdir()] == ["few.json"]
    assert run(encoder, tmp_path / "run", train_file=tmp_path / "few.json", fold_groups="none", C=3) == 0
    read_run(tmp_path / "run")


def test_a_run_is_pushed_and_read_back(encoder, tmp_path, hub_here, capsys, caplog):
    where = {"hub_namespace": "lab", "hub_name": "sys"}
    assert run(encoder, tmp_path / "probe", **where, push_only="true") == 2
    assert "no fold is complete, so there is nothing to push" in capsys.readouterr().err
    assert run(encoder, tmp_path / "probe", test_file=TEST) == 0
    # Neither rows nor a model are needed, and it does not matter what this machine would compute with.
    absent = {"train_file": tmp_path / "absent.json", "bf16": True}
    caplog.clear()
    assert run("./absent", tmp_path / "probe", **absent, **where, push_only="true") == 0
    assert "others can blend its tables, but not load its models" in caplog.text
    pulled = read_run("lab/sys-oof:probe", require_test=True)
    local = read_run(tmp_path / "probe")
    np.testing.assert_array_equal(pulled.oof.logits, local.oof.logits)


def test_a_test_table_follows_the_rows_of_the_test_file(encoder, tmp_path):
    """Other texts under the same ids: the tables are made again, the heads are not; equal rows give equal bytes."""
    run_dir, changed = tmp_path / "run", tmp_path / "test.json"
    records = json.loads(TEST.read_text(encoding="utf-8"))
    changed.write_text(json.dumps(records))
    assert run(encoder, run_dir, test_file=changed) == 0
    first = files_under(run_dir)
    for record in records:
        record["current_text"] = record["dialogue"][-1]["text"] = "Something else altogether."
    changed.write_text(json.dumps(records))
    assert run(encoder, run_dir, test_file=changed) == 0
    second = files_under(run_dir)
    assert {name for name in first if first[name] != second[name]} == {
        f"test/fold-{fold}.parquet" for fold in range(3)
    }
    assert run(encoder, run_dir, test_file=TEST) == 0
    assert files_under(run_dir) == first
    (run_dir / "test/fold-2.parquet").write_bytes(second["test/fold-2.parquet"])
    with pytest.raises(InputError, match="test fold 2: made for other texts than fold 0"):
        read_run(run_dir)


# --------------------------------------------------------------------------------------------------------- features, head


def naive_turn(text: str, model: torch.nn.Module, tokenizer: object, layer: int) -> np.ndarray:
    """One text alone through the whole model: the mean over its tokens at a layer."""
    inputs = tokenizer(" ".join(text.split()), return_tensors="pt")
    with torch.no_grad():
        return model(**inputs, output_hidden_states=True).hidden_states[layer][0].mean(0).numpy()


def naive_row(row: Row, turn_vector: Callable[[str], np.ndarray]) -> np.ndarray:
    """The four vectors of a row."""
    *before, target = [(turn_vector(turn.text), turn.speaker) for turn in row.turns]
    history = [vector for vector, speaker in before if speaker == target[1]]
    others = [vector for vector, speaker in before if speaker != target[1]]
    zero = np.zeros(64)
    vectors = [
        target[0],
        np.mean([vector for vector, _ in before], axis=0) if before else zero,
        np.mean(history, axis=0) if history else zero,
        others[-1] if others else zero,
    ]
    return np.concatenate(vectors)


def test_encoder_features_are_what_a_plain_loop_gives(encoder, demo):
    rows = demo[:12]
    model, tokenizer = AutoModel.from_pretrained(encoder), AutoTokenizer.from_pretrained(encoder)
    features = frozen_features(encoder, layer=2).extract(rows)
    assert features.shape == (12, 4 * 64) and features.dtype == np.float32
    for row, found in zip(rows, features, strict=True):
        expected = naive_row(row, lambda text: naive_turn(text, model, tokenizer, 2))
        np.testing.assert_allclose(found, expected, atol=1e-4)


def test_pairs_give_the_target_as_it_stands_beside_its_context(encoder, demo):
    rows, window = demo[:12], WINDOW | {"max_seq_length": 60}
    model, tokenizer = AutoModel.from_pretrained(encoder), AutoTokenizer.from_pretrained(encoder)
    features = frozen_features(encoder, layer=2, pairs=True, window=window).extract(rows)
    assert features.shape == (12, 2 * 64)
    rendered = Renderer(tokenizer, GUIDE, is_encoder=True, **window).render(rows)
    assert any(row.segment_ids.any() for row in rendered)
    for row, found in zip(rendered, features, strict=True):
        with torch.no_grad():
            outputs = model(torch.tensor(row.input_ids)[None].long(), output_hidden_states=True)
        target = outputs.hidden_states[2][0, : int((row.segment_ids == 0).sum())]
        np.testing.assert_allclose(found, torch.cat([target.mean(0), target.amax(0)]), atol=1e-4)


def test_a_row_sees_its_window_only(encoder):
    turns = tuple(Turn(f"word number {number}", ("seeker", "supporter")[number % 2]) for number in range(21))
    long, short = Row("a", "d", turns, 7), Row("b", "d", turns[-5:], 7)
    window = WINDOW | {"max_turns": 5, "window_stride": 5}
    features = frozen_features(encoder, window=window).extract([long, short])
    np.testing.assert_array_equal(features[0], features[1])


def test_each_distinct_turn_is_encoded_once(encoder, demo, monkeypatch):
    encoded = []
    real = probing.keep_layers

    def watch(backbone, count):
        real(backbone, count)
        backbone.register_forward_pre_hook(
            lambda module, args, inputs: encoded.append(inputs["input_ids"].shape[0]), with_kwargs=True
        )

    monkeypatch.setattr(probing, "keep_layers", watch)
    frozen_features(encoder).extract(demo)
    texts = {" ".join(turn.text.split()) for row in demo for turn in row.turns[-30:]}
    assert sum(encoded) == len(texts) < sum(len(row.turns) for row in demo) / 3
    assert max(encoded) == 16


def test_a_turn_beyond_the_model_s_positions_loses_its_beginning(encoder, caplog):
    long = " ".join(["morning"] * 600 + ["evening", "sad"])
    rows = [Row("a", "d", (Turn(long, "seeker"),), 7)]
    features = frozen_features(encoder).extract(rows)
    assert caplog.messages == ["1 turns are longer than 512 tokens and lost their beginning"]
    end = [Row("b", "d", (Turn(" ".join(long.split()[-510:]), "seeker"),), 7)]
    np.testing.assert_allclose(features, frozen_features(encoder).extract(end), atol=1e-5)


def test_roberta_has_two_positions_less_than_its_table():
    settings = {"vocab_size": 9, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    config = {**settings, "intermediate_size": 8, "max_position_embeddings": 20}
    roberta = AutoModel.from_config(AutoConfig.for_model("roberta", **config, pad_token_id=1))
    limit = position_limit(roberta)
    assert limit == 18
    roberta(torch.full((1, limit), 5))
    with pytest.raises((IndexError, RuntimeError)):
        roberta(torch.full((1, limit + 1), 5))
    bert = AutoModel.from_config(AutoConfig.for_model("bert", **config))
    assert position_limit(bert) == 20


@pytest.mark.parametrize("layer", [2, 3])
def test_decoder_features_are_those_of_rows_alone(layer, decoder, demo):
    rows = [row for row in demo if row.dialogue_id in {demo[0].dialogue_id, demo[30].dialogue_id}]
    features = frozen_features(decoder, layer=layer).extract(rows)
    tokenizer = AutoTokenizer.from_pretrained(decoder)
    model = AutoModel.from_pretrained(decoder)
    for row, rendered, found in zip(
        rows, Renderer(tokenizer, GUIDE, is_encoder=False).render(rows), features, strict=True
    ):
        ids = torch.from_numpy(rendered.input_ids.astype(np.int64))[None]
        with torch.no_grad():
            hidden = model(ids, output_hidden_states=True).hidden_states[layer][0, -1]
            # The last norm comes after whichever layer is the last; transformers gives the top layer's normed.
            expected = hidden if layer == 3 else model.norm(hidden)
        np.testing.assert_allclose(found, expected.numpy(), atol=1e-4, err_msg=row.id)


def test_the_default_layer_is_two_thirds_up(encoder, tmp_path):
    assert frozen_features(encoder).layer == 2
    assert frozen_features(make_tiny_encoder(tmp_path, num_hidden_layers=6)).layer == 4
    assert frozen_features(make_tiny_encoder(tmp_path, num_hidden_layers=1)).layer == 1


def toy() -> tuple[np.ndarray, np.ndarray]:
    """120 rows of three labels; two blocks of three features of unlike size, off centre."""
    rng = np.random.default_rng(0)
    labels = rng.choice(3, size=120, p=[0.6, 0.3, 0.1])
    features = rng.normal(size=(120, 6)) * [1, 1, 1, 50, 50, 50] + labels[:, None] * [1, 0, 0, 0, 50, 0]
    return features.astype(np.float32) + 7, labels


@pytest.mark.parametrize("weights", ["balanced", "none"])
def test_the_head_is_scikit_learn_s_on_scaled_blocks(weights):
    features, labels = toy()
    head = fit_head(features, labels, num_labels=5, block_size=3, weights=weights, C=2.0)
    centred = features.astype(np.float64) - features.mean(axis=0, dtype=np.float64)
    scaled = [
        block / np.sqrt((block**2).sum(axis=1).mean()) / np.sqrt(2) for block in np.split(centred, 2, axis=1)
    ]
    scaled = np.concatenate(scaled, axis=1)
    assert (scaled**2).sum(axis=1).mean() == pytest.approx(1)
    balanced = "balanced" if weights == "balanced" else None
    model = LogisticRegression(C=2.0, class_weight=balanced, max_iter=2000, tol=1e-8).fit(scaled, labels)
    logits = head.logits(features)
    assert logits.dtype == np.float32 and logits.shape == (120, 5)
    np.testing.assert_allclose(logits[:, :3], model.decision_function(scaled), atol=0.02)
    assert (logits[:, 3:] == -1e4).all()
    np.testing.assert_allclose(softmax(logits)[:, :3], model.predict_proba(scaled), atol=2e-3)


def test_two_labels_give_two_natural_logits():
    features, labels = toy()
    labels = np.where(labels > 0, 2, 0)
    head = fit_head(features, labels, num_labels=3, block_size=1, weights="none", C=1.0)
    scaled = (features - head.mean) / head.scale
    np.testing.assert_allclose(scaled.var(axis=0), np.full(6, 1 / 6), rtol=1e-4)
    model = LogisticRegression(C=1.0, max_iter=2000).fit(scaled, labels)
    probabilities = softmax(head.logits(features))
    np.testing.assert_allclose(probabilities[:, [0, 2]], model.predict_proba(scaled), atol=2e-3)
    assert probabilities[:, 1].max() == 0


def test_one_label_only_is_refused_and_a_constant_feature_is_not():
    features, labels = toy()
    features[:, :3] = 4.0
    head = fit_head(features, labels, num_labels=3, block_size=3, weights="none", C=1.0)
    assert np.isfinite(head.logits(features)).all()
    with pytest.raises(InputError, match="all 120 training rows have label 1"):
        fit_head(features, labels * 0 + 1, num_labels=3, block_size=3, weights="none", C=1.0)


def test_C_is_chosen_on_dialogues_that_the_head_has_not_seen():
    """Features that name the dialogue fit the rows they were trained on and tell nothing of others."""
    rng = np.random.default_rng(3)
    groups = np.repeat([f"d{number}" for number in range(40)], 6)
    labels = np.repeat(rng.integers(2, size=40), 6)
    features = np.repeat(rng.normal(size=(40, 60)), 6, axis=0).astype(np.float32)
    may_judge = np.ones(240, dtype=bool)
    options = {"num_labels": 2, "block_size": 60, "weights": "none"}
    candidates = [0.01, 1.0, 100.0, 10_000.0]
    splits = list(inner_folds(labels, groups, may_judge, 0))
    best, losses = choose_C(features, labels, splits, candidates, **options)
    assert best == 0.01
    assert list(losses) == [0.01, 1.0]  # the first that is worse ends the search
    assert losses[0.01] < losses[1.0]
    for train, judged in splits:
        assert not set(groups[train]) & set(groups[judged])
    # Rows split without regard to dialogues would have chosen the loosest head.
    alone = np.array([f"r{number}" for number in range(240)])
    best, _ = choose_C(features, labels, inner_folds(labels, alone, may_judge, 0), candidates, **options)
    assert best >= 100
    assert choose_C(features, labels, splits, [3.0], **options) == (3.0, {})


def test_rows_that_only_train_and_unknown_labels_are_not_judged():
    groups = np.repeat([f"d{number}" for number in range(9)], 4)
    labels = np.tile([0, 0, 1, 1], 9)
    labels[:4] = 2  # a label of one dialogue only
    may_judge = np.tile([True, False], 18)
    judged_rows = []
    for train, judged in inner_folds(labels, groups, may_judge, 0):
        assert not may_judge[train].all()
        judged_rows += judged.tolist()
    assert sorted(judged_rows) == [row for row in range(4, 36) if may_judge[row]]
    with pytest.raises(InputError, match=r"2 training dialogues are too few .*give one --C"):
        list(inner_folds(labels[:8], groups[:8], may_judge[:8], 0))


def test_a_head_file_that_is_none(tmp_path):
    (tmp_path / "head.safetensors").write_bytes(b"no tensors")
    for name in ("head.safetensors", "absent.safetensors"):
        with pytest.raises(InputError, match=f"{name}: cannot read the head"):
            LinearHead.load(tmp_path / name)


# ------------------------------------------------------------------------------------------------------ adapted features

KINDS = {
    "decoder": {"lora_r": 4, "lora_target_modules": ["q_proj", "v_proj"]},
    "label tokens": {"lora_r": 4, "lora_target_modules": ["q_proj", "v_proj"], "head": "label_tokens"},
    "encoder": {"lora_r": 4, "lora_target_modules": ["query", "value"]},
    "turns": {"tuning": "full", "pooling": "turns"},
}


@pytest.fixture(scope="module")
def few(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Flags of the rows of eight dialogues, with labels in turn so that no fold lacks one, and of a few test rows."""
    place = tmp_path_factory.mktemp("few")
    train, test = (json.loads(path.read_text(encoding="utf-8")) for path in (TRAIN, TEST))
    dialogues = list(dict.fromkeys(row["dialogue_id"] for row in train))[:8]
    train = [row for row in train if row["dialogue_id"] in dialogues]
    train = [row | {"label": number % 9} for number, row in enumerate(train)]
    rows = {"train_file": train, "test_file": test[:6]}
    for name, content in rows.items():
        (place / f"{name}.json").write_text(json.dumps(content))
    return {name: place / f"{name}.json" for name in rows}


@pytest.fixture(scope="module")
def trained(encoder: str, decoder: str, few: dict, tmp_path_factory: pytest.TempPathFactory):
    """kind -> the folder of a trained run of two folds."""
    place = tmp_path_factory.mktemp("trained")

    @functools.cache
    def of_kind(kind: str) -> Path:
        model = encoder if kind in ("encoder", "turns") else decoder
        how = {
            "num_train_epochs": 1,
            "learning_rate": 2e-2,
            "per_device_train_batch_size": 8,
        }
        window = {"max_turns": 4, "window_stride": 4, "max_seq_length": 700 if model == decoder else 40}
        flags = {
            "model_name_or_path": model,
            "train_file": few["train_file"],
            "num_folds": 2,
            "bf16": False,
            **how,
            **window,
        }
        for fold in range(2):
            os.environ.pop("TENSORBOARD_LOGGING_DIR", None)
            words = flags | KINDS[kind] | {"output_dir": place / kind.split()[0], "fold": fold}
            assert run_script(run_classification.main, **words) == 0
        return place / kind.split()[0]

    return of_kind


def adapted(run_dir: Path, output_dir: Path, **flags: object) -> int:
    settings = {"adapter": run_dir, "output_dir": output_dir, "num_folds": 2, "C": 1}
    return run_script(linear_probe.main, **settings | flags)


def naive_features(kind: str, base: str, folder: Path, rows: list[Row]) -> np.ndarray:
    """What the fold's model alone makes of each row at its last layer, a row or turn at a time."""
    tokenizer = AutoTokenizer.from_pretrained(base)
    if kind in ("encoder", "turns"):
        if kind == "turns":
            model = AutoModelForSequenceClassification.from_pretrained(folder).encoder.eval()
        else:
            base_model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=9)
            model = PeftModel.from_pretrained(base_model, folder).eval().get_base_model().bert
        tokenizer.truncation_side = "left"
        tokenize = functools.partial(tokenizer, truncation=True, max_length=40)
        of_turn = functools.cache(lambda text: naive_turn(text, model, tokenize, -1))
        rows = [Row(row.id, row.dialogue_id, row.turns[-4:], row.label) for row in rows]
        return np.stack([naive_row(row, of_turn) for row in rows]).astype(np.float32)
    by_tokens = kind == "label tokens"
    auto = AutoModelForCausalLM if by_tokens else AutoModelForSequenceClassification
    base_model = auto.from_pretrained(base, **({} if by_tokens else {"num_labels": 9}))
    model = PeftModel.from_pretrained(base_model, folder).eval()
    window = {"max_turns": 4, "window_stride": 4, "max_seq_length": 700}
    renderer = Renderer(tokenizer, GUIDE, is_encoder=False, cue=LABEL_CUE if by_tokens else "", **window)
    found = []
    for row in renderer.render(rows):
        ids = torch.from_numpy(row.input_ids.astype(np.int64))[None]
        with torch.no_grad():
            hidden = model(input_ids=ids, output_hidden_states=True).hidden_states
        found.append(hidden[-1][0, -1].numpy())
    return np.stack(found)


@pytest.mark.parametrize("kind", KINDS)
def test_adapted_features_come_from_the_folds_own_model(
    kind, trained, encoder, decoder, few, tmp_path, monkeypatch
):
    is_encoder, run_dir = kind in ("encoder", "turns"), trained(kind)
    assert adapted(run_dir, tmp_path / "probe", **few) == 0
    made = read_run(tmp_path / "probe", require_test=True)
    assert made.info["features"]["layer"] == (2 if kind == "turns" else 3)
    of_id = {row.id: row for row in load_rows(str(few["train_file"]), GUIDE)}
    rows, folds = [of_id[row_id] for row_id in made.oof.id], made.oof.fold
    test, labels = load_rows(str(few["test_file"]), GUIDE, require_labels=False), made.oof.label
    for fold in range(2):
        base = encoder if is_encoder else decoder
        features = naive_features(kind, base, run_dir / f"fold-{fold}/adapter", rows + test)
        train = np.flatnonzero(folds != fold)
        fitting = {"num_labels": 9, "block_size": 64 if is_encoder else 1, "weights": "balanced", "C": 1.0}
        logits = fit_head(features[train], labels[train], **fitting).logits(features)
        held_out = logits[np.flatnonzero(folds == fold)]
        assert np.ptp(held_out, axis=0).mean() > 1
        np.testing.assert_allclose(made.oof.take(np.flatnonzero(folds == fold)).logits, held_out, atol=0.02)
        np.testing.assert_allclose(made.test[fold].logits, logits[len(rows) :], atol=0.02)
    monkeypatch.setattr(FrozenFeatures, "load", None)  # another head needs no pass of any of the models
    assert adapted(run_dir, tmp_path / "again", **few, class_weights="none") == 0


@pytest.mark.parametrize("kind", ["decoder", "turns"])
def test_an_adapted_run_is_blended_and_predicts(kind, trained, few, tmp_path):
    shutil.copytree(trained(kind), tmp_path / "trained")
    assert adapted(tmp_path / "trained", tmp_path / "probe", **few) == 0
    shutil.rmtree(tmp_path / "trained")  # the probe holds what it needs
    flags = {"runs": tmp_path / "probe", "method": "prior", "repeats": 1, "test_file": few["test_file"]}
    assert run_script(ensemble.main, **flags, output_dir=tmp_path / "blend") == 0
    output, temperature = tmp_path / "labels.jsonl", read_json(tmp_path / "blend/ensemble.json")["decision"]
    flags = {"ensemble": tmp_path / "blend", "input": few["test_file"], "turns": "last", "output": output}
    assert run_script(predict.main, **flags) == 0
    lines, made = [json.loads(line) for line in output.open()], read_run(tmp_path / "probe")
    expected = np.mean([softmax(table.logits / temperature["temperature"]) for table in made.test], axis=0)
    said = np.array([list(line["probabilities"].values()) for line in lines])
    np.testing.assert_allclose(said, expected, atol=1e-4)


def test_a_run_that_does_not_fit_is_refused_in_one_line(trained, few, tmp_path, capsys):
    run_dir, probe = trained("encoder"), tmp_path / "probe"
    assert adapted(run_dir, probe, **few) == 0
    records = json.loads(few["train_file"].read_text(encoding="utf-8"))
    records[0]["dialogue"][-1]["text"] = records[0]["current_text"] = "Something else altogether."
    (tmp_path / "changed.json").write_text(json.dumps(records))
    other = tmp_path / "other"
    refused = {
        "folds: not those": {"fold_seed": 7},
        "rows: not those": {"train_file": tmp_path / "changed.json"},
        "--extra_train_file: not those": {"extra_train_file": ROOT / "label_guides/dmrs_examples.csv"},
        "--dtype: float32 in the run of --adapter; leave the flag out": {"dtype": "bfloat16"},
        "--max_turns: 4 in the run": {"max_turns": 5},
        "not a run of run_classification.py": {"adapter": probe},
        "--model_name_or_path is missing": {"adapter": None},
        "probe/run.json: the models of --adapter": {"adapter": other, "output_dir": probe},
    }
    shutil.copytree(run_dir, other)
    shutil.copy(other / "fold-0/adapter/adapter_model.safetensors", other / "fold-1/adapter")
    for problem, flags in refused.items():
        capsys.readouterr()
        assert adapted(**{"run_dir": run_dir, "output_dir": tmp_path / "new"} | few | flags) == 2
        errors = capsys.readouterr().err
        assert problem in errors and len(errors.splitlines()) == 1 and not (tmp_path / "new").exists()
