"""Probes at single tokens: readouts, gates and abort conditions have the probability that the artifact's formula gives
for the states of the oracle, in mixed batches, chunked or not, and under both executors."""

from typing import Any

import pytest
import torch
from engine_runs import Bench, Job, assert_same, loaded, truth
from oracle_formulas import probe_values
from probe_artifacts import FAMILY, LABELS, SHAPES, probe_tensors, put
from programs import GENERATED, edit, mixed, prompt

from patchclamp.v1 import program_pb2 as pb
from patchclamp_server.artifacts.probes import stored_probe
from patchclamp_server.artifacts.store import ArtifactStore
from patchclamp_server.artifacts.types import ArtifactKind
from patchclamp_server.engine.config import EngineConfig
from patchclamp_server.errors import Aborted, FailedPrecondition, InvalidArgument, RequestError
from patchclamp_server.interventions.bind import bind
from patchclamp_server.interventions.bound import BoundProgram
from patchclamp_server.interventions.program import (
    AbortCondition,
    Comparison,
    Condition,
    Gate,
    ProbeReadout,
    Program,
    Readout,
    Scope,
    Vector,
)
from patchclamp_server.model.sites import Site
from patchclamp_server.rpc.codecs.program import decode_program


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> ArtifactStore:
    return ArtifactStore(tmp_path_factory.mktemp("artifacts"))


@pytest.fixture(scope="module")
def probes(store: ArtifactStore) -> dict[str, str]:
    return {
        "one layer": put(store, "logistic", (1,), Site.RESID_POST),
        "two layers": put(store, "logistic", (0, 2), Site.RESID_POST),
        "neurons": put(store, "logistic", (0,), Site.MLP_POST, calibrated=False),
        "three labels": put(store, "logistic", (0, 1), Site.RESID_PRE, 3),
        "prototype": put(store, "prototype", (1,), Site.MLP_OUT),
        "prototypes": put(store, "prototype", (0, 2), Site.RESID_POST, 3),
        "number": put(store, "ridge", (2,), Site.ATTN_OUT, 1),
        "early": put(store, "logistic", (0,), Site.RESID_PRE),
    }


@pytest.fixture(scope="module")
def reading(probes: dict[str, str]) -> Program:
    """Everything that can be read, beside edits that change it."""
    readouts = [
        Readout(
            ProbeReadout(ref, all_classes), None, f"{name} {all_classes}", scope=GENERATED if all_classes else Scope()
        )
        for name, ref in probes.items()
        for all_classes in (False, True)
        if not (all_classes and name == "number")
    ]
    return Program(
        (edit("add", Site.RESID_PRE, SHAPES, "p", name="add", layers=(0, 1), strength=0.5),), tuple(readouts)
    )


@pytest.fixture(scope="module")
def steering(probes: dict[str, str]) -> Program:
    """An edit behind a probability, and one that stays open."""
    gates = [
        Gate(Condition(Site.RESID_PRE, 0, Vector(), Comparison.ABOVE, 0.5, probe=probes["early"])),
        Gate(Condition(None, 0, Vector(), Comparison.BELOW, 0.4, probe=probes["neurons"]), latched=True),
        Gate(Condition(None, 0, Vector(), Comparison.ABOVE, 0.55, probe=probes["one layer"])),
    ]
    edits = [
        edit("add", Site.RESID_POST, SHAPES, f"gated {i}", name=f"e{i}", layers=(2,), strength=0.5, gate=gate)
        for i, gate in enumerate(gates)
    ]
    return Program(tuple(edits))


@pytest.mark.parametrize("kernels", [False, True], ids=["operators", "kernels"])
@pytest.mark.parametrize("step", [512, 5], ids=["whole", "chunked"])
def test_probabilities_and_gates_are_those_of_the_formula_in_a_mixed_batch(
    store: ArtifactStore, reading: Program, steering: Program, kernels: bool, step: int
) -> None:
    programs = [reading, None, steering, mixed(SHAPES)["many edits"]]
    jobs = [Job(prompt(f"probed {i}", 14 + i), program, artifacts=store) for i, program in enumerate(programs)]
    config = EngineConfig(kv_block_size=4, enable_prefix_cache=False, kernels=kernels, max_tokens_per_step=step)
    with Bench(FAMILY, config) as bench:
        outcomes = bench.run(jobs)
    assert truth(FAMILY, jobs[2]).condition_margin > 1e-4
    for job, outcome in zip(jobs, outcomes, strict=True):
        assert_same(FAMILY, job, outcome)
    firings = [own.gate_firings for own in outcomes[2].end().receipt.edits]
    assert all(firings), "a gate that never opens shows nothing"
    thresholds = [own.gate_threshold for own in outcomes[2].end().receipt.edits]
    assert thresholds == [0.5, 0.4, 0.55], "receipts speak of probabilities"


def test_a_readout_spreads_over_all_labels_what_the_target_leaves(store: ArtifactStore, probes: dict[str, str]) -> None:
    program = Program(readouts=(Readout(ProbeReadout(probes["three labels"], True), None),))
    with Bench(FAMILY, EngineConfig()) as bench:
        [outcome] = bench.run([Job(prompt("all labels", 9), program, artifacts=store)])
    assert len(outcome.readouts) == 14
    for value in outcome.readouts:
        assert (len(value.values), value.layer, value.ids) == (3, 1, ())
        assert sum(value.values) == pytest.approx(1.0)


@pytest.mark.parametrize("kernels", [False, True], ids=["operators", "kernels"])
@pytest.mark.parametrize("comparison", Comparison)
def test_a_stream_ends_where_the_probability_crosses_the_threshold(
    store: ArtifactStore, probes: dict[str, str], kernels: bool, comparison: Comparison
) -> None:
    ref = probes["one layer"]
    reads = Program(readouts=(Readout(ProbeReadout(ref), None),))
    seen = [value.values[0] for value in truth(FAMILY, Job(PROMPT, reads, 8, artifacts=store)).readouts]
    ordered = sorted(seen, reverse=comparison is Comparison.ABOVE)
    threshold = (ordered[2] + ordered[3]) / 2
    crossed = [p > threshold if comparison is Comparison.ABOVE else p < threshold for p in seen]
    condition = Condition(None, 0, Vector(), comparison, threshold, probe=ref)
    program = Program(abort_when=(AbortCondition("sure", condition),))
    with Bench(FAMILY, EngineConfig(kernels=kernels, enable_prefix_cache=False)) as bench:
        [outcome] = bench.run([Job(PROMPT, program, 8, artifacts=store)])
    assert isinstance(outcome.error, Aborted)
    assert f"position {crossed.index(True)}" in str(outcome.error)


PROMPT = prompt("abort by a probe", 10)


@pytest.mark.parametrize("threshold", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("name", ["one layer", "prototype", "neurons", "number"])
def test_the_projection_of_a_condition_is_where_the_probability_is_the_threshold(
    store: ArtifactStore, probes: dict[str, str], name: str, threshold: float
) -> None:
    condition = bind(gated(probes[name], threshold=threshold), loaded(FAMILY).info, store).aborts[0].condition
    # Of the states with this projection, one that also has a part across the vector.
    unit = condition.unit.double()
    across = torch.linspace(-1, 1, len(unit), dtype=torch.float64)
    h = condition.threshold * unit + across - (across @ unit) * unit
    stored = store.get(probes[name])
    [layer] = stored_probe(stored).layers
    assert probe_values(stored, {layer: h}, all_classes=False) == [pytest.approx(threshold, abs=1e-5)]


def refused(store: ArtifactStore, program: Program) -> RequestError:
    with pytest.raises(RequestError) as error:
        bind(program, loaded(FAMILY).info, store)
    return error.value


def gated(ref: str, *, site: Site | None = None, layer: int = 0, threshold: float = 0.5) -> Program:
    condition = Condition(site, layer, Vector(), Comparison.ABOVE, threshold, probe=ref)
    return Program(abort_when=(AbortCondition("a", condition),))


@pytest.mark.parametrize(
    ("name", "message"),
    [("three labels", "has 3 labels"), ("prototypes", "has 3 labels"), ("two layers", "reads layers 0, 2 together")],
)
def test_a_condition_refuses_a_probe_that_is_no_single_projection_and_names_the_readout(
    store: ArtifactStore, probes: dict[str, str], name: str, message: str
) -> None:
    error = refused(store, gated(probes[name]))
    assert isinstance(error, FailedPrecondition)
    assert error.field == "program.abort_when[0].condition.probe"
    assert message in error.message
    assert "a readout reads this one" in error.message


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"site": Site.RESID_PRE}, "site"),
        ({"site": Site.RESID_POST, "layer": 0}, "layer"),
        ({"layer": 2}, "layer"),
        ({"threshold": 1.0}, "threshold"),
        ({"threshold": -0.1}, "threshold"),
        ({"threshold": float("nan")}, "threshold"),
    ],
)
def test_a_condition_elsewhere_or_on_no_probability_is_refused_by_its_field(
    store: ArtifactStore, probes: dict[str, str], fields: dict[str, Any], field: str
) -> None:
    error = refused(store, gated(probes["one layer"], **fields))
    assert isinstance(error, InvalidArgument)
    assert error.field == f"program.abort_when[0].condition.{field}"


def threshold_of(store: ArtifactStore, program: Program) -> float | None:
    return bind(program, loaded(FAMILY).info, store).aborts[0].condition.given


def test_a_threshold_that_is_not_given_is_a_half_and_of_a_number_0(
    store: ArtifactStore, probes: dict[str, str]
) -> None:
    assert threshold_of(store, gated(probes["one layer"], threshold=0.0)) == 0.5
    assert threshold_of(store, gated(probes["number"], threshold=0.0)) == 0.0
    assert threshold_of(store, gated(probes["number"], threshold=-7.0)) == -7.0


def test_a_readout_is_where_its_probe_is(store: ArtifactStore, probes: dict[str, str]) -> None:
    def at(site: Site | None, layers: tuple[int, ...] = (), *, all_layers: bool = False) -> Program:
        kind = ProbeReadout(probes["two layers"])
        return Program(readouts=(Readout(kind, site, layers=layers, all_layers=all_layers),))

    for program in (at(None), at(Site.RESID_POST), at(None, (2, 0))):
        [readout] = bind(program, loaded(FAMILY).info, store).readouts
        assert (readout.site, readout.layers) == (Site.RESID_POST, (0, 2))
    assert refused(store, at(Site.RESID_PRE)).field == "program.readouts[0].site"
    assert refused(store, at(None, (2,))).field == "program.readouts[0].layers"
    assert refused(store, at(None, all_layers=True)).field == "program.readouts[0].all_layers"


def test_a_probe_of_another_model_or_kind_is_refused(store: ArtifactStore, probes: dict[str, str]) -> None:
    tensors = probe_tensors("logistic", (1,), Site.RESID_POST, 2)
    said = {"method": "logistic", "site": "resid_post", "labels": LABELS[:2], "target": "no"}
    other = store.put(ArtifactKind.PROBE, tensors, model_fingerprint="sha256:other", provenance=said)
    assert isinstance(refused(store, gated(other.id)), FailedPrecondition)
    fingerprint = loaded(FAMILY).info.fingerprint
    vector = store.put(
        ArtifactKind.VECTOR, {"layer.0": torch.ones(48)}, model_fingerprint=fingerprint, site=Site.RESID_POST
    )
    assert isinstance(refused(store, gated(vector.id)), InvalidArgument)
    silent = store.put(ArtifactKind.PROBE, tensors, model_fingerprint=fingerprint, provenance={"method": "logistic"})
    assert "cannot be served" in refused(store, gated(silent.id)).message


def fingerprint(store: ArtifactStore, program: Program) -> str:
    bound: BoundProgram = bind(program, loaded(FAMILY).info, store)
    return bound.fingerprint


def test_probes_that_differ_in_calibration_alone_have_programs_of_two_fingerprints(store: ArtifactStore) -> None:
    refs = [put(store, "logistic", (1,), Site.MLP_OUT, calibrated=calibrated) for calibrated in (True, False)]
    assert len({fingerprint(store, Program(readouts=(Readout(ProbeReadout(ref), None),))) for ref in refs}) == 2
    assert len({fingerprint(store, gated(ref)) for ref in refs}) == 2


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"vector": {"artifact": "v"}}, "vector"),
        ({"feature": {"autoencoder": "a"}}, "feature"),
        ({"cosine": True}, "cosine"),
        ({"stored_threshold": "STORED_THRESHOLD_MIDPOINT"}, "stored_threshold"),
    ],
)
def test_a_message_that_names_a_probe_and_something_else_is_refused(fields: dict[str, Any], field: str) -> None:
    condition = pb.Condition(probe="p", comparison=pb.COMPARISON_ABOVE, **fields)
    with pytest.raises(InvalidArgument) as refused:
        decode_program(pb.Program(abort_when=[pb.AbortCondition(condition=condition)]))
    assert refused.value.field == f"program.abort_when[0].condition.{field}"
