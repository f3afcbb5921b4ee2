"""The last line of the benchmark: what we are measured by."""

from collections.abc import Mapping
from typing import Any

from peers.cases import BATCHES, EDITED, PREFILLS, decode_name
from peers.environments import LLAMA, OURS
from peers.figures import Figure, Figures, ratio

# Before the name of a policy, in figures of it at a keep ratio of .5.
KEEP50 = "sparse "
# With half of the neurons they predict nearly as well as the dense model, perplexity at most 1.05 of its
# (benchmarks/sparse): what is faster and does not is no answer to whether sparse decoding pays.
KEEPS_QUALITY = frozenset({"fovea", "glance"})


def summary(figures: Figures, file_bytes: int, server: Mapping[str, Figure]) -> dict[str, Any]:
    """Ratios of rounds, with their quartiles; None for what was not measured. `server`: of `patchclamp serve`."""

    def of(name: str, peer: str = OURS) -> list[float]:
        return figures.get(name, {}).get(peer, Figure()).values

    def against(name: str) -> dict[str, Any] | None:
        return ratio(of(name), of(name, LLAMA))

    def overhead(batch: int) -> dict[str, Any] | None:
        """Of steering all layers: how much longer a token takes."""
        found = ratio(of(decode_name(batch, "unsteered")), of(decode_name(batch, "all layers")))
        return found and {
            "value": round(found["value"] - 1, 4),
            "quartiles": [round(each - 1, 4) for each in found["quartiles"]],
        }

    unsteered = {batch: decode_name(batch, "unsteered") for batch in BATCHES}
    policies = {name.removeprefix(KEEP50): name for name in figures if name.startswith(KEEP50)}
    sparse = {policy: ratio(of(name), of(unsteered[1])) for policy, name in policies.items()}
    measured = {policy: found for policy, found in sparse.items() if found and policy in KEEPS_QUALITY}
    best = max(measured, key=lambda policy: measured[policy]["value"], default=None)
    resident, ready = server["memory"].card()["value"], server["ready"].card()["value"]
    return {
        **{f"batch{batch}_vs_llama_cpp": against(name) for batch, name in unsteered.items()},
        **{f"programs{batch}_vs_llama_cpp": against(decode_name(batch, "programs")) for batch in BATCHES[1:]},
        **{f"prefill{length}_vs_llama_cpp": against(f"prefill {length}") for length in PREFILLS},
        # With programs of every kind of edit, those of benchmarks/cpu.py.
        "programs16_vs_unsteered": ratio(of(EDITED), of(unsteered[16])),
        "all_layer_steering_overhead": overhead(1),
        "all_layer_steering_overhead_16": overhead(16),
        "rss_over_file_embedded": resident and round(resident / file_bytes, 3),
        "ready_seconds_embedded": ready,
        "sparse_keep50_vs_dense": best and measured[best],
        "sparse_keep50_policy": best,
    }


def last_line(ratios: Mapping[str, Any]) -> dict[str, Any]:
    """The values alone."""
    return {name: each["value"] if isinstance(each, dict) else each for name, each in ratios.items()}
