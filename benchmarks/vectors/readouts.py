"""What reading costs: decode steps of 8 requests that each read an activation, or 64 features, and of 8 that read none.

One row of the residual stream is captured a token at one site and layer, or 64 chosen features of a sparse autoencoder
of 1,024 are read there. The three take turns, back and forth, in one run: a round has all of them. The overhead of a
round is the median decode step with the readout over that without, less 1; of all rounds the median, with an interval
of 95 % from draws of rounds with replacement. The weights of the autoencoder are random: what they are costs nothing.
"""

import tempfile
from dataclasses import dataclass
from statistics import median
from typing import Any

import numpy as np
import torch
from measure import alternate, decode_steps
from neurons.shown import say

from patchclamp_server.artifacts.store import ArtifactStore
from patchclamp_server.artifacts.types import ArtifactKind
from patchclamp_server.engine.engine import Engine
from patchclamp_server.interventions.bind import bind
from patchclamp_server.interventions.bound import BoundProgram
from patchclamp_server.interventions.kinds.features import FeatureReadout
from patchclamp_server.interventions.program import (
    ActivationReadout,
    Phase,
    Program,
    Readout,
    ReadoutKind,
    Scope,
    TokenSelector,
)
from patchclamp_server.model.load import LoadedModel
from patchclamp_server.model.sites import Site

FEATURES, READ = 1024, 64
SITE = Site.RESID_POST
RESAMPLES = 2000
# By what is read, the largest overhead that is accepted.
GOALS = {"captured_row": 0.05, "features64": 0.03}


@dataclass(frozen=True)
class Sizes:
    """`prompt` tokens before each of the `batch` requests, `tokens` of each in a round."""

    batch: int = 8
    prompt: int = 128
    tokens: int = 32
    rounds: int = 24


def measure(model: LoadedModel, sizes: Sizes) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)
    shape = (sizes.batch, sizes.prompt)
    prompts = torch.randint(min(100, model.info.vocab_size // 2), model.info.vocab_size, shape, generator=generator)
    engine = Engine(model)
    engine.start()
    try:
        with tempfile.TemporaryDirectory() as directory:
            programs = readers(model, ArtifactStore(directory))
        runs = {
            name: lambda program=program: median(decode_steps(engine, prompts.tolist(), program, sizes.tokens))
            for name, program in {"none": None, **programs}.items()
        }
        steps = alternate(runs, sizes.rounds)
    finally:
        engine.shutdown()
    found: dict[str, Any] = {"threads": torch.get_num_threads(), "sizes": vars(sizes), "goals": GOALS}
    found["step_milliseconds"] = {name: round(1e3 * median(own), 3) for name, own in steps.items()}
    for name in programs:
        found[name] = overhead(steps[name], steps["none"])
        say(f"{name}: {shown(found[name])} of a step of {found['step_milliseconds']['none']:.2f} ms")
    return found


def readers(model: LoadedModel, store: ArtifactStore) -> dict[str, BoundProgram]:
    """Programs that read generated tokens at the middle of the model."""
    info, layer = model.info, model.info.n_layers // 2
    generator = torch.Generator().manual_seed(1)
    encoder = torch.randn(FEATURES, info.d_model, generator=generator) / info.d_model**0.5
    stored = store.put(
        ArtifactKind.AUTOENCODER,
        {
            "encoder": encoder,
            "encoder_bias": torch.zeros(FEATURES),
            "decoder": encoder.clone(),
            "decoder_bias": torch.zeros(info.d_model),
        },
        model_fingerprint=info.fingerprint,
        site=SITE,
        provenance={"layer": layer, "function": "relu", "subtracted": "nothing"},
    )
    kinds: dict[str, ReadoutKind] = {
        "captured_row": ActivationReadout(()),
        "features64": FeatureReadout(stored.id, tuple(range(0, FEATURES, FEATURES // READ))),
    }
    scope = Scope((TokenSelector(phase=Phase.GENERATED),))
    return {
        name: bind(Program(readouts=(Readout(kind, SITE, layers=(layer,), scope=scope),)), info, store)
        for name, kind in kinds.items()
    }


def overhead(steps: list[float], without: list[float]) -> dict[str, float]:
    """Of one round after the other, seconds of a step."""
    ratios = np.array(steps) / np.array(without) - 1
    drawn = np.random.default_rng(0).choice(ratios, size=(RESAMPLES, len(ratios)))
    low, high = np.quantile(np.median(drawn, axis=1), [0.025, 0.975])
    return {"mean": round(float(np.median(ratios)), 4), "low": round(float(low), 4), "high": round(float(high), 4)}


def shown(row: dict[str, float]) -> str:
    return f"{row['mean']:+.1%} ({row['low']:+.1%} to {row['high']:+.1%})"
