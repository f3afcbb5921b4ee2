"""What the counts of a census say of neurons: classes, mutual information, controls; and runs that are interrupted."""

import math
from contextlib import aclosing
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from corpus_runs import WINDOW, corpus, word_encoder
from engine_runs import loaded, started
from scipy.stats import binom
from torch import Tensor

from patchclamp.v1 import generation_pb2
from patchclamp.v1 import neuron_pb2 as pb
from patchclamp_server.analysis.neurons import census as census_module
from patchclamp_server.analysis.neurons.census import Census, CensusProgress, CensusResult, census
from patchclamp_server.analysis.neurons.census_classes import Rules, position_bits
from patchclamp_server.analysis.neurons.census_controls import random_detectors, random_positions
from patchclamp_server.analysis.neurons.texts import TextSource
from patchclamp_server.artifacts.store import ArtifactStore
from patchclamp_server.engine.engine import Engine
from patchclamp_server.errors import InvalidArgument
from patchclamp_server.model.sites import Site
from patchclamp_server.rpc.codecs.neurons.census import decode_census

LENGTHS = (3, 20, 7, 1, 30, 15, 9, 40, 40, 40)


def job(*lengths: int) -> Census:
    rules = Rules(rare_below=0.2, min_occurrences=2, positional_from=0.01)
    texts = TextSource(corpus(*(lengths or LENGTHS)), WINDOW)
    return Census(texts, (0, 2), Site.MLP_GATE, 0.0, False, 2, 4, rules, 30)


async def events(
    engine: Engine, store: ArtifactStore, job: Census, until: int | None = None
) -> list[CensusProgress | CensusResult]:
    """`until`: leaves once so many tokens are done."""
    found: list[CensusProgress | CensusResult] = []
    async with aclosing(census(engine, store, loaded("llama").info, word_encoder(), job)) as each:
        async for event in each:
            found.append(event)
            if until is not None and isinstance(event, CensusProgress) and event.done >= until:
                break
    return found


async def test_a_resumed_census_is_one_that_was_not_interrupted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(census_module, "SECONDS_PER_EVENT", 0.0)
    store, other = ArtifactStore(tmp_path / "a"), ArtifactStore(tmp_path / "b")
    with started(loaded("llama")) as engine:
        await events(engine, store, job(), until=100)
        [key] = store.checkpoints().keys()
        first, *_, resumed = await events(engine, store, job())
        *_, whole = await events(engine, other, job())
    assert isinstance(first, CensusProgress)
    assert isinstance(resumed, CensusResult)
    assert isinstance(whole, CensusResult)
    assert first.done == first.resumed == resumed.resumed_tokens > 0
    assert (resumed.tokens, resumed.classes.layers) == (whole.tokens, whole.classes.layers)
    assert (resumed.classes.detectors, resumed.classes.positional) == (
        whole.classes.detectors,
        whole.classes.positional,
    )
    # Sets are named by all that they hold: neurons, scores and evidence are the same, bit for bit.
    ids = [{each: stored.artifact.id for each, stored in found.stored.items()} for found in (resumed, whole)]
    assert ids[0] == ids[1]
    assert ids[0]
    assert key not in set(store.checkpoints().keys())


async def test_other_rules_go_on_from_the_same_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(census_module, "SECONDS_PER_EVENT", 0.0)
    store = ArtifactStore(tmp_path)
    with started(loaded("llama")) as engine:
        await events(engine, store, job(), until=100)
        *_, found = await events(engine, store, replace(job(), rules=Rules(), description="others"))
    assert isinstance(found, CensusResult)
    assert found.resumed_tokens > 0


async def test_progress_comes_a_few_times_a_second_however_many_windows_there_are(tmp_path: Path) -> None:
    with started(loaded("llama")) as engine:
        found = await events(engine, ArtifactStore(tmp_path), job(*[WINDOW] * 40))
    assert isinstance(found[-1], CensusResult)
    seconds = found[-1].tokens / found[-1].tokens_per_second
    assert len(found) <= 3 + seconds / census_module.SECONDS_PER_EVENT
    totals = [event.total for event in found if isinstance(event, CensusProgress)]
    assert totals[-1] == found[-1].tokens


async def test_texts_without_a_token_are_refused(tmp_path: Path) -> None:
    empty = replace(job(), texts=TextSource(corpus(), WINDOW))
    with started(loaded("llama")) as engine, pytest.raises(InvalidArgument) as caught:
        await events(engine, ArtifactStore(tmp_path), empty)
    assert caught.value.field == "texts"


@pytest.mark.parametrize(("family", "site"), [("llama", Site.MLP_GATE), ("gpt2", Site.MLP_POST)])
def test_neurons_are_read_at_their_gates_where_they_have_one(family: str, site: Site, tmp_path: Path) -> None:
    text = pb.LabelledTexts(label="l", prompts=[generation_pb2.Prompt(text="w1 w2")])
    request = pb.CensusNeuronsRequest(texts=pb.TextSource(groups=[text]))
    found = decode_census(request, word_encoder(), ArtifactStore(tmp_path), loaded(family).info)
    assert found.site is site


def table(bins: int, width: int, seed: int) -> tuple[Tensor, Tensor]:
    rng = np.random.default_rng(seed)
    rows = rng.integers(0, 50, bins)
    rows[1] = 0
    counts = rng.binomial(rows[:, None], rng.random((bins, width)) * rng.integers(0, 2, width))
    return torch.from_numpy(rows), torch.from_numpy(counts)


def test_bits_are_the_mutual_information_of_the_table_less_its_bias() -> None:
    rows, counts = table(6, 20, 0)
    n = int(rows.sum())
    for unit, bits in enumerate(position_bits(rows, counts).tolist()):
        joint = np.stack((counts[:, unit].numpy(), (rows - counts[:, unit]).numpy()))

        def entropy(cells: np.ndarray) -> float:
            cells = cells[cells > 0]
            return float(-(cells / n * np.log2(cells / n)).sum() + (len(cells) - 1) / (2 * n * math.log(2)))

        expected = entropy(joint.sum(0)) + entropy(joint.sum(1)) - entropy(joint.ravel())
        assert bits == pytest.approx(max(0.0, expected), abs=1e-12)


def test_a_neuron_that_fires_in_one_half_alone_has_one_bit_and_one_that_always_fires_has_none() -> None:
    rows = torch.tensor([10_000, 10_000])
    bits = position_bits(rows, torch.tensor([[10_000, 10_000, 0], [0, 10_000, 0]]))
    assert bits.tolist() == pytest.approx([1.0, 0.0, 0.0], abs=1e-4)


def test_neurons_that_fire_at_random_positions_have_no_bits_but_for_chance() -> None:
    rows, rates = torch.full((32,), 1000), torch.linspace(0, 1, 500, dtype=torch.float64)
    neurons, total, most = random_positions(rows, rates, 3, Rules())
    assert neurons == 0
    assert total / 500 < 1e-3
    assert most < Rules().positional_from
    assert (neurons, total, most) == random_positions(rows, rates, 3, Rules())


@pytest.mark.parametrize("rate", [0.01, 0.5, 0.9])
def test_detectors_among_neurons_that_fire_at_random_are_bounded_by_chernoff(rate: float) -> None:
    rules, total, occurrences = Rules(min_occurrences=3), 2000, np.array([2, 5, 5, 40, 900, 1900])
    fired = round(rate * total)
    bound = random_detectors(np.array([fired, 0, fired]), total, occurrences, rules)
    exact = 0.0
    for o in occurrences[1:]:
        least = math.ceil(max(rules.recall * o, (1 - rules.elsewhere) * fired) - 1e-9)
        exact += 2 * float(binom.sf(least - 1, o, rate))
    assert exact <= bound + 1e-12
    assert bound <= 2 * 5
