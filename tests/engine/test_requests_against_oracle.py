"""What a request may ask for besides generation under a fixed program, against the oracle."""

import queue
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from engine_runs import TOLERANCE, Bench, Job, Outcome, assert_same, loaded, truth
from oracle import oracle_logits, run_oracle
from patience import PATIENCE_SECONDS
from programs import GENERATED, PROMPT, SCOPES, abort, edit, numbers, prompt, shapes, sites_of
from tiny_models import FAMILIES, LAYERS, tiny_model

from patchclamp_server.artifacts.store import ArtifactStore
from patchclamp_server.artifacts.types import ArtifactKind
from patchclamp_server.engine.config import EngineConfig
from patchclamp_server.engine.engine import Engine
from patchclamp_server.engine.request import (
    Capture,
    Captured,
    Divergence,
    Event,
    Failed,
    Finished,
    Pooling,
    Priority,
    Request,
    StopParams,
    Token,
)
from patchclamp_server.errors import Aborted
from patchclamp_server.interventions.bind import bind
from patchclamp_server.interventions.program import (
    AddVector,
    Edit,
    HeadEdit,
    NeuronEdit,
    NeuronOp,
    Program,
    ProjectionReadout,
    Readout,
    Scope,
    TokenSelector,
    Vector,
)
from patchclamp_server.model.sites import Site

CONFIG = EngineConfig(kv_block_size=4, kv_cache_tokens=1024)
CHUNKED = EngineConfig(kv_block_size=4, kv_cache_tokens=1024, max_tokens_per_step=5)


def events_of(family: str, request: Request, events: "queue.SimpleQueue[Event]", config: EngineConfig) -> list[Event]:
    """All events of one request, which puts them into `events`."""
    engine = Engine(loaded(family), config)
    engine.submit(request)
    engine.start()
    try:
        seen = [events.get(timeout=PATIENCE_SECONDS)]
        while not isinstance(seen[-1], Finished | Failed):
            seen.append(events.get(timeout=PATIENCE_SECONDS))
    finally:
        engine.shutdown()
    return seen


@pytest.mark.parametrize("config", [CONFIG, CHUNKED], ids=["whole", "chunked"])
@pytest.mark.parametrize("family", FAMILIES)
def test_scores_are_the_log_probabilities_of_the_oracle(family: str, config: EngineConfig) -> None:
    """The scored continuation counts as generated."""
    program = Program(
        (
            edit("add", Site.RESID_POST, shapes(family), name="a", scope=GENERATED),
            edit("neurons_scale", Site.MLP_POST, shapes(family), name="b", scope=PROMPT),
        )
    )
    tokens, start = prompt(f"{family} score", 24), 15
    events: queue.SimpleQueue[Event] = queue.SimpleQueue()
    bound = bind(program, loaded(family).info)
    seen = events_of(family, Request(tokens, events.put, program=bound, score_from=start), events, config)
    scored = [event for event in seen if isinstance(event, Token)]
    logprobs = torch.log_softmax(oracle_logits(tiny_model(family), tokens, program, prompt_length=start), dim=-1)
    assert [(event.position, event.id) for event in scored] == list(enumerate(tokens))[start:]
    expected = [float(logprobs[position - 1, tokens[position]]) for position in range(start, len(tokens))]
    assert [event.logprob for event in scored] == pytest.approx(expected, abs=1e-3)
    finished = seen[-1]
    assert isinstance(finished, Finished)
    # The last token is scored and never an input.
    assert [own.rows for own in finished.receipt.edits] == [len(tokens) - start - 1, start]


@pytest.mark.parametrize("prefixes", [True, False], ids=["prefixes", "no prefixes"])
def test_a_token_is_scored_once_though_its_sequence_is_preempted(prefixes: bool) -> None:
    config = replace(CHUNKED, max_sequences=1, enable_prefix_cache=prefixes)
    engine, seen, tokens = Engine(loaded("llama"), config), list[Event](), prompt("scored and preempted", 24)
    engine.submit(Request(tokens, seen.append, priority=Priority.ANALYSIS, score_from=4))
    for _ in range(3):
        engine.step()
    assert seen
    engine.submit(Request(tokens[:3], lambda event: None, stop=StopParams(max_tokens=2, ignore_eos=True)))
    while engine.step():
        pass
    assert engine.stats().preemptions == 1
    logprobs = torch.log_softmax(oracle_logits(tiny_model("llama"), tokens, None), dim=-1)
    found = [event for event in seen if isinstance(event, Token)]
    assert [event.position for event in found] == list(range(4, 24))
    expected = [float(logprobs[position - 1, tokens[position]]) for position in range(4, 24)]
    assert [event.logprob for event in found] == pytest.approx(expected, abs=1e-3)


@pytest.mark.parametrize("strength", [0.4, 4.0])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_divergence_from_the_baseline_is_that_of_the_oracle(family: str, strength: float) -> None:
    """Of the edited model: where the edit is strong, the baseline's own divergence is another number."""
    program = Program((edit("add", Site.RESID_POST, shapes(family), strength=strength),))
    tokens = prompt(f"{family} compare", 20)
    events: queue.SimpleQueue[Event] = queue.SimpleQueue()
    request = Request(
        tokens,
        events.put,
        program=bind(program, loaded(family).info),
        stop=StopParams(max_tokens=5, ignore_eos=True),
        compare_baseline=True,
    )
    seen = [event for event in events_of(family, request, events, CONFIG) if isinstance(event, Divergence)]
    edited = run_oracle(tiny_model(family), tokens, program, 5)
    baseline = oracle_logits(tiny_model(family), tokens + edited.tokens[:-1], None)[len(tokens) - 1 :]
    p, q = torch.log_softmax(edited.logits.double(), dim=-1), torch.log_softmax(baseline.double(), dim=-1)
    kl = (p.exp() * (p - q)).sum(dim=-1)
    assert [event.id for event in seen] == list(edited.tokens)
    assert [event.position for event in seen] == list(range(20, 25))
    assert [event.kl for event in seen] == pytest.approx(kl.tolist(), abs=1e-3, rel=1e-3)
    assert [event.same_top1 for event in seen] == (p.argmax(dim=-1) == q.argmax(dim=-1)).tolist()


@pytest.mark.parametrize("family", FAMILIES)
def test_a_strength_set_between_tokens_holds_from_the_next_token_on(family: str) -> None:
    program = Program((edit("add", Site.RESID_POST, shapes(family), name="steer", strength=0.2),))
    tokens = prompt(f"{family} session", 18)
    outcome = Outcome()
    granted: queue.SimpleQueue[int] = queue.SimpleQueue()

    def on_event(event: Event) -> None:
        outcome.on_event(event)
        if isinstance(event, Token):
            granted.put(event.position)

    request = Request(
        tokens,
        on_event,
        program=bind(program, loaded(family).info),
        stop=StopParams(max_tokens=6, ignore_eos=True),
        credits=2,
    )
    engine = Engine(loaded(family), CONFIG)
    engine.start()
    try:
        request_id = engine.submit(request)
        assert [granted.get(timeout=PATIENCE_SECONDS) for _ in range(2)] == [18, 19]
        # Token 19 has been chosen and not been an input yet: it is the next one.
        engine.set_strength(request_id, "steer", 1.5)
        engine.advance(request_id, 2)
        assert [granted.get(timeout=PATIENCE_SECONDS) for _ in range(2)] == [20, 21]
        engine.set_strength(request_id, "steer", 0.0)
        engine.advance(request_id, 2)
        assert outcome.done.wait(PATIENCE_SECONDS)
    finally:
        engine.shutdown()
    changes = {"steer": {19: 1.5, 21: 0.0}}
    expected = run_oracle(tiny_model(family), tokens, program, 6, strengths_by_position=changes)
    assert outcome.tokens == list(expected.tokens)
    own, count = outcome.end().receipt.edits[0], expected.receipts[0]
    assert own.rows == count.rows
    assert own.mean_relative_change == pytest.approx(count.mean_relative_change, rel=1e-4)


def aborted_later(family: str) -> Job:
    """A request that the first generated tokens do not abort, and a later one does."""
    unreached = abort(shapes(family), threshold=1e9)
    examined = unreached.abort_when[0].condition
    direction = ProjectionReadout((Vector(values=examined.vector.values, unit=True),))
    watch = Readout(direction, examined.site, layers=(examined.layer,), scope=GENERATED)
    for attempt in range(8):
        tokens = prompt(f"{family} abort {attempt}", 18)
        watched = truth(family, Job(tokens, Program(unreached.edits, (watch,)), max_tokens=10))
        values = [value.values[0] for value in watched.readouts]
        if max(values) > values[0] + 0.1:
            return Job(tokens, abort(shapes(family), threshold=(max(values) + values[0]) / 2), max_tokens=10)
    raise AssertionError("no prompt whose later tokens project further than the first")


@pytest.mark.parametrize("config", [CONFIG, CHUNKED], ids=["whole", "chunked"])
@pytest.mark.parametrize("family", FAMILIES)
def test_an_abort_condition_ends_the_stream_where_the_oracle_ends(family: str, config: EngineConfig) -> None:
    job = aborted_later(family)
    expected = truth(family, job)
    assert expected.aborted_at is not None
    assert expected.aborted_at > len(job.prompt)
    with Bench(family, config) as bench:
        outcome = bench.run([job])[0]
    assert isinstance(outcome.error, Aborted)
    assert "too much" in outcome.error.message
    assert outcome.tokens == list(expected.tokens)


@pytest.mark.parametrize("config", [CONFIG, CHUNKED], ids=["whole", "chunked"])
def test_an_abort_condition_that_holds_in_the_prompt_lets_no_token_out(config: EngineConfig) -> None:
    job = Job(prompt("abort at once", 18), abort(shapes("llama"), threshold=-1e9, scope=PROMPT))
    with Bench("llama", config) as bench:
        outcome = bench.run([job])[0]
    assert isinstance(outcome.error, Aborted)
    assert outcome.tokens == list(truth("llama", job).tokens) == []


@pytest.mark.parametrize("kind", ["add", "neurons_scale", "heads_scale"])
def test_the_change_of_an_edit_is_relative_to_the_activation_it_was_given(kind: str) -> None:
    """Edits of one site run in listed order, so the second of two is measured against what the first left behind."""
    s = shapes("llama")
    first, second = (edit(kind, sites_of(kind, s)[-1], s, name=name) for name in ("first", "second"))
    if isinstance(second.kind, NeuronEdit) and isinstance(first.kind, NeuronEdit):
        others = tuple(sorted(set(range(s.d_ff)) - set(first.kind.neurons)))[: len(first.kind.neurons)]
        second = replace(second, kind=replace(second.kind, neurons=others))
    if isinstance(second.kind, HeadEdit):
        second = replace(second, kind=replace(second.kind, heads=(1, 2)))
    job = Job(prompt("relative", 12), Program((first, second)))
    with Bench("llama", CONFIG) as bench:
        own = bench.run([job])[0].end().receipt.edits
    expected = [count.mean_relative_change for count in truth("llama", job).receipts]
    assert [each.mean_relative_change for each in own] == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("role", ["system", "user", "assistant"])
def test_a_scope_by_role_edits_the_turns_of_that_role(role: str) -> None:
    roles = ("system",) * 6 + ("user",) * 5 + ("assistant",) * 4
    scope = Scope(include=(TokenSelector(role=role),))
    program = Program((edit("add", Site.RESID_POST, shapes("llama"), scope=scope),))
    job = Job(prompt("roles", 15), program, roles=roles)
    with Bench("llama", CHUNKED) as bench:
        assert_same("llama", job, bench.run([job])[0])
    # Generated tokens are the assistant's; the last one is not fed back.
    generated = job.max_tokens - 1 if role == "assistant" else 0
    assert truth("llama", job).receipts[0].rows == roles.count(role) + generated


def pooled(states: torch.Tensor, pooling: Pooling) -> torch.Tensor:
    """Of tokens [n, width] those whose norm is at most three times the median: their mean, or the last."""
    norms = states.norm(dim=1)
    kept = states[norms <= 3 * norms.sort().values[(len(norms) - 1) // 2]]
    if pooling is Pooling.MAX:
        return states.amax(dim=0)
    return kept[-1] if pooling is Pooling.LAST_TOKEN else kept.mean(dim=0)


@pytest.mark.drawn(0.3)
@pytest.mark.parametrize("config", [CONFIG, CHUNKED], ids=["whole", "chunked"])
@pytest.mark.parametrize("pooling", Pooling)
@pytest.mark.parametrize("family", FAMILIES)
def test_captured_activations_are_the_pooled_readouts_of_the_oracle(
    family: str, pooling: Pooling, config: EngineConfig
) -> None:
    s, tokens = shapes(family), prompt(f"{family} capture", 18)
    program = Program((edit("add", Site.RESID_PRE, s, layers=(1,)),))
    for site, width in s.sites.items():
        events: queue.SimpleQueue[Event] = queue.SimpleQueue()
        request = Request(
            tokens,
            events.put,
            program=bind(program, loaded(family).info),
            stop=StopParams(max_tokens=0),
            capture=Capture(site, (2, 0), pooling),
        )
        captured = next(e for e in events_of(family, request, events, config) if isinstance(e, Captured))
        axes = tuple(Vector(values=row) for row in torch.eye(width))
        readout = Readout(ProjectionReadout(axes), site, layers=(2, 0))
        values = run_oracle(tiny_model(family), tokens, Program(program.edits, (readout,)), 0).readouts
        rows = {(v.layer, v.position): torch.tensor(v.values) for v in values}
        expected = torch.stack(
            [pooled(torch.stack([rows[layer, p] for p in range(1, len(tokens))]), pooling) for layer in (2, 0)]
        )
        assert (captured.pooled.values - expected).abs().max() <= TOLERANCE * expected.abs().max(), site


def test_artifacts_are_used_as_the_oracle_uses_them(tmp_path: Path) -> None:
    s, store, fingerprint = shapes("llama"), ArtifactStore(tmp_path), loaded("llama").info.fingerprint
    directions = {f"layer.{layer}": numbers(f"artifact {layer}", s.sites[Site.RESID_POST]) for layer in range(LAYERS)}
    vector = store.put(ArtifactKind.VECTOR, directions, model_fingerprint=fingerprint, site=Site.RESID_POST)
    sets = {
        "layer.0.neurons": torch.tensor([3, 1]),
        "layer.0.values": torch.tensor([0.5, -2.0]),
        "layer.2.neurons": torch.tensor([7, 40, 5]),
        "layer.2.values": torch.tensor([1.0, 2.0, 3.0]),
    }
    neurons = store.put(ArtifactKind.NEURON_SET, sets, model_fingerprint=fingerprint)
    own_rows = AddVector(Vector(artifact=vector.id))
    one_row = AddVector(Vector(artifact=vector.id, artifact_layer=1, unit=True))
    own_values = NeuronEdit(neuron_set=neurons.id, op=NeuronOp.SET)
    other_value = NeuronEdit(neuron_set=neurons.id, op=NeuronOp.SCALE, values=(1.5,))
    program = Program(
        (
            Edit(own_rows, Site.RESID_POST, "own rows", layers=(2, 0), strength=0.4),
            Edit(one_row, Site.RESID_PRE, "one row", all_layers=True, strength=3.0, scope=SCOPES[3]),
            Edit(own_values, Site.MLP_POST, "its own layers", strength=0.5),
            Edit(other_value, Site.MLP_POST, "one layer", layers=(2,), scope=PROMPT),
            Edit(own_values, Site.MLP_GATE, "gates of its layers", strength=0.5),
            Edit(other_value, Site.MLP_UP, "ups of one layer", layers=(0,)),
        )
    )
    tokens = prompt("artifacts", 16)
    bound = bind(program, loaded("llama").info, store)
    outcome = Outcome()
    engine = Engine(loaded("llama"), CONFIG)
    engine.submit(Request(tokens, outcome.on_event, program=bound, stop=StopParams(max_tokens=4, ignore_eos=True)))
    engine.start()
    try:
        assert outcome.done.wait(PATIENCE_SECONDS)
    finally:
        engine.shutdown()
    artifacts = {reference: store.get(reference) for reference in (vector.id, neurons.id)}
    expected = run_oracle(tiny_model("llama"), tokens, program, 4, artifacts=artifacts)
    assert outcome.tokens == list(expected.tokens)
    assert [own.rows for own in outcome.end().receipt.edits] == [count.rows for count in expected.receipts]
    changes = [count.mean_relative_change for count in expected.receipts]
    assert [own.mean_relative_change for own in outcome.end().receipt.edits] == pytest.approx(changes, rel=1e-4)
