"""What must hold to the bit, whatever the model: an edit touches its own rows, and nothing when it says nothing."""

from dataclasses import replace

import pytest
import torch
from engine_runs import Bench, Job, Outcome, assert_same, run_alone
from programs import EDIT_KINDS, VECTOR_KINDS, edit, mixed, one_of_each_kind, prompt, shapes, sites_of
from tiny_models import FAMILIES

from patchclamp_kernels.runtime import reference_only
from patchclamp_server.engine.config import EngineConfig
from patchclamp_server.interventions.program import (
    Edit,
    NeuronEdit,
    NeuronOp,
    NeuronReadout,
    PositionRange,
    Program,
    Readout,
    Scope,
    TokenSelector,
)
from patchclamp_server.model.sites import Site

LENGTH = 12
# Without the prefix cache every batch has the shape of the one it is compared with.
CONFIG = EngineConfig(kv_block_size=4, kv_cache_tokens=2048, enable_prefix_cache=False)


def run(family: str, programs: list[Program | None], max_tokens: int = 4) -> list[Outcome]:
    jobs = [Job(prompt(f"{family} {i}", LENGTH), program, max_tokens) for i, program in enumerate(programs)]
    with Bench(family, CONFIG) as bench:
        outcomes = bench.run(jobs)
    for outcome in outcomes:
        outcome.end()
    return outcomes


def assert_equal_bits(left: Outcome, right: Outcome) -> None:
    assert left.tokens == right.tokens
    assert torch.equal(torch.stack(left.logits), torch.stack(right.logits))


@pytest.mark.parametrize("family", FAMILIES)
def test_unsteered_rows_keep_their_bits_beside_steered_ones(family: str) -> None:
    """Four unsteered requests among others, which are unsteered in one run and steered in every way in the next."""
    s = shapes(family)
    steering: list[Program | None] = [*one_of_each_kind(s).values(), *mixed(s).values()]
    programs: list[Program | None] = [None, *steering[:11], None, *steering[11:], None, None]
    plain = run(family, [None] * len(programs))
    steered = run(family, programs)
    for place, program in enumerate(programs):
        if program is None:
            assert_equal_bits(plain[place], steered[place])
    changed = [not torch.equal(plain[i].logits[-1], steered[i].logits[-1]) for i, p in enumerate(programs) if p]
    assert sum(changed) > len(changed) // 2, "the neighbours are not steered"


@pytest.mark.parametrize("kind", EDIT_KINDS)
@pytest.mark.parametrize("family", FAMILIES)
def test_strength_zero_changes_nothing(family: str, kind: str) -> None:
    s = shapes(family)
    norms = (False, True) if kind in VECTOR_KINDS else (False,)
    edits = tuple(
        edit(kind, site, s, name=f"{site.value} {norm}", strength=0.0, all_layers=True, preserve_norm=norm)
        for site in sites_of(kind, s)
        for norm in norms
    )
    steered, plain = run(family, [Program(edits)]), run(family, [None])
    assert_equal_bits(steered[0], plain[0])
    assert all(own.mean_relative_change == 0.0 for own in steered[0].end().receipt.edits)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_neuron_clamped_to_its_own_value_changes_nothing(family: str) -> None:
    """One generated token at a time: its neurons are read, then set and clamped to what was read."""
    neurons, position = (0, 3, 11, 79), LENGTH - 1
    here = Scope(include=(TokenSelector(positions=PositionRange(position, position + 1)),))
    read = Program(readouts=(Readout(NeuronReadout(neurons), Site.MLP_POST, layers=(1,), scope=here),))
    plain = run(family, [read])[0]
    values = plain.readouts[0].values
    kinds = [NeuronEdit(neurons, op=NeuronOp.SET, values=values)]
    kinds += [
        NeuronEdit((neuron,), op=NeuronOp.CLAMP, min=value, max=value)
        for neuron, value in zip(neurons, values, strict=True)
    ]
    edits = tuple(Edit(kind, Site.MLP_POST, str(i), layers=(1,), scope=here) for i, kind in enumerate(kinds))
    clamped = run(family, [Program(edits)])[0]
    assert_equal_bits(clamped, plain)
    assert [(own.rows, own.mean_relative_change) for own in clamped.end().receipt.edits] == [(1, 0.0)] * len(edits)


@pytest.mark.parametrize("family", FAMILIES)
def test_bounds_that_hold_anyway_change_nothing(family: str) -> None:
    s = shapes(family)
    wide = NeuronEdit(tuple(range(s.d_ff)), op=NeuronOp.CLAMP, min=-1e6, max=1e6)
    clamped, plain = run(family, [Program((Edit(wide, Site.MLP_POST, all_layers=True),))]), run(family, [None])
    assert_equal_bits(clamped[0], plain[0])


@pytest.mark.parametrize("kind", EDIT_KINDS)
def test_a_scope_that_matches_no_token_leaves_a_receipt_of_zeros(kind: str) -> None:
    s = shapes("llama")
    nowhere = Scope(include=(TokenSelector(positions=PositionRange(100, 110)),))
    edits = tuple(edit(kind, site, s, name=site.value, scope=nowhere) for site in sites_of(kind, s))
    steered, plain = run("llama", [Program(edits)]), run("llama", [None])
    assert_equal_bits(steered[0], plain[0])
    receipt = steered[0].end().receipt
    assert [(e.rows, e.mean_relative_change, e.gate_firings, e.rows_from_cache) for e in receipt.edits] == [
        (0, 0.0, 0, 0) for _ in edits
    ]
    assert not receipt.touched


def test_a_gate_that_never_opens_leaves_a_receipt_of_zeros() -> None:
    gated = mixed(shapes("llama"))["gate per token"].edits[0]
    assert gated.gate is not None
    closed = replace(gated.gate, condition=replace(gated.gate.condition, threshold=1e9))
    never = (
        replace(gated, name="per token", gate=closed),
        replace(gated, name="latched", gate=replace(closed, latched=True)),
    )
    steered, plain = run("llama", [Program(never)]), run("llama", [None])
    assert_equal_bits(steered[0], plain[0])
    assert [(e.rows, e.gate_firings) for e in steered[0].end().receipt.edits] == [(0, 0), (0, 0)]
    assert not steered[0].end().receipt.touched


@pytest.mark.parametrize("kernels", [False, True])
def test_additions_that_preserve_the_norm_run_one_after_the_other(kernels: bool) -> None:
    """The second one sees what the first has left: their sum, scaled once, is another vector."""
    s = shapes("llama")
    edits = tuple(edit("add", Site.RESID_POST, s, name, name=name, preserve_norm=True) for name in ("a", "b"))
    asked = Job(prompt("norms", LENGTH), Program(edits), max_tokens=4)
    with reference_only():
        outcome = run_alone("llama", asked, replace(CONFIG, kernels=kernels))
    assert_same("llama", asked, outcome)


@pytest.mark.parametrize("family", FAMILIES)
def test_readouts_change_nothing(family: str) -> None:
    s = shapes(family)
    watched = Program(readouts=mixed(s)["everything is read"].readouts)
    assert_equal_bits(run(family, [watched])[0], run(family, [None])[0])
