"""Activation patching: the output of a head in the clean run is put into the corrupt run, at every position.

    change_h = metric(corrupt run | z_h ← z_h(clean)) - metric(corrupt run)

Positive for a head that carries the answer. The position of a token takes the output at the same position of the other
prompt: this is why both have equally many tokens. Heads downstream see the change, so this is the total effect
(Vig et al. 2020, causal mediation analysis; Meng et al. 2022, causal tracing; "denoising" in Heimersheim & Nanda 2024).
"""

from collections.abc import Iterator

from torch import Tensor

from patchclamp_server.analysis.heads.circuits.runs import PairRuns, single_heads, variant_ends, variants_at_once
from patchclamp_server.engine.exclusive import Sliced
from patchclamp_server.model.decoder import Decoder


def changes(decoder: Decoder, runs: PairRuns, means: Tensor) -> Iterator[Sliced[Tensor]]:
    """Is a CircuitMethod; the means are not used."""
    for heads in single_heads(decoder.spec, variants_at_once(len(runs.pair.clean))):
        yield _changes(decoder, runs, heads)


def _changes(decoder: Decoder, runs: PairRuns, heads: Tensor) -> Sliced[Tensor]:
    ends = yield from variant_ends(decoder, runs.corrupt, heads, runs.clean.z)
    return runs.pair.metric(decoder, ends) - runs.corrupt_metric
