"""The logit lens of states, of what attention and the MLP add, and of single neurons: the numbers of plain transformers
with naive hooks, in mixed batches, in chunks, after a preemption, from the prefix cache, and under both executors."""

from collections.abc import Iterator

import pytest
import torch
from engine_runs import Bench, Job, assert_same, loaded, truth
from oracle_sites import contributions
from programs import GENERATED, PROMPT, edit, mixed, prompt, shapes
from test_against_oracle import BLOCK, config
from tiny_models import tiny_model

from patchclamp_kernels.runtime import reference_only
from patchclamp_server.engine.config import EngineConfig
from patchclamp_server.errors import InvalidArgument
from patchclamp_server.interventions.bind import bind
from patchclamp_server.interventions.program import ActivationReadout, LogitLensReadout, Program, Readout, Scope
from patchclamp_server.model.sites import Site


@pytest.fixture(autouse=True)
def references() -> Iterator[None]:
    with reference_only():
        yield


def jobs(family: str) -> list[Job]:
    """Programs that read states and contributions, of tokens or the largest, at several layers, beside edits."""
    s, last = shapes(family), shapes(family).n_layers - 1
    kinds = {
        "largest": LogitLensReadout(3),
        "tokens": LogitLensReadout(token_ids=(9, 2, 31)),
        "one token": LogitLensReadout(token_ids=(5,)),
    }
    neurons = {
        "largest": LogitLensReadout(2, neurons=(5, 0)),
        "tokens": LogitLensReadout(token_ids=(4, 8), neurons=(7, 3, s.d_ff - 1)),
    }
    every = tuple(
        Readout(kind, site, f"{name} {site.value}", layers=(0, last), scope=scope)
        for (name, kind), scope in zip(kinds.items(), (Scope(), PROMPT, GENERATED), strict=True)
        for site in (Site.RESID_PRE, Site.ATTN_OUT, Site.MLP_OUT)
    )
    single = tuple(Readout(kind, Site.MLP_POST, f"neurons {name}", all_layers=True) for name, kind in neurons.items())
    # Its last layer's edit moves the end of the stream, and with it the divisor.
    added = edit("add", Site.RESID_POST, s, layers=(0, last), strength=0.8)
    scaled = edit("neurons_scale", Site.MLP_POST, s, name="n", layers=(1,))
    programs = [
        Program((added,), every),
        Program(readouts=single),
        None,
        Program((added, scaled), single[::-1]),
        mixed(s)["many edits"],
    ]
    return [Job(prompt(f"{family} lens {i}", 11 + 3 * i), program, max_tokens=3) for i, program in enumerate(programs)]


@pytest.mark.parametrize("kernels", [False, True], ids=["operators", "kernels"])
@pytest.mark.parametrize("step", [512, 9], ids=["whole", "chunked"])
@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2", "gpt_neox"])
def test_a_mixed_batch(family: str, step: int, kernels: bool) -> None:
    asked = jobs(family)
    options = config(max_tokens_per_step=step, kernels=kernels, decode_graphs=kernels, enable_prefix_cache=False)
    with Bench(family, options) as bench:
        for job, outcome in zip(asked, bench.run(asked), strict=True):
            assert_same(family, job, outcome)


def test_the_numbers_are_the_same_bits_whatever_else_is_in_the_batch() -> None:
    asked = jobs("llama")
    options = config(max_tokens_per_step=9, enable_prefix_cache=False)
    with Bench("llama", options) as bench:
        among = bench.run(asked)
        alone = [bench.run([job])[0] for job in asked]
    for own, other in zip(alone, among, strict=True):
        assert sorted(own.readouts) == sorted(other.readouts)


def test_a_prompt_from_the_prefix_cache_gives_the_rows_in_scope() -> None:
    tokens = prompt("read twice", 4 * BLOCK + 1)
    read = Readout(LogitLensReadout(token_ids=(3, 4)), Site.MLP_OUT, "parts", all_layers=True)
    plain, reading = Job(tokens, None, max_tokens=2), Job(tokens, Program(readouts=(read,)), max_tokens=2)
    with Bench("llama", EngineConfig(kv_block_size=BLOCK)) as bench:
        bench.run([plain])
        [outcome] = bench.run([reading])
    assert_same("llama", reading, outcome)


def test_a_preempted_request_is_read_once() -> None:
    """Two requests fit the KV cache until they grow: the later one is preempted and computed again."""
    [asked] = jobs("llama")[:1]
    asked = Job(asked.prompt, asked.program, max_tokens=12)
    rival = Job(prompt("rival", len(asked.prompt)), None, max_tokens=14)
    with Bench("llama", EngineConfig(kv_block_size=BLOCK, kv_cache_tokens=32, enable_prefix_cache=False)) as bench:
        _, preempted = bench.run([rival, asked])
    assert preempted.end().usage.preemptions > 0
    assert_same("llama", asked, preempted)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2"])
def test_contributions_sum_to_the_logits(family: str) -> None:
    """With that of the embedding, which no readout gives, and the biases. Of gemma2 before its soft cap."""
    model, tokens = tiny_model(family), prompt("sum", 9)
    ids = (1, 17, 30)
    read = tuple(Readout(LogitLensReadout(token_ids=ids), site, site.value, all_layers=True) for site in SUMMANDS)
    with Bench(family, EngineConfig(enable_prefix_cache=False)) as bench:
        [outcome] = bench.run([Job(tokens, Program(readouts=read), max_tokens=1)])
    end, start = (hidden(family, tokens, place) for place in (Site.RESID_POST, Site.RESID_PRE))
    decoder = loaded(family).decoder
    biases = torch.zeros(len(ids), dtype=torch.double)
    if decoder.final_norm.bias is not None:
        biases += decoder.unembedding.rows(torch.tensor(ids)).double() @ decoder.final_norm.bias.double()
    for position in range(len(tokens)):
        total = biases + contributions(model, start[position], end[position])[list(ids)]
        for value in outcome.readouts:
            if value.position == position:
                total += torch.tensor(value.values, dtype=torch.double)
        expected = decoder.unembedding(decoder.final_norm(end[position : position + 1]))[0, list(ids)].double()
        assert torch.allclose(total, expected, atol=1e-4)


SUMMANDS = (Site.ATTN_OUT, Site.MLP_OUT)


def hidden(family: str, tokens: tuple[int, ...], site: Site) -> torch.Tensor:
    """Rows at the start or end of all blocks, by a readout of them."""
    layer = 0 if site is Site.RESID_PRE else shapes(family).n_layers - 1
    job = Job(tokens, Program(readouts=(Readout(ActivationReadout(), site, "rows", layers=(layer,)),)), max_tokens=1)
    values = sorted(truth(family, job).readouts, key=lambda value: value.position)
    return torch.tensor([value.values for value in values])


@pytest.mark.parametrize(
    ("kind", "site", "field"),
    [
        (LogitLensReadout(3), Site.ATTN_Z, "program.readouts[0].site"),
        (LogitLensReadout(3), Site.MLP_UP, "program.readouts[0].site"),
        (LogitLensReadout(3), Site.MLP_POST, "program.readouts[0].logit_lens.neurons"),
        (LogitLensReadout(3, neurons=(1,)), Site.MLP_OUT, "program.readouts[0].logit_lens.neurons"),
        (LogitLensReadout(3, neurons=(1, 9999)), Site.MLP_POST, "program.readouts[0].logit_lens.neurons[1]"),
        (LogitLensReadout(token_ids=(1, 9999)), Site.ATTN_OUT, "program.readouts[0].logit_lens.token_ids[1]"),
        (LogitLensReadout(9999), Site.ATTN_OUT, "program.readouts[0].logit_lens.k"),
    ],
)
def test_what_is_not_read_is_refused(kind: LogitLensReadout, site: Site, field: str) -> None:
    with pytest.raises(InvalidArgument) as error:
        bind(Program(readouts=(Readout(kind, site, layers=(0,)),)), loaded("llama").info)
    assert error.value.field == field
