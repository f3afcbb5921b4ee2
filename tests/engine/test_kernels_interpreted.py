"""The engine on the kernels themselves, in Triton's interpreter, against plain transformers with naive hooks."""

import pytest
from engine_runs import Bench, Job, assert_same
from programs import GENERATED, edit, mixed, one_of_each_kind, prompt, shapes
from test_against_oracle import config

from patchclamp_kernels.runtime import INTERPRETED
from patchclamp_server.interventions.program import NeuronReadout, Program, Readout
from patchclamp_server.model.sites import PREACTIVATION_SITES

pytestmark = pytest.mark.skipif(not INTERPRETED, reason="TRITON_INTERPRET=1 was not set when Triton was imported")


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2"])
def test_a_mixed_batch_is_prefilled_and_decoded(family: str) -> None:
    s = shapes(family)
    kinds = one_of_each_kind(s)
    programs = [kinds["add"], kinds["neurons_clamp"], kinds["heads_scale"], mixed(s)["gate latched"], Program()]
    jobs = [Job(prompt(f"interpreted {i}", 9), program, max_tokens=2) for i, program in enumerate(programs)]
    with Bench(family, config(kernels=True, decode_graphs=True)) as bench:
        for asked, outcome in zip(jobs, bench.run(jobs), strict=True):
            assert_same(family, asked, outcome)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_gates_and_ups_are_edited_and_read_beside_an_unsteered_request(family: str) -> None:
    s = shapes(family)
    sites = [site for site in PREACTIVATION_SITES if site in s.sites]
    read = tuple(
        Readout(NeuronReadout((s.d_ff - 1, 0, 5)), site, site.value, layers=(0, 1), scope=GENERATED) for site in sites
    )
    edits = (edit("neurons_clamp", sites[0], s), edit("add", sites[-1], s))
    programs = [*(Program((own,), read) for own in edits), None]
    jobs = [Job(prompt(f"interpreted {i}", 5), program, max_tokens=2) for i, program in enumerate(programs)]
    with Bench(family, config(kernels=True, decode_graphs=True)) as bench:
        for asked, outcome in zip(jobs, bench.run(jobs), strict=True):
            assert_same(family, asked, outcome)
