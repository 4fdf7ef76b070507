"""A model's transformer layers: finding them, leaving some out, reading several, freezing the lower ones."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from rareturn.errors import InputError
from rareturn.models import heads


class PassThrough(nn.Module):
    """Stands where a layer was that is not loaded: the layers beside it keep their places and names."""

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return hidden_states


def layer_list(backbone: nn.Module) -> nn.ModuleList:
    """A backbone's transformer layers; an InputError where it does not keep them in a plain list."""
    count = backbone.config.get_text_config().num_hidden_layers
    for module in backbone.modules():
        if isinstance(module, nn.ModuleList) and len(module) == count:
            return module
    raise InputError(
        f"{backbone.config.model_type} models do not keep their layers in a list: they cannot be cut"
    )


def without_layers(model_class: type, first: int, end: int) -> type:
    """A model's class without the layers outside `first` to `end` - 1.

    Where `first` is not 0 it has no embeddings either, unless they are the output matrix of a language model too.
    """

    class Cut(model_class):
        def __init__(self, config: Any, *args: Any, **kwargs: Any):
            super().__init__(config, *args, **kwargs)
            layers = layer_list(self.base_model)
            for index in {*range(len(layers))} - {*range(first, end)}:
                layers[index] = PassThrough()
            tied = self.get_output_embeddings() is not None and config.tie_word_embeddings
            if first > 0 and not tied:
                self.base_model.set_input_embeddings(PassThrough())

    Cut.__name__ = model_class.__name__
    return Cut


def keep_layers(backbone: nn.Module, count: int) -> None:
    """Drop all transformer layers after the first `count`; what follows them (a decoder's last norm) stays."""
    if count < backbone.config.get_text_config().num_hidden_layers:
        del layer_list(backbone)[count:]


def stack_outputs(backbone: nn.Module, numbers: Sequence[int]) -> None:
    """Let the last hidden state be the outputs of several layers, one behind another along the tokens.

    What follows the layers, such as a last norm, sees each of them. `numbers` count from 1 and go up; the last of them is
    the last layer that there is.
    """
    layers, outputs = layer_list(backbone), []

    def keep(layer: nn.Module, inputs: Any, output: Any) -> Any:
        outputs.append(output[0] if isinstance(output, tuple) else output)
        if layer is not layers[numbers[-1] - 1]:
            return None
        stacked = torch.cat(outputs, dim=1)
        outputs.clear()
        return (stacked, *output[1:]) if isinstance(output, tuple) else stacked

    for number in numbers:
        layers[number - 1].register_forward_hook(keep)


def default_layer(config: Any) -> int:
    """The layer, counted from 1, whose output probes and `--pooling turns` take: two thirds up, rounded.

    There a model says more about how a thing is put and not only what it is about.
    """
    return max(1, round(config.get_text_config().num_hidden_layers * 2 / 3))


def freeze_trunk(model: nn.Module, cut: int) -> None:
    """Freeze all that comes before layer `cut`, counted from 0, and take the dropout out of it."""
    layers = layer_list(model.base_model)
    for module in itertools.takewhile(lambda module: module is not layers[cut], model.base_model.modules()):
        for weight in module.parameters(recurse=False):
            weight.requires_grad_(False)
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        if hasattr(module, "attention_dropout"):
            module.attention_dropout = 0.0
    if isinstance(model, heads.TurnClassifier):
        # What serves all layers, such as MPNet's position biases, is frozen too.
        model.encoder.requires_grad_(False)
        layers[cut:].requires_grad_(True)
