"""Host time of a decode step: everything but the numbers, which a decoder with 32 layers leaves out.

    python benchmarks/host.py [--rounds 9] [--tokens 64]

The decoder calls the hooks at all its sites with activations of the right shapes and computes nothing, so that a step
is left with scheduling, batches, plans, sampling, detokenisation and events. Steps of 64 and 256 sequences that all
decode, in alternating runs: without programs; with as many different programs, each an addition at four layers; and
with one projection readout in one of these programs. The metrics of a server observe the engine. Compilations of the
planner are counted in the steps of the runs with a readout.

A figure is the median over the steps of a round, and the median of the rounds. It is CPU time of the whole process, so
that other processes of the machine disturb it little and work that moves to another thread still counts; time on the
clock is told besides. Writes benchmarks/results/host.json, and as its last line prints a JSON object. Where the
planner does not count its compilations, it says so in the end, fails and writes nothing.
"""

from patchclamp_server.cpu.compiled_code import keep_compiled_code
from patchclamp_server.threads import configure_threads

configure_threads()
keep_compiled_code()

import argparse
import json
import os
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from statistics import median
from typing import Any

import torch
from measure import alternate, save
from tokenizers import Tokenizer, decoders, models
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from patchclamp_server.engine.config import EngineConfig
from patchclamp_server.engine.engine import Engine
from patchclamp_server.engine.request import Event, Failed, Finished, Request, StopParams
from patchclamp_server.interventions.bind import bind
from patchclamp_server.interventions.bound import BoundProgram
from patchclamp_server.interventions.program import AddVector, Edit, Program, ProjectionReadout, Readout, Vector
from patchclamp_server.model.decoder import Decoder, SiteHooks, StepInputs
from patchclamp_server.model.info import ModelInfo
from patchclamp_server.model.load import LoadedModel
from patchclamp_server.model.sites import Site
from patchclamp_server.model.weights import decoder_from_transformers
from patchclamp_server.rpc.metrics.server import Metrics

LAYERS = 32
WORDS = 512
BATCHES = (64, 256)
EDITED_LAYERS = 4
READ_LAYER = 20
# Made once: it is asked of every event.
_ENDS = (Failed, Finished)
# Prompts of so many lengths, so that no two steps in a row fill the blocks of everybody.
LENGTHS = range(16, 32)
# Sites in the order of the forward pass, without the queries, which are visited where a program edits them.
SITES = tuple(
    Site[name] for name in ("RESID_PRE", "ATTN_Z", "ATTN_OUT", "RESID_MID", "MLP_POST", "MLP_OUT", "RESID_POST")
)


class HostDecoder(Decoder):
    """Visits every site, and has what attention asks of a step made; activations and logits are always the same."""

    @classmethod
    def of(cls, decoder: Decoder) -> "HostDecoder":
        own = cls.__new__(cls)
        vars(own).update(vars(decoder))
        spec, most = decoder.spec, max(BATCHES)
        generator = torch.Generator().manual_seed(0)
        own._activations = {site: torch.randn(most, width, generator=generator) for site, width in spec.sites.items()}
        own._logits = torch.randn(most, spec.vocab_size, generator=generator)
        own._visits = {}
        return own

    _activations: dict[Site, Tensor]
    _logits: Tensor
    # The sites of a layer with their activations, by the number of rows.
    _visits: dict[int, list[tuple[Site, Tensor]]]

    @torch.inference_mode()
    def forward(self, step: StepInputs, pools: Sequence[Tensor], hooks: SiteHooks, products: Any = None) -> Tensor:
        rows = len(step.token_ids)
        assert len(step.positions) == len(step.slots) == rows
        # What attention reads in the first layer, and keeps for the others.
        assert len(step.attention.tables) == len(step.attention.spans)
        assert int(step.attention.tiles[:, 2].sum()) == rows
        assert step.attention.n_keys >= rows
        if rows not in self._visits:
            self._visits[rows] = [(site, _cycled(self._activations[site], rows)) for site in SITES]
        visits = self._visits[rows]
        for layer in range(self.spec.n_layers):
            for site, x in visits:
                hooks.visit(site, layer, x)
        return visits[-1][1]

    def logits(self, x: Tensor) -> Tensor:
        return self.unembed(x)

    def unembed(self, h: Tensor) -> Tensor:
        return _cycled(self._logits, len(h))


def _cycled(values: Tensor, rows: int) -> Tensor:
    return values[:rows] if rows <= len(values) else values.repeat(-(-rows // len(values)), 1)[:rows]


def tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level tokens of five characters, as many models have them."""
    words = {f"Ġ{index:04d}": index for index in range(WORDS)}
    backend = Tokenizer(models.WordLevel(vocab=words, unk_token="Ġ0000"))
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=backend)  # type: ignore[no-untyped-call]


def host_model() -> LoadedModel:
    config = LlamaConfig(
        vocab_size=WORDS,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=1,
        max_position_embeddings=1024,
    )
    decoder = HostDecoder.of(decoder_from_transformers(LlamaForCausalLM(config), dtype=torch.float32, device="cpu"))
    spec = decoder.spec
    info = ModelInfo(
        name="host",
        fingerprint="sha256:" + "0" * 64,
        architecture=spec.architecture,
        n_layers=spec.n_layers,
        d_model=spec.d_model,
        d_ff=spec.d_ff,
        n_heads=spec.n_heads,
        n_kv_heads=spec.n_kv_heads,
        head_dim=spec.head_dim,
        vocab_size=spec.vocab_size,
        context_length=spec.context_length,
        dtype="float32",
        device="cpu",
        sites=dict(spec.sites),
    )
    return LoadedModel(info, decoder, tokenizer(), eos_token_ids=frozenset())


def programs(info: ModelInfo, n: int, *, read: bool) -> list[BoundProgram]:
    """n additions, no two alike; the last program reads a projection too where one is `read`."""
    bound = []
    for i in range(n):
        generator = torch.Generator().manual_seed(i)
        layers = tuple(torch.randperm(info.n_layers, generator=generator)[:EDITED_LAYERS].sort().values.tolist())
        vector = Vector(values=torch.randn(info.d_model, generator=generator))
        edit = Edit(AddVector(vector), Site.RESID_POST, layers=layers, strength=0.1 + 0.001 * i)
        readout = Readout(ProjectionReadout((vector,)), Site.RESID_POST, name="read", layers=(READ_LAYER,))
        bound.append(bind(Program((edit,), (readout,) if read and i == n - 1 else ()), info))
    return bound


class Steps(Metrics):
    """The metrics of a server, and what is known at the end of each step in which `n` sequences got a token and nothing
    else ran: seconds of CPU time and on the clock, and how often the planner has compiled."""

    def __init__(self, compilations: Callable[[], int | None]) -> None:
        super().__init__()
        self._compilations = compilations
        self.n = 0
        self.ends: list[tuple[float, float, int | None] | None] = []

    def on_step(self, *, seconds: float, rows: int, generated: int) -> None:
        super().on_step(seconds=seconds, rows=rows, generated=generated)
        steady = rows == generated == self.n
        end = (time.process_time(), time.perf_counter(), self._compilations())
        self.ends.append(end if steady else None)


@dataclass(frozen=True)
class Round:
    """Milliseconds of a step, of CPU time and on the clock: medians of the steps that were steady and followed a steady
    one; and what was compiled in all of these."""

    cpu: float
    wall: float
    compilations: int | None


class Bench:
    def __init__(self, engine: Engine, tokens: int) -> None:
        self._engine, self._tokens = engine, tokens
        # The executors' planners are of two classes, and not part of what an engine asks of an executor.
        planner: Any = engine.executor.planner  # type: ignore[attr-defined]
        self._steps = Steps(lambda: getattr(planner, "compilations", None))
        engine.observer = self._steps

    def run(self, programs: Sequence[BoundProgram | None]) -> Round:
        steps, left, failures = self._steps, threading.Semaphore(0), list[str]()
        steps.n, steps.ends = len(programs), []

        def on_event(event: Event) -> None:
            if isinstance(event, _ENDS):
                if isinstance(event, Failed):
                    failures.append(str(event.error))
                left.release()

        stop = StopParams(max_tokens=self._tokens, ignore_eos=True)
        for i, program in enumerate(programs):
            generator = torch.Generator().manual_seed(i)
            prompt = torch.randint(WORDS, (LENGTHS[i % len(LENGTHS)],), generator=generator)
            self._engine.submit(Request(tuple(prompt.tolist()), on_event, program=program, stop=stop))
        for _ in programs:
            left.acquire()
        if failures:
            raise RuntimeError(failures[0])
        pairs = [(a, b) for a, b in pairwise(steps.ends) if a is not None and b is not None]
        if len(pairs) < self._tokens // 4:
            raise RuntimeError(f"{len(pairs)} steps of {len(programs)} sequences are too few: ask for more tokens")
        counts = [b[2] - a[2] for a, b in pairs if a[2] is not None and b[2] is not None]
        return Round(
            1e3 * median(b[0] - a[0] for a, b in pairs),
            1e3 * median(b[1] - a[1] for a, b in pairs),
            sum(counts) if counts else None,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--tokens", type=int, default=64)
    options = parser.parse_args()
    model = host_model()
    engine = Engine(model, EngineConfig(max_sequences=max(BATCHES)))
    bench = Bench(engine, options.tokens)
    engine.start()
    load_before = os.getloadavg()[0]
    runs: dict[str, Callable[[], Round]] = {}
    for n in BATCHES:
        runs[f"host_ms_{n}"] = partial(bench.run, [None] * n)
        runs[f"programs_ms_{n}"] = partial(bench.run, programs(model.info, n, read=False))
        runs[f"reader_ms_{n}"] = partial(bench.run, programs(model.info, n, read=True))
    rounds = alternate(runs, options.rounds)
    engine.shutdown()
    compilations = [r.compilations for name, own in rounds.items() if name.startswith("reader") for r in own]
    counted = [count for count in compilations if count is not None]
    result: dict[str, Any] = {name: round(median(r.cpu for r in own), 3) for name, own in rounds.items()}
    for n in BATCHES:
        # Of one round each: what the machine does beside it hits both alike.
        pairs = zip(rounds[f"reader_ms_{n}"], rounds[f"programs_ms_{n}"], strict=True)
        ratios = [read.cpu / unread.cpu for read, unread in pairs]
        result[f"reader_ratio_{n}"] = round(median(ratios), 3)
    result["steady_compilations"] = sum(counted) if counted else None
    result["wall_ms"] = {name: round(median(r.wall for r in own), 3) for name, own in rounds.items()}
    for name, own in rounds.items():
        print(f"{name:16s} {result[name]:8.3f} ms a step   rounds: " + " ".join(f"{r.cpu:.2f}" for r in own))
    conditions = {
        "layers": LAYERS,
        "rounds": options.rounds,
        "tokens": options.tokens,
        "threads": torch.get_num_threads(),
        "load": [round(load_before, 2), round(os.getloadavg()[0], 2)],
    }
    if counted and vars(options) == vars(parser.parse_args([])):
        print(f"written: {save('host', {**conditions, **result}).name}")
    print(json.dumps(result), flush=True)
    if not counted:
        sys.exit("the planner of this tree does not count its compilations (engine.executor.planner.compilations)")


if __name__ == "__main__":
    main()
