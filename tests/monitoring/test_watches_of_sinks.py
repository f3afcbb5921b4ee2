"""Watches of a model with attention sinks, in its engine and on servers: "." is one in every text."""

import random
import threading
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pytest
import sink_models
import torch
from live import LiveServer
from numpy.typing import NDArray
from sink_models import id_of
from torch import Tensor
from transformers import AutoModelForCausalLM
from watch_runs import BOTH

from patchclamp import Client
from patchclamp.monitoring import watch_direction, watch_neurons
from patchclamp.results.monitoring import WatchStatistics
from patchclamp_server.engine.config import EngineConfig
from patchclamp_server.engine.engine import Engine
from patchclamp_server.engine.request import Finished, Request, StopParams
from patchclamp_server.interventions.program import Vector
from patchclamp_server.model.load import LoadedModel, load_model
from patchclamp_server.model.sites import Site
from patchclamp_server.monitoring.bind import bind_watch
from patchclamp_server.monitoring.items import WatchedDirection, WatchItem
from patchclamp_server.monitoring.registry import WatchRegistry
from patchclamp_server.monitoring.watch import WatchOptions

AXIS = torch.eye(32)[5]


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("sink")
    sink_models.save_sink_model(directory)
    return directory


@pytest.fixture(scope="module")
def model(directory: Path) -> LoadedModel:
    return load_model(str(directory))


def texts(n: int, dots: int, seed: int = 0) -> list[str]:
    """Each of 30 letters after the first, `dots` of them sinks, of which one follows the first."""
    dice = random.Random(seed)
    found = []
    for _ in range(n):
        letters = [dice.choice("abcdefgh") for _ in range(31)]
        for place in [1, *dice.sample(range(2, 31), dots - 1)][:dots]:
            letters[place] = "."
        found.append("".join(letters))
    return found


def expected(directory: Path, written: list[str]) -> NDArray[np.float64]:
    """Of every token but the first ones and sinks, the value at resid_post of layer 0, as plain transformers has it."""
    plain = AutoModelForCausalLM.from_pretrained(directory)
    found: list[Tensor] = []
    for text in written:
        with torch.no_grad():
            states = plain(torch.tensor([[id_of(letter) for letter in text]]), output_hidden_states=True).hidden_states
        found += [state for letter, state in zip(text[1:], states[1][0, 1:], strict=True) if letter != "."]
    return (torch.stack(found).double() @ AXIS.double()).numpy()


def run(engine: Engine, written: list[str]) -> None:
    waiting = []
    for text in written:
        done = threading.Event()

        def on_event(event: object, done: threading.Event = done) -> None:
            if isinstance(event, Finished):
                done.set()

        stop = StopParams(max_tokens=1, ignore_eos=True)
        engine.submit(Request(tuple(map(id_of, text)), on_event, stop=stop))
        waiting.append(done)
    for done in waiting:
        assert done.wait(30)


@pytest.mark.parametrize("executor", ["operators", "kernels", "by torch operators"])
def test_a_direction_is_watched_beside_sinks(directory: Path, model: LoadedModel, executor: str) -> None:
    """By loops, and by torch operators as on CUDA; in prompts of one chunk and of several."""
    kernels = executor != "operators"
    engine = Engine(model, EngineConfig(kernels=kernels, decode_graphs=kernels, max_tokens_per_step=48))
    if executor == "by torch operators":
        engine.monitor = engine.runner.monitor = WatchRegistry(
            model.decoder.spec, torch.device("cpu"), max_watches=1, max_items=100, compiled=False
        )
    engine.start()
    item = WatchItem("d", WatchedDirection(Vector(values=AXIS), Site.RESID_POST, (0,)))
    options = WatchOptions("w", phases=BOTH, calibration_tokens=70)
    engine.monitor.start("sha256:w", bind_watch([item], model.info, None, max_items=1), options)
    written = texts(6, 3)
    run(engine, written)
    found = engine.monitor.statistics("w")
    engine.shutdown()
    values = expected(directory, written)
    assert found.mean[0] == pytest.approx(values.mean(), abs=1e-4)
    assert found.deviation[0] == pytest.approx(values.std(), rel=1e-4)
    assert found.sums.max[0] == pytest.approx(values.max(), rel=1e-4)
    assert (found.tokens.tolist(), found.sums.left_out.tolist()) == ([6 * 27], [6 * 3])


def watched(client: Client, written: list[str]) -> WatchStatistics:
    for text in written:
        client.generate(text, max_tokens=1, ignore_eos=True).result()
    return client.watch_statistics("w")


@pytest.fixture
def servers(model: LoadedModel, tmp_path: Path) -> Iterator[list[tuple[LiveServer, Client]]]:
    """Two of one store, of which the second looks there when it is asked for a listing."""
    with ExitStack() as stack:
        running = []
        for _ in range(2):
            server = stack.enter_context(LiveServer(model, tmp_path, watch_poll_seconds=3600.0))
            running.append((server, stack.enter_context(Client(server.address))))
        yield running


def test_replicas_and_restarted_servers_leave_out_by_the_stored_reference(
    directory: Path, model: LoadedModel, servers: list[tuple[LiveServer, Client]], tmp_path: Path
) -> None:
    """What they see first are three sinks, of which they could not tell otherwise what they are."""
    (_, one), (server, other) = servers
    one.create_watch([watch_direction("d", AXIS.tolist(), layers=0), watch_neurons("n", 1, [3])], tags=["w"])
    one.start_watch("w", phases=["prompt", "generated"], window_tokens=90, calibration_tokens=20)
    with one.record_reference("w", tokens=300, use=True) as recording:
        next(recording)
        watched(one, texts(10, 3, seed=1))
        reference = recording.result()
    assert [running.reference for running in other.list_watches().watches] == [reference.id]
    first = "a...bc"
    found = watched(other, [first])
    values = expected(directory, [first])
    assert found.items[0].mean == pytest.approx(values.mean(), abs=1e-4)
    assert [(item.tokens, item.tokens_left_out) for item in found.items] == [(2, 3), (5, 0)]
    assert {kind.kind: kind.values_left_out for kind in found.kinds} == {"neuron": 0, "direction": 3}
    assert server.metric('patchclamp_watch_left_out_total{kind="direction",watch="w"}') == 3
    found = watched(other, texts(4, 15, seed=2))
    assert found.items[0].drift_excess is not None
    assert found.items[0].drift_excess < 0.1
    with LiveServer(model, tmp_path, watch_poll_seconds=3600.0) as restarted, Client(restarted.address) as client:
        assert [running.reference for running in client.list_watches().watches] == [reference.id]
        found = watched(client, [first])
        assert found.items[0].mean == pytest.approx(values.mean(), abs=1e-4)
        assert found.items[0].tokens_left_out == 3
