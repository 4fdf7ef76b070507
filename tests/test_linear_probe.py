"""linear_probe.py as a user runs it, and probing.py against slow and plain computations of the same things."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from running import run_script, words_of
from sklearn.linear_model import LogisticRegression
from tiny_models import make_tiny_decoder, make_tiny_encoder
from transformers import AutoConfig, AutoModel, AutoTokenizer

import linear_probe
from rareturn.data.label_guide import load_label_guide
from rareturn.data.rendering import Renderer
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


def test_a_run_from_its_command_line_is_whole_and_is_not_done_twice(encoder, tmp_path, capsys):
    run_dir = tmp_path / "probe"
    command = [sys.executable, ROOT / "linear_probe.py", *words(encoder, run_dir, test_file=TEST, seed=7)]
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


def test_a_run_is_pushed_and_read_back(encoder, tmp_path, hub_here, capsys):
    where = {"hub_namespace": "lab", "hub_name": "sys"}
    assert run(encoder, tmp_path / "probe", **where, push_only="true") == 2
    assert "no fold is complete, so there is nothing to push" in capsys.readouterr().err
    assert run(encoder, tmp_path / "probe", test_file=TEST) == 0
    # Neither rows nor a model are needed, and it does not matter what this machine would compute with.
    absent = {"train_file": tmp_path / "absent.json", "bf16": True}
    assert run("./absent", tmp_path / "probe", **absent, **where, push_only="true") == 0
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


def test_encoder_features_are_what_a_plain_loop_gives(encoder, demo):
    rows = demo[:12]
    model, tokenizer = AutoModel.from_pretrained(encoder), AutoTokenizer.from_pretrained(encoder)
    features = frozen_features(encoder, layer=2).extract(rows)
    assert features.shape == (12, 4 * 64) and features.dtype == np.float32
    for row, found in zip(rows, features, strict=True):
        *before, target = [(naive_turn(turn.text, model, tokenizer, 2), turn.speaker) for turn in row.turns]
        history = [vector for vector, speaker in before if speaker == target[1]]
        others = [vector for vector, speaker in before if speaker != target[1]]
        zero = np.zeros(64)
        expected = [
            target[0],
            np.mean([vector for vector, _ in before], axis=0) if before else zero,
            np.mean(history, axis=0) if history else zero,
            others[-1] if others else zero,
        ]
        np.testing.assert_allclose(found, np.concatenate(expected), atol=1e-4)


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
    is_variant = np.zeros(240, dtype=bool)
    options = {"num_labels": 2, "block_size": 60, "weights": "none"}
    candidates = [0.01, 1.0, 100.0, 10_000.0]
    splits = list(inner_folds(labels, groups, is_variant, 0))
    best, losses = choose_C(features, labels, splits, candidates, **options)
    assert best == 0.01
    assert list(losses) == [0.01, 1.0]  # the first that is worse ends the search
    assert losses[0.01] < losses[1.0]
    for train, judged in splits:
        assert not set(groups[train]) & set(groups[judged])
    # Rows split without regard to dialogues would have chosen the loosest head.
    alone = np.array([f"r{number}" for number in range(240)])
    best, _ = choose_C(features, labels, inner_folds(labels, alone, is_variant, 0), candidates, **options)
    assert best >= 100
    assert choose_C(features, labels, splits, [3.0], **options) == (3.0, {})


def test_variants_and_unknown_labels_are_not_judged():
    groups = np.repeat([f"d{number}" for number in range(9)], 4)
    labels = np.tile([0, 0, 1, 1], 9)
    labels[:4] = 2  # a label of one dialogue only
    is_variant = np.tile([False, True], 18)
    judged_rows = []
    for train, judged in inner_folds(labels, groups, is_variant, 0):
        assert is_variant[train].any()
        judged_rows += judged.tolist()
    assert sorted(judged_rows) == [row for row in range(4, 36) if not is_variant[row]]
    with pytest.raises(InputError, match=r"2 training dialogues are too few .*give one --C"):
        list(inner_folds(labels[:8], groups[:8], is_variant[:8], 0))


def test_a_head_file_that_is_none(tmp_path):
    (tmp_path / "head.safetensors").write_bytes(b"no tensors")
    for name in ("head.safetensors", "absent.safetensors"):
        with pytest.raises(InputError, match=f"{name}: cannot read the head"):
            LinearHead.load(tmp_path / name)
