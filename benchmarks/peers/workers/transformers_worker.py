"""transformers with forward hooks of torch, as one writes them by hand."""

from contextlib import AbstractContextManager
from typing import Any

import torch
from hf import HfPeer, hidden, hooks
from protocol import Program, serve


class Hooked(HfPeer):
    batches_programs = True

    def steered(self, programs: list[Program]) -> AbstractContextManager[None]:
        """A hook on each layer that some row's program names adds [batch, 1, d_model]."""
        layers = sorted({int(layer) for program in programs for layer in program or {}})
        return hooks([self._add(layer, self._table(layer, programs)) for layer in layers])

    def _table(self, layer: int, programs: list[Program]) -> torch.Tensor:
        table = torch.zeros(len(programs), 1, self.vectors.shape[1])
        for row, program in enumerate(programs):
            if program is not None and str(layer) in program:
                table[row, 0] = self.vectors[program[str(layer)]]
        return table

    def _add(self, layer: int, table: torch.Tensor) -> Any:
        def hook(_module: Any, _inputs: Any, output: Any) -> None:
            hidden(output).add_(table)

        return self.model.model.layers[layer].register_forward_hook(hook)

    def rows(self, ids: torch.Tensor) -> torch.Tensor:
        kept: list[torch.Tensor] = []

        def keep(_module: Any, _inputs: Any, output: Any) -> None:
            kept.append(hidden(output)[0])

        with hooks([layer.register_forward_hook(keep) for layer in self.model.model.layers]):
            self.model.model(input_ids=ids, use_cache=False)
        return torch.stack(kept)


if __name__ == "__main__":
    serve(Hooked())
