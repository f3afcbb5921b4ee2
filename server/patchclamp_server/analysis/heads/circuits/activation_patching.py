"""Activation patching: the output of a head in the clean run is put into the corrupt run, at every position.

    change_h = metric(corrupt run | z_h ← z_h(clean)) - metric(corrupt run)

Positive for a head that carries the answer. The position of a token takes the output at the same position of the other
prompt: this is why both have equally many tokens. Heads downstream see the change, so this is the total effect
(Vig et al. 2020, causal mediation analysis; Meng et al. 2022, causal tracing; "denoising" in Heimersheim & Nanda 2024).
"""

from collections.abc import Iterator

from torch import Tensor

from patchclamp_server.analysis.heads.circuits.runs import PairRuns, single_heads, variant_ends, variants_at_once
from patchclamp_server.model.decoder import Decoder


def changes(decoder: Decoder, runs: PairRuns, means: Tensor) -> Iterator[Tensor]:
    """A CircuitMethod; the means are not used."""
    for head in single_heads(decoder.spec, variants_at_once(len(runs.pair.clean))):
        yield runs.pair.metric(decoder, variant_ends(decoder, runs.corrupt, head, runs.clean.z)) - runs.corrupt_metric
