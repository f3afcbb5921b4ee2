"""Every counter equals what clients were told: usage, receipts, reports of sparse inference, and statuses."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import pytest
import torch
from live import LiveServer
from prometheus_client.parser import text_string_to_metric_families
from test_bad_input import add, condition
from test_generation_service import STRONG, request
from test_session import Client
from watch_runs import until

from patchclamp.v1 import generation_pb2 as pb
from patchclamp.v1 import program_pb2 as program
from patchclamp.v1 import sparse_policy_pb2 as policy
from patchclamp.v1.generation_pb2_grpc import GenerationServiceStub
from patchclamp_server.artifacts.store import ArtifactStore
from patchclamp_server.artifacts.types import ArtifactKind
from patchclamp_server.engine import places
from patchclamp_server.engine.config import EngineConfig
from patchclamp_server.interventions.request_warnings import WarningCode
from patchclamp_server.model.load import LoadedModel, load_model
from patchclamp_server.model.sites import Site

ALWAYS = condition(scope=program.Scope(include=[program.TokenSelector(phase=program.PHASE_GENERATED)]), threshold=-1e9)


@pytest.fixture(scope="module")
def model(tiny_llama_dir: Path) -> LoadedModel:
    return load_model(str(tiny_llama_dir))


@pytest.fixture
def server(model: LoadedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[LiveServer]:
    """One sequence at a time, which gives way to a higher priority, and not because its client is slow."""
    monkeypatch.setattr(places, "PAUSE_SECONDS", 3600.0)
    with LiveServer(model, tmp_path, engine=EngineConfig(max_sequences=1)) as live:
        store_what_is_warned_of(live)
        yield live


def store_what_is_warned_of(live: LiveServer) -> None:
    """A vector whose safe range is short, and an autoencoder of one feature with a threshold."""
    store = ArtifactStore(live.server.config.artifacts_url)
    own: dict[str, Any] = {"model_fingerprint": live.model.info.fingerprint, "site": Site.RESID_POST}
    row = torch.ones(1, live.model.info.d_model) / live.model.info.d_model**0.5
    card = {"calibration": {"add": {"safe": [{"layer": 1, "low": -0.01, "high": 0.01}]}}}
    store.put(ArtifactKind.VECTOR, {"layer.1": row[0]}, evidence=card, tags=["calibrated"], **own)
    vectors = {"encoder": row, "decoder": row, "decoder_bias": 0 * row[0]}
    numbers = {"encoder_bias": torch.zeros(1), "threshold": torch.ones(1)}
    said = {"layer": 1, "function": "jumprelu", "subtracted": "nothing"}
    store.put(ArtifactKind.AUTOENCODER, vectors | numbers, provenance=said, tags=["jumping"], **own)


@dataclass(eq=False)
class Told:
    """The sums of what clients were told."""

    usage: list[pb.Usage] = field(default_factory=list)
    scored: int = 0
    receipts: list[program.Receipt] = field(default_factory=list)
    # Of streams that did not finish, and so brought no usage.
    prompt_tokens: int = 0
    tokens: int = 0
    sparse: Counter[str] = field(default_factory=Counter)
    outcomes: Counter[str] = field(default_factory=Counter)
    calls: Counter[tuple[str, str]] = field(default_factory=Counter)

    def finished(self, method: str, *ends: pb.Finished) -> None:
        self.calls[method, "OK"] += 1
        for end in ends:
            self.usage.append(end.usage)
            self.receipts.append(end.receipt)
            self.outcomes[pb.FinishReason.Name(end.reason).removeprefix("FINISH_REASON_").lower()] += 1
            if end.HasField("sparsity"):
                self.sparse[end.sparsity.policy] += end.sparsity.sparse_tokens

    def refused(self, method: str, error: grpc.RpcError) -> None:
        self.calls[method, error.code().name] += 1


def tokens(n: int, first: int = 60) -> pb.Prompt:
    return pb.Prompt(tokens=pb.TokenIds(ids=[first + i for i in range(n)]))


def most(n: int) -> pb.StopConditions:
    return pb.StopConditions(max_tokens=n, ignore_eos=True)


class Calls:
    def __init__(self, channel: grpc.Channel, told: Told) -> None:
        self.channel, self.stub, self.told = channel, GenerationServiceStub(channel), told

    def generate(self, **fields: Any) -> pb.Finished:
        end = list(self.stub.Generate(request(**fields)))[-1].finished
        self.told.finished("Generate", end)
        return end

    def score(self) -> None:
        answer = self.stub.Score(pb.ScoreRequest(prompt=tokens(7, 70), tokens=pb.TokenIds(ids=[5, 6, 7])))
        end = pb.Finished(usage=answer.usage, receipt=answer.receipt, reason=pb.FINISH_REASON_LENGTH)
        self.told.finished("Score", end)
        self.told.scored += len(answer.tokens)

    def compare(self) -> None:
        steered = request(prompt=tokens(9, 80), program=program.Program(edits=[add(add=STRONG)]), stop=most(4))
        texts = [r.text.response for r in self.stub.Compare(pb.CompareRequest(request=steered)) if r.HasField("text")]
        self.told.finished("Compare", *(text.finished for text in texts if text.HasField("finished")))

    def abort(self) -> None:
        ending = program.Program(abort_when=[program.AbortCondition(name="always", condition=ALWAYS)])
        received: list[pb.GenerateResponse] = []
        with pytest.raises(grpc.RpcError) as aborted:
            received.extend(self.stub.Generate(request(prompt=tokens(6, 90), program=ending)))
        self.told.tokens += sum(len(response.tokens) for response in received)
        self.told.prompt_tokens += 6
        self.told.outcomes["aborted"] += 1
        self.told.refused("Generate", aborted.value)

    def cancel(self, server: LiveServer) -> None:
        """A call that waits behind a session, so that nothing of it was computed when it is cancelled."""
        session = Client(self.channel, prompt=tokens(4, 100))
        session.send(advance=pb.Advance(tokens=3))
        session.tokens(3)
        waiting = self.stub.Generate(request(prompt=tokens(4, 200)))
        until(lambda: server.metric("patchclamp_queue_waiting") == 1)
        waiting.cancel()
        until(lambda: server.metric('patchclamp_sequences_finished_total{outcome="cancelled"}') == 1)
        session.send(stop=pb.Stop())
        self.told.finished("Session", session.finished())
        session.close()
        self.told.outcomes["cancelled"] += 1
        self.told.calls["Generate", "CANCELLED"] += 1

    def preempt(self) -> pb.Finished:
        """A session of low priority loses its place, and goes on with it later."""
        session = Client(self.channel, prompt=tokens(20, 110), stop=most(6), priority=pb.PRIORITY_BATCH)
        session.send(advance=pb.Advance(tokens=2))
        session.tokens(2)
        self.generate(prompt=tokens(20, 140))
        session.send(advance=pb.Advance(tokens=4))
        session.tokens(4)
        end = session.finished()
        session.close()
        self.told.finished("Session", end)
        return end

    def refuse(self) -> None:
        with pytest.raises(grpc.RpcError) as refused:
            list(self.stub.Generate(pb.GenerateRequest()))
        self.told.refused("Generate", refused.value)


def samples(server: LiveServer) -> dict[tuple[str, tuple[str, ...]], float]:
    """By name and values of the labels in the order of their names."""
    return {
        (sample.name, tuple(value for _, value in sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(server.metrics())
        for sample in family.samples
    }


def test_ten_first_tokens_are_ten_generated_tokens_and_ten_short_prompts_are_none(server: LiveServer) -> None:
    with grpc.insecure_channel(server.address) as channel:
        calls = Calls(channel, Told())
        for _ in range(10):
            calls.generate(prompt=tokens(5), stop=most(1))
        assert server.metric("patchclamp_decode_tokens_total") == 10
        for _ in range(10):
            calls.generate(prompt=tokens(1), stop=most(0))
        assert server.metric("patchclamp_decode_tokens_total") == 10
        assert server.metric("patchclamp_prefill_tokens_total") == 60


def test_every_counter_equals_what_clients_were_told(server: LiveServer) -> None:
    told = Told()
    with grpc.insecure_channel(server.address) as channel:
        calls = Calls(channel, told)
        for _ in range(3):
            calls.generate(prompt=tokens(40), stop=most(1))
        calls.generate(prompt=tokens(1), stop=most(5))
        calls.generate(prompt=tokens(3), stop=most(0))
        cats = policy.SparsePolicy(cats=policy.CatsPolicy(), keep_ratio=0.5)
        calls.generate(prompt=tokens(3, 9), sparsity=policy.Sparsity(policy=cats))
        calls.generate(prompt=tokens(250, 3), stop=most(100))
        edits = [
            add(name="gated", layers=[1], add=STRONG, gate=program.Gate(condition=condition(threshold=-1e9))),
            add(name="mild", layers=[1], add=STRONG, strength=1e-3),
        ]
        edited = calls.generate(prompt=tokens(8, 30), program=program.Program(edits=edits))
        calibrated = program.AddVector(vector=program.Vector(artifact="calibrated"))
        below = program.FeatureEdit(autoencoder="jumping", features=[0], set=program.NeuronValues(values=[0.5]))
        warned = [
            add(layers=[1], add=calibrated, strength=0.02),
            program.Edit(site=program.SITE_RESID_POST, layers=[1], features=below),
        ]
        calls.generate(prompt=tokens(8, 30), program=program.Program(edits=warned))
        calls.score()
        calls.compare()
        calls.abort()
        calls.cancel(server)
        preempted = calls.preempt()
        calls.refuse()
        for method in ("Generate", "Session"):
            in_flight = f'patchclamp_requests_in_flight{{method="{method}",service="patchclamp.v1.GenerationService"}}'
            until(lambda name=in_flight: server.metric(name) == 0)
    # What was forced has happened.
    assert preempted.usage.preemptions == 1
    assert edited.receipt.edits[0].gate_firings > 0
    found = samples(server)

    def counted(name: str, *labels: str) -> float:
        return found.get((f"patchclamp_{name}", labels), 0.0)

    prompts = sum(u.prompt_tokens for u in told.usage) + told.prompt_tokens
    cached = sum(u.cached_prompt_tokens for u in told.usage)
    generated = sum(u.generated_tokens for u in told.usage) - told.scored + told.tokens
    assert cached == 2 * 32
    assert counted("prefix_cache_hit_tokens_total") == cached
    assert counted("prefill_tokens_total") == prompts - cached
    assert counted("decode_tokens_total") == generated
    assert counted("batch_decode_rows_sum") == generated
    assert counted("scored_tokens_total") == told.scored
    assert counted("preemptions_total") == sum(u.preemptions for u in told.usage)
    # Of the preempted session: its prompt and the token that had run, without a block that was still in the cache.
    assert counted("recomputed_tokens_total") == 20 + 1 - 16
    streams = [u for u in told.usage if u.generated_tokens]
    # One for each stream with a token, the aborted one too, but not for the score.
    assert counted("time_to_first_token_seconds_count") == len(streams)
    assert counted("inter_token_seconds_count") == generated - len(streams)
    assert counted("queue_wait_seconds_count") == len(told.usage) + 1
    outcomes = {key[1][0]: n for key, n in found.items() if key[0] == "patchclamp_sequences_finished_total"}
    assert outcomes == told.outcomes
    methods = {(key[1][1], key[1][0]): n for key, n in found.items() if key[0] == "patchclamp_requests_total"}
    assert methods == told.calls
    sparse = {key[1][0]: n for key, n in found.items() if key[0] == "patchclamp_sparse_tokens_total"}
    assert sparse == told.sparse
    assert sum(sparse.values()) > 0
    receipts = [edit for receipt in told.receipts for edit in receipt.edits]
    assert counted("edited_requests_total") == sum(bool(receipt.edits) for receipt in told.receipts) == 3
    assert len(receipts) == 5
    assert (counted("edits_total", "add"), counted("edits_total", "features")) == (4, 1)
    assert counted("gate_openings_total") == sum(edit.gate_firings for edit in receipts)
    assert counted("edit_change_ratio_count") == sum(edit.rows > 0 for edit in receipts)
    changes = sum(edit.mean_relative_change for edit in receipts)
    assert counted("edit_change_ratio_sum") == pytest.approx(changes)
    assert counted("aborted_requests_total") == told.outcomes["aborted"] == 1
    warnings = Counter(w.code for receipt in told.receipts for w in receipt.warnings)
    for code in WarningCode:
        number = program.RequestWarningCode.Value(f"REQUEST_WARNING_CODE_{code.name}")
        assert counted("request_warnings_total", code.value) == warnings[number] > 0
    assert counted("failed_steps_total") == 0
    assert counted("steps_total") == counted("step_seconds_count") == counted("batch_rows_count")
