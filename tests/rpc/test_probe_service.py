"""TrainProbe through a real channel, against scikit-learn on states of transformers with hooks on the same texts."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
import torch
from live import LiveServer
from numpy.typing import NDArray
from oracle_sites import attach
from patience import PATIENCE_SECONDS
from secured import until
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.metrics import accuracy_score, r2_score
from sklearn.neighbors import NearestCentroid
from sklearn.preprocessing import StandardScaler
from statuses import failure
from transformers import AutoModelForCausalLM, PreTrainedModel

from patchclamp.v1 import generation_pb2, job_pb2, neuron_pb2, program_pb2
from patchclamp.v1 import probe_pb2 as pb
from patchclamp.v1.job_pb2_grpc import JobServiceStub
from patchclamp.v1.probe_pb2_grpc import ProbeServiceStub
from patchclamp_server.analysis.calibration import platt
from patchclamp_server.analysis.neurons.localize.holdout import held_out
from patchclamp_server.analysis.probes.job import CONTROLS
from patchclamp_server.artifacts.probes import Probe, log_odds, stored_probe
from patchclamp_server.artifacts.store import ArtifactStore
from patchclamp_server.interventions.pooling import ordinary_tokens
from patchclamp_server.model.load import load_model
from patchclamp_server.model.sites import Site

LAYERS, SEED = 2, 2**64 - 2
GROUPS = {
    "rain": [f"It rained {'and rained ' * (i % 3)}in town {i}" for i in range(12)],
    "key": [f"The key {i} is of {'red ' * (i % 4)}glass" for i in range(11)],
    "sum": [f"{i} + {i * i} = {i + i * i}" for i in range(10)],
}
MIXED = {str(k): [text for texts in GROUPS.values() for text in texts][k::3] for k in range(3)}
NUMBERS = {str(i): [f"There are {i} apples {'here ' * j}" for j in range(3)] for i in range(8)}
TRAINING, CALIBRATION, REPORT = range(3)
Doubles = NDArray[np.float64]


def source(groups: dict[str, list[str]], **fields: Any) -> neuron_pb2.TextSource:
    listed = [
        neuron_pb2.LabelledTexts(label=label, prompts=[generation_pb2.Prompt(text=text) for text in texts])
        for label, texts in groups.items()
    ]
    return neuron_pb2.TextSource(groups=listed, **fields)


@pytest.fixture(scope="module")
def server(tiny_llama_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    with LiveServer(load_model(str(tiny_llama_dir)), tmp_path_factory.mktemp("artifacts")) as server:
        yield server


@pytest.fixture(scope="module")
def channel(server: LiveServer) -> Iterator[grpc.Channel]:
    with grpc.insecure_channel(server.address) as channel:
        yield channel


@pytest.fixture(scope="module")
def stub(channel: grpc.Channel) -> ProbeServiceStub:
    return ProbeServiceStub(channel)


@pytest.fixture(scope="module")
def model(tiny_llama_dir: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(tiny_llama_dir, dtype=torch.float32).eval()


def trained(stub: ProbeServiceStub, **fields: Any) -> pb.TrainedProbe:
    given = {"seed": SEED, "texts": source(GROUPS), **fields}
    responses = list(stub.TrainProbe(pb.TrainProbeRequest(**given)))
    assert all(response.HasField("progress") for response in responses[:-1])
    assert responses[-2].progress.done == responses[-2].progress.total
    result: pb.TrainedProbe = responses[-1].result
    return result


def stored(server: LiveServer, result: pb.TrainedProbe) -> Probe:
    return stored_probe(ArtifactStore(server.server.config.artifacts_url).get(result.artifact.id))


@torch.no_grad()
def states(
    server: LiveServer, model: PreTrainedModel, groups: dict[str, list[str]], site: Site, last: int = 0
) -> Doubles:
    """[texts, layers, width]: the mean of the ordinary tokens, of those among the last `last` where that is not 0."""
    rows = []
    for text in (text for texts in groups.values() for text in texts):
        seen: dict[int, torch.Tensor] = {}

        def visit(at: Site, layer: int, x: torch.Tensor, seen: dict[int, torch.Tensor] = seen) -> torch.Tensor:
            if at is site:
                seen[layer] = x.reshape(-1, x.shape[-1]).clone()
            return x

        hooks = attach(model, visit)
        model(torch.tensor([server.model.tokenizer.encode(text)]), use_cache=False)
        for hook in hooks:
            hook.remove()
        found = torch.stack([seen[layer] for layer in range(LAYERS)])
        usual = ordinary_tokens(found)
        usual[:, : -last if last else 0] = False
        rows.append(torch.stack([layer[own].mean(0) for layer, own in zip(found, usual, strict=True)]))
    return torch.stack(rows).double().numpy()


def parts(labels: NDArray[np.int64], fraction: float = 0.4) -> NDArray[np.int64]:
    out = held_out(labels, fraction, SEED)
    report = held_out(np.where(out, labels, -1), 0.5, SEED + 1)
    return np.where(report, REPORT, np.where(out, CALIBRATION, TRAINING))


def labels_of(groups: dict[str, list[str]]) -> NDArray[np.int64]:
    return np.repeat(np.arange(len(groups)), [len(texts) for texts in groups.values()])


def by_layer(found: Doubles) -> dict[int, Doubles]:
    return {layer: found[:, layer] for layer in range(LAYERS)}


@pytest.mark.parametrize("last", [0, 3])
@pytest.mark.parametrize("site", [Site.RESID_POST, Site.MLP_POST])
def test_a_probe_of_two_layers_is_that_of_scikit_learn_on_the_same_texts(
    server: LiveServer, stub: ProbeServiceStub, model: PreTrainedModel, site: Site, last: int
) -> None:
    scope = program_pb2.Scope(include=[program_pb2.TokenSelector(last_k=last)]) if last else None
    result = trained(
        stub,
        layers=[1, 0],
        site=f"SITE_{site.name}",
        pooling="TOKEN_POOLING_MEAN",
        penalty=3.0,
        target="key",
        scope=scope,
        tags=["probe-of-two"],
        replace_tags=True,
    )
    assert (list(result.layers), list(result.labels), result.artifact.tags) == ([0, 1], list(GROUPS), ["probe-of-two"])
    found, labels = states(server, model, GROUPS, site, last), labels_of(GROUPS)
    dealt, flat = parts(labels), found.reshape(len(found), -1)
    scaler = StandardScaler().fit(flat[dealt == TRAINING])
    wanted = LogisticRegression(C=1 / 3.0, tol=1e-8, max_iter=5000)
    wanted.fit(scaler.transform(flat[dealt == TRAINING]), labels[dealt == TRAINING])
    probe = stored(server, result)
    scores = probe.scores(by_layer(found))
    plain = Probe(probe.method, probe.site, probe.weights, probe.bias, probe.labels, probe.target)
    np.testing.assert_allclose(plain.probabilities(scores), wanted.predict_proba(scaler.transform(flat)), atol=5e-3)
    # The report is of the third part, by the probability that is served.
    own = probe.probabilities(scores)[dealt == REPORT]
    assert result.report.texts == (dealt == REPORT).sum()
    assert result.report.accuracy == pytest.approx(accuracy_score(labels[dealt == REPORT], own.argmax(1)))
    assert result.report.brier == pytest.approx(np.square(own[:, 1] - (labels[dealt == REPORT] == 1)).mean(), abs=1e-4)
    odds, calibrates = log_odds(scores, 1), dealt == CALIBRATION
    assert probe.calibration == pytest.approx(platt(odds[calibrates], labels[calibrates] == 1), rel=1e-2)
    assert result.artifact.evidence["report"]["brier"] == pytest.approx(result.report.brier)


def test_without_layers_the_one_that_reads_the_calibrating_texts_best_is_taken(
    server: LiveServer, stub: ProbeServiceStub, model: PreTrainedModel
) -> None:
    """Labels that say nothing of their texts: those that a probe was fitted to it reads better than others."""
    result = trained(stub, texts=source(MIXED), method="PROBE_METHOD_PROTOTYPE", pooling="TOKEN_POOLING_MEAN")
    found, labels = states(server, model, MIXED, Site.RESID_POST), labels_of(MIXED)
    dealt = parts(labels)
    for tried in result.by_layer:
        x = found[:, tried.layer]
        scaled = StandardScaler().fit(x[dealt == TRAINING]).transform(x)
        centres = np.stack([scaled[(dealt == TRAINING) & (labels == k)].mean(0) for k in range(3)])
        nearest = np.square(scaled[:, None] - centres).sum(2).argmin(1)
        own = dealt == CALIBRATION
        assert tried.score == pytest.approx((nearest[own] == labels[own]).mean())
    assert [tried.layer for tried in result.by_layer] == [0, 1]
    assert any(tried.score < 1.0 for tried in result.by_layer)
    [chosen] = result.layers
    assert result.by_layer[chosen].score == max(tried.score for tried in result.by_layer)


def test_selectivity_is_what_is_left_beyond_labels_that_were_dealt_anew(
    server: LiveServer, stub: ProbeServiceStub, model: PreTrainedModel
) -> None:
    fields = {"method": "PROBE_METHOD_PROTOTYPE", "pooling": "TOKEN_POOLING_MEAN", "layers": [1]}
    result = trained(stub, texts=source(GROUPS), **fields)
    found, labels = states(server, model, GROUPS, Site.RESID_POST)[:, 1], labels_of(GROUPS)
    dealt = parts(labels)
    training, report = dealt == TRAINING, dealt == REPORT
    x = StandardScaler().fit(found[training]).transform(found)

    def accuracy(learned: NDArray[np.int64], judged: NDArray[np.int64]) -> float:
        nearest = NearestCentroid().fit(x[training], learned).predict(x[report])
        return float((nearest == judged).mean())

    controls = []
    for draw in range(CONTROLS):
        generator = np.random.default_rng([SEED, draw])
        controls.append(accuracy(*(generator.permutation(labels[part]) for part in (training, report))))
    assert result.report.selectivity == pytest.approx(accuracy(labels[training], labels[report]) - np.mean(controls))
    assert result.report.selectivity > 0.0


def test_ridge_reads_the_numbers_that_the_labels_are(
    server: LiveServer, stub: ProbeServiceStub, model: PreTrainedModel
) -> None:
    result = trained(
        stub,
        texts=source(NUMBERS),
        method="PROBE_METHOD_RIDGE",
        layers=[1],
        penalty=2.0,
        pooling="TOKEN_POOLING_MEAN",
        holdout_fraction=0.5,
    )
    found, y = states(server, model, NUMBERS, Site.RESID_POST), labels_of(NUMBERS).astype(np.float64)
    dealt = parts(np.zeros(len(y), dtype=np.int64), 0.5)
    scaler = StandardScaler().fit(found[dealt == TRAINING, 1])
    wanted = Ridge(alpha=2.0).fit(scaler.transform(found[dealt == TRAINING, 1]), y[dealt == TRAINING])
    probe = stored(server, result)
    numbers = wanted.predict(scaler.transform(found[:, 1]))
    np.testing.assert_allclose(probe.scores(by_layer(found))[:, 0], numbers, atol=1e-3)
    assert result.report.r_squared == pytest.approx(r2_score(y[dealt == REPORT], numbers[dealt == REPORT]), abs=1e-3)
    assert (list(result.labels), probe.is_number) == ([], True)
    assert result.report.code_length_ratio == 0.0


def test_a_training_is_a_job_too(channel: grpc.Channel) -> None:
    request = pb.TrainProbeRequest(texts=source(GROUPS), layers=[0], method="PROBE_METHOD_PROTOTYPE")
    jobs = JobServiceStub(channel)
    job = jobs.StartJob(job_pb2.StartJobRequest(train_probe=request)).job
    *_, last = jobs.FollowJob(job_pb2.FollowJobRequest(id=job.id))
    assert list(last.train_probe.result.layers) == [0]


FEW = {"a": ["one", "two", "three"], "b": GROUPS["rain"]}


@pytest.mark.parametrize(
    ("fields", "path"),
    [
        ({"method": 9}, "method"),
        ({"site": 77}, "site"),
        ({"layers": [LAYERS]}, "layers[0]"),
        ({"layers": [0, 0]}, "layers[1]"),
        ({"holdout_fraction": 1.0}, "holdout_fraction"),
        ({"holdout_fraction": float("nan")}, "holdout_fraction"),
        ({"penalty": 0.0}, "penalty"),
        ({"penalty": 1.0, "method": "PROBE_METHOD_PROTOTYPE"}, "penalty"),
        ({"pooling": 7}, "pooling"),
        ({"target": "snow"}, "target"),
        ({"target": "rain", "method": "PROBE_METHOD_RIDGE"}, "target"),
        ({"method": "PROBE_METHOD_RIDGE"}, "texts"),
        ({"texts": neuron_pb2.TextSource()}, "texts.groups"),
        ({"texts": source({"a": GROUPS["rain"]})}, "texts"),
        ({"texts": source(FEW)}, "texts"),
        ({"texts": source(GROUPS, window_tokens=2)}, "texts.window_tokens"),
        ({"scope": {"include": [{"role": "user"}]}}, "scope.include[0].role"),
        ({"scope": {"include": [{"positions": {"start": 500}}]}}, "scope"),
        ({"tags": ["not a tag"]}, "tags[0]"),
    ],
)
def test_what_cannot_be_trained_is_refused_by_its_field(
    stub: ProbeServiceStub, fields: dict[str, Any], path: str
) -> None:
    request = pb.TrainProbeRequest(**{"texts": source(GROUPS), **fields})
    with pytest.raises(grpc.RpcError) as refused:
        list(stub.TrainProbe(request))
    found = failure(refused.value)
    assert (found.code, found.fields) == (grpc.StatusCode.INVALID_ARGUMENT, [path])


def test_a_call_that_is_cancelled_leaves_nothing_in_the_engine(server: LiveServer, stub: ProbeServiceStub) -> None:
    many = {label: texts * 40 for label, texts in GROUPS.items()}
    call = stub.TrainProbe(pb.TrainProbeRequest(texts=source(many)))
    next(call)
    call.cancel()
    until(lambda: server.server.engine.stats().running + server.server.engine.stats().waiting == 0, PATIENCE_SECONDS)
