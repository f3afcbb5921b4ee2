"""However little the engine grants, a slice of a job runs at most one block: a request waits for no more than that."""

from collections.abc import Callable
from copy import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
from circuit_oracle import random_pair
from sparse_models import documents
from tiny_models import tiny_model
from torch import Tensor

from patchclamp_server.analysis.heads.attention_mass import attention_mass
from patchclamp_server.analysis.heads.circuits.attribution import attribute
from patchclamp_server.analysis.heads.circuits.circuit import CircuitSearch, search
from patchclamp_server.analysis.heads.circuits.methods import CIRCUIT_METHODS
from patchclamp_server.analysis.progress import Steps
from patchclamp_server.analysis.sparsity.calibrate import CALIBRATIONS
from patchclamp_server.engine.exclusive import Slice, Work
from patchclamp_server.engine.reducers.reducer import Place
from patchclamp_server.model.decoder import Decoder
from patchclamp_server.model.weights import decoder_from_transformers
from patchclamp_server.sparsity.mlp import SparseModel
from patchclamp_server.sparsity.policies.teal import Teal
from patchclamp_server.sparsity.policy import input_widths


class Counted:
    """A decoder that counts the blocks it runs."""

    def __init__(self) -> None:
        self.blocks = 0
        self.decoder = copy(decoder_from_transformers(tiny_model("llama"), dtype=torch.float32, device="cpu"))
        self.decoder.blocks = [
            replace(block, attn_norm=self._counting(block.attn_norm)) for block in self.decoder.blocks
        ]

    def _counting(self, norm: Any) -> Any:
        def counted(x: Tensor) -> Tensor:
            self.blocks += 1
            return norm(x)

        return counted


def circuit(method: str) -> Callable[[Decoder], Work[Any]]:
    pairs = tuple(random_pair(tiny_model("llama"), 6, seed) for seed in range(2))
    return lambda decoder: search(decoder, CircuitSearch(method, pairs, circuit_size=2, random_sets=2))


def greedy(decoder: Decoder) -> Work[Any]:
    """What follows the requests that have given the inputs of all products and of the blocks."""
    texts = documents(2, 16, seed=7)
    calibrating = CALIBRATIONS["teal"](Teal(allocation="greedy"), SparseModel("llama", decoder), texts)
    assert calibrating.residuals is not None
    widths = *input_widths(decoder.spec), decoder.spec.d_model
    for reducer, width in zip((*calibrating.reducers.values(), calibrating.residuals), widths, strict=True):
        for layer in reducer.layers:
            for text in range(2):
                rows = torch.randn(16, width, generator=torch.Generator().manual_seed(layer))
                reducer.add(layer, rows, Place(text))
    yield (yield from calibrating.finish(Steps("calibration", decoder.spec.n_layers)))


WORKS: dict[str, Callable[[Decoder], Any]] = {
    "attention mass": lambda decoder: attention_mass(decoder, documents(1, 9)[0], torch.zeros(3, 1, dtype=torch.int64)),
    "attribution": lambda decoder: attribute(decoder, [5, 6, 7, 8], 5, 9),
    "greedy calibration": greedy,
    **{method: circuit(method) for method in CIRCUIT_METHODS},
}


@pytest.mark.parametrize("work", WORKS.values(), ids=WORKS.keys())
def test_a_slice_that_is_granted_one_row_runs_one_block(work: Callable[[Decoder], Any]) -> None:
    counted = Counted()
    slices, told, most, total = work(counted.decoder), None, 0, 0
    with torch.inference_mode():
        while True:
            try:
                told = slices.send(1 if isinstance(told, Slice) else None)
            except StopIteration:
                break
            finally:
                most, total = max(most, counted.blocks), total + counted.blocks
                counted.blocks = 0
    assert most == 1
    assert total >= 2 * counted.decoder.spec.n_layers or work is WORKS["attention mass"]
