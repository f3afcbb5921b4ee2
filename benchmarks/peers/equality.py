"""How far the predictions of each peer are from those of plain torch, float32, on the weights that the file holds.

    first choices equal      share of the tokens of a fixed text whose likeliest next token is the same
    KL(oracle ‖ peer)        mean over those tokens, nats, from log-probabilities in float64

Unsteered, and with the program of all layers: where they agree a peer has done the same edit.
"""

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from peers.cases import programs
from peers.figures import Figure, Figures
from peers.process import CannotError, PeerError, Worker

TOKENS = 384
STEERED = ("unsteered", "all layers")
# Rows of a vocabulary in float64 at a time.
AT_ONCE = 64


def compare(workers: Mapping[str, Worker], model: Path, vectors: Path, text: Sequence[int], n_layers: int) -> Figures:
    """The figures "first choices equal, …" and "mean KL, …" of every peer."""
    prompt, rows = list(text[:TOKENS]), torch.from_numpy(np.load(vectors))
    found: Figures = {}
    with tempfile.TemporaryDirectory(prefix="patchclamp-peers-") as scratch:
        for steering in STEERED:
            program = programs(steering, 1, n_layers)[0]
            truth = oracle(model, prompt, {int(layer): rows[row] for layer, row in (program or {}).items()})
            for peer, worker in workers.items():
                equal, divergence = Figure(), Figure()
                found.setdefault(f"first choices equal, {steering}", {})[peer] = equal
                found.setdefault(f"mean KL, {steering}", {})[peer] = divergence
                path = Path(scratch) / "logits.npy"
                try:
                    worker.ask("logits", prompt=prompt, program=program, path=str(path))
                except (CannotError, PeerError) as error:
                    equal.reason = divergence.reason = str(error)
                    continue
                share, mean = agreement(truth, torch.from_numpy(np.load(path)))
                equal.values.append(share)
                divergence.values.append(mean)
                print(f"{peer}, {steering}: first choices equal {share:.4f}, mean KL {mean:.3g}", flush=True)
    return found


def oracle(model: Path, prompt: Sequence[int], added: Mapping[int, Tensor]) -> Tensor:
    """float32 [tokens - 1, vocabulary]: logits after each token but the last. `added`: by layer, to its resid_post."""
    plain = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()

    def adding(vector: Tensor) -> Any:
        def hook(_module: Any, _inputs: Any, output: Any) -> Tensor:
            return output + vector

        return hook

    for layer, vector in added.items():
        plain.model.layers[layer].register_forward_hook(adding(vector))
    with torch.inference_mode():
        logits: Tensor = plain(input_ids=torch.tensor([list(prompt)])).logits[0, :-1]
    return logits.clone()


def agreement(truth: Tensor, other: Tensor) -> tuple[float, float]:
    """Share of rows with the same first choice, and mean KL(truth ‖ other). Both [tokens, vocabulary], logits or
    log-probabilities."""
    if truth.shape != other.shape:
        raise PeerError(f"logits of shape {list(other.shape)}, not {list(truth.shape)}")
    divergences = []
    for own, its in zip(truth.split(AT_ONCE), other.split(AT_ONCE), strict=True):
        p, q = own.double().log_softmax(1), its.double().log_softmax(1)
        divergences.append((p.exp() * (p - q)).sum(1))
    equal = (truth.argmax(1) == other.argmax(1)).double().mean()
    return float(equal), float(torch.cat(divergences).mean().clamp_min(0.0))
