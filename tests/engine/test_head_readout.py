"""Where heads look: the key with the largest probability of each head, and that probability, against eager attention
of transformers with its whole matrix kept."""

from collections.abc import Iterator

import pytest
import torch
from engine_runs import Bench, Job, assert_same, bound, loaded
from programs import GENERATED, PROMPT, edit, prompt, scope, shapes
from test_kernel_executor import graphs_of
from test_operator_count import OperatorCount
from tiny_models import FAMILIES, WINDOW

from patchclamp_kernels.runtime import reference_only
from patchclamp_server.engine.config import EngineConfig
from patchclamp_server.engine.engine import Engine
from patchclamp_server.engine.request import Request, StopParams
from patchclamp_server.errors import InvalidArgument
from patchclamp_server.interventions.bind import bind
from patchclamp_server.interventions.program import Edit, HeadEdit, HeadReadout, Program, Readout, Scope, TokenSelector
from patchclamp_server.model.sites import Site

# Longer than the sliding windows, and not a multiple of the blocks.
LENGTH, BLOCK = 22, 4
EVERY_TOKEN = Scope()
# The rows that generate a token.
GENERATING = scope(TokenSelector(last_k=1), *GENERATED.include)
EXECUTORS = ("operators", "kernels")


@pytest.fixture(autouse=True)
def references() -> Iterator[None]:
    with reference_only():
        yield


def heads(*named: int, name: str = "heads", tokens: Scope = EVERY_TOKEN, **options: object) -> Readout:
    options = options or {"all_layers": True}
    return Readout(HeadReadout(named), Site.ATTN_Z, name, scope=tokens, **options)  # type: ignore[arg-type]


def uniform(*named: int, **options: object) -> Edit:
    return Edit(HeadEdit(named, uniform=True), Site.ATTN_Z, "uniform", all_layers=True, **options)  # type: ignore[arg-type]


def config(executor: str, **options: int | bool) -> EngineConfig:
    kernels = executor == "kernels"
    return EngineConfig(kv_block_size=BLOCK, kv_cache_tokens=1024, kernels=kernels, decode_graphs=kernels, **options)  # type: ignore[arg-type]


def programs(family: str) -> list[Program]:
    """All heads everywhere; some heads of some layers where a token is generated; and of edited attention."""
    s = shapes(family)
    return [
        Program(readouts=(heads(),)),
        Program(readouts=(heads(3, 0, layers=(2, 0), tokens=GENERATING),)),
        Program(
            (uniform(1, 2, strength=0.5, scope=PROMPT), edit("add", Site.RESID_PRE, s, layers=(0,))),
            (heads(name="prompt", layers=(1,), tokens=PROMPT), heads(2, name="generated", tokens=GENERATED)),
        ),
    ]


def jobs(family: str) -> list[Job]:
    return [Job(prompt(f"{family} {i}", LENGTH), program) for i, program in enumerate(programs(family))]


@pytest.mark.parametrize("executor", EXECUTORS)
@pytest.mark.parametrize("family", FAMILIES)
def test_alone_chunked_and_on_a_prefix_cache_hit(family: str, executor: str) -> None:
    for asked in jobs(family):
        with Bench(family, config(executor, max_tokens_per_step=5)) as bench:
            assert_same(family, asked, bench.run([asked])[0])
            assert_same(family, asked, bench.run([asked])[0], reuse=True)


@pytest.mark.parametrize("executor", EXECUTORS)
@pytest.mark.parametrize("family", FAMILIES)
def test_in_a_batch_each_request_gets_its_own_heads_layers_and_tokens(family: str, executor: str) -> None:
    """Prompts come one after the other, so that chunks and decode steps meet."""
    batch = [*jobs(family), Job(prompt(f"{family} plain", 7), None)]
    with Bench(family, config(executor, max_tokens_per_step=LENGTH + 9)) as bench:
        for asked, outcome in zip(batch, bench.run(batch), strict=True):
            assert_same(family, asked, outcome)


@pytest.mark.parametrize("executor", EXECUTORS)
def test_rows_that_are_computed_again_after_a_preemption_are_read_once(executor: str) -> None:
    asked, rival = jobs("llama")[0], Job(prompt("rival", LENGTH), None)
    kernels = executor == "kernels"
    tight = EngineConfig(kv_block_size=BLOCK, kv_cache_tokens=12 * BLOCK, kernels=kernels, decode_graphs=kernels)
    with Bench("llama", tight) as bench:
        _, preempted = bench.run([rival, asked])
    assert preempted.end().usage.preemptions > 0
    assert_same("llama", asked, preempted)


@pytest.mark.parametrize("executor", EXECUTORS)
def test_the_last_token_of_a_prompt_that_is_all_in_the_cache_is_still_read(executor: str) -> None:
    asked = Job(prompt("cached", 5 * BLOCK), Program(readouts=(heads(1, tokens=GENERATING),)))
    with Bench("qwen2", config(executor)) as bench:
        bench.run([Job(asked.prompt, None)])
        outcome = bench.run([asked])[0]
    assert outcome.end().usage.cached_prompt_tokens == 4 * BLOCK
    assert min(value.position for value in outcome.readouts) == len(asked.prompt) - 1
    assert_same("qwen2", asked, outcome)


@pytest.mark.parametrize("executor", EXECUTORS)
@pytest.mark.parametrize("family", ["llama", "mistral", "gemma2"])
def test_of_equal_keys_the_first_that_is_visible_counts(family: str, executor: str) -> None:
    """Uniform heads find all keys equal."""
    everywhere = Program((uniform(0, 1, 2, 3),), (heads(),))
    with Bench(family, config(executor, max_tokens_per_step=9)) as bench:
        values = bench.run([Job(prompt(f"{family} equal", LENGTH), everywhere)])[0].readouts
    windows = loaded(family).decoder.spec.windows
    assert windows[0] in (0, WINDOW)
    for value in values:
        window = windows[value.layer]
        first = max(0, value.position - window + 1) if window else 0
        assert value.ids == (first,) * 4
        assert value.values == pytest.approx([1 / (value.position + 1 - first)] * 4)


@pytest.mark.parametrize("executor", EXECUTORS)
@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_reading_changes_no_bit_of_what_is_read_nor_of_its_neighbour(family: str, executor: str) -> None:
    plain = Job(prompt("neighbour", LENGTH), None)
    logits = []
    for program in (Program(), Program(readouts=(heads(),))):
        with Bench(family, config(executor, max_tokens_per_step=LENGTH + 9)) as bench:
            logits.append([outcome.logits for outcome in bench.run([Job(prompt("read", LENGTH), program), plain])])
    for read, unread in zip(*logits, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(read, unread, strict=True))


def test_reading_all_layers_at_a_decode_step_costs_as_many_operators_as_reading_one() -> None:
    counts = []
    for options in ({"layers": (1,)}, {"all_layers": True}):
        engine = Engine(loaded("llama"), config("operators"))
        program = bound("llama", Job((), Program(readouts=(heads(tokens=GENERATING, **options),))))
        for i in range(5):
            stop = StopParams(max_tokens=8, ignore_eos=True)
            engine.submit(Request((3, 5 + i, 9), lambda event: None, program=program, stop=stop))
        # Prefill, and the first decode step, whose memory is kept.
        assert engine.step()
        assert engine.step()
        with OperatorCount() as counter:
            engine.step()
        counts.append(counter.n)
    assert counts[0] == counts[1]


def test_decode_steps_that_read_heads_run_in_graphs_of_their_own() -> None:
    reading = Program(readouts=(heads(tokens=GENERATING),))
    with Bench("llama", config("kernels")) as bench:
        bench.run([Job(prompt(f"p{i}", 9), reading) for i in range(3)])
        assert {(key.rows, key.peaks) for key in graphs_of(bench)._graphs} == {(4, True)}
        bench.run([Job(prompt("unread", 9), None)])
        assert {(key.rows, key.peaks) for key in graphs_of(bench)._graphs} == {(4, True), (1, False)}


def test_uniform_heads_run_in_graphs_too() -> None:
    asked = Job(prompt("uniform", 9), Program((uniform(0, 3),)))
    with Bench("llama", config("kernels")) as bench:
        assert_same("llama", asked, bench.run([asked])[0])
        assert {(key.attn_q, key.attn_z) for key in graphs_of(bench)._graphs} == {(True, False)}


@pytest.mark.parametrize(
    ("part", "field"),
    [
        (Readout(HeadReadout(), Site.ATTN_OUT, layers=(0,)), "program.readouts[0].site"),
        (Readout(HeadReadout(), Site.ATTN_Q, layers=(0,)), "program.readouts[0].site"),
        (heads(1, 4), "program.readouts[0].heads.heads[1]"),
        (heads(1, 1), "program.readouts[0].heads.heads"),
        (Edit(HeadEdit((1,), uniform=True), Site.ATTN_Q, layers=(0,)), "program.edits[0].site"),
        (Edit(HeadEdit((9,), uniform=True), Site.ATTN_Z, layers=(0,)), "program.edits[0].heads.heads[0]"),
    ],
)
def test_refused(part: Edit | Readout, field: str) -> None:
    program = Program((part,)) if isinstance(part, Edit) else Program(readouts=(part,))
    with pytest.raises(InvalidArgument) as refusal:
        bind(program, loaded("llama").info)
    assert refusal.value.field == field
