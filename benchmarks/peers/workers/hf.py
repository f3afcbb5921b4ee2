"""What workers that run a transformers model share: float32 weights, `generate` with its KV cache, greedy.

A subclass says how its library steers. No padding and no end of text: prompts of a batch have one length.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from importlib.metadata import version
from typing import Any

import numpy as np
import torch
from protocol import Cannot, Clock, Program, same, together
from transformers import AutoModelForCausalLM
from transformers.generation.streamers import BaseStreamer

SETTINGS = "float32, sdpa attention, generate with a dynamic KV cache, torch.inference_mode"


class Ticks(BaseStreamer):
    """Is given the prompt first, and then the tokens of each step."""

    def __init__(self) -> None:
        self.clock = Clock()
        self._prompt = True

    def put(self, value: Any) -> None:
        if not self._prompt:
            self.clock.tick()
        self._prompt = False

    def end(self) -> None:
        pass


class HfPeer:
    package = "transformers"
    settings = SETTINGS
    # Whether a batch may have a program for each of its rows.
    batches_programs = False

    def load(self, model: str, vectors: str, threads: int) -> dict[str, Any]:
        torch.set_num_threads(threads)
        self.vectors = torch.from_numpy(np.load(vectors))
        self.model = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
        self.model.generation_config.eos_token_id = None
        self.n_layers = self.model.config.num_hidden_layers
        self.prepare()
        packages = dict.fromkeys((self.package, "transformers", "torch"))
        return {"versions": {name: version(name) for name in packages}, "settings": self.settings}

    def prepare(self) -> None:
        """What the library does with a model before it can be steered."""

    def steered(self, programs: list[Program]) -> AbstractContextManager[None]:
        """Programs of the rows of a batch, all the same unless `batches_programs`."""
        raise NotImplementedError

    def decode(self, prompts: list[list[int]], tokens: int, programs: list[Program], one_by_one: int) -> dict[str, Any]:
        if not same(programs) and not self.batches_programs:
            each = zip(prompts[:one_by_one], programs, strict=False)
            return together([self._batch([prompt], tokens, [program]) for prompt, program in each])
        return self._batch(prompts, tokens, programs) | {"how": "one batch"}

    def _batch(self, prompts: list[list[int]], tokens: int, programs: list[Program]) -> dict[str, Any]:
        ids = torch.tensor(prompts)
        with torch.inference_mode(), self.steered(programs):
            ticks = Ticks()
            found = self.model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=tokens,
                do_sample=False,
                streamer=ticks,
            )
        return ticks.clock.seconds(len(prompts)) | {"tokens": found[:, ids.shape[1] :].tolist()}

    def logits(self, prompt: list[int], program: Program, path: str) -> dict[str, Any]:
        with torch.inference_mode(), self.steered([program]):
            np.save(path, self.model(input_ids=torch.tensor([prompt])).logits[0, :-1].numpy())
        return {}

    def read(self, prompt: list[int], layers: int, path: str | None) -> dict[str, Any]:
        ids = torch.tensor([prompt])
        with torch.inference_mode():
            clock = Clock()
            rows = self.rows(ids)
            clock.tick()
        if path is not None:
            np.save(path, rows.numpy())
        return {"seconds": clock.times[0] - clock.started, "shape": list(rows.shape)}

    def rows(self, ids: torch.Tensor) -> torch.Tensor:
        """float32 [layers, tokens, d_model]."""
        raise Cannot("it has no way to read activations")


def hidden(output: Any) -> torch.Tensor:
    """What a block gives on: by the version of transformers it is alone or the first of several."""
    return output[0] if isinstance(output, tuple) else output


@contextmanager
def hooks(handles: list[Any]) -> Iterator[None]:
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
