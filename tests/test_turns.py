"""`--pooling turns`: the probe's vectors, trained; against plain loops over rows and turns, and as a user runs it."""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
import pytest
import torch
from running import run_script, words_of
from tiny_models import make_tiny_decoder, make_tiny_encoder
from transformers import AutoConfig, AutoModel, AutoModelForSequenceClassification

import ensemble
import linear_probe
import predict
import run_classification
from rareturn import DialogueClassifier
from rareturn.data.label_guide import load_label_guide
from rareturn.data.rows import Row, Turn, load_rows
from rareturn.errors import InputError
from rareturn.models import turns
from rareturn.models.heads import TrunkMemory, TurnClassifier, TurnConfig
from rareturn.models.inference import predict_logits
from rareturn.models.layers import freeze_trunk, keep_layers, layer_list
from rareturn.models.loading import (
    find_base_model,
    load_classifier,
    load_tokenizer,
    load_trained,
    trunk_layers,
)
from rareturn.models.probing import FrozenFeatures
from rareturn.models.turns import TurnBatches, TurnRenderer, share_layers, share_turns, turn_states
from rareturn.runs.tables import read_table

ROOT = Path(__file__).parent.parent
TRAIN, TEST = str(ROOT / "data/demo/train.json"), str(ROOT / "data/demo/test.json")
GUIDE = load_label_guide("label_guides/dmrs.yaml")
WINDOW = {"max_turns": 6, "max_seq_length": 24, "window_stride": 6}
FLAGS = WINDOW | {"train_file": TRAIN, "num_folds": 3, "pooling": "turns"}


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return make_tiny_encoder(tmp_path_factory.mktemp("encoder"), num_hidden_layers=6)


@pytest.fixture(scope="module")
def demo() -> list[Row]:
    return load_rows(TRAIN, GUIDE)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache/rareturn/trunk"


def classifier(encoder: str, trainable_layers: int | None = None) -> TurnClassifier:
    base = find_base_model(encoder, pooling="turns")
    torch.manual_seed(1)
    model = load_classifier(base, GUIDE.names, 0).eval()
    if cut := trunk_layers(base, trainable_layers):
        freeze_trunk(model, cut)
    torch.nn.init.normal_(model.classifier.weight)
    return model


def render(encoder: str, rows: list[Row]) -> list:
    base = find_base_model(encoder, pooling="turns")
    return TurnRenderer(base, load_tokenizer(base), WINDOW).render(rows)


def gradients(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None}


def assert_close(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name in expected:
        scale = max(expected[name].abs().max(), max(value.abs().max() for value in expected.values()) * 1e-2)
        assert (found[name] - expected[name]).abs().max() <= 1e-5 * scale, name


# ------------------------------------------------------------------------------------------------------ the same numbers


def test_the_vectors_are_the_probe_s(encoder, demo):
    features = FrozenFeatures(find_base_model(encoder), GUIDE, None, WINDOW, 16, bf16=False).extract(demo)
    with torch.inference_mode():
        vectors = classifier(encoder).vectors(**TurnBatches().collate(render(encoder, demo))).numpy()
    assert features.std() > 0.1 and vectors.shape == (len(demo), 4 * 64)
    np.testing.assert_allclose(vectors, features, atol=1e-5, rtol=0)


def test_logits_and_gradients_are_those_of_a_plain_loop_over_rows_and_their_turns(encoder, demo):
    rows, model = demo[:12], classifier(encoder)
    tokenizer, labels = load_tokenizer(find_base_model(encoder)), torch.tensor([row.label for row in rows])
    tokenizer.truncation_side = "left"

    def embed(turn: Turn) -> torch.Tensor:
        limit = {"truncation": True, "max_length": WINDOW["max_seq_length"]}
        inputs = tokenizer(" ".join(turn.text.split()), return_tensors="pt", **limit)
        return model.encoder(**inputs).last_hidden_state[0].mean(0)

    logits = []
    for row in rows:
        *before, target = row.turns[-WINDOW["max_turns"] :]
        own = [turn for turn in before if turn.speaker == target.speaker]
        others = [turn for turn in before if turn.speaker != target.speaker][-1:]
        parts = [[target], before, own, others]
        vectors = [
            torch.stack([embed(turn) for turn in part]).mean(0) if part else torch.zeros(64) for part in parts
        ]
        logits.append(model.classifier(torch.cat(vectors)))
        torch.nn.functional.cross_entropy(logits[-1], labels[len(logits) - 1]).backward()
    expected = {name: gradient.clone() for name, gradient in gradients(model).items()}
    model.zero_grad()
    found = model(**TurnBatches().collate(render(encoder, rows))).logits
    torch.nn.functional.cross_entropy(found, labels, reduction="sum").backward()
    assert (found - torch.stack(logits)).abs().max() <= 1e-5 * found.abs().max()
    assert "encoder.embeddings.word_embeddings.weight" in expected and len(expected) > 60
    assert_close(gradients(model), expected)


def test_logits_do_not_depend_on_the_rows_of_a_batch(encoder, demo):
    model, rendered = classifier(encoder), render(encoder, demo)
    with torch.inference_mode():
        together = model(**TurnBatches().collate(rendered)).logits.numpy()
        alone = np.concatenate([model(**TurnBatches().collate([row])).logits for row in rendered])
    for tokens in (100, 1000):
        batched = predict_logits(model, TurnBatches(tokens_per_batch=tokens), demo, rendered)
        np.testing.assert_allclose(batched, together, atol=1e-5, rtol=1e-5)
    np.testing.assert_allclose(alone, together, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("architecture", ["bert", "mpnet", "roberta", "electra", "deberta-v2", "modernbert"])
def test_frozen_layers_see_a_turn_once_and_change_nothing(architecture):
    """Whatever a layer returns: hidden states, or a tuple that begins with them."""
    sizes = {
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "pad_token_id": 1,
    }
    config = AutoConfig.for_model(architecture, vocab_size=99, **sizes)
    if architecture == "deberta-v2":
        config.update(
            {"relative_attention": True, "norm_rel_ebd": "layer_norm", "pos_att_type": ["p2c", "c2p"]}
        )
    models = []
    for _ in range(2):
        torch.manual_seed(0)
        models.append(TurnClassifier(TurnConfig(config, num_labels=3)).eval())
    plain, remembering = models
    for weight in plain.encoder.parameters():
        weight.data.normal_(std=0.2)
    remembering.load_state_dict(plain.state_dict())
    freeze_trunk(remembering, 2)
    TrunkMemory(remembering.encoder, layer_list(remembering.encoder)[:2], {}, keep=True)
    remembering.train()  # the trunk has no dropout; the layers above have none here
    for layer in layer_list(remembering.encoder)[2:]:
        for module in layer.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
    computed = Counter()
    for layer in [module for module in remembering.encoder.modules() if isinstance(module, torch.nn.Linear)]:
        layer.register_forward_hook(lambda layer, args, output: computed.update([layer]))
    rng = np.random.default_rng(0)
    turns = [rng.integers(5, 99, length) for length in (9, 8, 5, 3, 3, 2)]

    def batch(*wanted: int) -> dict[str, torch.Tensor]:
        chosen = [torch.from_numpy(turns[index]) for index in wanted]
        ids = torch.nn.utils.rnn.pad_sequence(chosen, batch_first=True, padding_value=1)
        mask = torch.nn.utils.rnn.pad_sequence([torch.ones_like(turn) for turn in chosen], batch_first=True)
        members = torch.arange(len(wanted)).repeat(2)
        return {"input_ids": ids, "attention_mask": mask, "members": members, "starts": torch.arange(4)}

    for wanted in ((0, 1, 2, 3), (2, 3, 4, 5), (0, 1, 4, 5), (0, 2, 3, 5)):
        computed.clear()
        results = []
        for model in models:
            model.zero_grad()
            logits = model(**batch(*wanted)).logits
            torch.nn.functional.cross_entropy(logits, torch.tensor([1]), reduction="sum").backward()
            results.append((logits, gradients(model)))
        (logits, whole), (again, upper) = results
        assert (logits - again).abs().max() <= 1e-5 * logits.abs().max()
        assert 10 < len(upper) < len(whole)
        assert_close(upper, {name: whole[name] for name in upper})
        counts = sorted(computed.values())
    # All turns of the last two batches were known: only the upper half of the layers computed anything.
    linear = sum(isinstance(module, torch.nn.Linear) for module in remembering.encoder.modules())
    assert len(counts) <= linear / 2 + 2
    with torch.inference_mode():
        np.testing.assert_allclose(
            models[0](**batch(1, 2)).logits, models[1](**batch(1, 2)).logits, atol=1e-4
        )


# ----------------------------------------------------------------------------------------------------- rows and batches


def test_a_batch_holds_each_distinct_turn_once_longest_first(encoder, demo):
    rendered = render(encoder, demo)
    turns, members, starts = share_turns(rendered)
    texts = {" ".join(turn.text.split()) for row in demo for turn in row.turns[-6:]}
    assert len(turns) == len({tuple(ids) for ids in turns}) <= len(texts)
    assert [len(ids) for ids in turns] == sorted(map(len, turns), reverse=True)
    parts = np.split(members.numpy(), starts.numpy()[1:])
    assert len(parts) == 4 * len(demo)
    for row, part in zip(rendered, parts[::4], strict=True):
        assert [turns[place].tolist() for place in part] == [row.turns[-1].tolist()]


def test_rows_of_a_dialogue_share_a_step_and_every_row_has_one(encoder, demo):
    rendered = render(encoder, demo)
    for passes in (1, 3):
        plan = TurnBatches(16, passes, 1000, num_epochs=2).plan(demo, rendered, seed=0)
        for epoch in (0, 1):
            steps = plan(epoch)
            assert all(len(step) == passes and all(step) for step in steps)
            batches = [batch for step in steps for batch in step]
            assert sorted(index for batch in batches for index in batch) == list(range(len(demo)))
            assert all(
                sum(map(len, share_turns([rendered[i] for i in batch])[0])) <= 1000 for batch in batches
            )
            steps_of = defaultdict(set)
            for number, batch in enumerate(batches):
                for index in batch:
                    steps_of[demo[index].dialogue_id].add(number)
            assert all(len(numbers) == 1 for numbers in steps_of.values())
        assert plan(0) != plan(1)


def test_a_dialogue_over_the_budget_is_split(encoder):
    turns = tuple(
        Turn(f"word number {number} of many", ("seeker", "supporter")[number % 2]) for number in range(40)
    )
    rows = [Row(str(place), "d", turns[: place + 1], 0) for place in range(0, 40, 2)]
    rendered = render(encoder, rows)
    budget = 2 * max(map(len, rendered))
    batches = TurnBatches(tokens_per_batch=budget).prediction_batches(rows, rendered)
    assert len(batches) > 1 and sorted(index for batch in batches for index in batch) == list(range(20))
    for batch in batches:
        assert sum(map(len, share_turns([rendered[index] for index in batch])[0])) <= budget


# ------------------------------------------------------------------------------------------------------------- the script


def test_pairs_are_cut_to_the_positions_that_an_encoder_has(tmp_path: Path, caplog):
    """1,024 tokens are the default, and most encoders have positions for 512."""
    model = make_tiny_encoder(tmp_path / "encoder", max_position_embeddings=40)
    flags = {
        "train_file": "data/demo/train.json",
        "label_guide": "data/demo/label_guide.yaml",
        "num_folds": 2,
    }
    flags |= {"model_name_or_path": model, "pairs": True, "C": 1}
    assert run_script(linear_probe.main, **flags, output_dir=tmp_path / "default") == 0
    assert f"{model} takes 40 tokens: rows are cut there" in caplog.text
    caplog.clear()
    assert run_script(linear_probe.main, **flags, output_dir=tmp_path / "forty", max_seq_length=40) == 0
    assert "rows are cut" not in caplog.text
    one, other = (read_table(tmp_path / name / "oof/fold-0.parquet") for name in ("default", "forty"))
    np.testing.assert_array_equal(one.logits, other.logits)


@pytest.mark.parametrize("tuning", ["full", "lora"])
def test_a_saved_model_gives_the_oof_logits(encoder, demo, tmp_path, tuning, capsys):
    lora = (
        {"lora_r": 4, "lora_dropout": 0, "lora_target_modules": ["query", "value"]}
        if tuning == "lora"
        else {}
    )
    flags = FLAGS | {
        "model_name_or_path": encoder,
        "tuning": tuning,
        "learning_rate": 3e-3,
        "num_train_epochs": 2,
    }
    flags |= {"head_init": "probe", "trainable_layers": 2, "output_dir": tmp_path / "run"} | lora
    assert run_script(run_classification.main, **flags) == 0, capsys.readouterr().err
    table, adapter = read_table(tmp_path / "run/oof/fold-0.parquet"), tmp_path / "run/fold-0/adapter"
    info = json.loads((tmp_path / "run/run.json").read_text())
    assert info["loader"]["pooling"] == "turns" and info["prompt_fingerprint"] is None
    by_id = {row.id: row for row in demo}
    rows = [by_id[name] for name in table.id]
    base = find_base_model(encoder, pooling="turns")
    loaded = [load_trained(base, adapter, GUIDE.names, 0)]
    if tuning == "full":
        config = json.loads((adapter / "config.json").read_text())
        assert config["model_type"] == "turn_classifier" and config["encoder"]["num_hidden_layers"] == 4
        loaded.append(AutoModelForSequenceClassification.from_pretrained(adapter))
        untrained = load_classifier(base, GUIDE.names, 0).state_dict()
        changed = {
            name for name, value in loaded[0].state_dict().items() if not torch.equal(value, untrained[name])
        }
        layers = {name.split("layer.")[1][0] for name in changed if "layer." in name}
        assert layers == {"2", "3"} and not any("embeddings" in name for name in changed)
    for model in loaded:
        logits = predict_logits(model, TurnBatches(), rows, render(encoder, rows))
        np.testing.assert_allclose(logits, table.logits, atol=1e-5 * np.abs(table.logits).max())
    assert table.logits.std() > 0.1


def test_a_trained_model_is_trained_on(encoder, tmp_path, capsys):
    flags = FLAGS | {
        "model_name_or_path": encoder,
        "tuning": "full",
        "max_train_samples": 32,
        "num_train_epochs": 1,
    }
    assert run_script(run_classification.main, **flags, output_dir=tmp_path / "first") == 0
    flags |= {"model_name_or_path": tmp_path / "first/fold-0/adapter", "trainable_layers": 3}
    assert run_script(run_classification.main, **flags, output_dir=tmp_path / "second") == 0
    layers = json.loads((tmp_path / "second/fold-0/adapter/config.json").read_text())["encoder"][
        "num_hidden_layers"
    ]
    assert layers == 4
    capsys.readouterr()
    assert (
        run_script(run_classification.main, **flags | {"pooling": "mean"}, output_dir=tmp_path / "third") == 2
    )
    assert "first/fold-0/adapter: was not trained with --pooling mean" in capsys.readouterr().err


@pytest.mark.parametrize("tuning", ["full", "lora"])
def test_the_head_starts_from_the_probe_s(encoder, tmp_path, tuning):
    common = WINDOW | {
        "model_name_or_path": encoder,
        "train_file": TRAIN,
        "num_folds": 3,
        "class_weights": "inverse_sqrt",
    }
    assert run_script(linear_probe.main, **common, C=3, output_dir=tmp_path / "probe") == 0
    lora = {"lora_r": 4, "lora_target_modules": ["query"]} if tuning == "lora" else {}
    still = {
        "learning_rate": 0,
        "num_train_epochs": 1,
        "tuning": tuning,
        "head_init": "probe",
        "head_C": 3,
        **lora,
    }
    flags = common | still | {"pooling": "turns", "output_dir": tmp_path / "run"}
    assert run_script(run_classification.main, **flags) == 0
    probe, start = (read_table(tmp_path / name / "oof/fold-0.parquet") for name in ("probe", "run"))
    assert probe.id == start.id and np.ptp(probe.logits, axis=0).mean() > 0.5
    np.testing.assert_allclose(start.logits, probe.logits, atol=1e-4)


def test_frozen_layers_are_computed_once_for_all_folds_and_runs(
    encoder, demo, tmp_path, cache, monkeypatch, caplog
):
    base, tokenizer = find_base_model(encoder, pooling="turns"), load_tokenizer(find_base_model(encoder))
    renderer, batches = TurnRenderer(base, tokenizer, WINDOW), TurnBatches(tokens_per_batch=300)
    how = {"bf16": False, "limit_gb": 1}
    rendered, states = turn_states(demo, renderer, base, 3, **how)
    plain, cached = classifier(encoder, 1), classifier(encoder, 1)
    TrunkMemory(cached.encoder, layer_list(cached.encoder)[:3], states)
    with torch.inference_mode():
        whole = plain.vectors(**TurnBatches().collate(rendered))
    np.testing.assert_allclose(states.vectors(rendered), whole, atol=1e-5)
    for model in (plain, cached):
        for batch in batches.prediction_batches(demo, rendered):
            logits = model(**batches.collate([rendered[index] for index in batch])).logits
            torch.nn.functional.cross_entropy(
                logits, torch.tensor([demo[index].label for index in batch])
            ).backward()
    assert_close(gradients(cached), gradients(plain))
    assert turn_states(demo, renderer, base, 3, bf16=False, limit_gb=1e-6)[1] is None
    assert "more than --trunk_cache_gb 1e-06" in caplog.text

    flags = FLAGS | {
        "model_name_or_path": encoder,
        "tuning": "full",
        "learning_rate": 3e-3,
        "num_train_epochs": 2,
    }
    flags |= {"head_init": "probe", "trainable_layers": 1, "max_train_samples": 60}
    assert run_script(run_classification.main, **flags, output_dir=tmp_path / "cached") == 0
    uncached = flags | {"trunk_cache_gb": 0, "output_dir": tmp_path / "uncached"}
    assert run_script(run_classification.main, **uncached) == 0
    tables = [read_table(tmp_path / run / "oof/fold-0.parquet").logits for run in ("cached", "uncached")]
    assert np.ptp(tables[0], axis=0).mean() > 0.1
    np.testing.assert_allclose(*tables, atol=1e-4 * np.abs(tables[1]).max())

    def compute_again(*arguments: object) -> None:
        raise AssertionError("the trunk was computed again")

    monkeypatch.setattr(turns, "write_parts", compute_again)
    again = flags | {"fold": 1, "output_dir": tmp_path / "cached", "seed": 42}
    assert run_script(run_classification.main, **again) == 0
    with pytest.raises(AssertionError, match="computed again"):
        run_script(run_classification.main, **flags | {"trainable_layers": 2}, output_dir=tmp_path / "other")


def test_predictions_of_a_bundle_are_the_ensemble_s_and_share_turns_and_layers(
    encoder, demo, tmp_path, monkeypatch
):
    flags = FLAGS | {"model_name_or_path": encoder, "tuning": "full", "num_train_epochs": 1, "num_folds": 2}
    flags |= {"max_train_samples": 32, "test_file": TEST, "do_predict": True, "output_dir": tmp_path / "run"}
    flags |= {"trainable_layers": 2, "learning_rate": 3e-3}
    for fold in range(2):
        assert run_script(run_classification.main, **flags, fold=fold) == 0
    probe = WINDOW | {
        "model_name_or_path": encoder,
        "train_file": TRAIN,
        "num_folds": 2,
        "test_file": TEST,
        "C": 3,
    }
    assert run_script(linear_probe.main, **probe, output_dir=tmp_path / "probe") == 0
    runs = [tmp_path / "run", tmp_path / "probe"]
    blend = {"runs": runs, "method": "prior", "repeats": 1, "test_file": TEST}
    assert run_script(ensemble.main, **blend, output_dir=tmp_path / "ensemble") == 0
    output = tmp_path / "labels.jsonl"
    asked = {"ensemble": tmp_path / "ensemble", "input": TEST, "turns": "last", "output": output}
    assert run_script(predict.main, **asked) == 0
    lines = [json.loads(line) for line in output.read_text().splitlines()]
    submitted = json.loads((tmp_path / "ensemble/prediction.json").read_text())
    assert [line["label"] for line in lines] == [row["label"] for row in submitted]

    encoded: list[int] = []
    forward = TurnClassifier.vectors

    def watch(self: TurnClassifier, input_ids: torch.Tensor, *rest: torch.Tensor) -> torch.Tensor:
        encoded.append(len(input_ids))
        return forward(self, input_ids, *rest)

    monkeypatch.setattr(TurnClassifier, "vectors", watch)
    longest = max(demo, key=lambda row: len(row.turns)).turns
    dialogue, counts = [turn._asdict() for turn in longest], []
    for share in (share_layers, lambda encoders: []):
        monkeypatch.setattr("rareturn.classifier.share_layers", share)
        model = DialogueClassifier.from_pretrained(str(tmp_path / "ensemble"))
        assert len({id(encoder) for voter in model.voters for encoder in voter.turn_encoders}) == 3
        model(dialogue[:2])  # in its first pass an encoder sees what its layers give
        encoded.clear()
        counts.append([Counter(), model])
        for encoder_model in (encoder for voter in model.voters for encoder in voter.turn_encoders):
            for place, layer in enumerate(layer_list(encoder_model)):
                linear = next(module for module in layer.modules() if isinstance(module, torch.nn.Linear))
                count = lambda *_, place=place, counter=counts[-1][0]: counter.update([place])  # noqa: E731
                linear.register_forward_hook(count)
        counts[-1].append(model(dialogue))
        assert encoded == [len({turn.text for turn in longest})] * 2  # two models
    (shared, model, said), (alone, _, expected) = counts
    assert len(said) > 3 and 0 < shared[0] == shared[1] < alone[0] == shared[2] == shared[3]
    for one, other in zip(said, expected, strict=True):
        np.testing.assert_allclose(
            list(one.probabilities.values()), list(other.probabilities.values()), atol=1e-5
        )
    assert len(model.shared) == 1 and len(model.shared[0]) <= len(longest)


def test_mistakes_are_one_line(encoder, tmp_path, capsys):
    decoder = make_tiny_decoder(tmp_path / "decoder")
    wrong = [
        ({"pooling": "mean", "head_init": "probe"}, "--head_init probe needs --pooling turns"),
        ({"head_C": 0}, "--head_C must be a positive number, not 0.0"),
        ({"trainable_layers": 0}, "--trainable_layers 0: one layer or more"),
        ({"trainable_layers": 5}, f"--trainable_layers 5: {encoder} has 4"),
        ({"model_name_or_path": decoder}, f"--pooling turns is for encoders; {decoder} is a decoder"),
        ({"gradient_accumulation_steps": 64}, "dialogues cannot fill the 64 batches of a step"),
    ]
    for flags, message in wrong:
        words = words_of(
            **FLAGS | {"model_name_or_path": encoder, "tuning": "full"} | flags, output_dir=tmp_path / "run"
        )
        assert run_script(run_classification.main, *words) == 2
        lines = [line for line in capsys.readouterr().err.splitlines() if ": error: " in line]
        assert len(lines) == 1 and message in lines[0], lines
        assert not (tmp_path / "run").exists()
    with pytest.raises(InputError, match="albert models do not keep their layers in a list"):
        config = AutoConfig.for_model(
            "albert", vocab_size=99, num_hidden_layers=6, hidden_size=64, num_attention_heads=4
        )
        keep_layers(AutoModel.from_config(config), 4)
