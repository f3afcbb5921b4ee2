"""repeng: ControlModel around the layers, set_raw_control before `generate`."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from hf import SETTINGS, HfPeer
from protocol import Cannot, Program, serve
from repeng import ControlModel


class Controlled(HfPeer):
    package = "repeng"
    settings = f"{SETTINGS}, ControlModel on the layers of the program: one vector a layer for the whole batch"

    @contextmanager
    def steered(self, programs: list[Program]) -> Iterator[None]:
        """A model is wrapped at the layers that are controlled, as its notebooks do, and unwrapped after it."""
        program = programs[0]
        if program is None:
            yield
            return
        rows = {int(layer): self.vectors[row] for layer, row in program.items()}
        controlled = ControlModel(self.model, list(rows))
        controlled.set_raw_control(rows)
        try:
            yield
        finally:
            controlled.unwrap()

    def rows(self, ids: torch.Tensor) -> torch.Tensor:
        raise Cannot("it reads the last token of a text only (batched_get_hiddens)")


if __name__ == "__main__":
    serve(Controlled())
