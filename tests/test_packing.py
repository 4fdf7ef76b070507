"""Packed rows have the logits and the gradients that they have one by one, whatever is among them."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.linear_model import LogisticRegression
from tiny_models import make_tiny_decoder, make_tiny_encoder, make_tokenizer
from transformers import AutoConfig, AutoModelForSequenceClassification

import run_classification
from rareturn.classifier import _Bases
from rareturn.command_line import parse_arguments
from rareturn.data.folds import limit_rows
from rareturn.data.label_guide import load_label_guide, parse_label_guide
from rareturn.data.rendering import Renderer
from rareturn.data.rows import Row, Turn, load_rows
from rareturn.errors import InputError
from rareturn.models import packing
from rareturn.models.inference import predict_logits
from rareturn.models.loading import (
    add_lora,
    find_base_model,
    load_classifier,
    load_tokenizer,
    load_trained,
    save_trained,
)
from rareturn.models.packing import PackedBatches, RowGroups, accept_packed, can_branch, lay_out, tree_mask
from rareturn.models.training import RowBatches, class_weights
from rareturn.runs.folder import table_path
from rareturn.runs.tables import read_table

ROOT = Path(__file__).resolve().parent.parent
GUIDE = parse_label_guide(
    {
        "task": "Classify the last seeker turn.",
        "speakers": ["seeker", "supporter"],
        "target_speaker": "seeker",
        "labels": [
            {"number": number, "name": name, "definition": "see above"}
            for number, name in enumerate("abcdefghi")
        ],
    },
    "the tests' guide",
)
PAD = make_tokenizer().pad_token_id


@pytest.fixture(scope="session")
def decoders(tmp_path_factory):
    """architecture -> folder of a tiny decoder."""
    folder = tmp_path_factory.mktemp("decoders")
    return {name: make_tiny_decoder(folder / name, name) for name in ("qwen3", "llama", "mistral")}


def load(path, attn_implementation="sdpa", **loading):
    torch.manual_seed(0)
    base = find_base_model(path, attn_implementation=attn_implementation, **loading)
    model = load_classifier(base, GUIDE.names, PAD)
    accept_packed(model)
    return model


def demo_rows(num_dialogues=None):
    """The demo corpus with two variants of each rare row; every third row of each dialogue left out."""
    rows = load_rows("data/demo/train.json", load_label_guide("label_guides/dmrs.yaml"))
    if num_dialogues is not None:
        by_length = sorted(
            {row.dialogue_id: len(row.turns) for row in rows}.items(), key=lambda item: -item[1]
        )
        kept = [dialogue for dialogue, _ in by_length[:num_dialogues]]
        rows = [row for index, row in enumerate(row for row in rows if row.dialogue_id in kept) if index % 3]
    variants = []
    for row in rows:
        if row.label in (2, 3, 4, 5, 8):
            for number, opening in enumerate(("um, ", "I mean, well, ")):
                target = Turn(opening + row.turns[-1].text, row.turns[-1].speaker)
                variants.append(
                    dataclasses.replace(
                        row,
                        id=f"{row.id}#aug{number}",
                        turns=(*row.turns[:-1], target),
                        augmented_from=row.id,
                    )
                )
    return rows + variants


def render(rows, **window):
    return Renderer(make_tokenizer(), GUIDE, is_encoder=False, **window).render(rows)


def logits_and_gradients(model, rows, rendered, batches, collate):
    """Logits in the rows' order, and the gradients of the mean cross-entropy over all rows, summed over batches."""
    labels = torch.tensor([row.label for row in rows])
    logits = torch.full((len(rows), len(GUIDE.labels)), torch.nan)
    model.zero_grad()
    for batch in batches:
        output = model(**collate([rendered[index] for index in batch])).logits.float()
        loss = torch.nn.functional.cross_entropy(output, labels[batch], reduction="sum") / len(rows)
        loss.backward()
        logits[batch] = output.detach()
    return logits, {
        name: item.grad.clone() for name, item in model.named_parameters() if item.grad is not None
    }


def compare(model, rows, rendered, branches=True, tokens_per_batch=1500):
    """(largest logit difference, largest relative gradient difference) of packed against unpacked rows."""
    results = []
    for way in (
        RowBatches(PAD, 16, 1, prediction_rows=8, segment_name=None),
        PackedBatches(16, 1, tokens_per_batch, num_epochs=1, branches=branches),
    ):
        batches = way.prediction_batches(rows, rendered)
        assert sorted(index for batch in batches for index in batch) == list(range(len(rows)))
        results.append(logits_and_gradients(model, rows, rendered, batches, way.collate))
    (expected, expected_gradients), (packed, packed_gradients) = results
    assert packed_gradients.keys() == expected_gradients.keys()
    assert expected.std() > 0.05, "logits that are all alike would prove nothing"
    gradient_difference = max(
        float((packed_gradients[name] - item).norm() / item.norm())
        for name, item in expected_gradients.items()
    )
    return float((packed - expected).abs().max()), gradient_difference


# -------------------------------------------------------------------------------------------------------------- layout

token_rows = st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=6), min_size=1, max_size=8)


@given(token_rows, st.booleans())
@settings(max_examples=200, deadline=None)
def test_a_rows_last_token_sees_the_row_and_nothing_else(rows, branches):
    layout = lay_out([np.array(row, dtype=np.int32) for row in rows], branches)
    place = np.arange(len(layout.input_ids))
    sees = (tree_mask(torch.from_numpy(layout.subtree_end)[None], torch.float32)[0, 0] == 0).numpy()
    for row, last in zip(rows, layout.row_positions, strict=True):
        for token in place[
            sees[last]
        ]:  # every token on the way sees what stands before it in the row, no more
            depth = layout.position_ids[token]
            assert layout.input_ids[sees[token]].tolist() == row[: depth + 1]
            assert layout.position_ids[sees[token]].tolist() == list(range(depth + 1))
    prefixes = {tuple(row[:length]) for row in rows for length in range(1, len(row) + 1)}
    leaves = {
        tuple(row)
        for row in rows
        if not any(tuple(row) == p[: len(row)] for p in prefixes if len(p) > len(row))
    }
    assert len(layout.input_ids) == (len(prefixes) if branches else sum(map(len, leaves)))


def test_layout_by_hand():
    # two rows of a dialogue (7 8 | 7 8 9 5), and a variant (7 8 6) of a target that the later row has as context
    layout = lay_out([np.array([7, 8, 9, 5]), np.array([7, 8]), np.array([7, 8, 6])])
    assert layout.input_ids.tolist() == [7, 8, 6, 9, 5]
    assert layout.position_ids.tolist() == [0, 1, 2, 2, 3]
    assert layout.subtree_end.tolist() == [5, 5, 3, 5, 5]
    assert layout.row_positions.tolist() == [4, 1, 2]
    sees = tree_mask(torch.from_numpy(layout.subtree_end)[None], torch.bfloat16)[0, 0] == 0
    assert sees.int().tolist() == [
        [1, 0, 0, 0, 0],
        [1, 1, 0, 0, 0],
        [1, 1, 1, 0, 0],
        [1, 1, 0, 1, 0],
        [1, 1, 0, 1, 1],
    ]


# ------------------------------------------------------------------------------------------------------------ equality


@pytest.mark.parametrize(
    ("num_dialogues", "window", "last_start"),
    [
        (None, {}, 30),
        (3, {"window_stride": 1}, 23),
        (3, {"max_turns": 100, "max_seq_length": 2048}, 0),
    ],
    ids=["all at stride 10", "long ones at stride 1", "long ones whole"],
)
def test_rows_of_the_demo_corpus(decoders, num_dialogues, window, last_start):
    rows = demo_rows(num_dialogues)
    rendered = render(rows, **window)
    assert max(row.start for row in rendered) == last_start
    logit_difference, gradient_difference = compare(load(decoders["qwen3"]), rows, rendered)
    assert logit_difference <= 1e-5
    assert gradient_difference <= 1e-5


@pytest.mark.parametrize("attn_implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("architecture", ["qwen3", "llama", "mistral"])
@pytest.mark.parametrize("window_stride", [1, 10])
def test_with_cut_targets_and_left_out_rows(decoders, architecture, attn_implementation, window_stride):
    rows = demo_rows(num_dialogues=4)
    room = len(render(rows[:1])[0].pieces[0]) + 40
    rendered = render(rows, window_stride=window_stride, max_seq_length=room)
    assert any(row.cut for row in rendered)
    assert any(row.start for row in rendered)
    model = load(decoders[architecture], attn_implementation)
    assert can_branch(model)
    logit_difference, gradient_difference = compare(model, rows, rendered, tokens_per_batch=400)
    assert logit_difference <= 1e-5
    assert gradient_difference <= 1e-5


@pytest.mark.parametrize("attn_implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("autocast", [False, True])
def test_in_bf16(tmp_path, attn_implementation, autocast):
    rows = demo_rows(num_dialogues=1)
    # weights of the size that pretrained models start from; the other tests' are larger, to be told apart in float32
    path = make_tiny_decoder(tmp_path, initializer_range=0.02)
    model = load(path, attn_implementation, dtype="float32" if autocast else "bfloat16")
    with torch.no_grad():
        model.score.weight /= model.score.weight.norm(dim=1, keepdim=True)  # logits of size 1
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        logit_difference, _ = compare(model, rows, render(rows, max_turns=10))
    assert logit_difference <= 1e-2


@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_lora_with_activation_checkpointing(decoders, quantization):
    rows = demo_rows(num_dialogues=3)
    torch.manual_seed(0)
    base = find_base_model(decoders["qwen3"], quantization=quantization, dtype="float32")
    model = load_classifier(base, GUIDE.names, PAD)
    model = add_lora(model, 4, 8, 0.0, ["q_proj", "down_proj"])
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    accept_packed(model)
    model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
    model.enable_input_require_grads()
    model.train()
    rendered = render(rows, max_turns=10)
    if quantization == "nf4":
        # In bf16 as it comes, packed rows are only close: batches of other shapes round sums otherwise, at every product
        # by up to 2^-9 of a value, and these weights make logits of up to 4. In float32 it is the same computation.
        logit_difference, gradient_difference = compare(model, rows, rendered)
        assert logit_difference <= 5e-2
        assert gradient_difference <= 5e-2
        for module in model.modules():
            if hasattr(module, "compute_dtype"):
                module.compute_dtype = torch.float32
    logit_difference, gradient_difference = compare(model, rows, rendered)
    assert logit_difference <= 1e-5
    assert gradient_difference <= 1e-5


# ---------------------------------------------------------------------------------------------- sliding windows, flex


def test_window_by_hand():
    # (7 8 9 5) with a variant (7 8 6); a window of two tokens: itself and the one before it in its row
    layout = lay_out([np.array([7, 8, 9, 5]), np.array([7, 8, 6])])
    assert layout.input_ids.tolist() == [7, 8, 6, 9, 5]
    end, positions = (torch.from_numpy(part)[None] for part in (layout.subtree_end, layout.position_ids))
    sees = tree_mask(end, torch.float32, (positions, 2))[0, 0] == 0
    assert sees.int().tolist() == [
        [1, 0, 0, 0, 0],
        [1, 1, 0, 0, 0],
        [0, 1, 1, 0, 0],
        [0, 1, 0, 1, 0],
        [0, 0, 0, 1, 1],
    ]


SLIDING = {
    "mistral": {"sliding_window": 64},  # all layers
    "ministral": {"sliding_window": 64, "layer_types": ["sliding_attention", "full_attention"]},
    "gemma3_text": {"sliding_window": 64, "layer_types": ["sliding_attention", "full_attention"]},
    "qwen3": {"sliding_window": 64, "use_sliding_window": True, "max_window_layers": 1},
}


@pytest.mark.parametrize("attn_implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("architecture", SLIDING)
def test_sliding_windows_shorter_than_the_rows(tmp_path, architecture, attn_implementation):
    rows = demo_rows(num_dialogues=3)
    rendered = render(rows, max_turns=10)
    path = make_tiny_decoder(tmp_path, architecture, **SLIDING[architecture])
    model = load(path, attn_implementation)
    assert max(map(len, rendered)) > 64
    logit_difference, gradient_difference = compare(model, rows, rendered)
    assert logit_difference <= 1e-5
    assert gradient_difference <= 1e-5
    # The window shows in the logits: a mask without it is another model.
    for config in (model.config, model.base_model.config):
        config.sliding_window = 1 << 20
    assert compare(model, rows, rendered)[0] <= 1e-5


@pytest.mark.parametrize("architecture", ["qwen3", "gemma3_text"])
def test_flex_attention_sees_what_the_dense_mask_shows(tmp_path, architecture, monkeypatch):
    # Not compiled: what is checked is the mask, and a CPU takes minutes to compile the kernel.
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)
    monkeypatch.setattr(torch.nn.attention.flex_attention, "_FLEX_ATTENTION_DISABLE_COMPILE_DEBUG", True)
    rows = demo_rows(num_dialogues=2)
    path = make_tiny_decoder(tmp_path, architecture, **SLIDING[architecture])
    batch = PackedBatches().collate(render(rows, max_turns=10))
    assert "subtree_end" in batch
    logits = []
    for attn_implementation in ("sdpa", "flex_attention"):
        model = load(path, attn_implementation)
        with torch.no_grad():
            logits.append(model(**batch).logits)
    torch.testing.assert_close(*logits, rtol=1e-4, atol=1e-4)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_qlora_on_a_gpu_with_a_dense_mask_and_with_flex_attention(decoders, monkeypatch):
    monkeypatch.setattr(packing, "FLEX_TOKENS", 0)
    rows = demo_rows(num_dialogues=2)
    rendered, results = render(rows, max_turns=10), []
    for named in ("sdpa", None):
        torch.manual_seed(0)
        how = {"quantization": "nf4", "dtype": "bfloat16", "attn_implementation": named}
        base = find_base_model(decoders["qwen3"], **how)
        model = add_lora(load_classifier(base, GUIDE.names, PAD), 4, 8, 0.0, ["q_proj", "down_proj"])
        accept_packed(model)
        batch = {key: value.cuda() for key, value in PackedBatches().collate(rendered).items()}
        logits = model.cuda()(**batch).logits
        labels = torch.tensor([row.label for row in rows]).cuda()
        torch.nn.functional.cross_entropy(logits, labels).backward()
        results.append((logits, model.get_base_model().score.modules_to_save["default"].weight.grad))
        chosen = model.get_base_model().base_model.config._attn_implementation
        assert chosen == (named or "flex_attention")
    for dense, flex in zip(*results, strict=True):
        assert (dense - flex).norm() <= 5e-2 * dense.norm()


@pytest.mark.parametrize("architecture", ["qwen3", "gemma3_text"])
def test_flex_attention_is_chosen_where_the_user_named_none(tmp_path, architecture, monkeypatch):
    """A GPU's choice, made here; uncompiled. Padded to whole blocks, with checkpointing and a tree of few tokens after it."""
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)
    flex = torch.nn.attention.flex_attention
    monkeypatch.setattr(flex, "_FLEX_ATTENTION_DISABLE_COMPILE_DEBUG", True)
    monkeypatch.setattr(
        flex, "_validate_device", lambda *tensors: None
    )  # uncompiled, a CPU has the gradients too
    monkeypatch.setattr(packing, "takes_flex", lambda backbone, batch: batch["subtree_end"].shape[1] > 600)
    rows = demo_rows(num_dialogues=2)
    rendered = render(rows, max_turns=10)
    path = make_tiny_decoder(tmp_path, architecture, **SLIDING[architecture])
    batches = [[*range(len(rows))], [0, 1, 2]]
    results = []
    for named in ("sdpa", None):
        model = load(path, named)
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.train()
        results.append(logits_and_gradients(model, rows[:3], rendered, batches[1:], PackedBatches().collate))
        lengths = []
        embeddings = model.get_input_embeddings()
        embeddings.register_forward_pre_hook(
            lambda layer, args, found=lengths: found.append(args[0].shape[1])
        )
        results.append(logits_and_gradients(model, rows, rendered, batches[:1], PackedBatches().collate))
        assert all(length % 128 == 0 for length in lengths) == (named is None)
        assert model.base_model.config._attn_implementation == (named or "flex_attention")
        results.append(logits_and_gradients(model, rows[:3], rendered, batches[1:], PackedBatches().collate))
        assert model.base_model.config._attn_implementation == "sdpa"
    for (logits, gradients), (again, others) in zip(results[:3], results[3:], strict=True):
        torch.testing.assert_close(logits, again, rtol=1e-4, atol=1e-4)
        for name, gradient in gradients.items():
            assert (gradient - others[name]).norm() <= 1e-4 * gradient.norm(), name


# ------------------------------------------------------------------------------------- attention that takes no tree


def test_causal_sequences_one_after_the_other(tmp_path, decoders):
    """Without branches, as under flash attention, rows that continue one another share a sequence and others repeat."""
    rows = demo_rows(num_dialogues=3)
    rendered = render(rows, max_turns=10)
    logit_difference, gradient_difference = compare(load(decoders["qwen3"]), rows, rendered, branches=False)
    assert logit_difference <= 1e-5
    assert gradient_difference <= 1e-5


def test_what_cannot_be_packed(tmp_path, decoders):
    encoder = find_base_model(make_tiny_encoder(tmp_path / "encoder"))
    with pytest.raises(InputError, match="bert models cannot be packed; use --no_pack_dialogues"):
        can_branch(load_classifier(encoder, GUIDE.names, 0))
    bloom = AutoModelForSequenceClassification.from_config(
        AutoConfig.for_model("bloom", hidden_size=8, n_head=2)
    )
    with pytest.raises(InputError, match="bloom models cannot be packed"):
        can_branch(bloom)


def test_unpacked_batches_keep_their_path_and_files_their_names(decoders, tmp_path):
    model = load(decoders["qwen3"])
    plain = load_classifier(find_base_model(decoders["qwen3"]), GUIDE.names, PAD)
    plain.load_state_dict(model.state_dict())
    batch = RowBatches(PAD, 16, 1, 8, None).collate(render(demo_rows(1)[:3]))
    with torch.no_grad():
        assert torch.equal(model(**batch).logits, plain(**batch).logits)
    model.save_pretrained(tmp_path / "saved")
    assert type(load(str(tmp_path / "saved"))) is type(plain)


# ------------------------------------------------------------------------------------------------------------- batches


def count_tokens(rendered, batch):
    return len(lay_out([rendered[index].input_ids for index in batch]).input_ids)


@pytest.mark.parametrize("micro_batches", [1, 2, 3])
def test_an_epoch_has_every_row_once_within_the_budgets(micro_batches):
    rows = demo_rows()
    rendered = render(rows)
    batches = PackedBatches(32, micro_batches, 1200, num_epochs=4)
    plan = batches.plan(rows, rendered, seed=0)
    num_steps = len(plan(0))
    assert num_steps >= -(-len(rows) // 32)
    for epoch in range(4):
        assert [len(step) for step in plan(epoch)] == [micro_batches] * num_steps
        parts = [part for step in plan(epoch) for part in step]
        assert all(parts)
        assert sorted(index for part in parts for index in part) == list(range(len(rows)))
        assert max(count_tokens(rendered, part) for part in parts) <= 1200
    assert plan(0) == batches.plan(rows, rendered, seed=0)(0)
    assert plan(0) != plan(1)
    assert plan(0) != batches.plan(rows, rendered, seed=1)(0)


def test_a_roomy_budget_leaves_the_number_of_steps_as_it_is_unpacked():
    rows = demo_rows()
    plan = PackedBatches(16, 1, 8192, num_epochs=3).plan(rows, render(rows), seed=0)
    sizes = [len(step[0]) for step in plan(0)]
    assert len(sizes) == -(-len(rows) // 16)
    assert min(sizes) >= 4
    assert max(sizes) <= 32


def test_prediction_batches_keep_the_budget_and_put_the_most_tokens_first():
    rows = demo_rows()
    rendered = render(rows)
    batches = PackedBatches(16, 1, 1200, num_epochs=1).prediction_batches(rows, rendered)
    assert sorted(index for batch in batches for index in batch) == list(range(len(rows)))
    tokens = [count_tokens(rendered, batch) for batch in batches]
    assert max(tokens) <= 1200
    assert tokens[0] >= max(map(len, rendered))


def test_a_group_over_the_budget_is_split_and_a_row_over_it_is_alone(caplog):
    turns = tuple(Turn(f"turn {number} says something", "seeker") for number in range(12))
    rows = [Row(str(number), "one", turns[: number + 1], 0) for number in range(12)]
    rendered = render(rows)
    shortest, longest = min(map(len, rendered)), max(map(len, rendered))
    assert RowGroups(rows, rendered, longest).members == [list(range(12))]
    assert RowGroups(rows, rendered, longest - 1).members == [list(range(11)), [11]]
    assert "1 rows have more than" in caplog.text
    assert len(RowGroups(rows, rendered, shortest).members) == 12


def test_too_few_dialogues_for_the_processes(caplog):
    rows = [Row(str(number), "one", (Turn("hello", "seeker"),) * (number + 1), 0) for number in range(20)]
    rendered = render(rows)
    assert len(PackedBatches(16, 1, 4096, num_epochs=1).plan(rows, rendered, seed=0)(0)) == 1
    assert "a step has 20.0 rows on average, not 16" in caplog.text
    with pytest.raises(InputError, match="1 dialogues cannot fill the 2 batches of a step"):
        PackedBatches(16, 2, 4096, num_epochs=1).plan(rows, rendered, seed=0)


# ------------------------------------------------------------------------------------------ processes and adapters


def fold_flags(decoder, output_dir, accumulation):
    flags = {
        "model_name_or_path": decoder,
        "train_file": "data/demo/train.json",
        "output_dir": output_dir,
        "lora_r": 4,
        "lora_dropout": 0.0,
        "lora_target_modules": "q_proj",
        "max_train_samples": 60,
        "num_folds": 3,
        "num_train_epochs": 2,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "save_strategy": "steps",
        "save_steps": 8,
        "rows_per_batch": 8,
        "gradient_accumulation_steps": accumulation,
        "bf16": False,
    }
    words = [str(word) for name, value in flags.items() for word in (f"--{name}", value)]
    return [*words, "--use_cpu", "--keep_checkpoints"]


def losses_and_table(output_dir):
    (checkpoint,) = (output_dir / "fold-0" / "checkpoints").glob("checkpoint-*")
    state = json.loads((checkpoint / "trainer_state.json").read_text())
    losses = [entry["loss"] for entry in state["log_history"] if "loss" in entry]
    return losses, read_table(table_path(output_dir, "oof", 0))


def test_two_processes_train_as_one(python, decoders, tmp_path, monkeypatch):
    """The launch configuration for a CPU starts two processes; the steps are those of one that accumulates."""
    monkeypatch.chdir(ROOT)
    flags = fold_flags(decoders["qwen3"], tmp_path / "one", accumulation=2)
    monkeypatch.setattr(sys, "argv", ["run_classification.py", *flags])
    run_classification.main()
    finished = subprocess.run(
        [
            *(python, "-m", "accelerate.commands.launch", "--main_process_port", "0"),
            *("--config_file", "recipes/accelerate/cpu.yaml", "run_classification.py"),
            *fold_flags(decoders["qwen3"], tmp_path / "two", accumulation=1),
        ],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert finished.returncode == 0, finished.stderr[-3000:]
    losses, table = losses_and_table(tmp_path / "one")
    both_losses, both_table = losses_and_table(tmp_path / "two")
    assert len(losses) == 8
    assert max(losses) - min(losses) > 0.1
    np.testing.assert_allclose(both_losses, losses, atol=1e-5, rtol=0)
    assert both_table.id == table.id
    np.testing.assert_allclose(both_table.logits, table.logits, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("words", "value"),
    [
        ([], None),
        (["--pack_dialogues"], True),
        (["--no_pack_dialogues"], False),
        (["--pack_dialogues", "false"], False),
    ],
)
def test_the_flag(words, value):
    (data,) = parse_arguments((run_classification.FoldArguments,), "", ["--output_dir", "run", *words])
    assert data.pack_dialogues is value


def test_an_encoder_is_refused(tmp_path, monkeypatch):
    encoder = make_tiny_encoder(tmp_path / "encoder")
    flags = fold_flags(encoder, tmp_path / "run", accumulation=1)
    monkeypatch.setattr(sys, "argv", ["run_classification.py", *flags, "--pack_dialogues"])
    with pytest.raises(InputError, match=r"--pack_dialogues: .* reads both ways"):
        run_classification.main()
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("trainable_layers", [None, 1])
def test_a_decoder_starts_from_a_logistic_head(decoders, tmp_path, monkeypatch, trainable_layers):
    """With a learning rate of 0 the fold's logits are those of scikit-learn on the last token's states."""
    flags = [*fold_flags(decoders["llama"], tmp_path / "run", accumulation=1), "--learning_rate", "0"]
    flags += ["--head_init", "probe", "--label_guide", "data/demo/label_guide.yaml"]
    flags += ["--trainable_layers", str(trainable_layers)] if trainable_layers else []
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(sys, "argv", ["run_classification.py", *flags])
    run_classification.main()
    table = read_table(table_path(tmp_path / "run", "oof", 0))
    info = json.loads((tmp_path / "run/run.json").read_text())
    base = find_base_model(decoders["llama"])
    guide = load_label_guide("data/demo/label_guide.yaml")
    rows = load_rows("data/demo/train.json", guide)
    rendered = Renderer(load_tokenizer(base), guide, is_encoder=False, **info["window"]).render(rows)
    backbone = load_classifier(base, guide.names, PAD).model.eval()
    with torch.inference_mode():
        states = [backbone(torch.tensor(row.input_ids)[None]).last_hidden_state[0, -1] for row in rendered]
    features, labels = torch.stack(states).numpy(), np.array([row.label for row in rows])
    folds = json.loads((tmp_path / "run/folds.json").read_text())["folds"]
    place = {row.id: index for index, row in enumerate(rows)}
    train = [place[row.id] for row in limit_rows([row for row in rows if folds[row.id] != 0], 60)]
    scale = np.sqrt(np.square(features[train]).mean(0) * features.shape[1])
    counts = np.bincount(labels[train], minlength=len(guide.labels))
    weights = class_weights(counts, "inverse_sqrt")
    by_class = {label: weights[label] for label in np.unique(labels[train])}
    expected = LogisticRegression(C=10, class_weight=by_class, fit_intercept=False, max_iter=2000)
    expected.fit(features[train] / scale, labels[train])
    held_out = [place[name] for name in table.id]
    logits = expected.decision_function(features[held_out] / scale)
    np.testing.assert_allclose(table.logits[:, expected.classes_], logits, atol=2e-3)
    assert logits.std() > 0.1


@pytest.mark.parametrize("path", sorted(ROOT.glob("recipes/accelerate/*.yaml")), ids=lambda path: path.stem)
def test_accelerate_reads_its_configurations(path):
    arguments = launch_command_parser().parse_args(["--config_file", str(path), "run_classification.py"])
    config = load_config_from_file(str(path))  # refuses unknown keys
    arguments, _, _ = _validate_launch_command(arguments)
    assert config.num_processes % config.num_machines == 0
    assert arguments.num_processes == config.num_processes
    assert arguments.use_fsdp == (path.stem == "fsdp-qlora")
    assert arguments.multi_gpu == (path.stem != "fsdp-qlora")


def test_adapters_on_one_base_are_the_adapters_each_on_its_own(decoders, tmp_path):
    base = find_base_model(decoders["qwen3"], quantization="nf4", dtype="float32")
    tokenizer = load_tokenizer(base)
    for fold in range(2):
        torch.manual_seed(fold)
        model = load_classifier(base, GUIDE.names, PAD)
        model = add_lora(model, 4, 8, 0.0, ["q_proj", "down_proj"])
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.1)
        save_trained(model, tokenizer, base, tmp_path / str(fold))
    rows = demo_rows(num_dialogues=1)
    rendered = render(rows, max_turns=10)
    way = PackedBatches(16, 1, 1200, num_epochs=1)

    def logits(model):
        return predict_logits(model, way, rows, rendered)

    # No tolerance: the same batches go through the same kernels with the same weights, in bf16 too, so that nothing
    # rounds otherwise. A difference would be another adapter's weights, or weights that a prediction has changed.
    apart = []
    for fold in range(2):
        model = load_trained(base, tmp_path / str(fold), GUIDE.names, PAD)
        accept_packed(model)
        apart.append(logits(model))
    bases = _Bases(())
    loaded = [bases.load_fold(base, tmp_path / str(fold), GUIDE, PAD) for fold in range(2)]
    assert loaded[0][0] is loaded[1][0]
    for fold in (1, 0, 1):
        model, adapter = loaded[fold]
        model.set_adapter(adapter)
        np.testing.assert_array_equal(logits(model), apart[fold])
    assert np.abs(apart[0] - apart[1]).max() > 0.1


@pytest.mark.soak
def test_benchmark(tmp_path):
    flags = {
        "train_file": "data/demo/train.json",
        "num_dialogues": 2,
        "repeats": 1,
        "batch_sizes": 4,
        "output": tmp_path / "result.json",
    }
    words = [str(word) for name, value in flags.items() for word in (f"--{name}", value)]
    subprocess.run([sys.executable, "benchmarks/packing.py", *words], cwd=ROOT, check=True)
    result = json.loads(flags["output"].read_text())
    packed = [item for item in result["results"] if item["packed"]]
    assert len(packed) == 5 and sum(item["end_to_end"] for item in result["results"]) == 1
    for item in packed:
        if not item["cut"]:
            assert item["logit_difference"] <= 1e-5
            assert item["gradient_difference"] <= 1e-5
        assert item["tokens"] < result["results"][0]["tokens"]
        assert item["peak_memory"] > 0
        assert item["run"] < result["results"][0]["run"]
