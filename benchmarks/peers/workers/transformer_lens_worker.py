"""transformer-lens: TransformerBridge, hooks on hook_resid_post around `generate_stream`, run_with_cache."""

from contextlib import AbstractContextManager, nullcontext
from importlib.metadata import version
from typing import Any

import numpy as np
import torch
from protocol import Clock, Program, serve
from transformer_lens.model_bridge import TransformerBridge


class Lens:
    def load(self, model: str, vectors: str, threads: int) -> dict[str, Any]:
        torch.set_num_threads(threads)
        self.vectors = torch.from_numpy(np.load(vectors))
        self.model = TransformerBridge.boot_transformers(model, device="cpu", dtype=torch.float32)
        self.model.eval()
        versions = {name: version(name) for name in ("transformer-lens", "transformers", "torch")}
        settings = "float32, TransformerBridge (eager attention, as it sets it), KV cache, torch.inference_mode"
        return {"versions": versions, "settings": settings}

    def _steered(self, programs: list[Program]) -> AbstractContextManager[Any]:
        layers = sorted({int(layer) for program in programs for layer in program or {}})
        if not layers:
            return nullcontext()
        return self.model.hooks(
            fwd_hooks=[(f"blocks.{layer}.hook_resid_post", self._add(layer, programs)) for layer in layers]
        )

    def _add(self, layer: int, programs: list[Program]) -> Any:
        table = torch.zeros(len(programs), 1, self.vectors.shape[1])
        for row, program in enumerate(programs):
            if program is not None and str(layer) in program:
                table[row, 0] = self.vectors[program[str(layer)]]

        def add(residual: torch.Tensor, hook: Any) -> torch.Tensor:
            return residual + table

        return add

    def decode(self, prompts: list[list[int]], tokens: int, programs: list[Program], one_by_one: int) -> dict[str, Any]:
        ids = torch.tensor(prompts)
        came: list[torch.Tensor] = []
        with torch.inference_mode(), self._steered(programs):
            clock = Clock()
            stream = self.model.generate_stream(
                ids,
                max_new_tokens=tokens,
                max_tokens_per_yield=1,
                stop_at_eos=False,
                do_sample=False,
                return_type="tokens",
                verbose=False,
            )
            for step in stream:
                clock.tick()
                came.append(step[:, -1])
        return clock.seconds(len(prompts)) | {"tokens": torch.stack(came, 1).tolist(), "how": "one batch"}

    def logits(self, prompt: list[int], program: Program, path: str) -> dict[str, Any]:
        with torch.inference_mode(), self._steered([program]):
            np.save(path, self.model(torch.tensor([prompt]))[0, :-1].numpy())
        return {}

    def read(self, prompt: list[int], layers: int, path: str | None) -> dict[str, Any]:
        names = [f"blocks.{layer}.hook_resid_post" for layer in range(layers)]
        with torch.inference_mode():
            clock = Clock()
            _, cache = self.model.run_with_cache(torch.tensor([prompt]), names_filter=names, return_type=None)
            rows = torch.stack([cache[name][0] for name in names])
            clock.tick()
        if path is not None:
            np.save(path, rows.numpy())
        return {"seconds": clock.times[0] - clock.started, "shape": list(rows.shape)}


if __name__ == "__main__":
    serve(Lens())
