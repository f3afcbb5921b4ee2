"""Words: the first neuron that FindNeurons names for a word is clamped, beside random neurons of its layer.

METHODS of the field say which sign makes a word likelier; here the value that is stored with the neuron is used as it
is. A word is raised where its mean log-probability after neutral prompts is above that under every random neuron.
"""

from typing import Any

from neurons.shown import say
from patchclamp import Client
from patchclamp.neurons import FactsTest

WORDS = ("dog", "doctor", "music", "California")
PROMPTS = (
    "I think that this is a",
    "The word that comes to mind is",
    "She talked about the",
    "It was all about",
    "My favorite thing is the",
    "They wrote a story about the",
)


def measure(client: Client, random_neurons: int) -> dict[str, Any]:
    """By word: the neuron, its value, log-probabilities, and whether it is raised."""
    return {word: _word(client, word, random_neurons) for word in WORDS}


def _word(client: Client, word: str, random_neurons: int) -> dict[str, Any]:
    found = client.find_neurons(word, top_k=1, tags=[word], replace_tags=True).result().found.best[0]
    test = FactsTest(word, [(prompt, f" {word}") for prompt in PROMPTS])
    effect = client.evaluate_neuron_edit(word, "clamp", test, fractions=[1], random_sets=random_neurons).result()
    measured = next(each for each in effect.points[0].measurements if each.metric == "log_probability")
    others = [measured.unedited + change for change in measured.random]
    row = {
        "neuron": str(found.neuron),
        "value": found.value,
        "unedited": measured.unedited,
        "clamped": measured.edited,
        "random_best": max(others),
        "random_mean": measured.unedited + measured.random_mean,
        "raised": measured.edited > max(others) and measured.edited > measured.unedited,
    }
    say(
        f"{word}: {row['neuron']} at {row['value']:g}, log p {row['unedited']:.2f} to {row['clamped']:.2f}; "
        f"best of {len(others)} random neurons {row['random_best']:.2f}"
    )
    return row
