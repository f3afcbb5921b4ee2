"""Features of sparse autoencoders in programs: edits, readouts and conditions against the oracle, on both executors."""

from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from autoencoders import N_FEATURES, orthonormal, put_autoencoder
from engine_runs import Bench, Job, Outcome, assert_same, run_alone, truth
from programs import GENERATED, SCOPES, edit, prompt, shapes
from tiny_models import FAMILIES

from patchclamp_kernels.runtime import INTERPRETED, reference_only
from patchclamp_server.artifacts.store import ArtifactStore
from patchclamp_server.engine.config import EngineConfig
from patchclamp_server.errors import Aborted
from patchclamp_server.interventions.kinds.features import FeatureEdit, FeatureReadout, TopFeaturesReadout
from patchclamp_server.interventions.program import (
    AbortCondition,
    Comparison,
    Condition,
    Edit,
    FeatureReference,
    Gate,
    NeuronOp,
    Program,
    Readout,
    Vector,
)
from patchclamp_server.model.sites import Site

CONFIG = EngineConfig(kv_block_size=4, kv_cache_tokens=1024, enable_prefix_cache=False)
EXECUTORS = {
    "operators": CONFIG,
    "kernels": replace(CONFIG, kernels=True),
    "graphs": replace(CONFIG, kernels=True, decode_graphs=True),
}
FUNCTIONS = ("relu", "jumprelu", "batchtopk")
TRANSCODERS = (
    ((Site.RESID_MID, 1), (Site.MLP_OUT, 1)),
    ((Site.MLP_POST, 1), (Site.MLP_OUT, 1)),
    ((Site.MLP_OUT, 0), (Site.RESID_POST, 0)),
    ((Site.RESID_PRE, 0), (Site.ATTN_Z, 2)),
)
CHOSEN = (7, 0, 31, 12, 3)
LAYER = 1


@pytest.fixture
def store(tmp_path: Path) -> ArtifactStore:
    return ArtifactStore(tmp_path)


@pytest.fixture(params=EXECUTORS)
def config(request: pytest.FixtureRequest) -> Iterator[EngineConfig]:
    """The kernels' definitions stand for the kernels: those are compared in test_the_kernels_themselves."""
    with nullcontext() if request.param == "operators" else reference_only():
        yield EXECUTORS[request.param]


def edits(ref: str, features: tuple[int, ...] = CHOSEN) -> dict[NeuronOp, FeatureEdit]:
    n = len(features)
    return {
        NeuronOp.SET: FeatureEdit(ref, features, NeuronOp.SET, tuple(0.5 * i for i in range(n))),
        NeuronOp.SCALE: FeatureEdit(ref, features, NeuronOp.SCALE, (-1.5,)),
        NeuronOp.ADD: FeatureEdit(ref, features[:1], NeuronOp.ADD, (0.7,)),
        NeuronOp.CLAMP: FeatureEdit(ref, features, NeuronOp.CLAMP, min=0.1, max=0.4),
    }


def read(ref: str, site: Site, **options: object) -> tuple[Readout, ...]:
    return (
        Readout(FeatureReadout(ref, (12, 39, 7)), site, "chosen", (LAYER,), **options),  # type: ignore[arg-type]
        Readout(TopFeaturesReadout(ref, 4), site, "largest", (LAYER,), **options),  # type: ignore[arg-type]
    )


def above(ref: str, site: Site, feature: int, threshold: float, **options: object) -> Condition:
    named = FeatureReference(ref, feature)
    return Condition(site, 0, Vector(), Comparison.ABOVE, threshold, feature=named, **options)  # type: ignore[arg-type]


def program(kind: FeatureEdit, site: Site = Site.RESID_POST, **options: object) -> Program:
    return Program((Edit(kind, site, "features", (LAYER,), **options),))  # type: ignore[arg-type]


def job(text: str, asked: Program | None, store: ArtifactStore, max_tokens: int = 4) -> Job:
    return Job(prompt(text, 11), asked, max_tokens, artifacts=store)


def every_job(store: ArtifactStore, family: str = "llama") -> list[Job]:
    """Requests with features of several autoencoders, beside others and one that is not steered."""
    s, jobs = shapes(family), [job(f"{family} unsteered", None, store)]
    for i, function in enumerate(FUNCTIONS):
        site = (Site.RESID_POST, Site.MLP_OUT, Site.RESID_PRE)[i]
        ref = put_autoencoder(store, family, site, LAYER, function)
        for j, (op, kind) in enumerate(edits(ref).items()):
            own = Edit(
                kind,
                site,
                "features",
                (LAYER,),
                strength=(1.0, 0.6, -0.4, 1.3)[j],
                scope=SCOPES[(3 * i + j) % len(SCOPES)],
                preserve_norm=op is NeuronOp.ADD,
            )
            before = edit("add", site, s, name="before")
            asked = Program((before, own, replace(before, name="after")), read(ref, site))
            jobs.append(job(f"{family} {function} {op.value}", asked, store))
    for i, (reads, writes) in enumerate(TRANSCODERS):
        ref = put_autoencoder(store, family, reads[0], reads[1], FUNCTIONS[i % 2], output=writes)
        both = (edit("add", reads[0], s, name="before", layers=(reads[1],)),) if reads[0] is not Site.MLP_POST else ()
        for j, (op, kind) in enumerate(edits(ref).items()):
            own = Edit(
                kind,
                writes[0],
                "features",
                (writes[1],),
                strength=(1.0, 0.6)[j % 2],
                scope=SCOPES[(i + j) % len(SCOPES)],
            )
            jobs.append(job(f"{family} transcoder {i} {op.value}", Program((*both, own)), store))
    first = put_autoencoder(store, family, Site.RESID_POST, 0, "jumprelu", seed="gate")
    gated = edit("add", Site.RESID_POST, s, name="gated", gate=Gate(above(first, Site.RESID_POST, 5, 0.1)))
    latched = Gate(above(first, Site.RESID_POST, 9, 0.3), latched=True)
    jobs.append(job(f"{family} gated", Program((gated,)), store))
    jobs.append(job(f"{family} latched", Program((replace(gated, name="latched", gate=latched),)), store))
    return jobs


@pytest.mark.parametrize("op", NeuronOp)
@pytest.mark.parametrize("function", FUNCTIONS)
def test_an_edit_is_the_formula_of_the_oracle(
    function: str, op: NeuronOp, store: ArtifactStore, config: EngineConfig
) -> None:
    ref = put_autoencoder(store, "llama", Site.RESID_POST, LAYER, function)
    asked = job(f"{function} {op.value}", program(edits(ref)[op], strength=0.8), store)
    assert_same("llama", asked, run_alone("llama", asked, config))


@pytest.mark.parametrize("family", FAMILIES)
def test_features_are_edited_and_read_at_every_site_of_every_family(family: str, store: ArtifactStore) -> None:
    jobs = []
    for site in shapes(family).sites:
        ref = put_autoencoder(store, family, site, LAYER)
        kind = FeatureEdit(ref, CHOSEN, NeuronOp.SET, (0.4,))
        asked = Program((Edit(kind, site, layers=(LAYER,), scope=GENERATED),), read(ref, site, scope=SCOPES[3]))
        jobs.append(job(f"{family} {site.value}", asked, store, max_tokens=2))
    for on in EXECUTORS.values():
        with reference_only(), Bench(family, on) as bench:
            for asked, outcome in zip(jobs, bench.run(jobs), strict=True):
                assert_same(family, asked, outcome)


def test_a_mixed_batch_is_served_as_the_oracle_says(store: ArtifactStore, config: EngineConfig) -> None:
    jobs = every_job(store)
    with Bench("llama", config) as bench:
        for asked, outcome in zip(jobs, bench.run(jobs), strict=True):
            assert_same("llama", asked, outcome)


def test_edits_at_one_place_keep_their_own_features_and_thresholds_in_a_batch(
    store: ArtifactStore, config: EngineConfig
) -> None:
    refs = [put_autoencoder(store, "llama", Site.RESID_POST, LAYER, "jumprelu", seed=seed) for seed in "ab"]
    kinds = [
        FeatureEdit(refs[0], (5, 31, 2), NeuronOp.SCALE, (2.0,)),
        FeatureEdit(refs[1], (12,), NeuronOp.CLAMP, min=0.3),
        FeatureEdit(refs[0], (0, 8, 17, 25, 33), NeuronOp.SET, (0.5, 0.1, 0.9, 0.0, 0.4)),
    ]
    jobs = [job(f"own features {i}", program(kind), store) for i, kind in enumerate(kinds)]
    with Bench("llama", config) as bench:
        for asked, outcome in zip(jobs, bench.run(jobs), strict=True):
            assert_same("llama", asked, outcome)


@pytest.mark.parametrize(
    "options",
    [{}, {"max_tokens_per_step": 5}, {"kv_cache_tokens": 17 * 4}],
    ids=["whole", "chunked", "preempted"],
)
def test_neither_batch_nor_chunks_nor_preemption_change_a_bit(store: ArtifactStore, options: dict[str, int]) -> None:
    jobs = every_job(store)
    alone = [run_alone("llama", own, CONFIG) for own in jobs]
    with Bench("llama", replace(CONFIG, **options)) as bench:  # type: ignore[arg-type]
        together = bench.run(jobs)
        assert bool(bench.stats().preemptions) == ("kv_cache_tokens" in options)
    for own, expected in zip(together, alone, strict=True):
        assert own.tokens == expected.tokens
        assert torch.equal(torch.stack(own.logits), torch.stack(expected.logits))
        assert chosen_of(own) == chosen_of(expected)


def chosen_of(outcome: Outcome) -> dict[int, tuple[float, ...]]:
    return {value.position: value.values for value in outcome.readouts if value.name == "chosen"}


def test_an_unsteered_neighbour_keeps_its_bits(store: ArtifactStore, config: EngineConfig) -> None:
    """Compared with a batch of the same rows in which nobody edits."""
    jobs = every_job(store)
    with Bench("llama", config) as bench:
        among = bench.run(jobs)[0]
    with Bench("llama", config) as bench:
        plain = bench.run([replace(own, program=None) for own in jobs])[0]
    assert among.tokens == plain.tokens
    assert torch.equal(torch.stack(among.logits), torch.stack(plain.logits))


def test_a_set_feature_is_read_again_as_its_target_and_the_others_as_before(
    store: ArtifactStore, config: EngineConfig
) -> None:
    ref = orthonormal(store, "llama", Site.RESID_POST, LAYER, 12)
    everything = Readout(FeatureReadout(ref, tuple(range(12))), Site.RESID_POST, "all", (LAYER,))
    plain = run_alone("llama", job("again", Program(readouts=(everything,)), store, 1), config)
    asked = Program((Edit(FeatureEdit(ref, (4, 2), NeuronOp.SET, (1.25, 0.5)), Site.RESID_POST, layers=(LAYER,)),))
    edited = run_alone("llama", job("again", replace(asked, readouts=(everything,)), store, 1), config)
    for before, after in zip(plain.readouts, edited.readouts, strict=True):
        expected = list(before.values)
        expected[4], expected[2] = 1.25, 0.5
        if before.values[4] > 0 and before.values[2] > 0:
            assert after.values == pytest.approx(expected, abs=1e-5)
        else:
            # What was below 0 is not 0 in h: its projection had been negative, and keeps its distance.
            others = [i for i in range(12) if i not in (4, 2)]
            assert [after.values[i] for i in others] == pytest.approx([before.values[i] for i in others], abs=1e-5)
    assert any(value.values[4] > 0 and value.values[2] > 0 for value in plain.readouts)


def test_scaling_by_one_and_setting_a_closed_feature_to_zero_leave_the_bits_alone(
    store: ArtifactStore, config: EngineConfig
) -> None:
    ref = put_autoencoder(store, "llama", Site.RESID_POST, LAYER)
    plain = run_alone("llama", job("same bits", None, store), config)
    for kind in (
        FeatureEdit(ref, CHOSEN, NeuronOp.SCALE, (1.0,)),
        FeatureEdit(ref, CHOSEN, NeuronOp.CLAMP, min=-1.0),
    ):
        own = run_alone("llama", job("same bits", program(kind), store), config)
        assert torch.equal(torch.stack(own.logits), torch.stack(plain.logits))


@pytest.mark.parametrize("comparison", Comparison)
def test_a_feature_ends_a_stream(comparison: Comparison, store: ArtifactStore, config: EngineConfig) -> None:
    ref = put_autoencoder(store, "llama", Site.RESID_POST, 0, "jumprelu")
    condition = replace(above(ref, Site.RESID_POST, 3, 0.25, scope=GENERATED), comparison=comparison)
    asked = job("aborted", Program(abort_when=(AbortCondition("too much", condition),)), store, 12)
    outcome, expected = run_alone("llama", asked, config), truth("llama", asked)
    assert expected.aborted_by == "too much"
    assert isinstance(outcome.error, Aborted)
    assert outcome.tokens == list(expected.tokens)


def test_the_largest_of_a_topk_are_read(store: ArtifactStore, config: EngineConfig) -> None:
    ref = put_autoencoder(store, "llama", Site.RESID_MID, LAYER, "topk")
    asked = Program(
        readouts=tuple(
            Readout(TopFeaturesReadout(ref, k), Site.RESID_MID, f"{k}", (LAYER,)) for k in (1, 3, N_FEATURES)
        )
    )
    own = job("topk", asked, store)
    assert_same("llama", own, run_alone("llama", own, config))


def test_tables_forget_whole_encoders_with_the_last_program(store: ArtifactStore, config: EngineConfig) -> None:
    ref = put_autoencoder(store, "llama", Site.RESID_POST, LAYER)
    asked = job("forgotten", Program(readouts=read(ref, Site.RESID_POST)), store)
    with Bench("llama", config) as bench:
        bench.run([asked, asked])
        tables = bench.engine.executor.tables
        assert not tables.objects
        assert not tables.n_held


@pytest.mark.skipif(not INTERPRETED, reason="TRITON_INTERPRET=1 was not set when Triton was imported")
def test_the_kernels_themselves(store: ArtifactStore) -> None:
    jobs = [replace(own, max_tokens=2) for own in every_job(store)]
    with Bench("llama", EXECUTORS["graphs"]) as bench:
        for asked, outcome in zip(jobs, bench.run(jobs), strict=True):
            assert_same("llama", asked, outcome)
