"""Languages: the neurons whose activity has the lowest entropy over languages (N2) are set to zero, beside random ones.

The texts are paragraphs of one document in each language: neurons are found on every other paragraph, and tested on the
rest. A language is selective where its perplexity rises with every fraction, by more than under random sets (the
interval of the difference lies above 0 with the whole set), and by a larger factor than that of every other language.
"""

from dataclasses import dataclass
from typing import Any

from neurons.shown import curve, grows, say, shows_progress
from patchclamp import Client, datasets
from patchclamp.neurons import TextsTest, activation_entropy
from patchclamp.results import NeuronEditEffect


@dataclass(frozen=True)
class Sizes:
    """`paragraphs` of each language that are scored; share of all neurons that are specific."""

    languages: tuple[str, ...] = ("English", "French", "German", "Spanish")
    paragraphs: int = 4
    share: float = 0.01
    fractions: tuple[float, ...] = (0.25, 0.5, 1.0)
    random_sets: int = 5


def measure(client: Client, sizes: Sizes) -> dict[str, Any]:
    dataset = datasets.load("languages")
    first, second = dataset.halves()
    texts = {name: first.texts[name] for name in sizes.languages}
    tags = ["language"]
    method = activation_entropy(texts)
    stream = client.localize_neurons(method, share=sizes.share, tags=tags, replace_tags=True)
    localized = stream.result(shows_progress)
    sets = {found.label: found for found in localized.sets}
    for warning in localized.warnings:
        say(f"warning: {warning}")
    say(f"specific neurons over {localized.tokens} tokens: { {name: s.stored.neurons for name, s in sets.items()} }")
    test = {name: second.texts[name][: sizes.paragraphs] for name in sizes.languages}
    rows = {}
    for name, found in sets.items():
        effect = client.evaluate_neuron_edit(
            found.stored.artifact.id,
            "zero",
            TextsTest(name, test[name]),
            sides=[TextsTest(other, test[other]) for other in sizes.languages if other != name],
            fractions=sizes.fractions,
            random_sets=sizes.random_sets,
        ).result(shows_progress)
        rows[name] = _row(name, found.stored.neurons, effect, [other for other in sizes.languages if other != name])
    return {"sizes": vars(sizes), "tokens": localized.tokens, "languages": rows}


def _row(name: str, neurons: int, effect: NeuronEditEffect, side_names: list[str]) -> dict[str, Any]:
    target = curve(effect, name, "perplexity")
    sides = {other: curve(effect, other, "perplexity")[-1] for other in side_names}
    whole = target[-1]
    row = {
        "neurons": neurons,
        "target": target,
        "sides": sides,
        "rises": grows(target, 1),
        "beyond_random": whole["beyond_random_low"] > 0,
        "beyond_sides": all(_factor(whole) > _factor(side) for side in sides.values()),
    }
    row["selective"] = row["rises"] and row["beyond_random"] and row["beyond_sides"]
    random, others = 1 + whole["random_mean"] / whole["unedited"], max(map(_factor, sides.values()))
    say(
        f"{name}, {neurons} neurons{', selective' * row['selective']}: perplexity {whole['unedited']:.1f} times "
        f"{_factor(whole):.2f}, random sets {random:.2f}, others at most {others:.2f}"
    )
    return row


def _factor(measured: dict[str, Any]) -> float:
    return float(1 + measured["change"] / measured["unedited"])
