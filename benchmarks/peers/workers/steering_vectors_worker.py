"""steering-vectors: SteeringVector.apply around `generate`, record_activations around a forward pass."""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from hf import SETTINGS, HfPeer
from protocol import Program, serve
from steering_vectors import SteeringVector, record_activations


class Steered(HfPeer):
    package = "steering-vectors"
    settings = f"{SETTINGS}, SteeringVector.apply: one vector a layer for the whole batch"

    def steered(self, programs: list[Program]) -> AbstractContextManager[Any]:
        program = programs[0]
        if program is None:
            return nullcontext()
        rows = {int(layer): self.vectors[row] for layer, row in program.items()}
        return SteeringVector(rows, "decoder_block").apply(self.model)

    def rows(self, ids: torch.Tensor) -> torch.Tensor:
        with record_activations(self.model, layer_type="decoder_block") as recorded:
            self.model.model(input_ids=ids, use_cache=False)
        return torch.stack([recorded[layer][0][0] for layer in range(self.n_layers)])


if __name__ == "__main__":
    serve(Steered())
