"""What each sparse policy does to the predictions of a model, on text that calibration did not see.

Prompts of 256 tokens are dense; the next 256 are computed by the policy and scored (evaluate.py says how). `random` and
`oracle` are controls: a random set, and the neurons that a look at all of them would choose. Bytes are those of the
weights of the MLP that one row reads, over the dense ones, for weights of 16 bits; of teal and wina, of all four
products of a block.
"""

import math
import time
from collections.abc import Sequence
from dataclasses import replace
from statistics import fmean
from typing import Any

from torch import Tensor

from patchclamp_server.analysis.sparsity.calibrate import calibrate_on
from patchclamp_server.analysis.sparsity.evaluate import Quality, scored
from patchclamp_server.engine.engine import Engine
from patchclamp_server.sparsity.policies import CONTROLS
from patchclamp_server.sparsity.policies.cats import Cats
from patchclamp_server.sparsity.policies.coreinfer_similarity import CoreInferSimilarity
from patchclamp_server.sparsity.policies.coreinfer_stability import CoreInferStability
from patchclamp_server.sparsity.policies.dense import Dense
from patchclamp_server.sparsity.policies.exact_zero import ExactZero
from patchclamp_server.sparsity.policies.fovea import Fovea
from patchclamp_server.sparsity.policies.glance import Glance
from patchclamp_server.sparsity.policies.griffin import Griffin
from patchclamp_server.sparsity.policies.oracle import Oracle
from patchclamp_server.sparsity.policies.random_set import RandomSet
from patchclamp_server.sparsity.policies.static_set import StaticSet
from patchclamp_server.sparsity.policies.teal import Teal
from patchclamp_server.sparsity.policies.wina import Wina
from patchclamp_server.sparsity.policy import Policy, Selector
from patchclamp_server.sparsity.profile import Profile

PROMPT = 256
# Row → policy, and whether it is bound to a profile. fovea_select is fovea without its compensation: selection alone.
ROWS: dict[str, tuple[Policy, bool]] = {
    "fovea": (Fovea(), True),
    "fovea_select": (Fovea(compensate=False, budget="uniform"), True),
    "glance": (Glance(), False),
    "cats": (Cats(), False),
    "oracle": (Oracle(), False),
    "random": (RandomSet(), False),
    "wina": (Wina(), False),
    "teal_uniform": (Teal(), True),
    "teal_greedy": (Teal(allocation="greedy"), True),
    "griffin": (Griffin(), False),
    "coreinfer_stability": (CoreInferStability(), False),
    "coreinfer_similarity": (CoreInferSimilarity(), True),
    "static_set": (StaticSet(), True),
}
# What keeps everything, or everything that is not zero: one row of its own, whatever the ratio.
EXACT: dict[str, Policy] = {"dense": Dense(), "exact_zero": ExactZero()}
ALL = (*EXACT, *ROWS)
OURS = "fovea"
SUMMARY = (
    "quality",
    "best_policy_keep50",
    "best_ratio_keep50",
    "best_policy_keep30",
    "best_ratio_keep30",
    "random_ratio_keep50",
    "ours_is_best",
)
Table = dict[str, dict[str, dict[str, float]]]


class Profiles:
    """Calibrates on `documents` when first asked. Rows of one policy share what the fullest of them needs."""

    def __init__(self, engine: Engine, documents: Tensor, description: str) -> None:
        self.engine, self.documents, self.description = engine, documents, description
        self.made: dict[str, Profile] = {}
        self.seconds: dict[str, float] = {}

    async def of(self, policy: Policy) -> Profile:
        name = policy.name
        if name not in self.made:
            fullest = {"teal": Teal(allocation="greedy"), "fovea": Fovea()}.get(name, policy)
            started = time.perf_counter()
            async for event in calibrate_on(self.engine, fullest, self.documents):
                if isinstance(event, Profile):
                    self.made[name] = event
            self.seconds[name] = round(time.perf_counter() - started, 1)
            print(f"calibrated {name} in {self.seconds[name]} s", flush=True)
        return self.made[name]

    async def bound(self, row: str, keep: float) -> Selector:
        model = self.engine.sparse_model
        if row in EXACT:
            return EXACT[row].bind(model)
        policy, calibrated = ROWS[row]
        profile = await self.of(policy) if calibrated else None
        return replace(policy, keep_ratio=keep).bind(model, profile)


async def measure(
    profiles: Profiles, documents: Tensor, keeps: Sequence[float], policies: Sequence[str]
) -> dict[str, Any]:
    """The rows named in `policies` at each ratio, on documents [n, 2 · prompt]."""
    prompt = documents.shape[1] // 2
    perplexity = math.nan
    print(f"{len(documents)} documents")
    print(f"{'policy':22}{'keep':>6}{'ppl ratio':>11}{'KL':>9}{'top-1':>8}{'sparsity':>10}{'bytes':>8}{'s':>7}")
    table: Table = {}
    for keep in keeps:
        for row in policies:
            if row in EXACT and keep != keeps[0]:
                continue
            started = time.perf_counter()
            selector = await profiles.bound(row, keep)
            each = [document async for _, document in scored(profiles.engine, documents, prompt, [selector])]
            perplexity = math.exp(fmean(document.dense_nll for document in each))
            found = Quality.of(each, selector)
            shown = "1" if row in EXACT else f"{keep:g}"
            print(
                f"{row:22}{shown:>6}{found.perplexity_ratio:11.4f}{found.divergence:9.4f}{found.top1_agreement:8.3f}"
                f"{found.sparsity:10.3f}{found.bytes_read_16:8.3f}{time.perf_counter() - started:7.1f}",
                flush=True,
            )
            table.setdefault(row, {})[shown] = found.card()
    return {
        "text": profiles.description,
        "documents": len(documents),
        "scored_tokens": len(documents) * (documents.shape[1] - prompt - 1),
        "dense_perplexity": round(perplexity, 3),
        "calibration_seconds": profiles.seconds,
        "table": table,
        **summary(table),
    }


def summary(table: Table) -> dict[str, Any]:
    """SUMMARY: the best are of the policies that can be served. None: not measured."""
    quality = {row: {keep: card["perplexity_ratio"] for keep, card in cards.items()} for row, cards in table.items()}
    practical = [row for row in quality if row in ROWS and ROWS[row][0].name not in CONTROLS]
    keeps = dict.fromkeys(keep for row in practical for keep in quality[row])
    best = {keep: min(practical, key=lambda row: quality[row].get(keep, float("inf"))) for keep in keeps}
    return {
        "quality": quality,
        "best_policy_keep50": best.get("0.5"),
        "best_ratio_keep50": quality[best["0.5"]]["0.5"] if "0.5" in best else None,
        "best_policy_keep30": best.get("0.3"),
        "best_ratio_keep30": quality[best["0.3"]]["0.3"] if "0.3" in best else None,
        "random_ratio_keep50": quality.get("random", {}).get("0.5"),
        "ours_is_best": {keep: row == OURS for keep, row in best.items()},
    }
