"""Sparse inference: what every policy costs in quality, and what reading fewer neurons saves on this machine's CPU.

    python benchmarks/sparse [--only quality|speed|decode] [--keep .75 .5 .4 .3] [--policies fovea …] [--rounds 61]

sparse/quality.py, sparse/speed.py and sparse/decode.py say what is measured. Each part prints its table, and a whole
one is written to benchmarks/results; the last line is a JSON object. `--tiny` runs everything on random weights in
seconds and writes nothing.
"""

from patchclamp_server.cpu.compiled_code import keep_compiled_code
from patchclamp_server.threads import configure_threads

configure_threads()
keep_compiled_code()

import argparse
import asyncio
import json
import sys
from pathlib import Path
from typing import Any

import torch

# Its modules, and those that benchmarks share.
sys.path.insert(0, str(Path(__file__).parents[1]))
from brown import DESCRIPTION, calibration_texts, evaluation_texts
from measure import save

from patchclamp_server.analysis.documents import documents_of
from patchclamp_server.engine.config import EngineConfig
from patchclamp_server.engine.engine import Engine
from patchclamp_server.model.load import LoadedModel
from patchclamp_server.sparsity.mlp import SparseModel
from sparse import decode, quality, speed
from sparse.models import embedded_model, random_loaded_model, random_model

KEEPS = (0.75, 0.5, 0.4, 0.3)
# What is decoded end to end, unless policies and ratios are named.
DECODED = ("glance", "cats", "griffin")
DECODED_KEEPS = (0.5, 0.3)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=["quality", "speed", "decode"])
    parser.add_argument("--documents", type=int, default=16, help="scored")
    parser.add_argument("--calibration", type=int, default=24, help="documents that policies are calibrated on")
    parser.add_argument("--keep", type=float, nargs="+", default=KEEPS)
    parser.add_argument("--policies", nargs="+", default=quality.ALL, choices=quality.ALL)
    parser.add_argument("--rounds", type=int, default=61)
    parser.add_argument("--tiny", action="store_true")
    options = parser.parse_args()
    last: dict[str, Any] = {}
    if options.only in (None, "quality"):
        result = measure_quality(options)
        last |= {name: result[name] for name in quality.SUMMARY}
    if options.only in (None, "decode"):
        result = asyncio.run(measure_decode(options))
        last |= {name: result[name] for name in decode.SUMMARY}
    if options.only in (None, "speed"):
        result = measure_speed(options)
        last |= {name: result[name] for name in speed.SUMMARY}
    print(json.dumps(last))


def _model_and_documents(options: argparse.Namespace) -> tuple[LoadedModel, tuple[torch.Tensor, torch.Tensor, str]]:
    """Returns the model, the documents that are scored and those of calibration, and what they are."""
    if options.tiny:
        model = random_loaded_model(64, 96, n_layers=2)
        documents = torch.randint(model.info.vocab_size, (8, 128), generator=torch.Generator().manual_seed(0))
        scored, calibrated, description = documents[:2], documents[2:], "random tokens"
    else:
        model = embedded_model()
        scored, calibrated = (
            documents_of(texts, lambda text: model.tokenizer(text).input_ids, 2 * quality.PROMPT)
            for texts in (evaluation_texts()[: options.documents], calibration_texts(options.calibration))
        )
        description = DESCRIPTION
    return model, (scored, calibrated, description)


def measure_quality(options: argparse.Namespace) -> dict[str, Any]:
    model, (scored, calibrated, description) = _model_and_documents(options)
    engine = Engine(model)
    engine.start()
    try:
        profiles = quality.Profiles(engine, calibrated, description)
        result = asyncio.run(quality.measure(profiles, scored, options.keep, options.policies))
    finally:
        engine.shutdown()
    whole = set(options.policies) == set(quality.ALL) and set(options.keep) == set(KEEPS)
    if whole and not options.tiny:
        save("sparse_quality", result)
    return result


async def measure_decode(options: argparse.Namespace) -> dict[str, Any]:
    """Of policies that need no profile, unless they were asked for by name: quality on some of the documents first."""
    model, (scored, calibrated, description) = _model_and_documents(options)
    asked = options.policies if options.policies != quality.ALL else DECODED
    keeps = options.keep if options.keep != KEEPS else DECODED_KEEPS
    engine = Engine(model, EngineConfig(enable_prefix_cache=False))
    engine.start()
    try:
        profiles = quality.Profiles(engine, calibrated, description)
        names = {f"{row} {keep:g}": (row, keep) for row in asked for keep in keeps}
        selectors = {name: await profiles.bound(row, keep) for name, (row, keep) in names.items()}
        table = await quality.measure(profiles, scored, keeps, asked)
        ratios = {name: table["table"][row][f"{keep:g}"]["perplexity_ratio"] for name, (row, keep) in names.items()}
        effort: dict[str, Any] = {"batches": (1, 2), "prompt": 8, "tokens": 4, "rounds": 1} if options.tiny else {}
        result = await asyncio.to_thread(decode.measure, engine, selectors, ratios, **effort)
    finally:
        engine.shutdown()
    result |= {name: table[name] for name in ("text", "documents", "scored_tokens", "dense_perplexity")}
    if asked is DECODED and keeps is DECODED_KEEPS and not options.tiny:
        save("sparse_decode", result)
    return result


def measure_speed(options: argparse.Namespace) -> dict[str, Any]:
    if options.tiny:
        cases = {
            "embedded_codes": lambda: random_model(64, 96, n_layers=2, four_bits=True),
            "8b_float32": lambda: random_model(64, 96),
            "8b_bfloat16": lambda: random_model(64, 96, dtype=torch.bfloat16),
        }
        return speed.measure(cases, rounds=2)
    cases = {
        "embedded_codes": lambda: SparseModel("embedded", embedded_model().decoder),
        "8b_float32": lambda: random_model(4096, 14336),
        "8b_bfloat16": lambda: random_model(4096, 14336, dtype=torch.bfloat16),
    }
    result = speed.measure(cases, options.rounds)
    save("sparse_speed", result)
    return result


if __name__ == "__main__":
    main()
