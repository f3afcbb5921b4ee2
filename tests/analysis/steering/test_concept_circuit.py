"""The circuit of a concept against direct computations: weights of the contrast, directions, writes, zeroing."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from concept_circuit_oracle import NaiveCircuit
from engine_runs import loaded, started
from tiny_models import FAMILIES, VOCAB, tiny_model

from patchclamp_server.analysis.progress import Progress
from patchclamp_server.analysis.steering.concept_circuit.job import find_concept_circuit
from patchclamp_server.analysis.steering.concept_circuit.scenarios import Scenarios, ScenarioText
from patchclamp_server.analysis.steering.concept_circuit.search import ConceptCircuitSearch, Split
from patchclamp_server.analysis.steering.concept_circuit.sets import random_heads, unmatched_heads
from patchclamp_server.analysis.steering.concept_circuit.storing import FoundConceptCircuit
from patchclamp_server.analysis.steering.concept_circuit.writes import Writers
from patchclamp_server.artifacts.head_sets import Head, load_head_set
from patchclamp_server.artifacts.store import ArtifactStore
from patchclamp_server.errors import InvalidArgument
from patchclamp_server.interventions.pooling import Pooling
from patchclamp_server.model.sites import Site

# How many texts of each value a scenario has.
TEXTS = (2, 1, 3)


def scenarios(n: int = 4) -> Scenarios:
    generator = np.random.default_rng(7)
    texts = []
    for s in range(n):
        for value, count in enumerate(TEXTS):
            for _ in range(count):
                ids = tuple(generator.integers(5, VOCAB, int(generator.integers(4, 9))).tolist())
                texts.append(ScenarioText(ids, s, value))
    return Scenarios(tuple(texts), ("joy", "fear", "calm"), 0)


def search(**fields: object) -> ConceptCircuitSearch:
    given = ConceptCircuitSearch(
        scenarios(), Site.RESID_POST, (1,), Pooling.MEAN, neurons=9, heads=3, random_sets=2, tag_names=("joy",)
    )
    return replace(given, **fields)  # type: ignore[arg-type]


async def found(family: str, job: ConceptCircuitSearch, store: ArtifactStore) -> FoundConceptCircuit:
    model = loaded(family)
    with started(model) as engine:
        *_, last = [event async for event in find_concept_circuit(engine, store, model.info, job)]
    assert isinstance(last, FoundConceptCircuit)
    return last


def test_a_contrast_is_the_target_less_the_mean_of_all_values_of_its_scenario() -> None:
    texts = scenarios()
    x = torch.randn(len(texts.texts), dtype=torch.float64)
    expected = []
    for s in (1, 3):
        means = [
            torch.stack([x[i] for i, t in enumerate(texts.texts) if (t.scenario, t.value) == (s, v)]).mean()
            for v in range(3)
        ]
        expected.append(means[0] - sum(means) / 3)
    assert float(texts.contrast([1, 3]) @ x) == pytest.approx(float(sum(expected)) / 2)
    assert float(texts.contrast([1, 3]).sum()) == pytest.approx(0)
    assert {texts.texts[i].scenario for i in texts.contrast([1, 3]).nonzero()[:, 0].tolist()} == {1, 3}


def test_pairs_are_of_one_scenario_and_have_every_other_text_once() -> None:
    texts = scenarios()
    positive, negative = texts.pairs([0, 2])
    assert [texts.texts[i].value for i in positive] == [0] * 8
    assert sorted(negative) == [i for i, t in enumerate(texts.texts) if t.scenario in (0, 2) and t.value]
    for a, b in zip(positive, negative, strict=True):
        assert texts.texts[a].scenario == texts.texts[b].scenario


@pytest.mark.parametrize("family", FAMILIES)
async def test_all_that_is_found_equals_a_naive_computation(family: str, tmp_path: Path) -> None:
    store, job = ArtifactStore(tmp_path), search()
    result = await found(family, job, store)
    split = Split.of(job)
    naive = NaiveCircuit(tiny_model(family), job.scenarios, Site.RESID_POST, 1)
    direction = store.get("joy-vector").direction(1).double()
    torch.testing.assert_close(direction, naive.direction(split.training), rtol=1e-3, atol=1e-5)
    unit = direction / direction.norm()

    n_heads, d_ff = loaded(family).info.n_heads, loaded(family).info.d_ff
    places = [(layer, head) for layer in (0, 1) for head in range(n_heads)]
    heads = {place: naive.head(split.training, *place, unit) for place in places}
    stored = load_head_set("joy-heads", store, "heads")
    for (layer, head), expected in heads.items():
        assert float(stored.scores[layer, head]) == pytest.approx(expected, rel=1e-3, abs=1e-5)
    assert not stored.scores[2].any()
    best = sorted((place for place in places if heads[place] > 0), key=lambda place: -heads[place])[:3]
    assert [tuple(head) for head, _ in result.heads] == best
    assert [tuple(head) for head in stored.best(0)] == best

    neurons = {
        (layer, neuron): naive.neuron(split.training, layer, neuron, unit) for layer in (0, 1) for neuron in range(d_ff)
    }
    own = result.neurons.found
    assert own.scores is not None
    ranked = sorted(neurons, key=lambda place: -neurons[place])[:9]
    assert set(map(tuple, own.neurons)) == set(ranked)
    for neuron, score in zip(own.neurons, own.scores.tolist(), strict=True):
        assert score == pytest.approx(neurons[tuple(neuron)], rel=1e-3, abs=1e-5)

    # Nothing is left over: parts and embedding are all of the contrast.
    parts = sum(neurons.values()) + sum(heads.values()) + naive.embedding(split.training, unit)
    assert parts == pytest.approx(float(direction.norm()), rel=1e-4)
    card = result.neurons.artifact.evidence
    assert card["written_by_all"] == pytest.approx(sum(neurons.values()), rel=1e-3, abs=1e-4)
    assert card["contrast"] == pytest.approx(float(direction.norm()), rel=1e-6)

    zeroed = {"neurons": (ranked, []), "heads": ([], best), "both": (ranked, best)}
    plain = naive.zeroed(split.heldout, unit)
    assert (result.unzeroed.projection, result.unzeroed.separation) == pytest.approx(plain, rel=1e-3, abs=1e-4)
    for part, sets in zeroed.items():
        expected_pair = naive.zeroed(split.heldout, unit, *sets)
        told = result.zeroed[part]
        assert (told.projection, told.separation) == pytest.approx(expected_pair, rel=1e-3, abs=1e-4)
        assert len(told.random_projections) == len(told.random_separations) == 2


@pytest.mark.parametrize(("site", "neuron_layers"), [(Site.RESID_PRE, (0,)), (Site.RESID_MID, (0,))])
async def test_what_comes_after_the_site_is_no_part_of_it(
    site: Site, neuron_layers: tuple[int, ...], tmp_path: Path
) -> None:
    store, job = ArtifactStore(tmp_path), search(site=site, neurons=20, heads=2)
    result = await found("gpt2", job, store)
    assert {neuron.layer for neuron in result.neurons.found.neurons} == set(neuron_layers)
    scores = load_head_set("joy-heads", store, "heads").scores
    assert scores[0].any()
    assert bool(scores[1].any()) is (site is Site.RESID_MID)
    split, direction = Split.of(job), store.get("joy-vector").direction(1).double()
    naive, unit = NaiveCircuit(tiny_model("gpt2"), job.scenarios, site, 1), direction / direction.norm()
    parts = [result.neurons.artifact.evidence["written_by_all"], result.head_set.evidence["written_by_all"]]
    assert sum(parts) + naive.embedding(split.training, unit) == pytest.approx(float(direction.norm()), rel=1e-3)


async def test_the_last_token_stands_for_a_text_where_it_is_asked_for(tmp_path: Path) -> None:
    store, job = ArtifactStore(tmp_path), search(pooling=Pooling.LAST_TOKEN)
    result = await found("llama", job, store)
    naive = NaiveCircuit(tiny_model("llama"), job.scenarios, Site.RESID_POST, 1)
    naive.pool_last()
    split, direction = Split.of(job), store.get("joy-vector").direction(1).double()
    torch.testing.assert_close(direction, naive.direction(split.training), rtol=1e-3, atol=1e-5)
    unit = direction / direction.norm()
    [(head, score), *_] = result.heads
    assert score == pytest.approx(naive.head(split.training, *head, unit), rel=1e-3)
    assert result.unzeroed.separation == pytest.approx(naive.zeroed(split.heldout, unit)[1], rel=1e-3, abs=1e-4)


def test_random_heads_are_others_of_the_same_layers_as_far_as_there_are_any() -> None:
    info, writers = loaded("llama").info, Writers.before(Site.RESID_POST, 1)
    few = [Head(0, 1), Head(1, 0), Head(1, 3)]
    for drawn in random_heads(few, writers, info, 20, seed=1):
        assert not set(drawn) & set(few)
        assert [head.layer for head in drawn] == [0, 1, 1]
    assert unmatched_heads(few, info) == 0
    many = [Head(0, 0), Head(0, 1), Head(0, 2)]
    for drawn in random_heads(many, writers, info, 20, seed=1):
        assert Head(0, 3) in drawn
        assert [head.layer for head in drawn] == [0, 1, 1]
        assert len(set(drawn)) == 3
    assert unmatched_heads(many, info) == 2


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"scenarios": scenarios(2)}, "scenarios"),
        ({"random_sets": 100_000}, "random_sets"),
        ({"neurons": 120}, "neurons"),
    ],
)
async def test_what_cannot_be_done_is_refused_by_its_field(
    fields: dict[str, object], field: str, tmp_path: Path
) -> None:
    with pytest.raises(InvalidArgument) as refused:
        await found("llama", search(**fields), ArtifactStore(tmp_path))
    assert refused.value.field == field


async def test_a_circuit_leaves_heads_for_a_random_set_of_its_size(tmp_path: Path) -> None:
    result = await found("llama", search(layers=(0,), heads=4, random_sets=3), ArtifactStore(tmp_path))
    assert 1 <= len(result.heads) <= 2
    assert any("of 4 heads there are" in warning for warning in result.vector.warnings)


async def test_equal_texts_of_all_values_have_no_direction(tmp_path: Path) -> None:
    texts = tuple(ScenarioText((9, 8, 7), s, v) for s in range(4) for v in range(2))
    job = search(scenarios=Scenarios(texts, ("a", "b"), 0))
    with pytest.raises(InvalidArgument) as refused:
        await found("llama", job, ArtifactStore(tmp_path))
    assert refused.value.field == "scenarios"


async def test_progress_is_told_of_every_stage(tmp_path: Path) -> None:
    model, job = loaded("llama"), search(random_sets=1)
    with started(model) as engine:
        events = find_concept_circuit(engine, ArtifactStore(tmp_path), model.info, job)
        told = [(e.stage, e.done, e.total) async for e in events if isinstance(e, Progress)]
    texts, heldout = 24, 6
    ends = [(stage, done) for stage, done, total in told if done == total]
    assert ends == [
        ("activations", texts),
        ("tokens", heldout),
        ("evidence", 1),
        ("norms", texts),
        ("writes", texts - heldout),
        ("zeroing", heldout * 7),
    ]
