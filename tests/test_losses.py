"""Losses against their papers' formulas, one gradient however a step is cut, draws of rare rows, averaged weights."""

from __future__ import annotations

import functools
import itertools
import json
import shutil
from collections import Counter
from math import exp, log
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml
from running import run_script, words_of
from safetensors.torch import load_file
from tiny_models import make_tiny_decoder, make_tiny_encoder
from transformers import TrainerCallback, TrainingArguments

import run_classification
from rareturn.data.label_guide import load_label_guide, parse_label_guide
from rareturn.data.rendering import Renderer
from rareturn.data.rows import load_rows
from rareturn.errors import InputError
from rareturn.models import losses
from rareturn.models.inference import segment_name
from rareturn.models.loading import find_base_model, load_classifier, load_tokenizer
from rareturn.models.packing import PackedBatches, accept_packed, lay_out
from rareturn.models.training import RowBatches, WeightAverage, class_weights, row_draws, with_labels
from rareturn.runs.tables import read_table

ROOT = Path(__file__).parent.parent
TRAIN = str(ROOT / "data/demo/train.json")
GUIDE = load_label_guide("label_guides/dmrs.yaml")
NAMES = ["cross_entropy", "focal", "logit_adjusted", "balanced_softmax", "ldam", "distance"]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    place = tmp_path_factory.mktemp("models")
    return {"encoder": make_tiny_encoder(place / "bert"), "decoder": make_tiny_decoder(place / "qwen3")}


def found(name: str, counts: list[int], scope: list[int], **flags: float) -> dict:
    """What `WeightedTrainer` is given for `--loss name`."""
    options = run_classification.ModelArguments(model_name_or_path="m", loss=name, **flags)
    return losses.find_loss(options, np.array(counts), GUIDE, scope)


# --------------------------------------------------------------------------------------------------------------- formulas


def test_each_loss_by_hand():
    """Of one row with probabilities .5, .3 and .2, whatever the label."""

    def of(loss, **options) -> list[float]:
        logits = torch.tensor([[0.5, 0.3, 0.2]]).log().repeat(3, 1) + 7
        return loss(logits, torch.arange(3), **options).tolist()

    close = functools.partial(pytest.approx, rel=1e-5)
    assert of(losses.focal, gamma=2.0) == close([0.25 * -log(0.5), 0.49 * -log(0.3), 0.64 * -log(0.2)])
    assert of(losses.focal, gamma=0.0) == of(losses.cross_entropy)

    six, three, one = torch.tensor([6, 3, 1]), 0.3 * 0.3, 0.2 * 0.1
    adjusted = [-log(part / 0.41) for part in (0.5 * 0.6, three, one)]
    assert of(losses.logit_adjusted, counts=six, tau=1.0) == close(adjusted)
    squared = [0.5 * 0.36, 0.3 * 0.09, 0.2 * 0.01]
    expected = [-log(part / sum(squared)) for part in squared]
    assert of(losses.logit_adjusted, counts=six, tau=2.0) == close(expected)
    smooth = [0.9 * value + 0.1 * sum(adjusted) / 3 for value in adjusted]
    assert of(losses.logit_adjusted, counts=six, tau=1.0, smoothing=0.1) == close(smooth)

    # 16, 1 and 81 rows: fourth roots 2, 1 and 3, so the margins are 1/4, 1/2 and 1/6.
    kept = [(0.5 * exp(-1 / 4)) ** 2, (0.3 * exp(-1 / 2)) ** 2, (0.2 * exp(-1 / 6)) ** 2]
    rest = [0.09 + 0.04, 0.25 + 0.04, 0.25 + 0.09]
    expected = [-log(own / (own + others)) for own, others in zip(kept, rest, strict=True)]
    assert of(losses.ldam, counts=torch.tensor([16, 1, 81]), margin=0.5, scale=2.0) == close(expected)

    # β = log 2 halves a label's share with each step away from the true one.
    line = torch.tensor([[0.0, 1, 2], [1, 0, 1], [2, 1, 0]])
    shares = [[4 / 7, 2 / 7, 1 / 7], [1 / 4, 1 / 2, 1 / 4], [1 / 7, 2 / 7, 4 / 7]]
    expected = [-sum(q * log(p) for q, p in zip(row, (0.5, 0.3, 0.2), strict=True)) for row in shares]
    assert of(losses.distance, distances=line, beta=log(2)) == close(expected)
    assert of(losses.distance, distances=line, beta=99.0) == close(of(losses.cross_entropy))


def test_r_drop_by_hand():
    first, second = torch.tensor([[0.5, 0.5]]).log(), torch.tensor([[0.8, 0.2]]).log()
    outputs, weights = {"logits": torch.stack([first, second])}, np.array([3.0, 1.0])
    loss = losses.step_loss(outputs, torch.tensor([0]), 4, class_weights=weights, r_drop_alpha=5.0)
    there, back = 0.5 * log(0.5 / 0.8) + 0.5 * log(0.5 / 0.2), 0.8 * log(0.8 / 0.5) + 0.2 * log(0.2 / 0.5)
    expected = 3 * (-log(0.5) - log(0.8)) / 2 + 5 * (there + back) / 2
    assert loss.item() == pytest.approx(expected / 4, rel=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_a_specialist_without_rows_of_a_class(name: str):
    scope, labels = [1, 3, 4], torch.tensor([1, 3, 3])
    logits = torch.randn(2, 3, 9, dtype=torch.bfloat16, requires_grad=True)
    how = found(name, [0, 1, 0, 2, 0, 0, 0, 0, 0], scope, r_drop_alpha=1.0)
    assert how.pop("drw_start") == (0.8 if name == "ldam" else 0.0)
    loss = losses.step_loss({"logits": logits}, labels, 3, label_smoothing_factor=0.1, **how)
    loss.backward()
    assert loss.isfinite() and logits.grad.isfinite().all()
    touched = logits.grad.abs().sum(dim=(0, 1)) > 0
    assert touched.tolist() == [label in scope for label in range(9)]


def test_sure_rows_have_a_gradient_under_any_gamma():
    for gamma in (0.0, 0.5, 1.0, 2.0):
        logits = torch.tensor([[200.0, 0.0]], requires_grad=True)
        losses.focal(logits, torch.tensor([0]), gamma=gamma).sum().backward()
        assert logits.grad.isfinite().all(), gamma


# ------------------------------------------------------------------------------------------------- one step, cut anyhow


def make_model(base, pad: int):
    """The same weights each time, without dropout."""
    torch.manual_seed(0)
    model = load_classifier(base, GUIDE.names, pad)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    return model


def gradients(model, batches, rows, rendered, accumulation: int, where: Path, cases, oversample: float = 0.0):
    """The gradients of a step over all rows with each case's options of `WeightedTrainer`: a step each, at a rate of 0."""
    seen: list[dict[str, torch.Tensor]] = []

    class Switch(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            trainer.options |= cases[state.global_step]

        def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
            named = model.named_parameters()
            seen.append({name: weight.grad.clone() for name, weight in named if weight.grad is not None})

    trainer = run_classification.weighted_trainer()(
        model=model,
        args=TrainingArguments(
            str(where),
            per_device_train_batch_size=16 // accumulation,
            gradient_accumulation_steps=accumulation,
            label_smoothing_factor=0.05,
            learning_rate=0.0,
            max_grad_norm=0,
            num_train_epochs=len(cases),
            remove_unused_columns=False,
            report_to="none",
            use_cpu=True,
            disable_tqdm=True,
            save_strategy="no",
        ),
        data_collator=functools.partial(with_labels, batches),
        train_dataset=[(tokens, row.label) for tokens, row in zip(rendered, rows, strict=True)],
        class_weights=class_weights(np.bincount([row.label for row in rows], minlength=9)),
        plan=batches.plan(rows, rendered, 1, oversample),
        callbacks=[Switch()],
    )
    trainer.train()
    assert len(seen) == len(cases)
    return seen


def largest_difference(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    """In parts of the largest gradient of `other`."""
    assert one.keys() == other.keys() and len(one) > 10
    scale = max(gradient.abs().max() for gradient in other.values())
    return max(float((one[name] - other[name]).abs().max() / scale) for name in other)


def all_cases(rows) -> list[dict]:
    counts = np.bincount([row.label for row in rows], minlength=9).tolist()
    every = [{"loss": found(name, counts, list(range(9)))["loss"], "r_drop_alpha": 0.0} for name in NAMES]
    return [*every, {"loss": losses.cross_entropy, "r_drop_alpha": 3.0}]


@pytest.mark.parametrize("pooling", ["native", "mean"])
def test_a_step_has_one_gradient_however_it_is_cut(models, tmp_path: Path, pooling: str):
    rows = load_rows(TRAIN, GUIDE)[:16]
    base = find_base_model(models["encoder"], pooling=pooling)
    tokenizer = load_tokenizer(base)
    rendered = Renderer(tokenizer, GUIDE, is_encoder=True, max_seq_length=64).render(rows)
    cases, pad = all_cases(rows)[:: 6 if pooling == "mean" else 1], tokenizer.pad_token_id
    measured = []
    for accumulation in (1, 4, 8, 16):
        batches = RowBatches(pad, 16, accumulation, 16, segment_name(base, tokenizer))
        model = make_model(base, pad)
        measured.append(gradients(model, batches, rows, rendered, accumulation, tmp_path, cases))

    # The gradient of the loss as written down, on one batch; R-Drop without dropout is the loss without it.
    model, labels = make_model(base, pad).eval(), torch.tensor([row.label for row in rows])
    weights = torch.tensor(class_weights(np.bincount(labels, minlength=9)))[labels]
    for case, *cut in zip(cases, *measured, strict=True):
        model.zero_grad()
        logits = model(**batches.collate(rendered)).logits
        row_loss = case["loss"](logits, labels, smoothing=0.05)
        if case["loss"] is losses.cross_entropy:
            log_p = torch.log_softmax(logits, -1)
            row_loss = 0.95 * -log_p[range(16), labels] + 0.05 * -log_p.mean(-1)
        (weights * row_loss).sum().div(16).backward()
        by_hand = {key: weight.grad for key, weight in model.named_parameters() if weight.grad is not None}
        assert max(largest_difference(one, by_hand) for one in cut) < 1e-5, case


def test_a_packed_step_has_the_gradient_of_its_rows_one_by_one(models, tmp_path: Path):
    """Rare rows, drawn more often, stand in a packed batch once and count as often as they are drawn."""
    rows = load_rows(TRAIN, GUIDE)[:16]
    base = find_base_model(models["decoder"])
    tokenizer = load_tokenizer(base)
    window = {"max_turns": 3, "max_seq_length": 400, "window_stride": 1}
    rendered = Renderer(tokenizer, GUIDE, is_encoder=False, **window).render(rows)
    cases, measured = all_cases(rows), []
    for accumulation in (1, 2, 0):
        batches: PackedBatches | RowBatches = RowBatches(tokenizer.pad_token_id, 16, 1, 16, None)
        if accumulation:
            batches = PackedBatches(16, accumulation, 1 << 14, num_epochs=len(cases))
        model, passes = make_model(base, tokenizer.pad_token_id), max(accumulation, 1)
        accept_packed(model)
        measured.append(gradients(model, batches, rows, rendered, passes, tmp_path, cases, oversample=1.0))
    for case, one, two, unpacked in zip(cases, *measured, strict=True):
        assert max(largest_difference(packed, unpacked) for packed in (one, two)) < 1e-5, case


def test_class_weights_hold_from_their_part_of_training_on(models, tmp_path: Path):
    weights, labels = np.array([5.0, 1.0]), torch.tensor([0, 1])
    args = TrainingArguments(str(tmp_path), use_cpu=True, report_to="none")
    model = torch.nn.Linear(1, 2)
    trainer = run_classification.weighted_trainer()(
        model=model, args=args, plan=None, class_weights=weights, drw_start=0.8
    )
    trainer.state.max_steps, outputs = 10, {"logits": torch.zeros(2, 2)}
    seen = []
    for trainer.state.global_step in (0, 7, 8, 9):
        seen.append(trainer.step_loss(outputs, labels, num_items_in_batch=2).item() / log(2))
    assert seen == pytest.approx([1, 1, 3, 3])


# ---------------------------------------------------------------------------------------------------------------- draws


def test_draws_by_hand():
    rows = [SimpleNamespace(label=label) for label in [0] * 12 + [1] * 3 + [2]]
    assert row_draws(rows, 16, 0.0, 1, 0).tolist() == [1] * 16
    epochs = [row_draws(rows, 16, 1.0, 1, epoch) for epoch in range(300)]
    for draws in epochs:
        totals = draws[:12].sum(), draws[12:15].sum(), draws[15]
        assert sum(totals) == 16 and totals[2] in (5, 6)
        assert draws[:12].max() <= 1 and set(draws[12:15]) <= {1, 2}  # on average 4/9 and 16/9
    averages = np.mean(epochs, axis=0)
    assert averages == pytest.approx([4 / 9] * 12 + [16 / 9] * 3 + [16 / 3], abs=0.1)
    assert (row_draws(rows, 16, 1.0, 1, 7) == epochs[7]).all() and (epochs[7] != epochs[8]).any()
    assert (row_draws(rows, 16, 1.0, 2, 7) != epochs[7]).any()
    half = np.mean([row_draws(rows, 16, 0.5, 1, epoch) for epoch in range(300)], axis=0)
    assert half[15] / half[0] == pytest.approx(12**0.5, rel=0.1)


@pytest.mark.parametrize("packed", [False, True])
def test_an_epoch_has_the_rows_that_are_drawn(models, packed: bool):
    rows = load_rows(TRAIN, GUIDE)
    tokenizer = load_tokenizer(find_base_model(models["decoder"]))
    rendered = Renderer(tokenizer, GUIDE, is_encoder=False, max_turns=6, window_stride=1).render(rows)
    way = PackedBatches(16, 4, 1200, num_epochs=3) if packed else RowBatches(0, 16, 4, 1, None)
    plan = way.plan(rows, rendered, 5, 1.0)
    for epoch in range(3):
        draws = row_draws(rows, len(rows), 1.0, 5, epoch)
        batches = list(itertools.chain(*plan(epoch)))
        seen = Counter(itertools.chain(*batches))
        assert [seen[index] for index in range(len(rows))] == draws.tolist() and draws.max() > 1
        assert all(batches) and len(plan(epoch)) == len(plan(0)) and {*map(len, plan(epoch))} == {4}
        if packed:
            tokens = [len(lay_out([rendered[row].input_ids for row in batch]).input_ids) for batch in batches]
            assert max(tokens) <= 1200
    assert plan(0) == way.plan(rows, rendered, 5, 1.0)(0) != way.plan(rows, rendered, 6, 1.0)(0)


# -------------------------------------------------------------------------------------------------------------- averages


def test_the_average_by_hand(tmp_path: Path):
    model = torch.nn.Linear(1, 1, bias=True).to(torch.bfloat16)
    model.bias.requires_grad_(False).fill_(4.0)
    average, args = WeightAverage(0.5), SimpleNamespace(output_dir=str(tmp_path))
    state = SimpleNamespace(global_step=0, is_world_process_zero=True)
    expected = 1.0
    model.weight.data.fill_(expected)
    average.on_train_begin(args, state, None, model=model)
    for step in range(1, 12):
        model.weight.data.fill_(float(step))
        state.global_step = step
        average.on_step_end(args, state, None, model=model)
        decay = min(0.5, (1 + step) / (10 + step))  # 2/11, 1/4, 4/13, … and from step 8 on 1/2
        expected = decay * expected + (1 - decay) * step
        if step == 6:  # killed here, and resumed from its checkpoint
            (tmp_path / "checkpoint-6").mkdir()
            average.on_save(args, state, None)
            average = WeightAverage(0.5)
            average.on_train_begin(args, state, None, model=model)
    assert average.average["weight"].item() == pytest.approx(expected, rel=1e-6)
    average.on_train_end(args, state, None, model=model)
    assert model.weight.item() == torch.tensor(expected).bfloat16().item() and model.bias.item() == 4.0


def test_what_is_saved_and_predicts_is_the_average_and_a_resumed_fold_has_its_bytes(models, tmp_path: Path):
    run_dir = tmp_path / "run"
    words = words_of(
        model_name_or_path=models["decoder"], train_file=TRAIN, output_dir=run_dir, num_folds=3, bf16=False,
        max_train_samples=40, max_turns=4, num_train_epochs=3, learning_rate=3e-3, lora_r=4, quantization="nf4",
        ema_decay=0.9, loss="ldam", oversample=0.7, keep_checkpoints=True, save_total_limit=9,
    )  # fmt: skip
    assert run_script(run_classification.main, *words) == 0
    checkpoints = sorted(run_dir.glob("fold-0/checkpoints/*"), key=lambda path: int(path.name.split("-")[1]))
    adapter, table = run_dir / "fold-0/adapter/adapter_model.safetensors", run_dir / "oof/fold-0.parquet"
    saved, average = load_file(adapter), load_file(checkpoints[-1] / WeightAverage.NAME)
    last = load_file(checkpoints[-1] / adapter.name)
    # The head has one name in the model and another in PEFT's file.
    short = {name.replace(".default", "").replace(".modules_to_save", ""): average[name] for name in average}
    assert saved.keys() == short.keys() == last.keys()
    assert all(torch.equal(saved[name], short[name]) for name in saved)
    assert not any(torch.equal(saved[name], last[name]) for name in saved)

    before = adapter.read_bytes(), read_table(table).logits.tobytes()
    for path in (*checkpoints[1:], adapter.parent):
        shutil.rmtree(path)
    (run_dir / "fold-0/metrics.json").unlink()
    table.unlink()
    assert run_script(run_classification.main, *words) == 0
    assert (adapter.read_bytes(), read_table(table).logits.tobytes()) == before


# ------------------------------------------------------------------------------------------------------------ the guide


def test_distances_of_a_guide_are_checked():
    content = {**GUIDE.to_dict(), "labels": GUIDE.to_dict()["labels"][:3], "positive": [1], "protected": 0}
    assert "distances" not in content
    good = [[0, 1, 2.5], [1, 0, 1], [2.5, 1, 0]]
    assert parse_label_guide(content | {"distances": good}, "guide").distances[0] == (0, 1, 2.5)
    for place, value, message in (
        ((1, 2), 3, "from 1 to 2 it is 3, and back 1"),
        ((1, 1), 2, "from 1 to 1 it is 2"),
        ((0, 1), -1, "guide: distances.0.1: Input should be greater than or equal to 0"),
        ((0, 1), True, "guide: distances.0.1"),
        ((0, 1), float("inf"), "guide: distances.0.1"),
        ((2,), [1, 1], "guide: distances: must be 3 rows of 3 numbers"),
    ):
        bad = [list(row) for row in good]
        node = bad if len(place) == 1 else bad[place[0]]
        node[place[-1]] = value
        with pytest.raises(InputError, match=message):
            parse_label_guide(content | {"distances": bad}, "guide")


def test_distances_belong_to_a_run_that_uses_them_alone(models, tmp_path: Path, capsys):
    guide = yaml.safe_load((ROOT / "label_guides/dmrs.yaml").read_text())
    assert guide["distances"] == [list(row) for row in GUIDE.distances]
    other = {**guide, "distances": [[10 * value for value in row] for row in guide["distances"]]}
    without = {key: guide[key] for key in guide if key != "distances"}
    (tmp_path / "other.yaml").write_text(yaml.safe_dump(other))
    (tmp_path / "without.yaml").write_text(yaml.safe_dump(without))
    flags = {"model_name_or_path": models["encoder"], "tuning": "full", "train_file": TRAIN, "num_folds": 3}
    flags |= {"max_seq_length": 32, "max_train_samples": 24, "num_train_epochs": 1}

    def launch(name: str, **more: object) -> int:
        return run_script(run_classification.main, output_dir=tmp_path / name, **flags | more)

    missing = tmp_path / "without.yaml"
    assert launch("near", loss="distance", label_guide=missing) == 2
    assert "error: --loss distance: the label guide has no `distances`" in capsys.readouterr().err
    assert not (tmp_path / "near").exists()
    assert launch("near", loss="distance") == launch("plain") == 0
    info = json.loads((tmp_path / "near/run.json").read_text())
    assert info["label_guide"]["distances"] == guide["distances"]
    assert launch("near", loss="distance", label_guide=tmp_path / "other.yaml") == 2
    assert "run.json: --label_guide: " in capsys.readouterr().err
    plain = (tmp_path / "plain/run.json").read_bytes()
    assert launch("plain", label_guide=missing) == launch("plain", label_guide=tmp_path / "other.yaml") == 0
    assert (tmp_path / "plain/run.json").read_bytes() == plain and b'"distances"' not in plain
    for flag, value, message in (
        ("oversample", 1.5, "--oversample 1.5: from 0 to 1"),
        ("ldam_scale", "nan", "--ldam_scale nan: 0 or a positive number"),
    ):
        assert launch("bad", **{flag: value}) == 2 and message in capsys.readouterr().err
