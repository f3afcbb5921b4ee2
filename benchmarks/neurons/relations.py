"""Relations: neurons that detect prompts of a relation are set to zero, beside random neurons of the same layers.

Facts are those that the model knows: the answer is likelier than four others. Neurons are found on one half of the
countries and tested on the other, with the other relations as sides. By average precision (N1), and by gradient times
activation with the facts of the other relations as controls (N3).

A relation is selective where the log-probability of its answers falls with every fraction, by more than under random
sets (the interval of the difference lies below 0 with the whole set), and by more than that of every other relation.
"""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

from neurons.shown import curve, grows, say, shows_progress
from patchclamp import Client, datasets
from patchclamp.neurons import (
    Fact,
    FactsTest,
    LocalizationMethod,
    average_precision,
    gradient_times_activation,
)

METRICS = ("log_probability", "accuracy")
Facts = dict[str, list[Fact]]


@dataclass(frozen=True)
class Sizes:
    """`facts` of the target, `side_facts` of each side, both of those that are known; neurons of a set.

    Of the four candidates of a fact the target is measured with two, and sides with one: the change of the
    log-probability is that of the answer.
    """

    relations: tuple[str, ...] = ("capital", "currency", "language", "continent")
    facts: int = 12
    side_facts: int = 4
    neurons: int = 460
    fractions: tuple[float, ...] = (0.25, 0.5, 1.0)
    random_sets: int = 5


def measure(client: Client, sizes: Sizes) -> dict[str, Any]:
    relations = datasets.load("relations")
    first, second = relations.halves()
    known = known_facts(client, {name: list(relations.facts[name]) for name in relations.facts})
    search, test = (
        {name: [fact for fact in half.facts[name] if fact in known[name]] for name in known} for half in (first, second)
    )
    # Gradients are of an answer by itself, and take no candidates.
    pairs = {name: [(fact.prompt, fact.answer) for fact in own] for name, own in search.items()}
    methods: dict[str, Callable[[str], LocalizationMethod]] = {
        "average_precision": lambda name: average_precision(first.texts, name),
        "gradient_times_activation": lambda name: gradient_times_activation(
            pairs[name], [pair for other in pairs if other != name for pair in pairs[other]]
        ),
    }
    rows = {
        name: {method: _relation(client, name, method, build(name), test, sizes) for method, build in methods.items()}
        for name in sizes.relations
    }
    return {
        "facts": {name: len(own) for name, own in relations.facts.items()},
        "known": {name: len(own) for name, own in known.items()},
        "sizes": vars(sizes),
        "relations": rows,
    }


def known_facts(client: Client, facts: Facts) -> Facts:
    """Those whose answer is the likeliest of its candidates."""

    def is_known(fact: Fact) -> bool:
        answer, *others = (client.score(fact.prompt, each).total_logprob for each in (fact.answer, *fact.candidates))
        return all(answer > other for other in others)

    known: Facts = {}
    with ThreadPoolExecutor(8) as pool:
        for name, own in facts.items():
            known[name] = [fact for fact, found in zip(own, pool.map(is_known, own), strict=True) if found]
            say(f"{name}: {len(known[name])} of {len(own)} facts are known")
    return known


def _facts_test(name: str, facts: Facts, n: int, *, candidates: int) -> FactsTest:
    return FactsTest(name, [replace(fact, candidates=fact.candidates[:candidates]) for fact in facts[name][:n]])


def _relation(
    client: Client, name: str, method: str, request: LocalizationMethod, test: Facts, sizes: Sizes
) -> dict[str, Any]:
    tag = f"{name}-{method}"
    localized = client.localize_neurons(request, top_k=sizes.neurons, tags=[tag], replace_tags=True)
    found = localized.result(shows_progress).sets[0]
    others = [other for other in test if other != name]
    effect = client.evaluate_neuron_edit(
        tag,
        "zero",
        _facts_test(name, test, sizes.facts, candidates=2),
        sides=[_facts_test(other, test, sizes.side_facts, candidates=1) for other in others],
        fractions=sizes.fractions,
        random_sets=sizes.random_sets,
    ).result(shows_progress)
    curves = {metric: curve(effect, name, metric) for metric in METRICS}
    sides = {other: curve(effect, other, "log_probability")[-1] for other in others}
    whole = curves["log_probability"][-1]
    row = {
        "neurons": found.stored.neurons,
        "heldout": {"measure": found.measure, "set": found.heldout, "random": found.random_mean},
        "facts": min(sizes.facts, len(test[name])),
        "target": curves,
        "sides": sides,
        "falls": grows(curves["log_probability"], -1),
        "beyond_random": whole["beyond_random_high"] < 0,
        "beyond_sides": all(whole["change"] < side["change"] for side in sides.values()),
    }
    row["selective"] = row["falls"] and row["beyond_random"] and row["beyond_sides"]
    changes = [f"{each['change']:+.2f}" for each in curves["log_probability"]]
    worst = min(side["change"] for side in sides.values())
    say(
        f"{name}, {method}{', selective' * row['selective']}: log p of answers {' '.join(changes)}, "
        f"random sets {whole['random_mean']:+.2f}, beyond "
        f"[{whole['beyond_random_low']:+.2f}, {whole['beyond_random_high']:+.2f}], worst side {worst:+.2f}"
    )
    return row
