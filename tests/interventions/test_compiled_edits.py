"""Compiled loops of edits give, bit for bit, what torch's operators give."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from engine_runs import Bench, Job, Outcome
from programs import EDIT_KINDS, VECTOR_KINDS, edit, mixed, one_of_each_kind, prompt, shapes, sites_of
from torch import Tensor

from patchclamp_server.engine.config import EngineConfig
from patchclamp_server.interventions.kinds import add, heads, neurons, rules
from patchclamp_server.interventions.program import Program

LENGTH = 12
CONFIG = EngineConfig(kv_block_size=4, kv_cache_tokens=2048, enable_prefix_cache=False)


def _nowhere(x: Tensor) -> bool:
    return False


@contextmanager
def by_torch() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patched:
        for module in (add, heads, neurons, rules):
            patched.setattr(module, "holds_for", _nowhere)
        yield


def run(family: str, programs: list[Program]) -> list[Outcome]:
    jobs = [Job(prompt(f"{family} {i}", LENGTH), program, 4) for i, program in enumerate(programs)]
    with Bench(family, CONFIG) as bench:
        return bench.run(jobs)


def same(family: str, programs: list[Program]) -> None:
    ours = run(family, programs)
    with by_torch():
        theirs = run(family, programs)
    for own, wanted in zip(ours, theirs, strict=True):
        assert torch.equal(torch.stack(own.logits), torch.stack(wanted.logits))
        for edited, expected in zip(own.end().receipt.edits, wanted.end().receipt.edits, strict=True):
            assert edited.rows == expected.rows
            assert edited.mean_relative_change == pytest.approx(expected.mean_relative_change, rel=1e-5, abs=1e-7)


@pytest.mark.parametrize("strength", [0.3, 0.7, 1.0, -1.5])
@pytest.mark.parametrize("kind", EDIT_KINDS)
def test_a_kind_of_edit_at_every_site(kind: str, strength: float) -> None:
    s = shapes("llama")
    norms = (False, True) if kind in VECTOR_KINDS else (False,)
    programs = [
        Program((edit(kind, site, s, name=f"{site.value} {norm}", strength=strength, preserve_norm=norm),))
        for site in sites_of(kind, s)
        for norm in norms
    ]
    same("llama", programs)


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2"])
def test_gated_repeated_and_mixed_edits(family: str) -> None:
    s = shapes(family)
    same(family, [*one_of_each_kind(s).values(), *mixed(s).values()])
