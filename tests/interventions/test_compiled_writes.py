"""Vectors are added within the compiled blocks: bits and receipts of visits in Python, and no Python between them."""

from collections.abc import Callable

import pytest
from engine_runs import Bench, Job, Outcome
from programs import GENERATED, condition, edit, prompt, readout_kind, shapes
from torch import Tensor

from patchclamp_server.engine.config import EngineConfig
from patchclamp_server.interventions.kinds.add import AddRule
from patchclamp_server.interventions.kinds.rules import StepContext
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


def assert_equal(ours: list[Outcome], theirs: list[Outcome]) -> None:
    for own, wanted in zip(ours, theirs, strict=True):
        assert own.tokens == wanted.tokens
        assert own.readouts == wanted.readouts
        assert own.end().receipt == wanted.end().receipt


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("together", [True, False])
def test_vectors_that_are_added_in_compiled_blocks_have_the_bits_and_receipts_of_those_in_python(
    family: str, together: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    jobs = jobs_of(family)

    def run() -> list[Outcome]:
        with Bench(family, CONFIG) as bench:
            return bench.run(jobs) if together else [bench.run([job])[0] for job in jobs]

    ours = run()
    monkeypatch.setattr(StepPlan, "compiled_visits", None)
    assert_equal(ours, run())


def test_steady_steps_run_no_rule_of_vectors_that_are_added(monkeypatch: pytest.MonkeyPatch) -> None:
    rows: list[int] = []
    own: Callable[..., None] = AddRule.run

    def run(self: AddRule, x: Tensor, context: StepContext) -> None:
        rows.append(len(x))
        own(self, x, context)

    monkeypatch.setattr(AddRule, "run", run)
    with Bench("llama", CONFIG) as bench:
        (outcome,) = bench.run([Job(prompt("steady", 7), Program(added("llama")), 6)])
    # Five tokens were decoded, each a step of one row.
    assert set(rows) == {7}
    receipt = outcome.end().receipt
    assert receipt is not None
    # All tokens but the last, which is not read any more, at each of the layers.
    layers = shapes("llama").n_layers
    assert {own.rows for own in receipt.edits} == {12 * layers}
    assert all(own.mean_relative_change > 0 for own in receipt.edits)
