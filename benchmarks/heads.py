"""Retrieval heads of the embedded model: found on some needles, tested causally on others, and what finding them costs.

    python benchmarks/heads.py [--only readout|naive|causal] [--runs 48] [--causal-runs 20] [--random-sets 10] …

- readout: decode steps with all heads read and without, alternating.
- naive: the naive way (tests/analysis/heads/naive_retrieval.py: full attention matrices, token by token) on
  `--naive-runs` of up to 1024 tokens, and ours on the same, in this run. Also with the naive way given a cache of keys
  and values.
- causal: detection over `--runs` needle runs of 256 to 1536 tokens (analysis/heads/retrieval/detect.py), with half of
  the built-in needles; then a table on the other half: the 3 and the 10 best heads set to zero, against random draws of
  as many other heads, in texts of up to 1024 tokens.

Each part writes benchmarks/results/heads_<part>.json; the last line is a JSON object.
"""

from patchclamp_server.cpu.compiled_code import keep_compiled_code
from patchclamp_server.threads import configure_threads

configure_threads()
keep_compiled_code()

import argparse
import asyncio
import json
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import aclosing
from dataclasses import asdict
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from measure import alternate, decode_steps, least_steps, save
from transformers import AutoModelForCausalLM

from patchclamp_server.analysis.heads.retrieval.detect import Detection, RetrievalHeads, detect, reading_all_heads
from patchclamp_server.analysis.heads.retrieval.needle_prompt import PromptWriter
from patchclamp_server.analysis.heads.retrieval.needle_run import NeedleRun
from patchclamp_server.analysis.heads.retrieval.needles import NeedleTest, built_in_needles, plan
from patchclamp_server.analysis.heads.sets.evaluation import EditEvaluation, HeadEditEffect, HeadMetrics, evaluate_edit
from patchclamp_server.analysis.heads.sets.overlap import rank_correlation
from patchclamp_server.artifacts.head_sets import HeadSelection
from patchclamp_server.artifacts.store import ArtifactStore
from patchclamp_server.artifacts.types import Tags
from patchclamp_server.engine.config import EngineConfig
from patchclamp_server.engine.engine import Engine
from patchclamp_server.model.embedded import embedded_file
from patchclamp_server.model.gguf.conversion import converted_gguf
from patchclamp_server.model.load import LoadedModel, load_model
from patchclamp_server.model.progress import RichProgress
from patchclamp_server.text.detokenize import token_bytes
from patchclamp_server.text.prompt import PromptEncoder

sys.path.append(str(Path(__file__).parents[1] / "tests" / "analysis" / "heads"))
from naive_retrieval import NaiveRun, naive_mean, naive_run, naive_success

SIZES = (3, 10)
CAUSAL_LENGTHS = NAIVE_LENGTHS = (256, 512, 1024)
# Room for sixteen of the longest prompts; the default takes 3 GB.
KV_TOKENS = 32768
# Sequences of a decode step, each with a prompt of so many tokens.
DECODE_BATCHES = (1, 8)
DECODE_PROMPT, DECODE_TOKENS = 512, 64


class Session:
    """An engine with what the jobs need. A new engine knows no prefix of an earlier one."""

    def __init__(self, model: LoadedModel, directory: str) -> None:
        self.model = model
        self.prompts = PromptEncoder(model.tokenizer, model.info)
        self.store = ArtifactStore(directory)
        self.engine = Engine(model, EngineConfig(kv_cache_tokens=KV_TOKENS))
        self.engine.start()

    def detect(self, job: Detection) -> tuple[RetrievalHeads, list[NeedleRun]]:
        async def run() -> tuple[RetrievalHeads, list[NeedleRun]]:
            runs: list[NeedleRun] = []
            events = detect(self.engine, self.store, self.model.info, self.prompts, job)
            async with aclosing(events):
                async for event in events:
                    if isinstance(event, NeedleRun):
                        runs.append(event)
                    elif isinstance(event, RetrievalHeads):
                        return event, runs
            raise AssertionError("a detection ends with its result")

        return asyncio.run(run())

    def evaluate(self, job: EditEvaluation) -> HeadEditEffect:
        async def run() -> HeadEditEffect:
            events = evaluate_edit(self.engine, self.store, self.model.info, self.prompts, job)
            async with aclosing(events):
                async for event in events:
                    if isinstance(event, HeadEditEffect):
                        return event
            raise AssertionError("an evaluation ends with its result")

        return asyncio.run(run())


def detection(session: Session, test: NeedleTest) -> dict[str, Any]:
    started = time.perf_counter()
    found, runs = session.detect(Detection(test, tags=Tags(("found",))))
    seconds = time.perf_counter() - started
    best = [asdict(head) | {"head": f"L{head.head.layer}H{head.head.head}"} for head in found.scores[:20]]
    lengths = sorted({run.length for run in runs})
    print(
        f"{found.runs} runs, {found.successes} answered, {seconds:.0f} s; stability of the top 10 {found.stability:.2f}"
    )
    print(
        f"{found.fraction_above_threshold:.1%} of {len(found.scores)} heads have a score of at least {found.threshold}"
    )
    for head in best[:10]:
        always = ", in every success" if head["always_on"] else ""
        print(f"  {head['head']:7}{head['score']:.3f}  [{head['low']:.3f}, {head['high']:.3f}]{always}")
    sys.stdout.flush()
    return {
        "runs": found.runs,
        "successes": found.successes,
        "by_length": {
            n: [sum(r.success for r in runs if r.length == n), sum(r.length == n for r in runs)] for n in lengths
        },
        "seconds": round(seconds, 1),
        "heads": len(found.scores),
        "above_threshold": round(found.fraction_above_threshold * len(found.scores)),
        "without_score": sum(head.score == 0.0 for head in found.scores),
        "always_on": sum(head.always_on for head in found.scores),
        "stability": round(found.stability, 4),
        "best": [{k: round(v, 4) if isinstance(v, float) else v for k, v in head.items()} for head in best],
    }


def causal(session: Session, test: NeedleTest, n_random: int) -> dict[str, Any]:
    print(f"\n{'set to zero':26}{'answered':>16}{'recall':>9}{'perplexity':>13}", flush=True)
    table: dict[str, Any] = {}
    for k in SIZES:
        asked = EditEvaluation(HeadSelection(head_set="found", top_k=k), random_sets=n_random, test=test)
        effect = session.evaluate(asked)
        if "unedited" not in table:
            table["unedited"] = row("nothing", [effect.unedited])
        table[f"top{k}"] = row(f"the {k} best heads", [effect.edited])
        table[f"random{k}"] = row(f"{n_random} draws of {k} others", effect.random)
    return table


def row(name: str, metrics: Sequence[HeadMetrics]) -> dict[str, Any]:
    """Means over sets; of several sets, all of them too."""
    successes = [m.successes for m in metrics]
    perplexities = [m.perplexity for m in metrics]
    summary = {
        "runs": metrics[0].runs,
        "success_rate": fmean(successes) / metrics[0].runs,
        "recall": fmean(m.mean_recall for m in metrics),
        "perplexity": fmean(perplexities),
        "successes": successes,
        "perplexities": [round(p, 3) for p in perplexities],
        "heads": [[f"L{head.layer}H{head.head}" for head in m.heads] for m in metrics],
    }
    spread = f" ({min(successes)} to {max(successes)})" if len(successes) > 1 else ""
    answered = f"{fmean(successes):.1f}/{metrics[0].runs}{spread}"
    print(f"{name:26}{answered:>16}{summary['recall']:9.3f}{summary['perplexity']:13.2f}", flush=True)
    return summary


def against_naive(model: LoadedModel, test: NeedleTest) -> dict[str, Any]:
    """Both on the same prompts; ours with an engine that has seen none of them."""
    with tempfile.TemporaryDirectory() as directory:
        session = Session(model, directory)
        started = time.perf_counter()
        found, _ = session.detect(Detection(test, tags=Tags(("found",))))
        ours = time.perf_counter() - started
        scores = session.store.get("found").head_scores()[0]
        session.engine.shutdown()
    with RichProgress() as progress:
        directory = converted_gguf(embedded_file(progress), progress)
    naive = AutoModelForCausalLM.from_pretrained(directory, attn_implementation="eager").eval()
    seconds, expected = naive_scores(naive, model, test, cache=False)
    cached_seconds, _ = naive_scores(naive, model, test, cache=True)
    tenth = float(expected.flatten().sort(descending=True).values[9])
    return {
        "runs": found.runs,
        "successes": found.successes,
        "tokens_of_a_prompt": sorted({p.length for p in plan(test, model.info).placements}),
        "seconds": round(ours, 1),
        "naive_seconds": round(seconds, 1),
        "naive_with_cache_seconds": round(cached_seconds, 1),
        "speedup": seconds / ours,
        "speedup_over_naive_with_cache": cached_seconds / ours,
        "rank_correlation": rank_correlation(scores, expected),
        "largest_difference": float((scores.double() - expected).abs().max()),
        "same_top10": all(float(expected[head.head]) >= tenth - 1e-6 for head in found.scores[:10]),
    }


def naive_scores(naive: Any, model: LoadedModel, test: NeedleTest, *, cache: bool) -> tuple[float, torch.Tensor]:
    """Seconds, and mean scores over successes."""
    planned = plan(test, model.info)
    prompts = PromptEncoder(model.tokenizer, model.info)
    writer = PromptWriter(planned, model.info, prompts, token_bytes(model.tokenizer))
    started = time.perf_counter()
    successes: list[NaiveRun] = []
    for placement in planned.placements:
        prompt = writer.write(placement)
        run = naive_run(naive, prompt.ids, prompt.needle, prompt.max_tokens, model.eos_token_ids, cache=cache)
        text = model.tokenizer.decode(run.tokens, skip_special_tokens=True)
        if naive_success(str(text), planned.needles[placement.needle].answer):
            successes.append(run)
    return time.perf_counter() - started, naive_mean(successes)


def readout_overhead(session: Session, rounds: int) -> dict[str, Any]:
    """Decode steps with all heads of all layers read, over those without."""
    vocab = session.model.info.vocab_size
    generator = torch.Generator().manual_seed(0)
    figures: dict[str, Any] = {}
    reading = reading_all_heads(session.model.info)
    for batch in DECODE_BATCHES:
        prompts = torch.randint(100, vocab, (batch, DECODE_PROMPT), generator=generator).tolist()
        runs = alternate(
            {
                "without": lambda prompts=prompts: decode_steps(session.engine, prompts, None, DECODE_TOKENS),
                "reading": lambda prompts=prompts: decode_steps(session.engine, prompts, reading, DECODE_TOKENS),
            },
            rounds,
        )
        steps = {name: least_steps(seconds) for name, seconds in runs.items()}
        overhead = sum(steps["reading"]) / sum(steps["without"]) - 1
        figures[str(batch)] = {
            "overhead": overhead,
            **{f"{name}_milliseconds": round(1e3 * fmean(values), 3) for name, values in steps.items()},
        }
        print(f"all heads read at batch {batch}: {overhead:+.2%} of {1e3 * fmean(steps['without']):.2f} ms", flush=True)
    return figures


def readout_part(model: LoadedModel, options: argparse.Namespace) -> tuple[dict[str, Any], dict[str, float]]:
    with tempfile.TemporaryDirectory() as directory:
        session = Session(model, directory)
        batches = readout_overhead(session, options.rounds)
        session.engine.shutdown()
    return {"batches": batches}, {"readout_overhead": max(row["overhead"] for row in batches.values())}


def naive_part(model: LoadedModel, options: argparse.Namespace) -> tuple[dict[str, Any], dict[str, float]]:
    test = NeedleTest(needles=built_in_needles()[0::2], lengths=NAIVE_LENGTHS, max_runs=options.naive_runs)
    naive = against_naive(model, test)
    print(f"{json.dumps(naive)}\n", flush=True)
    return naive, {"naive_speedup": naive["speedup"], "naive_rank_correlation": naive["rank_correlation"]}


def causal_part(model: LoadedModel, options: argparse.Namespace) -> tuple[dict[str, Any], dict[str, float]]:
    # Heads are tested on needles they were not found with.
    finding, testing = built_in_needles()[0::2], built_in_needles()[1::2]
    with tempfile.TemporaryDirectory() as directory:
        session = Session(model, directory)
        found = detection(session, NeedleTest(needles=finding, max_runs=options.runs))
        test = NeedleTest(needles=testing, lengths=CAUSAL_LENGTHS, max_runs=options.causal_runs)
        table = causal(session, test, options.random_sets)
        session.engine.shutdown()
    rates = {f"{name}_success_rate": row["success_rate"] for name, row in table.items() if name != "unedited"}
    return (
        {"detection": found, "causal": table},
        {"unmasked_success_rate": table["unedited"]["success_rate"], **rates},
    )


PARTS = {"readout": readout_part, "naive": naive_part, "causal": causal_part}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=PARTS)
    parser.add_argument("--runs", type=int, default=48)
    parser.add_argument("--causal-runs", type=int, default=20)
    parser.add_argument("--random-sets", type=int, default=10)
    parser.add_argument("--naive-runs", type=int, default=6)
    parser.add_argument("--rounds", type=int, default=11)
    options = parser.parse_args()
    whole = vars(options) == vars(parser.parse_args([])) | {"only": options.only}
    with RichProgress() as progress:
        model = load_model(progress=progress)
    last: dict[str, float] = {}
    for name in [options.only] if options.only else PARTS:
        figures, summary = PARTS[name](model, options)
        last |= {key: round(value, 4) for key, value in summary.items()}
        if whole:
            save(f"heads_{name}", {"threads": torch.get_num_threads(), **figures, **summary})
    print(json.dumps(last))


if __name__ == "__main__":
    main()
