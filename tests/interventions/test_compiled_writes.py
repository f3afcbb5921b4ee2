"""Edits within the compiled blocks: bits and receipts of visits in Python, and no Python between blocks."""

from collections.abc import Callable

import pytest
from engine_runs import Bench, Job, Outcome
from programs import (
    EDIT_KINDS,
    GENERATED,
    condition,
    edit,
    mixed,
    one_of_each_kind,
    prompt,
    readout_kind,
    shapes,
    sites_of,
)
from torch import Tensor

from patchclamp_server.engine.config import EngineConfig
from patchclamp_server.interventions.kinds.add import AddRule
from patchclamp_server.interventions.kinds.heads import HeadRule
from patchclamp_server.interventions.kinds.neurons import NeuronRule
from patchclamp_server.interventions.kinds.project import ProjectRule
from patchclamp_server.interventions.kinds.rotate import RotateRule
from patchclamp_server.interventions.kinds.rules import CompiledEdit, StepContext
from patchclamp_server.interventions.plan import StepPlan
from patchclamp_server.interventions.program import Gate, Program, Readout
from patchclamp_server.model.sites import PREACTIVATION_SITES, Site

CONFIG = EngineConfig(kv_block_size=4, kv_cache_tokens=2048, enable_prefix_cache=False)
FAMILIES = ("llama", "gemma2", "gpt2", "gpt_neox")


def added(family: str, seed: str = "", **options: object) -> tuple[object, ...]:
    """A vector at every site and layer that takes one."""
    s = shapes(family)
    sites = [site for site in s.sites if site not in (*PREACTIVATION_SITES, Site.ATTN_Q)]
    return tuple(
        edit("add", site, s, f"{seed} {site.value}", name=site.value, strength=0.05, all_layers=True, **options)
        for site in sites
    )


def jobs_of(family: str) -> list[Job]:
    s = shapes(family)
    twice = (*added(family, "one"), edit("add", Site.RESID_POST, s, "two", name="again", strength=0.3))
    read = Readout(readout_kind("projection", Site.RESID_POST, s), Site.RESID_POST, "read", all_layers=True)
    gated = edit("add", Site.RESID_POST, s, gate=Gate(condition(Site.RESID_PRE, 1, s, threshold=-1e9)))
    kept = edit("add", Site.RESID_MID if Site.RESID_MID in s.sites else Site.RESID_PRE, s, preserve_norm=True)
    programs = [
        None,
        Program(added(family)),
        Program(twice, (read,)),
        Program(added(family, scope=GENERATED)),
        Program((gated, *added(family)[:1])),
        Program((kept, *added(family)[:2])),
    ]
    return [Job(prompt(f"{family} {i}", 7 + i), own, 6) for i, own in enumerate(programs)]


def jobs_of_each_kind(family: str) -> list[Job]:
    """Every kind alone, with a gate that is open at some tokens, and with others."""
    s = shapes(family)
    gate = Gate(condition(Site.RESID_PRE, 0, s, "sometimes"))
    gated = [
        Program((edit(kind, sites_of(kind, s)[-1], s, "gated", gate=gate, layers=(1, 2), strength=0.4),))
        for kind in EDIT_KINDS
    ]
    programs = [*one_of_each_kind(s).values(), *gated, *mixed(s).values()]
    return [Job(prompt(f"{family} kind {i}", 5 + i % 4), own, 6) for i, own in enumerate(programs)]


JOBS = {"vectors": jobs_of, "kinds": jobs_of_each_kind}


def assert_equal(ours: list[Outcome], theirs: list[Outcome]) -> None:
    for own, wanted in zip(ours, theirs, strict=True):
        assert own.tokens == wanted.tokens
        assert own.readouts == wanted.readouts
        assert own.end().receipt == wanted.end().receipt


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("together", [True, False])
@pytest.mark.parametrize("jobs_of_family", JOBS.values(), ids=JOBS)
def test_edits_in_compiled_blocks_have_the_bits_and_receipts_of_those_in_python(
    family: str, together: bool, jobs_of_family: Callable[[str], list[Job]], monkeypatch: pytest.MonkeyPatch
) -> None:
    jobs = jobs_of_family(family)

    def run() -> list[Outcome]:
        with Bench(family, CONFIG) as bench:
            return bench.run(jobs) if together else [bench.run([job])[0] for job in jobs]

    ours = run()
    monkeypatch.setattr(StepPlan, "compiled_visits", None)
    assert_equal(ours, run())


# Kinds, by the rule that runs them in Python.
RULES: dict[type[CompiledEdit], tuple[str, Site]] = {
    AddRule: ("add", Site.RESID_POST),
    ProjectRule: ("cap_projection", Site.RESID_POST),
    RotateRule: ("rotate_towards", Site.RESID_MID),
    NeuronRule: ("neurons_clamp", Site.MLP_POST),
    HeadRule: ("heads_scale", Site.ATTN_Z),
}


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("rule", RULES)
def test_steady_steps_run_no_rule_of_what_is_compiled(
    rule: type[CompiledEdit], gated: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    visits: list[int] = []
    own: Callable[..., None] = rule.run

    def run(self: CompiledEdit, x: Tensor, context: StepContext) -> None:
        visits.append(len(x))
        own(self, x, context)

    monkeypatch.setattr(rule, "run", run)
    s, (kind, site) = shapes("llama"), RULES[rule]
    gate = Gate(condition(Site.RESID_PRE, 0, s, threshold=-1e9)) if gated else None
    # What no compiled visit does leaves those alone that have one.
    beside = edit("low_rank", Site.MLP_OUT, s, layers=(0,))
    program = Program((edit(kind, site, s, all_layers=True, strength=0.05, gate=gate), beside))
    with Bench("llama", CONFIG) as bench:
        (outcome,) = bench.run([Job(prompt("steady", 7), program, 6)])
    # Five tokens were decoded, each a step of one row.
    assert set(visits) == {7}
    receipt = outcome.end().receipt
    assert receipt is not None
    # All tokens but the last, which is not read any more, at each of the layers.
    assert receipt.edits[0].rows == 12 * s.n_layers
    assert receipt.edits[0].mean_relative_change > 0
