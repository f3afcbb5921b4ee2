"""Neurons: how they are named, the texts and facts that find them, and the tests that judge them.

from patchclamp.neurons import FactsTest, TextsTest, welch_t

client.find_neurons("dog", tags=["dog"]).result()
client.localize_neurons(welch_t({"code": functions, "prose": stories}, "code"), tags=["code"]).result()
client.evaluate_neuron_edit("dog", "zero", FactsTest("dogs", [("A puppy is a young", " dog")])).result()

One function a method of localisation; neuron.proto says what each computes. What is left out is the server's default.
"""

from patchclamp.neurons.checks import FactsTest, GenerationTest, NeuronTestLike, TextsTest, check_messages
from patchclamp.neurons.methods import (
    LocalizationMethod,
    activation_entropy,
    average_precision,
    contrast_set,
    gradient_times_activation,
    integrated_gradients,
    sparse_probe,
    welch_t,
)
from patchclamp.neurons.selection import Neuron, NeuronsLike, selection_message, selection_or_layers
from patchclamp.neurons.texts import Fact, FactLike, FactsLike, TextsLike, TextSource, fact_messages, texts_message

__all__ = [
    "Fact",
    "FactLike",
    "FactsLike",
    "FactsTest",
    "GenerationTest",
    "LocalizationMethod",
    "Neuron",
    "NeuronTestLike",
    "NeuronsLike",
    "TextSource",
    "TextsLike",
    "TextsTest",
    "activation_entropy",
    "average_precision",
    "check_messages",
    "contrast_set",
    "fact_messages",
    "gradient_times_activation",
    "integrated_gradients",
    "selection_message",
    "selection_or_layers",
    "sparse_probe",
    "texts_message",
    "welch_t",
]
