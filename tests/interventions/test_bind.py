"""What binding refuses, and what tells two programs apart."""

from dataclasses import replace

import pytest
from engine_runs import loaded
from programs import condition, edit, shapes

from patchclamp_server.errors import InvalidArgument
from patchclamp_server.interventions.bind import bind
from patchclamp_server.interventions.program import (
    Gate,
    HeadReadout,
    LogitLensReadout,
    NeuronReadout,
    Program,
    Readout,
    TopNeuronsReadout,
)
from patchclamp_server.model.sites import Site

INFO, SHAPES = loaded("llama").info, shapes("llama")


def gated(site: Site, layer: int) -> Program:
    gate = Gate(condition(site, layer, SHAPES))
    return Program((edit("add", Site.MLP_OUT, SHAPES, layers=(2, 1), gate=gate),))


@pytest.mark.parametrize(("site", "layer"), [(Site.MLP_POST, 1), (Site.RESID_POST, 0)])
def test_a_gate_before_the_first_site_of_its_edit_is_accepted(site: Site, layer: int) -> None:
    assert bind(gated(site, layer), INFO).edits[0].gate is not None


@pytest.mark.parametrize(("site", "layer"), [(Site.MLP_OUT, 1), (Site.RESID_POST, 1), (Site.RESID_PRE, 2)])
def test_a_gate_at_the_site_of_its_own_edit_or_behind_it_is_refused(site: Site, layer: int) -> None:
    with pytest.raises(InvalidArgument, match="does not come before") as refused:
        bind(gated(site, layer), INFO)
    assert refused.value.field == "program.edits[0].gate.condition"


def reading(kind: object, site: Site = Site.MLP_POST, layers: tuple[int, ...] = (1,)) -> str:
    return bind(Program(readouts=(Readout(kind, site, "read", layers=layers),)), INFO).fingerprint  # type: ignore[arg-type]


def test_programs_that_read_other_things_have_other_fingerprints() -> None:
    fingerprints = [
        reading(NeuronReadout((3, 1))),
        reading(NeuronReadout((3, 2))),
        reading(NeuronReadout((3, 1)), layers=(2,)),
        reading(TopNeuronsReadout(2)),
        reading(TopNeuronsReadout(3)),
        reading(LogitLensReadout(3), Site.RESID_POST),
        reading(LogitLensReadout(3), Site.RESID_PRE),
        reading(HeadReadout((1,)), Site.ATTN_Z),
        reading(HeadReadout((2,)), Site.ATTN_Z),
    ]
    assert len(set(fingerprints)) == len(fingerprints)


def test_programs_of_other_strengths_or_names_have_other_fingerprints() -> None:
    steered = edit("add", Site.RESID_POST, SHAPES, name="a")
    others = (steered, replace(steered, strength=0.5), replace(steered, name="b"), replace(steered, layers=(2,)))
    assert len({bind(Program((other,)), INFO).fingerprint for other in others}) == len(others)
