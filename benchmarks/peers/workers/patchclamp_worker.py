"""Patchclamp: requests to its engine in this process, as the peers run in theirs.

Prompts are the same in every round, so that the prefix cache, which would have them, is off.
"""

from patchclamp_server.cpu.compiled_code import keep_compiled_code
from patchclamp_server.threads import configure_threads

configure_threads()
keep_compiled_code()

import asyncio
import sys
import threading
import time
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from protocol import Clock, Program, serve
from torch import Tensor

# What benchmarks share.
sys.path.append(str(Path(__file__).parents[2]))
from edits import programs

from patchclamp_server.analysis.sparsity.calibrate import calibrate_on
from patchclamp_server.engine.config import EngineConfig
from patchclamp_server.engine.engine import Engine
from patchclamp_server.engine.reducers.kept_rows import KeptRows
from patchclamp_server.engine.request import (
    Event,
    Failed,
    Finished,
    Reduction,
    Request,
    SparseInference,
    StopParams,
    Token,
)
from patchclamp_server.interventions.bind import bind
from patchclamp_server.interventions.bound import BoundProgram
from patchclamp_server.interventions.program import AddVector, Edit, Vector
from patchclamp_server.interventions.program import Program as Edits
from patchclamp_server.model.load import load_model
from patchclamp_server.model.sites import Site
from patchclamp_server.sparsity.policies import POLICIES
from patchclamp_server.sparsity.policy import Selector
from patchclamp_server.sparsity.profile import Profile


class Patchclamp:
    def load(self, model: str, vectors: str, threads: int) -> dict[str, Any]:
        torch.set_num_threads(threads)
        self.vectors = torch.from_numpy(np.load(vectors))
        self.model = load_model(model)
        self.engine = Engine(self.model, EngineConfig(enable_prefix_cache=False))
        self.engine.start()
        self.selectors: dict[str, Selector] = {}
        versions = {name: version(name) for name in ("patchclamp", "torch", "numba")}
        return {"versions": versions, "settings": "the file as it is, float32 activations, prefix cache off"}

    def _bound(self, program: Program) -> BoundProgram | None:
        if program is None:
            return None
        edits = [
            Edit(AddVector(Vector(values=self.vectors[row])), Site.RESID_POST, layers=(int(layer),))
            for layer, row in program.items()
        ]
        return bind(Edits(edits=tuple(edits)), self.model.info)

    def decode(self, prompts: list[list[int]], tokens: int, programs: list[Program], one_by_one: int) -> dict[str, Any]:
        return self._together(prompts, tokens, [self._bound(program) for program in programs], None)

    def decode_edited(self, prompts: list[list[int]], tokens: int) -> dict[str, Any]:
        """With 16 programs of every kind of edit, those of benchmarks/cpu.py."""
        return self._together(prompts, tokens, programs(self.model.info)[: len(prompts)], None)

    def calibrate(self, policy: str, keep: float, documents: list[list[int]]) -> dict[str, Any]:
        """Binds a sparse policy once; `documents` are what its profile is made of, where it needs one."""
        if policy in self.selectors:
            return {}
        chosen = POLICIES[policy](keep_ratio=keep)  # type: ignore[call-arg]
        profile: Profile | None = None
        if chosen.needs_profile:

            async def make() -> None:
                nonlocal profile
                async for event in calibrate_on(self.engine, chosen, torch.tensor(documents)):
                    profile = event if isinstance(event, Profile) else profile

            asyncio.run(make())
        self.selectors[policy] = chosen.bind(self.engine.sparse_model, profile)
        return {}

    def decode_sparsely(self, prompts: list[list[int]], tokens: int, policy: str) -> dict[str, Any]:
        sparse = SparseInference(policy, self.selectors[policy])
        return self._together(prompts, tokens, [None] * len(prompts), sparse)

    def _together(
        self, prompts: list[list[int]], tokens: int, programs: list[BoundProgram | None], sparse: SparseInference | None
    ) -> dict[str, Any]:
        came: list[list[int]] = [[] for _ in prompts]
        times: list[list[float]] = [[] for _ in prompts]

        def follower(row: int) -> Any:
            def on_token(event: Event) -> None:
                if isinstance(event, Token):
                    times[row].append(time.perf_counter())
                    came[row].append(event.id)

            return on_token

        stop = StopParams(max_tokens=tokens, ignore_eos=True)
        clock = Clock()
        self._finish(
            [
                Request(tuple(prompt), follower(row), program=program, stop=stop, sparsity=sparse)
                for row, (prompt, program) in enumerate(zip(prompts, programs, strict=True))
            ]
        )
        # Requests that were first have more than one token when the last has its first.
        first, last = max(own[0] for own in times), max(own[-1] for own in times)
        return {
            "prefill_seconds": first - clock.started,
            "decode_seconds": last - first,
            "decoded": sum(moment > first for own in times for moment in own),
            "tokens": came,
            "how": "one batch",
        }

    def _finish(self, requests: list[Request]) -> None:
        """Runs them together to their ends."""
        left = threading.Semaphore(0)
        failures: list[str] = []

        def ending(request: Request) -> Any:
            def on_event(event: Event) -> None:
                request.on_event(event)
                if isinstance(event, Failed):
                    failures.append(str(event.error))
                if isinstance(event, Failed | Finished):
                    left.release()

            return on_event

        for request in requests:
            self.engine.submit(replace(request, on_event=ending(request)))
        for _ in requests:
            left.acquire()
        if failures:
            raise RuntimeError(failures[0])

    def logits(self, prompt: list[int], program: Program, path: str) -> dict[str, Any]:
        kept = Kept()
        self._finish([Request(tuple(prompt), _ignore, program=self._bound(program), score_from=1, scores=kept)])
        np.save(path, torch.stack(kept.rows).numpy())
        return {}

    def read(self, prompt: list[int], layers: int, path: str | None) -> dict[str, Any]:
        reducer = KeptRows(tuple(range(layers)))
        clock = Clock()
        self._finish(
            [
                Request(
                    tuple(prompt),
                    _ignore,
                    stop=StopParams(max_tokens=0),
                    reductions=(Reduction(Site.RESID_POST, reducer),),
                )
            ]
        )
        rows = torch.stack([reducer.rows(layer) for layer in range(layers)])
        clock.tick()
        if path is not None:
            np.save(path, rows.numpy())
        return {"seconds": clock.times[0] - clock.started, "shape": list(rows.shape)}


class Kept:
    """Takes the log-probabilities that each token is scored with."""

    def __init__(self) -> None:
        self.rows: list[Tensor] = []

    def add(self, position: int, logprobs: Tensor) -> None:
        self.rows.append(logprobs.clone())


def _ignore(_event: Event) -> None:
    pass


if __name__ == "__main__":
    serve(Patchclamp())
