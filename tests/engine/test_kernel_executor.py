"""The engine on patchclamp_kernels gives the answers of plain transformers with naive hooks.

The ops run their torch references, so that every architecture and every kind of edit is seen: tables, launches and
bookkeeping are tested here, the kernels in tests/kernels, and both together in test_kernels_interpreted.py.
"""

import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace

import pytest
from engine_runs import TOLERANCE, Bench, Job, Outcome, assert_same, bound, loaded
from programs import EDIT_KINDS, PROMPT, edit, mixed, one_of_each_kind, prompt, shapes, sites_of
from test_against_oracle import BLOCK, CASES, PROMPT_LENGTH, config, job
from tiny_models import FAMILIES

from patchclamp_kernels.runtime import reference_only
from patchclamp_server.engine.config import EngineConfig
from patchclamp_server.engine.engine import Engine
from patchclamp_server.engine.executors.decode_graphs import COLUMNS, DecodeGraphs
from patchclamp_server.engine.executors.kernel_executor import KernelExecutor
from patchclamp_server.engine.request import Request, StopParams
from patchclamp_server.interventions.program import Program, Readout, TopNeuronsReadout
from patchclamp_server.model.sites import Site


@pytest.fixture(autouse=True)
def references() -> Iterator[None]:
    with reference_only():
        yield


def on_kernels(*, graphs: bool = True, **options: int | bool) -> EngineConfig:
    return config(kernels=True, decode_graphs=graphs, **options)


def graphs_of(bench: Bench) -> DecodeGraphs:
    executor = bench.engine.executor
    assert isinstance(executor, KernelExecutor)
    assert executor.graphs is not None
    return executor.graphs


@pytest.mark.drawn(0.3)
@pytest.mark.parametrize("first", range(0, len(CASES), 7))
@pytest.mark.parametrize("family", FAMILIES)
def test_eight_different_programs_with_chunked_prefill_and_padded_decode_steps(family: str, first: int) -> None:
    chosen = [CASES[(first + i) % len(CASES)] for i in range(7)]
    jobs = [job(family, case) for case in chosen] + [Job(prompt(f"{family} plain", PROMPT_LENGTH), Program())]
    with Bench(family, on_kernels(max_tokens_per_step=PROMPT_LENGTH + 9)) as bench:
        outcomes = bench.run(jobs)
        for case, asked, outcome in zip([*chosen, "plain"], jobs, outcomes, strict=True):
            try:
                assert_same(family, asked, outcome)
            except AssertionError as error:
                raise AssertionError(f"in the batch, {case}: {error}") from error


@pytest.mark.parametrize("kind", EDIT_KINDS)
@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt_neox"])
def test_each_kind_at_every_site(family: str, kind: str) -> None:
    """All sites at once, each in a request of its own."""
    s = shapes(family)
    jobs = [
        Job(prompt(f"{family} {kind} {site}", 14), Program((edit(kind, site, s),)), max_tokens=2)
        for site in sites_of(kind, s)
    ]
    with Bench(family, on_kernels(enable_prefix_cache=False)) as bench:
        for asked, outcome in zip(jobs, bench.run(jobs), strict=True):
            assert_same(family, asked, outcome)


@pytest.mark.parametrize("case", CASES)
def test_when_preempted(case: str) -> None:
    asked, rival = job("llama", case), Job(prompt("rival", PROMPT_LENGTH), Program())
    with Bench("llama", EngineConfig(kv_block_size=BLOCK, kv_cache_tokens=12 * BLOCK, kernels=True)) as bench:
        first, preempted = bench.run([rival, asked])
    assert preempted.end().usage.preemptions > 0
    assert_same("llama", rival, first)
    assert_same("llama", asked, preempted)


@pytest.mark.parametrize("case", CASES)
def test_on_a_prefix_cache_hit(case: str) -> None:
    asked = job("qwen3", case)
    with Bench("qwen3", on_kernels()) as bench:
        bench.run([Job(asked.prompt, asked.program, max_tokens=1)])
        assert_same("qwen3", asked, bench.run([asked])[0], reuse=True)


def test_a_changed_strength_counts_from_the_next_token_on_also_when_recomputed() -> None:
    """Both executors change the strength at the same token; rows before it are computed again with the old one."""
    program = Program((edit("add", Site.RESID_POST, shapes("llama"), name="a"),))
    asked, rival = Job(prompt("session", 14), program, max_tokens=10), Job(prompt("rival", 28), None, max_tokens=4)
    seen = []
    for kernels in (False, True):
        options = EngineConfig(
            kv_block_size=BLOCK, kv_cache_tokens=10 * BLOCK, enable_prefix_cache=False, kernels=kernels
        )
        engine, outcome, other = Engine(loaded("llama"), options), Outcome(), Outcome()
        engine.on_logits = lambda _, position, logits, outcome=outcome: outcome.logits.append(logits.clone())  # type: ignore[misc]
        stop = StopParams(max_tokens=asked.max_tokens, ignore_eos=True)
        request = engine.submit(Request(asked.prompt, outcome.on_event, program=bound("llama", asked), stop=stop))
        while len(outcome.tokens) < 4:
            assert engine.step()
        engine.set_strength(request, "a", 3.0)
        while len(outcome.tokens) < 7:
            assert engine.step()
        stop = StopParams(max_tokens=rival.max_tokens, ignore_eos=True)
        engine.submit(Request(rival.prompt, other.on_event, stop=stop))
        while engine.step():
            pass
        seen.append(outcome)
    plain, tables = seen
    assert tables.tokens == plain.tokens
    assert tables.end().receipt.edits[0].rows == plain.end().receipt.edits[0].rows
    for mine, theirs in zip(tables.logits, plain.logits, strict=True):
        assert (mine - theirs).abs().max() <= TOLERANCE * theirs.abs().max()


def test_an_unsteered_request_keeps_its_bits_whatever_its_neighbours_do() -> None:
    """Also next to a program that is observed between the kernels, for which launches are split."""
    plain = Job(prompt("plain", PROMPT_LENGTH), None)
    observed = Program(readouts=(Readout(TopNeuronsReadout(3), Site.MLP_POST, "top", layers=(0, 1)),))
    neighbours = {
        "nobody's edit": Program(),
        "every kind": Program(tuple(e for p in one_of_each_kind(shapes("llama")).values() for e in p.edits)),
        "observed": observed,
    }
    logits = {}
    for name, program in neighbours.items():
        with Bench("llama", on_kernels(graphs=False)) as bench:
            outcomes = bench.run([plain, Job(prompt("neighbour", PROMPT_LENGTH), program)])
        logits[name] = outcomes[0].logits
    for name in neighbours:
        assert all((a == b).all() for a, b in zip(logits[name], logits["nobody's edit"], strict=True)), name


def test_decode_steps_run_padded_and_those_that_need_more_do_not() -> None:
    s = shapes("llama")
    add = Program((edit("add", Site.RESID_POST, s),))
    observed = Program(readouts=(Readout(TopNeuronsReadout(3), Site.MLP_POST, "top", layers=(0,)),))
    with Bench("llama", on_kernels()) as bench:
        bench.run([Job(prompt(f"p{i}", 9), add) for i in range(3)])
        sizes = {key.rows for key in graphs_of(bench)._graphs}
        assert sizes == {4}
        bench.run([Job(prompt("observed", 9), observed)])
        assert {key.rows for key in graphs_of(bench)._graphs} == sizes


def test_a_program_with_more_conditions_than_a_graph_has_room_for_runs_without_one() -> None:
    s = shapes("llama")
    gated = mixed(s)["gate per token"].edits[0]
    repeated = tuple(replace(gated, name=f"gated {i}", strength=0.1) for i in range(COLUMNS + 1))
    asked = Job(prompt("many", 9), Program(repeated))
    with Bench("llama", on_kernels()) as bench:
        assert_same("llama", asked, bench.run([asked])[0])
        assert not graphs_of(bench)._graphs


def test_more_items_than_a_word_of_a_mask() -> None:
    s = shapes("llama")
    edits = tuple(
        edit("add", Site.RESID_POST, s, f"e{i}", name=f"e{i}", layers=(i % 3,), strength=0.05) for i in range(70)
    )
    asked = Job(prompt("seventy", 9), Program(edits), max_tokens=3)
    with Bench("llama", on_kernels()) as bench:
        assert_same("llama", asked, bench.run([asked])[0])


def test_graphs_are_captured_anew_when_a_table_has_grown() -> None:
    s = shapes("llama")
    with Bench("llama", on_kernels()) as bench:
        bench.run([Job(prompt("first", 9), Program((edit("add", Site.RESID_POST, s),)))])
        graphs = graphs_of(bench)
        before = next(iter(graphs._graphs.values()))
        rows = len(graphs.tables.bank(s.sites[Site.RESID_POST]).data)
        adds = [edit("add", Site.RESID_POST, s, f"{i}", name=f"{i}", all_layers=True) for i in range(rows // 3 + 1)]
        program = Program(tuple(adds))
        grown = Job(prompt("second", 9), program, max_tokens=2)
        bench.run([grown])
        assert len(graphs.tables.bank(s.sites[Site.RESID_POST]).data) > rows
        after = Job(prompt("third", 9), Program((edit("add", Site.RESID_POST, s),)))
        assert_same("llama", after, bench.run([after])[0])
        assert next(iter(graphs._graphs.values())) is not before


def test_all_that_programs_held_is_given_back() -> None:
    with Bench("llama", on_kernels()) as bench:
        bench.run([job("llama", case) for case in CASES[:6]])
        tables = graphs_of(bench).tables
        assert tables.n_held == 0
        for ranges in (tables._slots, tables._entries, tables._units):
            assert ranges.acquire(ranges.capacity) == 0


def test_a_step_in_which_a_readout_is_out_of_scope_is_not_observed() -> None:
    """Only the prompt is read: decode steps have nobody between the kernels, and are padded like any other."""
    readout = Readout(TopNeuronsReadout(3), Site.MLP_POST, "top", layers=(0,), scope=PROMPT)
    asked = Job(prompt("prompt only", 9), Program(readouts=(readout,)))
    with Bench("llama", on_kernels()) as bench:
        assert_same("llama", asked, bench.run([asked])[0])
        assert graphs_of(bench)._graphs


def test_a_server_on_a_cpu_never_imports_the_kernels() -> None:
    """They need Triton, which a machine without a GPU need not have."""
    code = "import sys, patchclamp_server.rpc.server; print('patchclamp_kernels' in sys.modules)"
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert output.stdout.strip() == "False"
