"""Runs programs through a real engine on a tiny model, and compares what comes out with the oracle."""

import hashlib
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache

import torch
from oracle import OracleResult, run_oracle
from patience import PATIENCE_SECONDS
from tiny_models import VOCAB, tiny_model
from tokenizers import Tokenizer, decoders, models
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from patchclamp_server.artifacts.store import ArtifactStore
from patchclamp_server.engine.config import EngineConfig, EngineStats
from patchclamp_server.engine.engine import Engine
from patchclamp_server.engine.request import (
    Event,
    Failed,
    Finished,
    Readouts,
    Request,
    SparseInference,
    StopParams,
    Token,
)
from patchclamp_server.errors import RequestError
from patchclamp_server.interventions.bind import bind
from patchclamp_server.interventions.bound import BoundProgram
from patchclamp_server.interventions.program import Program, ReadoutValue
from patchclamp_server.model.info import ModelInfo
from patchclamp_server.model.load import LoadedModel
from patchclamp_server.model.weights import decoder_from_transformers

# Of the largest logit: the bar of DESIGN §5.
TOLERANCE = 1e-4
ROUNDING = torch.finfo(torch.float32).eps


@dataclass(frozen=True)
class Job:
    """One request. `program` None is an unsteered one; `roles` as in Request."""

    prompt: tuple[int, ...]
    program: Program | None = None
    max_tokens: int = 6
    roles: tuple[str, ...] | None = None
    sparsity: SparseInference | None = None
    # Those that the program names.
    artifacts: ArtifactStore | None = None


@contextmanager
def started(model: LoadedModel, config: EngineConfig | None = None) -> Iterator[Engine]:
    """An engine whose thread runs until the end of the block."""
    engine = Engine(model, config)
    engine.start()
    try:
        yield engine
    finally:
        engine.shutdown()


@dataclass(eq=False)
class Outcome:
    """All that one request brought."""

    tokens: list[int] = field(default_factory=list)
    positions: list[int] = field(default_factory=list)
    logits: list[Tensor] = field(default_factory=list)
    readouts: list[ReadoutValue] = field(default_factory=list)
    finished: Finished | None = None
    error: RequestError | None = None
    done: threading.Event = field(default_factory=threading.Event)

    def on_event(self, event: Event) -> None:
        if isinstance(event, Token):
            self.tokens.append(event.id)
            self.positions.append(event.position)
        elif isinstance(event, Readouts):
            self.readouts += event.values
        elif isinstance(event, Finished):
            self.finished = event
            self.done.set()
        elif isinstance(event, Failed):
            self.error = event.error
            self.done.set()

    def end(self) -> Finished:
        assert self.finished is not None, f"the request failed: {self.error}"
        return self.finished


@cache
def loaded(family: str) -> LoadedModel:
    decoder = decoder_from_transformers(tiny_model(family), dtype=torch.float32, device="cpu")
    # As load_model does: what numba compiles is compiled before anybody waits for an answer.
    decoder.warm_up()
    spec = decoder.spec
    info = ModelInfo(
        name=f"tiny {family}",
        fingerprint="sha256:" + hashlib.sha256(family.encode()).hexdigest(),
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
    return LoadedModel(info, decoder, _tokenizer(), eos_token_ids=frozenset({1}))


def _tokenizer() -> PreTrainedTokenizerFast:
    """One word a token; these tests look at ids alone."""
    words = {f"word{index}": index for index in range(VOCAB)}
    backend = Tokenizer(models.WordLevel(vocab=words, unk_token="word0"))
    backend.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=backend)  # type: ignore[no-untyped-call]


def bound(family: str, job: Job) -> BoundProgram | None:
    if job.program is None:
        return None
    return bind(job.program, loaded(family).info, job.artifacts, prompt_roles=job.roles)


class Bench:
    """An engine on a tiny model; as a context it is shut down at the end.

    `run` hands over all jobs in one batch: the first ones reach the engine before it starts. No sequence is expected to
    grow, so that those in a short KV cache preempt each other (test_admission.py has what the engine expects).
    """

    def __init__(self, family: str, config: EngineConfig) -> None:
        self.family = family
        self.engine = Engine(loaded(family), config)
        self.engine.scheduler.expected_length = lambda sequence: len(sequence.tokens)
        self.engine.on_logits = self._on_logits
        self._outcomes: dict[int, Outcome] = {}
        self._started = False

    def __enter__(self) -> "Bench":
        return self

    def __exit__(self, *_: object) -> None:
        if self._started:
            self.engine.shutdown()

    def _on_logits(self, request_id: int, position: int, logits: Tensor) -> None:
        self._outcomes[request_id].logits.append(logits.clone())

    def run(self, jobs: Sequence[Job]) -> list[Outcome]:
        outcomes = []
        for job in jobs:
            outcome = Outcome()
            request = Request(
                tokens=job.prompt,
                on_event=outcome.on_event,
                program=bound(self.family, job),
                stop=StopParams(max_tokens=job.max_tokens, ignore_eos=True),
                roles=job.roles,
                sparsity=job.sparsity,
            )
            request_id = self.engine.submit(request)
            self._outcomes[request_id] = outcome
            outcomes.append(outcome)
        if not self._started:
            self.engine.start()
            self._started = True
        for outcome in outcomes:
            assert outcome.done.wait(PATIENCE_SECONDS), "the engine did not finish a request"
        return outcomes

    def stats(self) -> EngineStats:
        return self.engine.stats()


def run_alone(family: str, job: Job, config: EngineConfig) -> Outcome:
    with Bench(family, config) as bench:
        return bench.run([job])[0]


_TRUTHS: dict[tuple[str, tuple[int, ...], int, int, tuple[str, ...] | None], tuple[Program | None, OracleResult]] = {}


def truth(family: str, job: Job) -> OracleResult:
    """The oracle's answer, computed once for each job of this process; programs are told apart by identity."""
    key = (family, job.prompt, id(job.program), job.max_tokens, job.roles)
    if key not in _TRUTHS:
        store = job.artifacts
        stored = {} if store is None else {info.id: store.get(info.id) for info in store.list()[0]}
        result = run_oracle(
            tiny_model(family), job.prompt, job.program, job.max_tokens, roles=job.roles, artifacts=stored
        )
        # The program is kept so that its identity is not given to another one.
        _TRUTHS[key] = (job.program, result)
    return _TRUTHS[key][1]


def assert_same(family: str, job: Job, outcome: Outcome, *, reuse: bool = False) -> None:
    """Tokens, logits, receipt and readouts equal those of the oracle.

    With `reuse`, rows taken from the prefix cache count as rows; mean changes, which leave them out, are not compared.
    """
    expected = truth(family, job)
    finished = outcome.end()
    assert outcome.positions == list(range(len(job.prompt), len(job.prompt) + len(outcome.tokens)))
    # Logits first, up to the first token that differs: they say how wrong it is.
    pairs = list(zip(outcome.tokens, expected.tokens, strict=True))
    same = next((i for i, (mine, theirs) in enumerate(pairs) if mine != theirs), len(pairs) - 1) + 1
    logits = torch.stack(outcome.logits)
    error = (logits[:same] - expected.logits[:same]).abs().max() / expected.logits.abs().max()
    assert error <= TOLERANCE, f"logits differ by {error:.2e} of their scale in the first {same} tokens"
    assert outcome.tokens == list(expected.tokens)
    for own, count in zip(finished.receipt.edits, expected.receipts, strict=True):
        assert own.rows + (own.rows_from_cache if reuse else 0) == count.rows, count
        assert own.gate_firings == count.gate_firings, count
        assert reuse or own.rows_from_cache == 0, own
        if not reuse:
            difference = abs(own.mean_relative_change - count.mean_relative_change)
            # A change of less than float32 resolves is the rounding of one formula or the other.
            assert difference <= 1e-4 * count.mean_relative_change + ROUNDING, (own, count)
    assert finished.receipt.touched == any(count.rows for count in expected.receipts)
    assert_same_readouts(outcome.readouts, expected.readouts)


def assert_same_readouts(own: Sequence[ReadoutValue], expected: Sequence[ReadoutValue]) -> None:
    def place(value: ReadoutValue) -> tuple[int, str, int]:
        return value.position, value.name, value.layer

    own, expected = sorted(own, key=place), sorted(expected, key=place)
    assert [place(value) for value in own] == [place(value) for value in expected]
    for mine, theirs in zip(own, expected, strict=True):
        scale = max(1.0, *(abs(value) for value in theirs.values))
        for a, b in zip(mine.values, theirs.values, strict=True):
            assert abs(a - b) <= TOLERANCE * scale, (mine, theirs)
        assert len(mine.ids) == len(theirs.ids), (mine, theirs)
        # A neuron that is off adds 0 to every logit: none of them is the largest.
        ids = zip(mine.ids, theirs.ids, theirs.values, strict=False)
        assert all(a == b for a, b, value in ids if value != 0), (mine, theirs)
