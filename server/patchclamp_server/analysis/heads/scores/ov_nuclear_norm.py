"""How much a head's OV circuit can write: the nuclear norm, the sum of the singular values.

    score_h = ‖W_O^h W_V^h‖_* = ‖R_O R_Vᵀ‖_*,   W_O^h = Q_O R_O,   (W_V^h)ᵀ = Q_V R_V

The QR factors of both slim matrices leave a product of head_dim x head_dim. Gradient descent on the two factors favours
the product of least nuclear norm, and that is why associations generalise out of context. Weights only; norms of the
residual stream are not folded in. The control is the same of random matrices with the Frobenius norms of both factors:
a score below it says that the circuit concentrates on few directions. Source: Huang et al. 2025, Generalization or
Hallucination? Understanding Out-of-Context Reasoning in Transformers.
"""

from collections.abc import AsyncGenerator

import torch
from torch import Tensor

from patchclamp_server.analysis.heads.scores.ov import ov_weights
from patchclamp_server.analysis.heads.scores.scoring import HeadScores, Scoring
from patchclamp_server.analysis.progress import Progress
from patchclamp_server.analysis.requests import exclusively
from patchclamp_server.engine.engine import Engine
from patchclamp_server.engine.exclusive import Slice, Sliced, Work
from patchclamp_server.model.decoder import Decoder
from patchclamp_server.text.prompt import PromptEncoder


def scores(engine: Engine, prompts: PromptEncoder, job: Scoring) -> AsyncGenerator[Progress | HeadScores, None]:
    return exclusively(engine, _norms(engine.model.decoder, job.seed))


def nuclear_norms(left: Tensor, right: Tensor) -> Tensor:
    """Returns the norms [n] of left [n, d, k] times right [n, k, d], for k up to d."""
    inner = torch.linalg.qr(left).R @ torch.linalg.qr(right.mT).R.mT
    norms: Tensor = torch.linalg.svdvals(inner).sum(-1)
    return norms


def _norms(decoder: Decoder, seed: int) -> Work[Progress | HeadScores]:
    generator = torch.Generator().manual_seed(seed)
    n_layers = decoder.spec.n_layers
    found, random = [], []
    for layer in range(n_layers):
        values, outputs = (factor.double().cpu() for factor in ov_weights(decoder, layer))
        drawn = _random_like(outputs, generator), _random_like(values, generator)
        found.append((yield from _by_head(outputs, values)))
        random.append((yield from _by_head(*drawn)))
        yield Progress("layers", layer + 1, n_layers)
    yield HeadScores(torch.stack(found).float(), torch.stack(random).float())


def _by_head(left: Tensor, right: Tensor) -> Sliced[Tensor]:
    """Returns the `nuclear_norms`, computed a few heads at a time."""
    norms: list[Tensor] = []
    done = 0
    while done < len(left):
        heads = yield Slice(len(left) - done)
        norms.append(nuclear_norms(left[done : done + heads], right[done : done + heads]))
        done += heads
    return torch.cat(norms)


def _random_like(factor: Tensor, generator: torch.Generator) -> Tensor:
    """Returns normal matrices [n, rows, columns] with the Frobenius norms of `factor`."""
    drawn = torch.randn(factor.shape, generator=generator, dtype=factor.dtype)
    norms: Tensor = torch.linalg.matrix_norm(factor) / torch.linalg.matrix_norm(drawn)
    return drawn * norms[:, None, None]
