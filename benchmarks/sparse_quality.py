"""What each sparse policy does to the predictions of the embedded model, on text that calibration did not see.

    python benchmarks/sparse_quality.py [--documents 16] [--calibration 24] [--keep .5 .3 .75 .4] [--policies fovea …]

Prompts of 256 tokens are dense; the next 256 are computed by the policy and scored (evaluate.py says how). `random` and
`oracle` are controls: a random set, and the neurons that a look at all of them would choose. Bytes are those of the
weights of the MLP that one row reads, over the dense ones, for weights of 16 bits; of teal and wina, of all four
products of a block. Writes benchmarks/results/sparse_quality.json, and as its last line prints a JSON object.
"""

from patchclamp_server.threads import configure_threads

configure_threads()

import argparse
import json
import time
from dataclasses import replace

import torch
from brown import DESCRIPTION, calibration_texts, evaluation_texts
from measure import save
from torch import Tensor

from patchclamp_server.model.load import load_model
from patchclamp_server.model.progress import RichProgress
from patchclamp_server.sparsity import CONTROLS, Policy, Profile, Selector, SparseModel, calibrate
from patchclamp_server.sparsity.cats import Cats
from patchclamp_server.sparsity.coreinfer_similarity import CoreInferSimilarity
from patchclamp_server.sparsity.coreinfer_stability import CoreInferStability
from patchclamp_server.sparsity.dense import Dense
from patchclamp_server.sparsity.documents import documents_of
from patchclamp_server.sparsity.evaluate import Evaluator
from patchclamp_server.sparsity.exact_zero import ExactZero
from patchclamp_server.sparsity.fovea import Fovea
from patchclamp_server.sparsity.griffin import Griffin
from patchclamp_server.sparsity.oracle import Oracle
from patchclamp_server.sparsity.random_set import RandomSet
from patchclamp_server.sparsity.static_set import StaticSet
from patchclamp_server.sparsity.teal import Teal
from patchclamp_server.sparsity.wina import Wina

PROMPT, SCORED = 256, 256
KEEPS = (0.5, 0.3, 0.75, 0.4)
# Row → policy, and whether it is bound to a profile. fovea_select is fovea without its compensation: selection alone.
ROWS: dict[str, tuple[Policy, bool]] = {
    "fovea": (Fovea(), True),
    "fovea_select": (Fovea(compensate=False, budget="uniform"), True),
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


class Profiles:
    """Calibrates when first asked. Rows of one policy share what the fullest of them needs."""

    def __init__(self, model: SparseModel, documents: Tensor) -> None:
        self.model, self.documents = model, documents
        self.made: dict[str, Profile] = {}
        self.seconds: dict[str, float] = {}

    def of(self, policy: Policy) -> Profile:
        name = policy.name
        if name not in self.made:
            fullest = {"teal": Teal(allocation="greedy"), "fovea": Fovea()}.get(name, policy)
            started = time.perf_counter()
            self.made[name] = calibrate(fullest, self.model, self.documents, {"text": DESCRIPTION})
            self.seconds[name] = round(time.perf_counter() - started, 1)
            print(f"calibrated {name} in {self.seconds[name]} s", flush=True)
        return self.made[name]

    def bound(self, row: str, keep: float) -> Selector:
        policy, calibrated = ROWS[row]
        profile = self.of(policy) if calibrated else None
        return replace(policy, keep_ratio=keep).bind(self.model, profile)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--documents", type=int, default=16)
    parser.add_argument("--calibration", type=int, default=24)
    parser.add_argument("--keep", type=float, nargs="+", default=KEEPS)
    parser.add_argument("--policies", nargs="+", default=[*EXACT, *ROWS], choices=[*EXACT, *ROWS])
    options = parser.parse_args()

    with RichProgress() as progress:
        loaded = load_model(progress=progress)
    model = SparseModel(loaded.info.fingerprint, loaded.decoder)

    def tokenize(text: str) -> list[int]:
        ids: list[int] = loaded.tokenizer(text).input_ids
        return ids

    documents = documents_of(evaluation_texts()[: options.documents], tokenize, PROMPT + SCORED)
    evaluator = Evaluator(model, documents, PROMPT)
    perplexity = float(torch.tensor(evaluator.dense_nll).exp())
    print(f"{len(documents)} documents, dense perplexity {perplexity:.2f}", flush=True)
    profiles = Profiles(model, documents_of(calibration_texts(options.calibration), tokenize, PROMPT + SCORED))

    print(f"{'policy':22}{'keep':>6}{'ppl ratio':>11}{'KL':>9}{'top-1':>8}{'sparsity':>10}{'bytes':>8}{'s':>7}")
    table: dict[str, dict[str, dict[str, float]]] = {}
    for keep in options.keep:
        for row in options.policies:
            if row in EXACT and keep != options.keep[0]:
                continue
            started = time.perf_counter()
            selector = EXACT[row].bind(model) if row in EXACT else profiles.bound(row, keep)
            found = evaluator.quality(selector)
            shown = "-" if row in EXACT else f"{keep:g}"
            print(
                f"{row:22}{shown:>6}{found.perplexity_ratio:11.4f}{found.divergence:9.4f}{found.top1_agreement:8.3f}"
                f"{found.sparsity:10.3f}{found.bytes_read_16:8.3f}{time.perf_counter() - started:7.1f}",
                flush=True,
            )
            table.setdefault(row, {})["1" if row in EXACT else f"{keep:g}"] = found.card()

    quality = {row: {keep: card["perplexity_ratio"] for keep, card in cards.items()} for row, cards in table.items()}
    practical = [row for row in quality if row in ROWS and ROWS[row][0].name not in CONTROLS]

    def best(keep: str) -> float | None:
        return min((quality[row][keep] for row in practical if keep in quality[row]), default=None)

    last = {
        "quality": quality,
        "best_ratio_keep50": best("0.5"),
        "best_ratio_keep30": best("0.3"),
        "random_ratio_keep50": quality.get("random", {}).get("0.5"),
    }
    if set(options.policies) == {*EXACT, *ROWS} and set(options.keep) == set(KEEPS):
        payload = {
            "text": DESCRIPTION,
            "documents": len(documents),
            "scored_tokens": len(documents) * (SCORED - 1),
            "dense_perplexity": round(perplexity, 3),
            "calibration_seconds": profiles.seconds,
            "table": table,
        }
        save("sparse_quality", payload | last)
    print(json.dumps(last))


if __name__ == "__main__":
    main()
