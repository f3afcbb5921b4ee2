"""A watched probe has at every token the probability that the formula of the artifact gives for the states there."""

from typing import Any

import numpy as np
import pytest
import torch
from engine_runs import TOLERANCE, Bench, Job, loaded
from oracle_formulas import probe_values
from probe_artifacts import FAMILY, SHAPES, put
from programs import mixed, prompt
from tiny_models import tiny_model
from watch_runs import _Recorded, follow

from patchclamp_server.artifacts.store import ArtifactStore
from patchclamp_server.engine.config import EngineConfig
from patchclamp_server.errors import FailedPrecondition, NotFound, RequestError
from patchclamp_server.interventions.program import Program, Vector
from patchclamp_server.model.sites import Site
from patchclamp_server.monitoring.bind import bind_watch
from patchclamp_server.monitoring.items import WatchedDirection, WatchedProbe, WatchItem
from patchclamp_server.monitoring.registry import WatchRegistry
from patchclamp_server.monitoring.watch import ItemKind, Watch, check_watch


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> ArtifactStore:
    return ArtifactStore(tmp_path_factory.mktemp("artifacts"))


@pytest.fixture(scope="module")
def probes(store: ArtifactStore) -> dict[str, str]:
    return {
        "logistic": put(store, "logistic", (1,), Site.RESID_POST),
        "prototype": put(store, "prototype", (0,), Site.MLP_OUT),
        "number": put(store, "ridge", (1,), Site.RESID_POST, 1),
        "neurons": put(store, "logistic", (1,), Site.MLP_POST),
        "layers": put(store, "logistic", (0, 1), Site.RESID_POST),
        "labels": put(store, "logistic", (0,), Site.RESID_POST, 3),
    }


def watched(store: ArtifactStore, refs: dict[str, str], **options: Any) -> Watch:
    items = [WatchItem(name, WatchedProbe(ref), **options) for name, ref in refs.items()]
    beside = Vector(values=torch.ones(SHAPES.sites[Site.RESID_POST]))
    items.insert(1, WatchItem("beside", WatchedDirection(beside, Site.RESID_POST, (1,)), threshold=0.0))
    return bind_watch(items, loaded(FAMILY).info, store, max_items=100)


SERVED = ("logistic", "prototype", "number")


@pytest.mark.parametrize("looks", ["compiled", "torch"])
@pytest.mark.parametrize("kernels", [False, True], ids=["operators", "kernels"])
def test_probabilities_of_all_tokens_after_all_edits_in_a_mixed_batch(
    store: ArtifactStore, probes: dict[str, str], kernels: bool, looks: str
) -> None:
    asked = [mixed(SHAPES)["many edits"], None]
    jobs = [Job(prompt(f"watched probe {i}", 15 + i), program, 4) for i, program in enumerate(asked)]
    config = EngineConfig(kv_block_size=4, kernels=kernels, max_tokens_per_step=24)
    with Bench(FAMILY, config) as bench:
        engine = bench.engine
        if looks == "torch":
            engine.monitor = engine.runner.monitor = WatchRegistry(
                loaded(FAMILY).decoder.spec, torch.device("cpu"), max_watches=1, max_items=100, compiled=False
            )
        followed = follow(bench, watched(store, {name: probes[name] for name in SERVED}))
        outcomes = bench.run(jobs)
    for sequence, (job, outcome) in enumerate(zip(jobs, outcomes, strict=True), start=1):
        tokens = [*job.prompt, *outcome.tokens][:-1]
        edits = Program() if job.program is None else Program(job.program.edits)
        seen = _Recorded(tiny_model(FAMILY), edits, tokens, len(job.prompt), None, {}, {}).run()
        found = followed.of(sequence)
        assert list(found) == list(range(1, len(tokens)))
        for column, name in ((0, "logistic"), (2, "prototype"), (3, "number")):
            artifact = store.get(probes[name])
            [layer] = artifact.info.layers
            states = seen.sites[Site(artifact.info.provenance["site"]), layer]
            wanted = [probe_values(artifact, {layer: h}, all_classes=False)[0] for h in states]
            own = np.array([row[column] for row in found.values()])
            assert np.abs(own - wanted[1:]).max() <= TOLERANCE * max(1.0, np.abs(wanted).max())


def test_a_probability_fires_above_a_half_and_a_number_above_a_quantile_of_its_own(
    store: ArtifactStore, probes: dict[str, str]
) -> None:
    watch = watched(store, {name: probes[name] for name in SERVED})
    assert watch.names == ("logistic", "beside", "prototype", "number")
    assert watch.kinds.tolist() == [ItemKind.PROBABILITY, ItemKind.DIRECTION, ItemKind.PROBABILITY, ItemKind.NUMBER]
    assert watch.thresholds.tolist() == [0.5, 0.0, 0.5, 0.0]
    assert watch.quantiles.tolist() == [0.0, 0.0, 0.0, 0.99]
    assert watch.kind_names == ("direction", "probe")
    assert watched(store, {"n": probes["logistic"]}, threshold=0.9).thresholds.tolist() == [0.9, 0.0]


def test_a_watch_of_probes_comes_back_from_its_tensors(store: ArtifactStore, probes: dict[str, str]) -> None:
    watch = watched(store, {name: probes[name] for name in SERVED})
    again = Watch.from_tensors(watch.tensors())
    check_watch(again, loaded(FAMILY).info)
    for name in ("kinds", "units", "vectors", "bias", "thresholds"):
        assert torch.equal(getattr(again, name), getattr(watch, name))


@pytest.mark.parametrize(
    ("name", "kind", "message"),
    [
        ("neurons", FailedPrecondition, "reads mlp_post; probes are watched at"),
        ("layers", FailedPrecondition, "reads layers 0, 1 together"),
        ("labels", FailedPrecondition, "has 3 labels"),
        ("nobody", NotFound, "nobody"),
    ],
)
def test_a_probe_that_cannot_be_watched_is_refused_with_the_reason(
    store: ArtifactStore, probes: dict[str, str], name: str, kind: type[RequestError], message: str
) -> None:
    with pytest.raises(kind, match=message) as refused:
        watched(store, {"p": probes.get(name, name)})
    assert refused.value.field == "items[0].probe.probe"
