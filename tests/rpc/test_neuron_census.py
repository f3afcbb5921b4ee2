"""CensusNeurons through a real channel, on a llama with planted neurons and against a naive pass of transformers."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
import torch
from live import LiveServer
from naive_census import NaiveCensus, naive_census
from planted_neurons import (
    ALWAYS,
    DEAD,
    PAIR,
    POSITIONAL,
    RARE,
    TOKEN,
    WINDOW,
    planted_texts,
    save_planted_neurons,
)
from secured import until
from statuses import failure
from transformers import AutoModelForCausalLM

from patchclamp.v1 import generation_pb2, job_pb2, program_pb2
from patchclamp.v1 import neuron_pb2 as pb
from patchclamp.v1.generation_pb2_grpc import GenerationServiceStub
from patchclamp.v1.job_pb2_grpc import JobServiceStub
from patchclamp.v1.neuron_pb2_grpc import NeuronServiceStub
from patchclamp_server.artifacts.corpora import CorpusBuilder
from patchclamp_server.artifacts.store import ArtifactStore
from patchclamp_server.artifacts.types import ArtifactKind
from patchclamp_server.model.load import load_model

BINS = 8
RARE_BELOW = 0.01
CODES = grpc.StatusCode
CLASSES = {
    "dead": pb.NEURON_CLASS_DEAD,
    "rare": pb.NEURON_CLASS_RARE,
    "always": pb.NEURON_CLASS_ALWAYS,
    "token": pb.NEURON_CLASS_TOKEN,
    "ngram": pb.NEURON_CLASS_NGRAM,
    "positional": pb.NEURON_CLASS_POSITIONAL,
}


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("planted_neurons")
    save_planted_neurons(directory)
    return directory


@pytest.fixture(scope="module")
def server(planted: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    with LiveServer(load_model(str(planted)), tmp_path_factory.mktemp("artifacts")) as server:
        store_corpus(ArtifactStore(server.server.config.artifacts_url), planted_texts(), "texts")
        yield server


@pytest.fixture(scope="module")
def channel(server: LiveServer) -> Iterator[grpc.Channel]:
    with grpc.insecure_channel(server.address) as channel:
        yield channel


@pytest.fixture(scope="module")
def stub(channel: grpc.Channel) -> NeuronServiceStub:
    return NeuronServiceStub(channel)


def store_corpus(store: ArtifactStore, texts: list[str], tag: str) -> None:
    builder = CorpusBuilder()
    for text in texts:
        builder.add(text)
    store.put(ArtifactKind.CORPUS, builder.tensors(), model_fingerprint="", tags=[tag])


def listed(texts: list[str]) -> pb.TextSource:
    prompts = [generation_pb2.Prompt(text=text) for text in texts]
    return pb.TextSource(groups=[pb.LabelledTexts(label="all", prompts=prompts)], window_tokens=WINDOW)


def request(**fields: Any) -> pb.CensusNeuronsRequest:
    given = {"texts": listed(planted_texts()), "rare_below": RARE_BELOW, "position_bins": BINS, **fields}
    return pb.CensusNeuronsRequest(**given)


def run(stub: NeuronServiceStub, **fields: Any) -> pb.NeuronCensus:
    *progress, last = list(stub.CensusNeurons(request(**fields)))
    assert progress[-1].progress.done == progress[-1].progress.total == last.result.tokens
    return last.result


@pytest.fixture(scope="module")
def census(stub: NeuronServiceStub) -> pb.NeuronCensus:
    return run(stub, tags=["seen"], description="of planted texts")


@pytest.fixture(scope="module")
def naive(server: LiveServer, planted: Path) -> NaiveCensus:
    model = AutoModelForCausalLM.from_pretrained(planted, dtype=torch.float32).eval()
    windows = [server.model.tokenizer.encode(text) for text in planted_texts()]
    return naive_census(model, windows, bins=BINS, window_tokens=WINDOW, rare_below=RARE_BELOW)


def members(census: pb.NeuronCensus, of: str) -> dict[tuple[int, int], float]:
    for each in census.classes:
        if each.neuron_class == CLASSES[of]:
            return {(s.neuron.layer, s.neuron.neuron): s.score for s in each.stored.best}
    return {}


@pytest.mark.parametrize(
    ("of", "neuron"),
    [
        ("dead", DEAD),
        ("rare", RARE),
        ("always", ALWAYS),
        ("token", TOKEN),
        ("ngram", PAIR),
        ("positional", POSITIONAL),
    ],
)
def test_a_planted_neuron_is_of_its_class(census: pb.NeuronCensus, of: str, neuron: int) -> None:
    assert (0, neuron) in members(census, of)


@pytest.mark.parametrize("of", CLASSES)
def test_classes_and_scores_are_those_of_a_naive_pass(census: pb.NeuronCensus, naive: NaiveCensus, of: str) -> None:
    assert members(census, of) == pytest.approx(getattr(naive, of), rel=1e-6)


def test_tokens_and_layers_are_those_of_a_naive_pass(census: pb.NeuronCensus, naive: NaiveCensus) -> None:
    assert (census.tokens, census.texts, census.resumed_tokens) == (naive.tokens, len(planted_texts()), 0)
    assert census.tokens_per_second > 0
    for row in census.layers:
        assert row.neurons == 64
        counts = (row.dead, row.rare, row.always, row.token_detectors, row.ngram_detectors, row.positional)
        assert counts == tuple(sum(n[0] == row.layer for n in getattr(naive, of)) for of in CLASSES)
        assert row.mean_rate == pytest.approx(naive.mean_rates[row.layer])


def test_detectors_name_their_tokens_with_counts_and_text(
    server: LiveServer, census: pb.NeuronCensus, naive: NaiveCensus
) -> None:
    named = {(d.neuron.layer, d.neuron.neuron): d for d in census.detectors}
    assert {neuron: tuple(d.token_ids) for neuron, d in named.items()} == naive.keys
    pair, token = named[0, PAIR], named[0, TOKEN]
    texts = planted_texts()
    assert (pair.text, pair.occurrences, pair.fired) == ("ab", sum("ab" in text for text in texts), pair.occurrences)
    assert (token.text, token.occurrences, token.recall, token.elsewhere) == ("q", 40, 1.0, 0.0)


def test_a_positional_neuron_comes_with_its_rate_in_every_bin(census: pb.NeuronCensus) -> None:
    [found] = [p for p in census.positional if (p.neuron.layer, p.neuron.neuron) == (0, POSITIONAL)]
    # It fires at the first eight positions, two bins of four.
    assert list(found.rates) == [1.0, 1.0, *[0.0] * (BINS - 2)]
    assert found.bits == pytest.approx(members(census, "positional")[0, POSITIONAL])


def test_sets_are_stored_with_tags_and_evidence_beside_random_sets(census: pb.NeuronCensus) -> None:
    for each in census.classes:
        [of] = [name for name, number in CLASSES.items() if number == each.neuron_class]
        artifact = each.stored.artifact
        assert list(artifact.tags) == [f"seen-{of}"]
        assert artifact.description == "of planted texts"
        evidence = dict(artifact.evidence)
        assert (evidence["tokens"], evidence["neurons"]) == (census.tokens, each.stored.neurons)
        if of in ("always", "token", "ngram", "positional"):
            assert evidence["mean_score"] > evidence["mean_score_of_random_sets"]
    evidence = {each.neuron_class: each.stored.artifact.evidence for each in census.classes}
    assert evidence[pb.NEURON_CLASS_TOKEN]["random_firing"]["detectors_at_most"] < 1e-6
    assert evidence[pb.NEURON_CLASS_POSITIONAL]["random_firing"]["neurons"] == 0
    assert evidence[pb.NEURON_CLASS_DEAD]["rate_below_at_95_percent"] == pytest.approx(3 / census.tokens)


def test_a_stored_corpus_gives_what_its_texts_give(stub: NeuronServiceStub, census: pb.NeuronCensus) -> None:
    found = run(stub, texts=pb.TextSource(corpus="texts", window_tokens=WINDOW))
    assert found.layers == census.layers
    assert found.detectors == census.detectors


def test_a_set_of_the_census_is_an_edit_in_the_next_call(channel: grpc.Channel, census: pb.NeuronCensus) -> None:
    edit = program_pb2.Edit(
        site=program_pb2.SITE_MLP_POST,
        neurons=program_pb2.NeuronEdit(neuron_set="seen-always", scale=program_pb2.NeuronValues(values=[0.0])),
    )
    program = program_pb2.Program(edits=[edit])
    stop = generation_pb2.StopConditions(max_tokens=2, ignore_eos=True)
    asked = generation_pb2.GenerateRequest(prompt=generation_pb2.Prompt(text="cab"), program=program, stop=stop)
    responses = list(GenerationServiceStub(channel).Generate(asked))
    assert sum(len(response.tokens) for response in responses) == 2


def test_sizes_above_a_threshold_are_counted_with_magnitude(stub: NeuronServiceStub, census: pb.NeuronCensus) -> None:
    found = run(stub, magnitude=True)
    # A gate that is always far below 0 has a size.
    assert (0, DEAD) in members(census, "dead")
    assert (0, DEAD) in members(found, "always")


def test_the_run_ends_with_the_first_window_that_reaches_the_tokens_asked_for(stub: NeuronServiceStub) -> None:
    texts = listed(planted_texts())
    texts.max_tokens = 300
    assert 300 <= run(stub, texts=texts).tokens < 300 + WINDOW


def test_tokens_alone_are_counted_without_pairs(stub: NeuronServiceStub, census: pb.NeuronCensus) -> None:
    found = run(stub, ngram=1)
    assert not members(found, "ngram")
    assert members(found, "token") == members(census, "token")


REFUSED = [
    ({"texts": pb.TextSource()}, "texts.groups"),
    ({"texts": pb.TextSource(corpus="none such")}, "texts.corpus"),
    ({"texts": pb.TextSource(corpus="texts", window_tokens=7)}, "texts.window_tokens"),
    ({"layers": [2]}, "layers[0]"),
    ({"layers": [0, 0]}, "layers[1]"),
    ({"site": program_pb2.SITE_RESID_POST}, "site"),
    ({"site": 99}, "site"),
    ({"threshold": float("nan")}, "threshold"),
    ({"threshold": -1.0, "magnitude": True}, "threshold"),
    ({"rare_below": 1.5}, "rare_below"),
    ({"always_from": -0.1}, "always_from"),
    ({"detector_recall": 0.4}, "detector_recall"),
    ({"detector_elsewhere": 2.0}, "detector_elsewhere"),
    ({"ngram": 3}, "ngram"),
    ({"position_bins": 1}, "position_bins"),
    ({"position_bins": 129}, "position_bins"),
    ({"positional_from": 1.5}, "positional_from"),
    ({"min_occurrences": 2**32 - 1}, "min_occurrences"),
    ({"checkpoint_tokens": 1}, "checkpoint_tokens"),
    ({"tags": ["fine", "not fine"]}, "tags[1]"),
    ({"tags": ["x" * 125]}, "tags[0]"),
]


@pytest.mark.parametrize(("fields", "path"), REFUSED, ids=[f"{path}-{i}" for i, (_, path) in enumerate(REFUSED)])
def test_a_request_that_is_wrong_is_refused_with_its_field(
    stub: NeuronServiceStub, fields: dict[str, Any], path: str
) -> None:
    with pytest.raises(grpc.RpcError) as caught:
        list(stub.CensusNeurons(request(**fields)))
    refused = failure(caught.value)
    assert refused.code in (CODES.INVALID_ARGUMENT, CODES.NOT_FOUND)
    assert refused.fields == [path]


def test_a_taken_tag_of_a_class_is_refused_before_anything_is_counted(
    server: LiveServer, stub: NeuronServiceStub, census: pb.NeuronCensus
) -> None:
    before = server.server.engine.stats()
    with pytest.raises(grpc.RpcError) as caught:
        list(stub.CensusNeurons(request(tags=["free", "seen"], layers=[1])))
    assert failure(caught.value).code is CODES.ALREADY_EXISTS
    assert "'seen-dead'" in caught.value.details()
    assert server.server.engine.stats() == before


def test_a_tag_of_a_class_that_has_no_neuron_any_more_is_told(stub: NeuronServiceStub) -> None:
    run(stub, tags=["moved"])
    found = run(stub, tags=["moved"], replace_tags=True, min_occurrences=10_000)
    assert [warning for warning in found.warnings if "'moved-token'" in warning]
    assert not members(found, "token")


def idle(server: LiveServer) -> bool:
    stats = server.server.engine.stats()
    return not stats.running and not stats.waiting and not stats.program_rows


def checkpoints_of(server: LiveServer) -> list[str]:
    return ArtifactStore(server.server.config.artifacts_url).checkpoints().keys()


def test_a_call_that_is_cancelled_leaves_nothing_in_the_engine_and_its_successor_goes_on_from_its_checkpoint(
    server: LiveServer, stub: NeuronServiceStub, channel: grpc.Channel
) -> None:
    texts = {"texts": listed(planted_texts(600)), "checkpoint_tokens": 2000, "layers": [0]}
    call = stub.CensusNeurons(request(**texts))
    next(call)
    until(lambda: checkpoints_of(server))
    # Others are served beside it.
    stop = generation_pb2.StopConditions(max_tokens=1, ignore_eos=True)
    asked = generation_pb2.GenerateRequest(prompt=generation_pb2.Prompt(text="cab"), stop=stop)
    assert list(GenerationServiceStub(channel).Generate(asked))
    call.cancel()
    until(lambda: idle(server))
    again, anew = run(stub, **texts), run(stub, **texts, restart=True)
    assert (again.resumed_tokens > 0, anew.resumed_tokens, again.warnings) == (True, 0, [])
    assert again.tokens == anew.tokens
    for field in ("layers", "classes", "detectors", "positional"):
        assert getattr(again, field) == getattr(anew, field), field
    assert not checkpoints_of(server)


def test_a_restart_forgets_the_checkpoint(server: LiveServer, stub: NeuronServiceStub) -> None:
    texts = {"texts": listed(planted_texts(601)), "checkpoint_tokens": 2000, "layers": [0]}
    call = stub.CensusNeurons(request(**texts))
    until(lambda: checkpoints_of(server))
    call.cancel()
    until(lambda: idle(server))
    assert run(stub, **texts, restart=True).resumed_tokens == 0


def test_a_damaged_checkpoint_is_told_and_not_used(server: LiveServer, stub: NeuronServiceStub) -> None:
    texts = {"texts": listed(planted_texts(602)), "checkpoint_tokens": 2000, "layers": [0]}
    call = stub.CensusNeurons(request(**texts))
    until(lambda: checkpoints_of(server))
    call.cancel()
    until(lambda: idle(server))
    [key] = checkpoints_of(server)
    path = Path(server.server.config.artifacts_url) / "checkpoints" / key
    path.write_bytes(path.read_bytes()[:-1] + b"?")
    found = run(stub, **texts)
    assert found.resumed_tokens == 0
    [warning] = found.warnings
    assert "checkpoint is damaged" in warning


def test_a_census_is_a_job_that_goes_on_without_its_client(channel: grpc.Channel, census: pb.NeuronCensus) -> None:
    jobs = JobServiceStub(channel)
    job = jobs.StartJob(job_pb2.StartJobRequest(census_neurons=request())).job
    responses = [each.census_neurons for each in jobs.FollowJob(job_pb2.FollowJobRequest(id=job.id))]
    assert responses[-1].result.layers == census.layers
    ended = jobs.GetJob(job_pb2.GetJobRequest(id=job.id)).job
    assert (ended.state, ended.stage, ended.done) == (job_pb2.JOB_STATE_SUCCEEDED, "tokens", census.tokens)


def serving(model: Path, store: Path) -> "subprocess.Popen[str]":
    command = [sys.executable, "-m", "patchclamp_server.cli", "--model", str(model)]
    addresses = ["--address", "127.0.0.1:0", "--metrics-address", "127.0.0.1:0", "--artifacts-url", str(store)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    return subprocess.Popen([*command, *addresses], stdout=subprocess.PIPE, text=True, env=environment)


def address_of(process: "subprocess.Popen[str]") -> str:
    assert process.stdout is not None
    line = process.stdout.readline()
    assert line.startswith("serving on "), line
    return line.split()[2].rstrip(",")


def test_a_server_that_is_killed_loses_one_checkpoint_at_most(planted: Path, tmp_path: Path) -> None:
    store, every = ArtifactStore(tmp_path), 500
    store_corpus(store, planted_texts(800), "long")
    asked = request(texts=pb.TextSource(corpus="long", window_tokens=WINDOW), checkpoint_tokens=every)
    process = serving(planted, tmp_path)
    try:
        with grpc.insecure_channel(address_of(process)) as channel:
            done = 0
            for response in NeuronServiceStub(channel).CensusNeurons(asked):
                done = response.progress.done
                if done > every and store.checkpoints().keys():
                    break
            process.send_signal(signal.SIGKILL)
            process.wait()
    finally:
        process.kill()
        process.wait()
    process = serving(planted, tmp_path)
    try:
        with grpc.insecure_channel(address_of(process)) as channel:
            found = run(NeuronServiceStub(channel), **{name.name: value for name, value in asked.ListFields()})
    finally:
        process.kill()
        process.wait()
    # What is in flight when a checkpoint is due, a window at the most behind it, is in it.
    assert found.resumed_tokens > 0
    assert found.resumed_tokens > done - every - WINDOW
