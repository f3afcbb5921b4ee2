"""nnsight: interventions written in a trace of `generate`, one invoke for each program of a batch."""

from importlib.metadata import version
from typing import Any, cast

import nnsight
import numpy as np
import torch
from hf import SETTINGS, Ticks
from nnsight import TransformersModel
from protocol import Clock, Program, same, serve


class Nnsight:
    def load(self, model: str, vectors: str, threads: int) -> dict[str, Any]:
        torch.set_num_threads(threads)
        self.vectors = torch.from_numpy(np.load(vectors))
        self.model = TransformersModel(model, task="text-generation", dispatch=True, dtype=torch.float32)
        self.model.generation_config.eos_token_id = None
        self.layers = self.model.model.layers
        versions = {name: version(name) for name in ("nnsight", "transformers", "torch")}
        return {"versions": versions, "settings": f"{SETTINGS}, one invoke for each program of a batch"}

    def decode(self, prompts: list[list[int]], tokens: int, programs: list[Program], one_by_one: int) -> dict[str, Any]:
        with torch.inference_mode():
            ticks = Ticks()
            found = (self._one if same(programs) else self._several)(prompts, tokens, programs, ticks)
        rows = found[:, len(prompts[0]) :].tolist()
        return ticks.clock.seconds(len(prompts)) | {"tokens": rows, "how": "one batch"}

    def _one(self, prompts: list[list[int]], tokens: int, programs: list[Program], ticks: Ticks) -> torch.Tensor:
        """One program for all rows."""
        edits = self._edits(programs[0])
        ids = torch.tensor(prompts)
        with self.model.generate(ids, max_new_tokens=tokens, do_sample=False, streamer=ticks) as tracer:
            if edits:
                for _ in tracer.iter[:tokens]:
                    for layer, vector in edits:
                        self.layers[layer].output[:] += vector
            found = tracer.result.save()
        # Of inside the trace nothing is returned: it is not run there.
        return cast(torch.Tensor, found)

    def _several(self, prompts: list[list[int]], tokens: int, programs: list[Program], ticks: Ticks) -> torch.Tensor:
        with self.model.generate(max_new_tokens=tokens, do_sample=False, streamer=ticks) as tracer:
            for prompt, program in zip(prompts, programs, strict=True):
                with tracer.invoke(torch.tensor([prompt])):
                    edits = self._edits(program)
                    for _ in tracer.iter[:tokens]:
                        for layer, vector in edits:
                            self.layers[layer].output[:] += vector
            with tracer.invoke():
                found = tracer.result.save()
        return cast(torch.Tensor, found)

    def _edits(self, program: Program) -> list[tuple[int, torch.Tensor]]:
        """Interventions are written in the order in which layers run."""
        return sorted((int(layer), self.vectors[row]) for layer, row in (program or {}).items())

    def logits(self, prompt: list[int], program: Program, path: str) -> dict[str, Any]:
        edits = self._edits(program)
        with torch.inference_mode(), self.model.trace(torch.tensor([prompt])):
            for layer, vector in edits:
                self.layers[layer].output[:] += vector
            found = self.model.output.logits.save()
        np.save(path, found[0, :-1].numpy())
        return {}

    def read(self, prompt: list[int], layers: int, path: str | None) -> dict[str, Any]:
        with torch.inference_mode():
            clock = Clock()
            with self.model.trace(torch.tensor([prompt])):
                kept = nnsight.save([])
                for layer in self.layers:
                    kept.append(layer.output[0])
            rows = torch.stack(list(kept))
            clock.tick()
        if path is not None:
            np.save(path, rows.numpy())
        return {"seconds": clock.times[0] - clock.started, "shape": list(rows.shape)}


if __name__ == "__main__":
    serve(Nnsight())
