"""What a watch sees of requests in the engine is what plain transformers computes, each token once.

And nothing of the requests is changed by it.
"""

import numpy as np
import pytest
import torch
from engine_runs import TOLERANCE, Bench, Job, Outcome, loaded, run_alone
from numpy.typing import NDArray
from patience import PATIENCE_SECONDS
from programs import GENERATED, mixed, prompt, shapes
from sparse_models import bound, sparse_model
from watch_runs import Followed, expected_values, follow, neurons_watch, watch_of_everything

from patchclamp_server.engine.config import EngineConfig
from patchclamp_server.engine.request import Priority, QualityGuard, Request, SparseInference, StopParams
from patchclamp_server.interventions.program import NeuronReadout, Phase, Program, Readout
from patchclamp_server.model.sites import Site
from patchclamp_server.monitoring.registry import WatchRegistry
from patchclamp_server.monitoring.watch import WatchOptions
from patchclamp_server.sparsity.policies import POLICIES
from patchclamp_server.sparsity.policies.static_set import StaticSet

LENGTH, BLOCK, TOKENS = 22, 4, 6
EXECUTORS = ("operators", "kernels")
FAMILIES = ("llama", "gpt2", "opt", "gemma3", "gpt_neox")


def config(executor: str, **options: int | bool) -> EngineConfig:
    kernels = executor == "kernels"
    return EngineConfig(
        **{"kv_block_size": BLOCK, "kv_cache_tokens": 1024, "kernels": kernels, "decode_graphs": kernels, **options}
    )  # type: ignore[arg-type]


def submit(bench: Bench, name: str, **options: object) -> Outcome:
    """A request of which more is asked than a Job says."""
    outcome = Outcome()
    stop = StopParams(max_tokens=TOKENS, ignore_eos=True)
    bench.engine.submit(Request(prompt(name, LENGTH), outcome.on_event, stop=stop, **options))  # type: ignore[arg-type]
    return outcome


def jobs(family: str) -> list[Job]:
    programs = [None, mixed(shapes(family))["many edits"], mixed(shapes(family))["everything is read"]]
    return [Job(prompt(f"{family} watched {i}", LENGTH + i), program) for i, program in enumerate(programs)]


def assert_seen(family: str, followed: Followed, sequence: int, job: Job, outcome: Outcome, first: int = 0) -> None:
    """Positions from `first` on, but for the last token, which is never computed, and the first, which is a sink."""
    first = max(first, 1)
    tokens = [*job.prompt, *outcome.tokens][:-1]
    expected = expected_values(family, followed.watch, job, tokens)
    seen = followed.of(sequence)
    assert list(seen) == list(range(first, len(tokens)))
    values = np.stack(list(seen.values()))
    scale = np.maximum(1.0, np.abs(expected).max(axis=0))
    assert (np.abs(values - expected[first:]) <= TOLERANCE * scale).all()
    for position in seen:
        assert followed.token_ids[sequence, position] == tokens[position]
        assert followed.generated[sequence, position] == (position >= len(job.prompt))


def assert_statistics(bench: Bench, followed: Followed, name: str = "seen") -> None:
    """Of all values that were followed."""
    values: NDArray[np.float64] = np.stack(list(followed.values.values()))
    found = bench.engine.monitor.statistics(name)
    assert found.rows == len(values)
    assert found.tokens.tolist() == [len(values)] * values.shape[1]
    assert found.sums.fired.tolist() == (values > found.scale.thresholds).sum(axis=0).tolist()
    np.testing.assert_allclose(found.mean, values.mean(axis=0), rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(found.deviation, values.std(axis=0), rtol=1e-6, atol=1e-6)
    assert found.sums.min.tolist() == values.min(axis=0).tolist()
    assert found.sums.max.tolist() == values.max(axis=0).tolist()
    for item, own in enumerate(values.T):
        assert found.sums.histogram[item].tolist() == np.bincount(
            np.searchsorted(found.edges[item], own, side="left"), minlength=found.edges.shape[1] + 1
        ).tolist()  # fmt: skip


@pytest.mark.parametrize("executor", EXECUTORS)
@pytest.mark.parametrize("family", FAMILIES)
def test_values_after_all_edits_in_a_mixed_batch_with_chunked_prefill(family: str, executor: str) -> None:
    with Bench(family, config(executor, max_tokens_per_step=LENGTH + 9)) as bench:
        followed = follow(bench, watch_of_everything(family))
        asked = jobs(family)
        for sequence, (job, outcome) in enumerate(zip(asked, bench.run(asked), strict=True), start=1):
            assert_seen(family, followed, sequence, job, outcome)
        assert_statistics(bench, followed)


def assert_same_readouts(own: Outcome, plain: Outcome) -> None:
    """Bit for bit; but attention in a chunk of a prompt is found by a product, whose last bit depends on how many rows
    are asked about, by requests or by watches."""
    for value, other in zip(own.readouts, plain.readouts, strict=True):
        if "heads" in value.name:
            assert value[:3] + value[4:] == other[:3] + other[4:]
            np.testing.assert_allclose(value.values, other.values, rtol=1e-5)
        else:
            assert value == other


@pytest.mark.parametrize("executor", EXECUTORS)
@pytest.mark.parametrize("family", FAMILIES)
def test_watching_changes_no_bit(family: str, executor: str) -> None:
    """Also not that a watch starts and stops while the requests run."""

    def run(watched: bool) -> list[Outcome]:
        with Bench(family, config(executor, max_tokens_per_step=LENGTH + 9)) as bench:
            monitor = bench.engine.monitor
            if watched:
                follow(bench, watch_of_everything(family))

                def restart(request_id: int, position: int, logits: torch.Tensor) -> None:
                    kept(request_id, position, logits)
                    if position % 2:
                        monitor.start("sha256:x", neurons_watch(family), WatchOptions(f"w{request_id}-{position}"))
                    elif f"w{request_id}-{position - 1}" in [own.name for own in monitor.running()]:
                        monitor.stop(f"w{request_id}-{position - 1}")

                kept = bench.engine.on_logits
                assert kept is not None
                bench.engine.on_logits = restart
            return bench.run(jobs(family))

    for own, plain in zip(run(True), run(False), strict=True):
        assert own.tokens == plain.tokens
        assert all(torch.equal(a, b) for a, b in zip(own.logits, plain.logits, strict=True))
        assert_same_readouts(own, plain)
        assert own.end().receipt == plain.end().receipt


@pytest.mark.parametrize("family", FAMILIES)
def test_rows_are_copied_and_counted_in_the_same_way_by_torch_operators(family: str) -> None:
    """As they are on CUDA, where there are kernels."""
    with Bench(family, config("kernels", max_tokens_per_step=LENGTH + 9)) as bench:
        engine = bench.engine
        engine.monitor = engine.runner.monitor = WatchRegistry(
            loaded(family).decoder.spec, torch.device("cpu"), max_watches=1, max_items=100, compiled=False
        )
        followed = follow(bench, watch_of_everything(family))
        asked = jobs(family)
        for sequence, (job, outcome) in enumerate(zip(asked, bench.run(asked), strict=True), start=1):
            assert_seen(family, followed, sequence, job, outcome)
        assert_statistics(bench, followed)


@pytest.mark.parametrize("executor", EXECUTORS)
def test_a_token_that_is_computed_again_after_a_preemption_is_seen_once(executor: str) -> None:
    """The only place is taken from a request of low priority when it has generated two tokens."""
    with Bench("llama", config(executor, max_sequences=1, enable_prefix_cache=False)) as bench:
        followed = follow(bench, watch_of_everything("llama"))
        outcomes: list[Outcome] = []

        def interrupt(request_id: int, position: int, logits: torch.Tensor) -> None:
            if (request_id, position) == (1, LENGTH + 1):
                outcomes.append(submit(bench, "rival"))

        bench.engine.on_logits = interrupt
        outcomes.append(submit(bench, "preempted", priority=Priority.BATCH))
        bench.run([])
        assert outcomes[0].done.wait(PATIENCE_SECONDS)
        assert outcomes[0].end().usage.preemptions == 1
        for sequence, (name, outcome) in enumerate(zip(("preempted", "rival"), outcomes, strict=True), start=1):
            assert outcome.done.wait(PATIENCE_SECONDS)
            assert_seen("llama", followed, sequence, Job(prompt(name, LENGTH), None), outcome)


@pytest.mark.parametrize("executor", EXECUTORS)
def test_tokens_that_come_from_the_prefix_cache_are_not_seen(executor: str) -> None:
    asked = Job(prompt("cached", LENGTH), None)
    with Bench("llama", config(executor)) as bench:
        bench.run([asked])
        followed = follow(bench, watch_of_everything("llama"))
        outcome = bench.run([asked])[0]
        assert_seen("llama", followed, 2, asked, outcome, first=outcome.end().usage.cached_prompt_tokens)
        assert outcome.end().usage.cached_prompt_tokens == 5 * BLOCK


def test_generated_tokens_are_watched_unless_more_is_asked() -> None:
    asked = Job(prompt("phases", LENGTH), None)
    with Bench("llama", config("operators")) as bench:
        seen = {
            "default": follow(bench, neurons_watch(), "default", phases=WatchOptions("x").phases),
            "prompt": follow(bench, neurons_watch(), "prompt", phases=frozenset({Phase.PROMPT})),
            "both": follow(bench, neurons_watch(layer=0), "both"),
        }
        bench.run([asked])
        tokens = LENGTH + asked.max_tokens - 1
        assert list(seen["default"].of(1)) == list(range(LENGTH, tokens))
        assert list(seen["prompt"].of(1)) == list(range(1, LENGTH))
        assert list(seen["both"].of(1)) == list(range(1, tokens))
        found = {name: bench.engine.monitor.statistics(name) for name in seen}
        # The first token is an attention sink: it is counted, and is in no figure.
        assert {name: own.sinks for name, own in found.items()} == {"default": 0, "prompt": 1, "both": 1}
        assert {name: own.rows for name, own in found.items()} == {
            "default": asked.max_tokens - 1,
            "prompt": LENGTH - 1,
            "both": tokens - 1,
        }


def test_analysis_requests_and_baselines_are_not_watched() -> None:
    with Bench("llama", config("operators")) as bench:
        followed = follow(bench, neurons_watch())
        bench.engine.on_logits = None
        analysis = submit(bench, "analysis", priority=Priority.ANALYSIS)
        compared = submit(bench, "compared", compare_baseline=True)
        bench.run([])
        for outcome in (analysis, compared):
            assert outcome.done.wait(PATIENCE_SECONDS)
        # Each token of the second once, though its baseline computes it too.
        assert set(followed.values) == {(2, position) for position in range(1, LENGTH + TOKENS - 1)}


@pytest.mark.parametrize("executor", EXECUTORS)
def test_the_dense_steps_of_a_quality_guard_are_not_watched(executor: str) -> None:
    guard = QualityGuard(max_divergence=1e9, sample_rate=1.0, window=1)
    inference = SparseInference("cats", bound(POLICIES["cats"](keep_ratio=0.5)), guard=guard)
    with Bench("llama", config(executor)) as bench:
        followed = follow(bench, neurons_watch())
        outcome = bench.run([Job(prompt("guarded", LENGTH), None, TOKENS, sparsity=inference)])[0]
        report = outcome.end().sparsity
        assert report is not None
        assert report.guard is not None
        assert report.guard.sampled_tokens > 0
        assert list(followed.of(1)) == list(range(1, LENGTH + TOKENS - 1))


@pytest.mark.parametrize("executor", EXECUTORS)
def test_a_watched_neuron_is_never_dropped_by_a_sparse_policy(executor: str) -> None:
    """The set has no neuron of layer 1; reading one by a program computes it, and so does watching it."""
    d_ff = shapes("llama").d_ff
    kept = {0: tuple(range(d_ff)), 1: (0,), 2: tuple(range(d_ff))}
    inference = SparseInference("static_set", StaticSet(neurons=kept).bind(sparse_model("llama")))
    asked = Job(prompt("sparse", LENGTH), None, TOKENS, sparsity=inference)
    reading = Program(readouts=(Readout(NeuronReadout((7, 9)), Site.MLP_POST, layers=(1,), scope=GENERATED),))
    uncached = config(executor, enable_prefix_cache=False)
    read = run_alone("llama", Job(asked.prompt, reading, TOKENS, sparsity=inference), uncached)
    with Bench("llama", uncached) as bench:
        followed = follow(bench, neurons_watch(neurons=(7, 9)), phases=frozenset({Phase.GENERATED}))
        watched = bench.run([asked])[0]
        assert watched.tokens == read.tokens
        values = {value.position: value.values for value in read.readouts}
        seen = {position: tuple(row.tolist()) for position, row in followed.of(1).items()}
        assert seen == values
        assert all(value != 0.0 for row in seen.values() for value in row)
        # Without the watch they are dropped again, and other requests of the policy run as before.
        bench.engine.monitor.stop("seen")
        dropped = bench.run([asked])[0]
    plain = run_alone("llama", asked, uncached)
    assert all(torch.equal(a, b) for a, b in zip(dropped.logits, plain.logits, strict=True))
    assert not torch.equal(torch.stack(dropped.logits), torch.stack(watched.logits))


def test_a_watch_that_starts_in_the_middle_of_a_sparse_sequence_sees_its_neurons() -> None:
    kept = dict.fromkeys(range(3), (0,))
    inference = SparseInference("static_set", StaticSet(neurons=kept).bind(sparse_model("llama")))
    with Bench("llama", config("operators")) as bench:
        started: list[Followed] = []
        kept_logits = bench.engine.on_logits
        assert kept_logits is not None

        def start(request_id: int, position: int, logits: torch.Tensor) -> None:
            kept_logits(request_id, position, logits)
            if position == LENGTH + 2:
                started.append(follow(bench, neurons_watch(neurons=(7,))))

        bench.engine.on_logits = start
        bench.run([Job(prompt("sparse", LENGTH), None, TOKENS, sparsity=inference)])
        seen = started[0].of(1)
        assert list(seen) == list(range(LENGTH + 2, LENGTH + TOKENS - 1))
        assert all(float(row[0]) != 0.0 for row in seen.values())


@pytest.mark.parametrize("executor", EXECUTORS)
def test_requests_read_their_heads_while_others_are_watched(executor: str) -> None:
    """Attention is asked once for the rows and layers of both."""
    asked = Job(prompt("both", LENGTH), mixed(shapes("llama"))["everything is read"])
    alone = run_alone("llama", asked, config(executor))
    with Bench("llama", config(executor)) as bench:
        follow(bench, watch_of_everything("llama"), phases=frozenset({Phase.GENERATED}))
        assert_same_readouts(bench.run([asked])[0], alone)
