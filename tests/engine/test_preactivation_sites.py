"""mlp_gate and mlp_up, what a neuron is made of: edited, read, examined and captured as hooks on the projections would.

The oracle's hooks sit on the projections of transformers' own modules (oracle_sites.py).
"""

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from engine_runs import Bench, Job, Outcome, assert_same, bound, loaded, run_alone
from programs import GENERATED, UNGATED, condition, edit, numbers, prompt, readout_kind, shapes
from test_against_oracle import config
from tiny_models import FAMILIES

from patchclamp_kernels.runtime import reference_only
from patchclamp_server.engine.engine import Engine
from patchclamp_server.engine.executors.kernel_executor import KernelExecutor
from patchclamp_server.engine.reducers.sums import Sums
from patchclamp_server.engine.request import Event, Reduction, Request, StopParams
from patchclamp_server.errors import Aborted, InvalidArgument
from patchclamp_server.interventions.program import (
    AbortCondition,
    AddVector,
    Comparison,
    Edit,
    Gate,
    NeuronEdit,
    NeuronOp,
    NeuronReadout,
    Program,
    ProjectionReadout,
    Readout,
    TopNeuronsReadout,
    Vector,
)
from patchclamp_server.model.sites import PREACTIVATION_SITES, Site

LENGTH = 17
KINDS = ("neurons_set", "neurons_scale", "neurons_add", "neurons_clamp", "add")
# On all families by operators, on one of each wiring of the MLP by the kernels' references.
ENGINES = [(family, False) for family in FAMILIES] + [(family, True) for family in ("llama", "phi3", "gemma2", "gpt2")]


@pytest.fixture(autouse=True)
def _by_references() -> Iterator[None]:
    """The kernels themselves run in test_kernels_interpreted.py."""
    with reference_only():
        yield


def sites(family: str) -> tuple[Site, ...]:
    return tuple(site for site in PREACTIVATION_SITES if site in shapes(family).sites)


def edited(family: str) -> list[Job]:
    """A request for each kind of edit at each site, at several layers and in several scopes."""
    s = shapes(family)
    where = ({"all_layers": True}, {"layers": (2, 0), "scope": GENERATED}, {"layers": (1,), "strength": 0.5})
    return [
        Job(
            prompt(f"{family} {kind} {site}", LENGTH - number % 3),
            Program((edit(kind, site, s, **where[number % 3]),)),
            max_tokens=4,
        )
        for site in sites(family)
        for number, kind in enumerate(KINDS)
    ]


@pytest.mark.parametrize(("family", "kernels"), ENGINES)
def test_every_edit_at_every_site_of_a_mixed_batch_with_chunked_prefill(family: str, kernels: bool) -> None:
    """Receipts too: they count the rows and layers that the oracle edits."""
    jobs = [*edited(family), Job(prompt(f"{family} plain", LENGTH), max_tokens=4)]
    with Bench(family, config(kernels=kernels, max_tokens_per_step=2 * LENGTH + 5)) as bench:
        for asked, outcome in zip(jobs, bench.run(jobs), strict=True):
            assert_same(family, asked, outcome)


@pytest.mark.parametrize("kernels", [False, True], ids=["operators", "kernels"])
@pytest.mark.parametrize("family", FAMILIES)
def test_an_unsteered_neighbour_keeps_its_bits(family: str, kernels: bool) -> None:
    plain = Job(prompt(f"{family} neighbour", LENGTH), max_tokens=4)
    steered = edited(family)

    def neighbour(others: list[Job]) -> Outcome:
        with Bench(family, config(kernels=kernels, decode_graphs=kernels)) as bench:
            return bench.run([*others, plain])[-1]

    beside, before = neighbour(steered), neighbour([replace(job, program=None) for job in steered])
    assert beside.tokens == before.tokens
    assert all(torch.equal(a, b) for a, b in zip(beside.logits, before.logits, strict=True))


@pytest.mark.parametrize("kernels", [False, True], ids=["operators", "kernels"])
@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_read_is_what_hooks_on_the_projections_see_after_their_edits(family: str, kernels: bool) -> None:
    s = shapes(family)
    edits = tuple(edit("neurons_scale", site, s, name=site.value, all_layers=True) for site in sites(family))
    readouts = tuple(
        Readout(readout_kind(name, site, s), site, f"{name} at {site.value}", all_layers=True)
        for site in sites(family)
        for name in ("projection", "neurons", "top_neurons")
    )
    jobs = [
        Job(prompt(f"{family} reads", LENGTH), Program(edits, readouts), max_tokens=3),
        Job(prompt(f"{family} reads on", LENGTH), Program((), readouts), max_tokens=3),
    ]
    with Bench(family, config(kernels=kernels, max_tokens_per_step=LENGTH + 3)) as bench:
        for asked, outcome in zip(jobs, bench.run(jobs), strict=True):
            assert_same(family, asked, outcome)
            assert len({value.name for value in outcome.readouts}) == len(readouts)


@pytest.mark.parametrize("latched", [False, True], ids=["per token", "latched"])
@pytest.mark.parametrize("kernels", [False, True], ids=["operators", "kernels"])
def test_the_gates_of_neurons_open_an_edit_of_their_ups_in_the_same_block(kernels: bool, latched: bool) -> None:
    s = shapes("llama")
    opens = Gate(condition(Site.MLP_GATE, 1, s, "gates", threshold=0.5), latched=latched)
    asked = Job(prompt("gated up", LENGTH), Program((edit("add", Site.MLP_UP, s, gate=opens),)), max_tokens=4)
    outcome = run_alone("llama", asked, config(kernels=kernels, max_tokens_per_step=7))
    assert_same("llama", asked, outcome)
    assert 0 < outcome.end().receipt.edits[0].rows < LENGTH + 3 + latched


@pytest.mark.parametrize("kernels", [False, True], ids=["operators", "kernels"])
def test_a_request_is_aborted_by_what_a_gate_shows(kernels: bool) -> None:
    examined = condition(Site.MLP_GATE, 1, shapes("llama"), "abort", scope=GENERATED)
    read = Readout(
        ProjectionReadout((replace(examined.vector, unit=True),)), Site.MLP_GATE, layers=(1,), scope=GENERATED
    )
    asked = Job(prompt("aborted", LENGTH), Program(readouts=(read,)), max_tokens=4)
    first = run_alone("llama", asked, config()).readouts[0].values[0]
    comparison = Comparison.ABOVE if first > 0 else Comparison.BELOW
    stop = AbortCondition("gate", replace(examined, comparison=comparison, threshold=first / 2))
    outcome = run_alone("llama", replace(asked, program=Program(abort_when=(stop,))), config(kernels=kernels))
    assert isinstance(outcome.error, Aborted)
    assert len(outcome.tokens) == 1


@pytest.mark.parametrize("kernels", [False, True], ids=["operators", "kernels"])
@pytest.mark.parametrize("site", PREACTIVATION_SITES)
def test_a_reducer_gets_the_preactivations_of_a_prompt(site: Site, kernels: bool) -> None:
    tokens, events, reducer = prompt("reduced", LENGTH), list[Event](), Sums((0, 2))
    engine = Engine(loaded("llama"), config(kernels=kernels, max_tokens_per_step=7))
    stop = StopParams(max_tokens=0)
    engine.submit(Request(tokens, events.append, stop=stop, reductions=(Reduction(site, reducer),)))
    while engine.step():
        pass
    d_ff = shapes("llama").d_ff
    every = Readout(NeuronReadout(tuple(range(d_ff))), site, layers=(0, 2))
    read = run_alone("llama", Job(tokens, Program(readouts=(every,)), max_tokens=1), config()).readouts
    for layer in (0, 2):
        expected = torch.tensor([value.values for value in read if value.layer == layer]).double().sum(0)
        torch.testing.assert_close(reducer.sum(layer), expected, rtol=1e-4, atol=1e-4)


def graphs_of(bench: Bench) -> list[bool]:
    """Of the graphs that were made, whether they launch edits of pre-activations."""
    executor = bench.engine.executor
    assert isinstance(executor, KernelExecutor)
    assert executor.graphs is not None
    return [key.preactivations for key in executor.graphs._graphs]


@pytest.mark.parametrize("kind", ["neurons_clamp", "add"])
def test_decode_steps_with_such_edits_are_replayed_by_graphs_of_their_own(kind: str) -> None:
    asked = Job(prompt("graph", LENGTH), Program((edit(kind, Site.MLP_UP, shapes("llama")),)), max_tokens=4)
    plain = Job(prompt("plain graph", LENGTH), max_tokens=4)
    with Bench("llama", config(kernels=True, decode_graphs=True)) as bench:
        assert_same("llama", plain, bench.run([plain])[0])
        assert graphs_of(bench) == [False]
        assert_same("llama", asked, bench.run([asked])[0])
        assert graphs_of(bench) == [False, True]


def test_an_edit_that_passes_the_range_is_named_where_it_was_made() -> None:
    far = Edit(NeuronEdit((3,), op=NeuronOp.SET, values=(3e38,)), Site.MLP_UP, layers=(1,), strength=3.0)
    for kernels in (False, True):
        outcome = run_alone("llama", Job(prompt("far", LENGTH), Program((far,))), config(kernels=kernels))
        assert "mlp_up of layer 1" in str(outcome.error)


@pytest.mark.parametrize("family", UNGATED)
def test_the_gate_of_a_model_without_one_is_refused_by_the_field(family: str) -> None:
    with pytest.raises(InvalidArgument, match=r"has no site mlp_gate; it has .*mlp_up, mlp_post") as refused:
        bound(family, Job((1,), Program((Edit(NeuronEdit((3,), values=(1.0,)), Site.MLP_GATE, layers=(0,)),))))
    assert refused.value.field == "program.edits[0].site"


@pytest.mark.parametrize(("family", "has"), [("llama", "mlp_gate, mlp_up, mlp_post"), ("gpt2", "mlp_up, mlp_post")])
def test_neurons_are_refused_at_other_sites_and_told_where_they_are(family: str, has: str) -> None:
    edits = Program((Edit(NeuronEdit((3,), values=(1.0,)), Site.MLP_OUT, layers=(0,)),))
    for kind in (NeuronReadout((3,)), TopNeuronsReadout(2)):
        with pytest.raises(InvalidArgument, match=f"neurons are read at {has}, not resid_post"):
            bound(family, Job((1,), Program(readouts=(Readout(kind, Site.RESID_POST, layers=(0,)),))))
    with pytest.raises(InvalidArgument, match=f"neurons are edited at {has}, not mlp_out") as refused:
        bound(family, Job((1,), edits))
    assert refused.value.field == "program.edits[0].site"


def test_numbers_of_a_width_other_than_the_neurons_are_refused() -> None:
    narrow = Edit(AddVector(Vector(values=numbers("narrow", 3))), Site.MLP_GATE, layers=(0,))
    with pytest.raises(InvalidArgument, match="width 3 does not fit mlp_gate"):
        bound("llama", Job((1,), Program((narrow,))))
