"""The weights by neuron that policies select from."""

import pytest
import torch
from coded_models import rounding_decoder
from tiny_models import tiny_model

from patchclamp_server.errors import FailedPrecondition
from patchclamp_server.model.weights import decoder_from_transformers
from patchclamp_server.sparsity.mlp import SparseModel


def test_a_model_is_told_what_the_copies_of_stored_weights_take_before_they_are_made() -> None:
    asked: list[int] = []
    model = SparseModel("coded", rounding_decoder("llama"), admit=asked.append)
    assert not asked
    matrices = [each for layer in model.layers for each in (layer.gate, layer.up, layer.down) if each is not None]
    assert asked == [sum(each.nbytes for each in matrices)]


def test_of_dense_weights_only_those_of_the_outputs_are_copied() -> None:
    asked: list[int] = []
    decoder = decoder_from_transformers(tiny_model("gpt2"), dtype=torch.bfloat16, device="cpu")
    model = SparseModel("dense", decoder, admit=asked.append)
    copied = sum(layer.down.nbytes for layer in model.layers)
    assert asked == [copied]


def test_what_is_refused_is_asked_for_again_later() -> None:
    def refuse(size: int) -> None:
        raise FailedPrecondition("sparsity", f"{size} bytes")

    model = SparseModel("coded", rounding_decoder("llama"), admit=refuse)
    for _ in range(2):
        with pytest.raises(FailedPrecondition):
            _ = model.layers
