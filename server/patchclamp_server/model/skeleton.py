"""A skeleton is a transformers model without weights: it says which parameters a model has, and in which shapes."""

from collections import defaultdict

import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

Shape = tuple[int, ...]


def skeleton_of(config: PreTrainedConfig) -> PreTrainedModel:
    """Returns the causal LM of a configuration on the meta device, which takes no memory for weights."""
    with torch.device("meta"):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config)  # type: ignore[no-untyped-call]
    return model


def shapes_of(skeleton: PreTrainedModel) -> dict[str, Shape]:
    """Returns the shapes of parameters and stored buffers by name."""
    return {name: tuple(value.shape) for name, value in skeleton.state_dict().items()}


def tied_names(skeleton: PreTrainedModel) -> dict[str, frozenset[str]]:
    """Returns, for each parameter, the names under which it may be stored: its own and those that are tied to it."""
    names: dict[int, set[str]] = defaultdict(set)
    for name, parameter in skeleton.named_parameters(remove_duplicate=False):
        names[id(parameter)].add(name)
    return {name: frozenset(group) for group in names.values() for name in group}
