"""A census as its definition reads: all gates of all windows, through hooks of transformers, in dictionaries."""

import math
from collections import Counter
from dataclasses import dataclass, field

import torch
from torch import Tensor
from transformers import PreTrainedModel

Neuron = tuple[int, int]


@dataclass
class NaiveCensus:
    """By class the neurons with their scores; detectors with their tokens."""

    tokens: int
    dead: dict[Neuron, float] = field(default_factory=dict)
    rare: dict[Neuron, float] = field(default_factory=dict)
    always: dict[Neuron, float] = field(default_factory=dict)
    token: dict[Neuron, float] = field(default_factory=dict)
    ngram: dict[Neuron, float] = field(default_factory=dict)
    positional: dict[Neuron, float] = field(default_factory=dict)
    keys: dict[Neuron, tuple[int, ...]] = field(default_factory=dict)
    mean_rates: list[float] = field(default_factory=list)


@torch.no_grad()
def gates_of(model: PreTrainedModel, window: list[int]) -> list[Tensor]:
    """The gates [tokens, d_ff] of each layer."""
    found: list[Tensor] = []
    layers = range(model.config.num_hidden_layers)
    hooks = [
        model.get_submodule(f"model.layers.{layer}.mlp.gate_proj").register_forward_hook(
            lambda _, __, output: found.append(output[0])
        )
        for layer in layers
    ]
    try:
        model(torch.tensor([window]))
    finally:
        for hook in hooks:
            hook.remove()
    return found


def naive_census(
    model: PreTrainedModel, windows: list[list[int]], *, bins: int, window_tokens: int, rare_below: float
) -> NaiveCensus:
    gates = [gates_of(model, window) for window in windows]
    tokens = [token for window in windows for token in window]
    pairs = [(window[i - 1], token) if i else None for window in windows for i, token in enumerate(window)]
    places = [i * bins // window_tokens for window in windows for i in range(len(window))]
    found = NaiveCensus(len(tokens))
    for layer in range(model.config.num_hidden_layers):
        fires = torch.cat([each[layer] for each in gates]) > 0
        found.mean_rates.append(float(fires.double().mean()))
        for neuron in range(fires.shape[1]):
            _judge(found, (layer, neuron), fires[:, neuron].tolist(), tokens, pairs, places, rare_below)
    return found


def _judge(found, own, fires, tokens, pairs, places, rare_below) -> None:  # type: ignore[no-untyped-def]
    rate = sum(fires) / len(fires)
    if not any(fires):
        found.dead[own] = 0.0
    elif rate < rare_below:
        found.rare[own] = rate
    if rate >= 0.99:
        found.always[own] = rate
    if key := _detected(fires, tokens):
        found.token[own], found.keys[own] = key[1], (key[0],)
    elif key := _detected(fires, pairs):
        found.ngram[own], found.keys[own] = key[1], key[0]
    if (bits := corrected_bits(fires, places)) >= 0.05:
        found.positional[own] = bits


def _detected(fires, keys):  # type: ignore[no-untyped-def]
    occurrences = Counter(key for key in keys if key is not None)
    at = Counter(key for key, fired in zip(keys, fires, strict=True) if fired and key is not None)
    for key, n in at.items():
        if occurrences[key] >= 10 and n / occurrences[key] >= 0.95 and 1 - n / sum(fires) <= 0.05:
            return key, n / occurrences[key]
    return None


def corrected_bits(fires: list[bool], places: list[int]) -> float:
    """H(X) + H(Y) - H(X, Y), each with the correction of Miller and Madow: (cells - 1) / (2 n) nats."""

    def entropy(values: list[object]) -> float:
        counts = Counter(values)
        n = len(values)
        return -sum(c / n * math.log(c / n) for c in counts.values()) + (len(counts) - 1) / (2 * n)

    both = entropy(list(zip(fires, places, strict=True)))
    return max(0.0, (entropy(list(fires)) + entropy(list(places)) - both) / math.log(2))
