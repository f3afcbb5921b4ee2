"""Readouts within the compiled blocks: the bits that Python's visits read, at places that no Python is run for."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from autoencoders import put_autoencoder
from engine_runs import Bench, Job, Outcome
from programs import GENERATED, READOUTS, edit, prompt, readout_kind, shapes
from torch import Tensor
from watch_runs import follow, neurons_watch

from patchclamp_server.artifacts.store import ArtifactStore
from patchclamp_server.engine.config import EngineConfig
from patchclamp_server.interventions.kinds.activations import ActivationRule
from patchclamp_server.interventions.kinds.features import FeatureReadout
from patchclamp_server.interventions.kinds.readings import NeuronValuesRule, ProjectionRule
from patchclamp_server.interventions.kinds.rules import StepContext
from patchclamp_server.interventions.plan import StepPlan
from patchclamp_server.interventions.program import Program, Readout
from patchclamp_server.model.sites import PREACTIVATION_SITES, Site

CONFIG = EngineConfig(kv_block_size=4, kv_cache_tokens=2048, enable_prefix_cache=False)
COMPILED = ("projection", "activations", "some activations", "neurons")
RULES = (ProjectionRule, ActivationRule, NeuronValuesRule)
FAMILIES = ("llama", "gemma2", "gpt2")


def jobs_of(family: str, store: ArtifactStore) -> list[Job]:
    """Requests that each read what compiled visits read at one site of all layers, at two of them with an edit there
    too; requests that read features; and one that reads nothing."""
    s = shapes(family)
    programs: list[Program | None] = [None]
    for site in s.sites:
        named = [(name, own) for name, own in READOUTS if own is site and name in COMPILED]
        readouts = tuple(Readout(readout_kind(name, site, s), site, name, all_layers=True) for name, _ in named)
        edits = (edit("add", site, s, strength=0.2),) if site in (Site.RESID_MID, Site.MLP_OUT) else ()
        if readouts:
            programs.append(Program(edits, readouts))
    for function in ("relu", "jumprelu"):
        ref = put_autoencoder(store, family, Site.RESID_POST, 1, function)
        kind = FeatureReadout(ref, (12, 39, 7))
        programs.append(Program((), (Readout(kind, Site.RESID_POST, "features", (1,), scope=GENERATED),)))
    return [Job(prompt(f"{family} {i}", 9 + i), own, 5, artifacts=store) for i, own in enumerate(programs)]


def in_python(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(StepPlan, "compiled_visits", None)


def counted(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The rows of x at each call of a rule that could be compiled."""
    calls: list[int] = []
    for rule in RULES:

        def run(self: object, x: Tensor, context: StepContext, own: Callable[..., None] = rule.run) -> None:
            calls.append(len(x))
            own(self, x, context)

        monkeypatch.setattr(rule, "run", run)
    return calls


def assert_equal(ours: list[Outcome], theirs: list[Outcome]) -> None:
    for own, wanted in zip(ours, theirs, strict=True):
        assert own.tokens == wanted.tokens
        assert own.readouts == wanted.readouts
        assert own.end() is not None


@pytest.mark.parametrize("family", FAMILIES)
def test_compiled_readouts_have_the_bits_of_those_in_python(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    jobs = jobs_of(family, ArtifactStore(tmp_path))
    with Bench(family, CONFIG) as bench:
        ours = bench.run(jobs)
    assert any(own.readouts for own in ours)
    in_python(monkeypatch)
    with Bench(family, CONFIG) as bench:
        theirs = bench.run(jobs)
    assert_equal(ours, theirs)


def test_steady_steps_run_no_rule_where_nothing_edits(monkeypatch: pytest.MonkeyPatch) -> None:
    s = shapes("llama")
    sites = [site for site in s.sites if site not in (*PREACTIVATION_SITES, Site.ATTN_Q)]
    named = [(name, site) for name, site in READOUTS if site in sites and name in COMPILED]
    program = Program(
        (),
        tuple(
            Readout(readout_kind(name, site, s), site, f"{name} {site.value}", all_layers=True) for name, site in named
        ),
    )
    calls = counted(monkeypatch)
    with Bench("llama", CONFIG) as bench:
        (outcome,) = bench.run([Job(prompt("steady", 7), program, 6)])
    # Five tokens were decoded, each a step of one row.
    assert {value.position for value in outcome.readouts} == set(range(12))
    assert set(calls) == {7}


def test_a_neighbour_whose_prompt_runs_beside_changes_no_reading(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Then the plan of the step is another one, in Python, and after it the first one again."""
    store = ArtifactStore(tmp_path)
    readers = jobs_of("llama", store)[1:4]
    first = [Job(job.prompt, job.program, 14, artifacts=store) for job in readers]
    late = Job(prompt("late", 60), readers[0].program, 2, artifacts=store)
    config = EngineConfig(kv_block_size=4, kv_cache_tokens=2048, enable_prefix_cache=False, max_tokens_per_step=8)
    with Bench("llama", config) as bench:
        ours = bench.run([*first, late])
    in_python(monkeypatch)
    with Bench("llama", config) as bench:
        theirs = bench.run([*first, late])
    assert_equal(ours, theirs)


@pytest.mark.parametrize("n", [1, 12])
def test_watches_at_the_same_places_see_the_same(n: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Looks at many rows are not compiled, and readouts beside them are."""
    kind = readout_kind("neurons", Site.MLP_POST, shapes("llama"))
    program = Program((), (Readout(kind, Site.MLP_POST, "neurons", all_layers=True),))
    jobs = [Job(prompt(str(i), 5 + i), program, 5) for i in range(n)]
    seen, outcomes = [], []
    for patched in (False, True):
        if patched:
            in_python(monkeypatch)
        with Bench("llama", CONFIG) as bench:
            followed = follow(bench, neurons_watch())
            outcomes.append(bench.run(jobs))
        seen.append(followed.values)
    assert_equal(*outcomes)
    assert seen[0]
    assert seen[0].keys() == seen[1].keys()
    for key, row in seen[0].items():
        np.testing.assert_array_equal(row, seen[1][key])
