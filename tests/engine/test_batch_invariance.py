"""What a request is told does not depend on what else runs, bit by bit: not on the batch, on where its prompt was cut,
on preemption, or on the prefix cache."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path

import pytest
import torch
from engine_runs import Bench, Job, Outcome, run_alone
from programs import GENERATED, edit, mixed, one_of_each_kind, prompt, shapes
from tiny_models import FAMILIES

from patchclamp_server.engine.config import EngineConfig
from patchclamp_server.engine.engine import Engine
from patchclamp_server.engine.request import Event, Finished, Request, SamplingParams, StopParams, Token
from patchclamp_server.engine.sampler import SamplingRow, sample
from patchclamp_server.interventions.program import Program
from patchclamp_server.model.load import LoadedModel, load_model
from patchclamp_server.model.sites import Site

BLOCK = 4
PLAIN = EngineConfig(kv_block_size=BLOCK, kv_cache_tokens=1024, enable_prefix_cache=False)


def assert_same_bits(own: Outcome, alone: Outcome) -> None:
    assert own.tokens == alone.tokens
    assert torch.equal(torch.stack(own.logits), torch.stack(alone.logits))


@cache
def jobs(family: str) -> tuple[Job, ...]:
    every = list(one_of_each_kind(shapes(family)).values()) + list(mixed(shapes(family)).values())
    programs = [None, *every]
    return tuple(Job(prompt(f"{family} {i}", 5 + 3 * (i % 7)), programs[i]) for i in range(len(programs)))


@cache
def alone(family: str) -> list[Outcome]:
    return [run_alone(family, job, PLAIN) for job in jobs(family)]


@pytest.mark.parametrize("family", FAMILIES)
def test_every_kind_of_program_in_one_batch(family: str) -> None:
    with Bench(family, PLAIN) as bench:
        together = bench.run(jobs(family))
    for own, expected in zip(together, alone(family), strict=True):
        assert_same_bits(own, expected)


@pytest.mark.parametrize("family", FAMILIES)
def test_prompts_in_chunks(family: str) -> None:
    with Bench(family, replace(PLAIN, max_tokens_per_step=5)) as bench:
        for own, expected in zip(bench.run(jobs(family)), alone(family), strict=True):
            assert_same_bits(own, expected)


@pytest.mark.parametrize("family", FAMILIES)
def test_preemption(family: str) -> None:
    with Bench(family, replace(PLAIN, kv_cache_tokens=19 * BLOCK)) as bench:
        together = bench.run(jobs(family))
        assert bench.stats().preemptions
    for own, expected in zip(together, alone(family), strict=True):
        assert_same_bits(own, expected)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_prefix_cache(family: str) -> None:
    """Blocks that another request computed, in other chunks."""
    first, other = prompt(f"{family} shared", 23), prompt(f"{family} own", 6)
    job = Job(first + other, Program(edits=(edit("add", Site.RESID_POST, shapes(family), scope=GENERATED),)))
    expected = run_alone(family, job, PLAIN)
    with Bench(family, replace(PLAIN, enable_prefix_cache=True, max_tokens_per_step=7)) as bench:
        bench.run([Job(first + prompt(f"{family} another", 3))])
        again = bench.run([job, *jobs(family)[:5]])[0]
    assert again.end().usage.cached_prompt_tokens >= 5 * BLOCK
    assert_same_bits(again, expected)


@pytest.mark.parametrize("kv_dtype", ["bfloat16", "int8"])
@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_keys_in_fewer_bits(family: str, kv_dtype: str) -> None:
    """In one batch, in chunks, preempted, and from the prefix cache."""
    config = replace(PLAIN, kv_dtype=kv_dtype)
    own_jobs = jobs(family)[:8]
    expected = [run_alone(family, job, config) for job in own_jobs]
    for other in (
        config,
        replace(config, max_tokens_per_step=5),
        replace(config, kv_cache_tokens=15 * BLOCK),
        replace(config, enable_prefix_cache=True, max_tokens_per_step=7),
    ):
        with Bench(family, other) as bench:
            for _ in range(1 + other.enable_prefix_cache):
                for own, alone_outcome in zip(bench.run(own_jobs), expected, strict=True):
                    assert_same_bits(own, alone_outcome)
    exact = alone(family)[0]
    assert not torch.equal(expected[0].logits[0], exact.logits[0])
    assert (expected[0].logits[0] - exact.logits[0]).abs().max() < 0.05 * exact.logits[0].abs().max()


@dataclass(eq=False)
class Heard:
    tokens: list[tuple[int, float | None, tuple[tuple[int, float], ...]]] = field(default_factory=list)
    finished: bool = False

    def on_event(self, event: Event) -> None:
        if isinstance(event, Token):
            self.tokens.append((event.id, event.logprob, event.top_logprobs))
        self.finished = self.finished or isinstance(event, Finished)


def heard(model: LoadedModel, prompts: Sequence[tuple[int, ...]], size: int, sampling: SamplingParams) -> list[Heard]:
    """The prompts in batches of `size`."""
    engine = Engine(model, EngineConfig(max_tokens_per_step=40))
    every = []
    for start in range(0, len(prompts), size):
        batch = []
        for i, tokens in enumerate(prompts[start : start + size], start):
            own = Heard()
            asked = replace(sampling, seed=i)
            engine.submit(
                Request(tokens, own.on_event, sampling=asked, stop=StopParams(max_tokens=12, ignore_eos=True))
            )
            batch.append(own)
        while engine.step():
            pass
        every += batch
    assert all(own.finished for own in every)
    return every


@pytest.mark.parametrize(
    "sampling",
    [
        SamplingParams(logprobs=3),
        SamplingParams(temperature=1.5, logprobs=1),
        SamplingParams(temperature=1.0, top_p=0.9, top_k=50, repetition_penalty=1.2, logprobs=0),
    ],
    ids=["greedy", "hot", "nucleus"],
)
def test_texts_and_log_probabilities_of_the_embedded_model_in_batches_of_all_sizes(
    embedded_model: LoadedModel, sampling: SamplingParams
) -> None:
    """The same figures for 100 prompts and longer texts are benchmarks/invariance.py's."""
    text = embedded_model.tokenizer("Once upon a time there was a keeper of bees who lived by the sea and sold honey.")
    ids = tuple(text.input_ids)
    prompts = [ids[i : i + 3 + 2 * i] for i in range(8)]
    alone = heard(embedded_model, prompts, 1, sampling)
    for size in (2, 3, 8):
        for own, expected in zip(heard(embedded_model, prompts, size, sampling), alone, strict=True):
            assert own.tokens == expected.tokens


@pytest.fixture(scope="session")
def embedded_model() -> LoadedModel:
    return load_model("embedded")


def test_a_row_is_drawn_from_alike_whatever_the_other_rows() -> None:
    logits = 3 * torch.randn(40, 50257, generator=torch.Generator().manual_seed(0))
    kinds = [
        SamplingParams(temperature=1.5, logprobs=5),
        SamplingParams(temperature=0.7, top_p=0.95, logprobs=0),
        SamplingParams(temperature=1.0, top_k=100, min_p=0.01),
        SamplingParams(logprobs=2),
    ]
    rows = [SamplingRow(kinds[i % 4], i, (), tuple(range(i))) for i in range(40)]
    alone = [sample(logits[i : i + 1], rows[i : i + 1])[0] for i in range(40)]
    assert sample(logits, rows) == alone
    assert sample(logits[1:], rows[1:]) == alone[1:]


@pytest.mark.parametrize("config", [EngineConfig(kv_dtype="int8", kernels=True), EngineConfig(kv_dtype="float16")])
def test_an_engine_refuses_keys_that_nothing_reads(tiny_llama_dir: Path, config: EngineConfig) -> None:
    with pytest.raises(ValueError, match=f"kv_dtype {config.kv_dtype}"):
        Engine(load_model(str(tiny_llama_dir)), config)


def test_an_engine_promises_only_what_its_model_was_loaded_for(tiny_llama_dir: Path) -> None:
    model = load_model(str(tiny_llama_dir), batch_invariant=False)
    with pytest.raises(ValueError, match="batch_invariant"):
        Engine(model, EngineConfig(batch_invariant=True))
    assert not Engine(model).model.decoder.batch_invariant
    assert load_model(str(tiny_llama_dir)).decoder.batch_invariant
