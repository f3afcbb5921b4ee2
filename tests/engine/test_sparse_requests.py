"""Sparse requests through the engine: what each policy means, alone and among others, however it is scheduled.

The truth of a set is the oracle (plain transformers with hooks) with the other neurons set to 0 in the generated
tokens; that of a policy that selects for each token is its meaning with dense products and masks (tests/sparsity).
"""

import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from autoencoders import put_autoencoder
from engine_runs import TOLERANCE, Bench, Job, Outcome, assert_same, run_alone
from programs import GENERATED, PROMPT, abort, condition, edit, mixed, prompt, shapes
from sparse_models import NAMES, bound, run, sparse_model

from patchclamp_kernels.runtime import reference_only
from patchclamp_server.artifacts.store import ArtifactStore
from patchclamp_server.engine.config import EngineConfig
from patchclamp_server.engine.quality_guard import GuardState
from patchclamp_server.engine.request import QualityGuard, SparseInference, SparsityReport
from patchclamp_server.errors import Aborted
from patchclamp_server.interventions.kinds.features import FeatureEdit
from patchclamp_server.interventions.program import (
    AbortCondition,
    Comparison,
    Condition,
    Edit,
    Gate,
    NeuronEdit,
    NeuronOp,
    NeuronReadout,
    PositionRange,
    Program,
    ProjectionReadout,
    Readout,
    Scope,
    TokenSelector,
    TopNeuronsReadout,
    Vector,
)
from patchclamp_server.model.sites import NEURON_SITES, Site
from patchclamp_server.sparsity.policies import POLICIES
from patchclamp_server.sparsity.policies.dense import Dense
from patchclamp_server.sparsity.policies.static_set import StaticSet
from patchclamp_server.sparsity.policy import ONLY_ACTIVE, Cost, Selector, SequenceState

LENGTH, TOKENS = 22, 6
BLOCK = 4
EIGHT = ("dense", "exact_zero", "coreinfer_stability", "coreinfer_similarity", "griffin", "fovea", "cats", "teal")
KERNELS = [False, True]


@pytest.fixture(autouse=True)
def references() -> Iterator[None]:
    """Kernels run their torch references."""
    with reference_only():
        yield


def config(*, kernels: bool = False, **options: int | bool) -> EngineConfig:
    return EngineConfig(**{"kv_block_size": BLOCK, "kv_cache_tokens": 1024, "kernels": kernels, **options})  # type: ignore[arg-type]


def sparse(name: str, keep: float = 0.4, family: str = "llama", **options: object) -> SparseInference:
    return SparseInference(name, bound(POLICIES[name](keep_ratio=keep, **options), family))


def job(inference: SparseInference | None, seed: str = "", program: Program | None = None, **options: int) -> Job:
    asked = inference.policy if inference is not None else "dense"
    return Job(
        prompt(f"sparse {asked} {seed}", LENGTH), program, **{"max_tokens": TOKENS, **options}, sparsity=inference
    )


def report(outcome: Outcome) -> SparsityReport:
    found = outcome.end().sparsity
    assert found is not None
    return found


def assert_same_outcome(own: Outcome, other: Outcome) -> None:
    assert_same_outcome_of_tokens(own, other)
    for edit_, same in zip(own.end().receipt.edits, other.end().receipt.edits, strict=True):
        assert (edit_.rows, edit_.gate_firings) == (same.rows, same.gate_firings)


def half(family: str = "llama") -> dict[int, tuple[int, ...]]:
    model = sparse_model(family)
    return {layer: tuple(range(layer % 2, model.spec.d_ff, 2)) for layer in range(model.n_layers)}


def static(neurons: dict[int, tuple[int, ...]], family: str = "llama") -> SparseInference:
    return SparseInference("static_set", StaticSet(neurons=neurons).bind(sparse_model(family)))


def silenced(kept: dict[int, tuple[int, ...]], family: str = "llama") -> tuple[Edit, ...]:
    """Edits that set all neurons but those to 0 in the generated tokens."""
    d_ff = shapes(family).d_ff
    return tuple(
        Edit(
            NeuronEdit(tuple(sorted(set(range(d_ff)) - set(neurons))), values=(0.0,)),
            Site.MLP_POST,
            name=f"silence {layer}",
            layers=(layer,),
            scope=GENERATED,
        )
        for layer, neurons in kept.items()
        if len(neurons) < d_ff
    )


@pytest.mark.parametrize("kernels", KERNELS)
@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2", "opt", "gpt_neox"])
@pytest.mark.parametrize("name", NAMES)
def test_each_policy_means_what_its_masks_mean(name: str, family: str, kernels: bool) -> None:
    selector: Selector = bound(POLICIES[name](keep_ratio=0.4), family)
    asked = job(SparseInference(name, selector))
    outcome = run_alone(family, asked, config(kernels=kernels))
    tokens = torch.tensor([[*asked.prompt, *outcome.tokens]])
    expected, _ = run(sparse_model(family), tokens, LENGTH, [selector])
    logits = sparse_model(family).decoder.logits(expected[0])
    scale = logits.abs().max()
    # The first token comes from the dense prompt.
    for own, theirs in zip(outcome.logits[1:], logits, strict=False):
        assert (own - theirs).abs().max() <= TOLERANCE * scale


@pytest.mark.parametrize("kernels", KERNELS)
@pytest.mark.parametrize("name", [name for name in NAMES if name != "exact_zero"])
def test_keep_one_is_bit_identical_to_dense(name: str, kernels: bool) -> None:
    asked = job(sparse(name, 1.0))
    own = run_alone("llama", asked, config(kernels=kernels))
    dense = run_alone("llama", replace(asked, sparsity=None), config(kernels=kernels))
    assert own.tokens == dense.tokens
    assert all(torch.equal(a, b) for a, b in zip(own.logits, dense.logits, strict=True))
    assert report(own).active_ratio == 1.0


def test_exact_zeros_of_a_relu_model_change_nothing() -> None:
    asked = Job(prompt("relu", LENGTH), max_tokens=TOKENS, sparsity=sparse("exact_zero", family="opt"))
    own = run_alone("opt", asked, config())
    assert_same("opt", replace(asked, sparsity=None), own)
    assert 0.2 < report(own).active_ratio < 0.8


@pytest.mark.parametrize("kernels", KERNELS)
def test_eight_requests_with_eight_policies_equal_eight_solo_runs(kernels: bool) -> None:
    s = shapes("llama")
    program = Program((edit("neurons_set", Site.MLP_POST, s), edit("add", Site.RESID_PRE, s)))
    jobs = [job(sparse(name), program=program if i % 2 else None) for i, name in enumerate(EIGHT)]
    with Bench("llama", config(kernels=kernels)) as bench:
        together = bench.run(jobs)
    for asked, outcome in zip(jobs, together, strict=True):
        alone = run_alone("llama", asked, config(kernels=kernels))
        assert_same_outcome(outcome, alone)
        assert report(outcome).active_ratio == pytest.approx(report(alone).active_ratio, abs=1e-3)


@pytest.mark.parametrize("kernels", KERNELS)
def test_dense_and_steered_neighbours_keep_the_answers_of_the_oracle(kernels: bool) -> None:
    s = shapes("llama")
    plain = job(None, "plain")
    steered = job(None, "steered", Program((edit("add", Site.RESID_MID, s), edit("neurons_scale", Site.MLP_POST, s))))
    others = [job(sparse(name, 0.1), str(i)) for i, name in enumerate(("fovea", "cats", "griffin"))]
    with Bench("llama", config(kernels=kernels)) as bench:
        outcomes = bench.run([plain, *others, steered])
    assert_same("llama", plain, outcomes[0])
    assert_same("llama", steered, outcomes[-1])


@pytest.mark.parametrize("name", ["griffin", "coreinfer_similarity", "fovea", "teal", "static_set"])
@pytest.mark.parametrize("kernels", KERNELS)
def test_chunks_of_the_prompt_change_nothing(name: str, kernels: bool) -> None:
    asked = job(sparse(name))
    whole = run_alone("llama", asked, config(kernels=kernels))
    assert_same_outcome(run_alone("llama", asked, config(kernels=kernels, max_tokens_per_step=5)), whole)


@pytest.mark.parametrize("name", ["griffin", "coreinfer_similarity", "fovea", "teal", "static_set"])
@pytest.mark.parametrize("kernels", KERNELS)
def test_preemption_changes_nothing(name: str, kernels: bool) -> None:
    """What the policy knew of the prompt is made again, and generated tokens are computed sparsely again."""
    asked, rival = job(sparse(name)), Job(prompt("rival", LENGTH), max_tokens=TOKENS)
    whole = run_alone("llama", asked, config(kernels=kernels))
    with Bench("llama", config(kernels=kernels, kv_cache_tokens=12 * BLOCK)) as bench:
        _, preempted = bench.run([rival, asked])
    assert preempted.end().usage.preemptions > 0
    assert_same_outcome(preempted, whole)
    assert report(preempted).sparse_tokens == report(whole).sparse_tokens


@pytest.mark.parametrize("kernels", KERNELS)
@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3", "gpt_neox"])
def test_a_set_equals_the_oracle_with_the_other_neurons_silenced(family: str, kernels: bool) -> None:
    kept = half(family)
    asked = Job(prompt("set", LENGTH), max_tokens=TOKENS, sparsity=static(kept, family))
    own = run_alone(family, asked, config(kernels=kernels))
    truth = run_alone(family, replace(asked, sparsity=None, program=Program(silenced(kept, family))), config())
    assert_same_outcome_of_tokens(own, truth)
    assert report(own).active_ratio == pytest.approx(0.5)


def assert_same_outcome_of_tokens(own: Outcome, other: Outcome) -> None:
    assert own.tokens == other.tokens
    scale = torch.stack(other.logits).abs().max()
    assert (torch.stack(own.logits) - torch.stack(other.logits)).abs().max() <= TOLERANCE * scale


@pytest.mark.parametrize("site", NEURON_SITES)
@pytest.mark.parametrize("kernels", KERNELS)
def test_clamped_and_watched_neurons_are_computed_whatever_the_policy_says(kernels: bool, site: Site) -> None:
    """Of an empty set they are all that is left: the edit works and the readout sees what a dense layer would give."""
    nothing: dict[int, tuple[int, ...]] = {0: (), 1: (), 2: ()}
    clamp = Edit(NeuronEdit((3, 7), values=(4.0,)), site, name="clamp", layers=(1,))
    watch = Readout(NeuronReadout((5, 2)), site, name="watch", layers=(0,), scope=GENERATED)
    asked = job(static(nothing), "forced", Program((clamp,), (watch,)))
    own = run_alone("llama", asked, config(kernels=kernels))
    kept = {0: (2, 5), 1: (3, 7), 2: ()}
    oracle = replace(asked, sparsity=None, program=Program((*silenced(kept), clamp), (watch,)))
    truth = run_alone("llama", oracle, config())
    assert_same_outcome_of_tokens(own, truth)
    for seen, expected in zip(own.readouts, truth.readouts, strict=True):
        assert seen.values == pytest.approx(expected.values, rel=1e-4)
        assert any(seen.values)
    assert own.end().receipt.edits[0].rows == truth.end().receipt.edits[-1].rows


NEVER = condition(Site.MLP_POST, 2, shapes("llama"), threshold=1e9)


@pytest.mark.parametrize(
    ("program", "layers"),
    [
        (Program((edit("add", Site.MLP_POST, shapes("llama")),)), {1}),
        (Program((edit("add", Site.MLP_UP, shapes("llama")),)), {1}),
        (Program((), (Readout(TopNeuronsReadout(4), Site.MLP_POST, name="top", layers=(0, 1, 2)),)), {0, 1, 2}),
        (Program((edit("add", Site.RESID_POST, shapes("llama"), layers=(2,), gate=Gate(NEVER)),)), {2}),
        (Program((), abort_when=(AbortCondition("never", NEVER),)), {2}),
    ],
    ids=["a direction", "a direction of ups", "the largest neurons", "a gate", "an abort condition"],
)
def test_layers_whose_neurons_are_all_needed_are_dense(program: Program, layers: set[int]) -> None:
    dense = job(None, "all", program)
    own = run_alone("llama", replace(dense, sparsity=sparse("griffin", 0.0)), config())
    if layers == {0, 1, 2}:
        assert_same("llama", dense, own)
    assert report(own).active_ratio == pytest.approx(len(layers) / 3)


@pytest.mark.parametrize("kernels", KERNELS)
def test_a_transcoder_reads_all_neurons_of_the_layer_before_it_whatever_the_policy_says(
    kernels: bool, tmp_path: Path
) -> None:
    store = ArtifactStore(tmp_path)
    ref = put_autoencoder(store, "llama", Site.MLP_POST, 1, output=(Site.MLP_OUT, 1))
    features = Edit(FeatureEdit(ref, (7, 0, 31), NeuronOp.SET, (2.0,)), Site.MLP_OUT, name="features", layers=(1,))
    nothing: dict[int, tuple[int, ...]] = {0: (), 1: (), 2: ()}
    asked = replace(job(static(nothing), "transcoder", Program((features,))), artifacts=store)
    own = run_alone("llama", asked, config(kernels=kernels))
    every = tuple(range(shapes("llama").d_ff))
    whole = run_alone("llama", replace(asked, sparsity=static({**nothing, 1: every})), config(kernels=kernels))
    assert_same_outcome(own, whole)
    assert report(own).active_ratio == pytest.approx(1 / 3)


@pytest.mark.parametrize("kernels", KERNELS)
def test_an_abort_condition_at_neurons_holds_where_they_are_computed_densely(kernels: bool) -> None:
    """Of an empty set the neurons would be 0, and so would what the condition examines."""
    program = abort(shapes("llama"), threshold=0.0)
    examined = condition(Site.MLP_POST, 1, shapes("llama"), "abort", scope=GENERATED)
    read = Readout(
        ProjectionReadout((replace(examined.vector, unit=True),)), Site.MLP_POST, layers=(1,), scope=GENERATED
    )
    kept: dict[int, tuple[int, ...]] = {0: (), 1: tuple(range(shapes("llama").d_ff)), 2: ()}
    asked = Job(prompt("abort at neurons", LENGTH), Program((*silenced(kept), *program.edits), (read,)), TOKENS)
    values = [value.values[0] for value in run_alone("llama", asked, config()).readouts]
    # Half-way between 0 and the first: it holds at the first generated token of the dense layer, and never of zeros.
    comparison = Comparison.ABOVE if values[0] > 0 else Comparison.BELOW
    fires = replace(examined, comparison=comparison, threshold=values[0] / 2)
    aborting = Program(program.edits, abort_when=(AbortCondition("at neurons", fires),))
    own = run_alone(
        "llama", replace(asked, program=aborting, sparsity=static({0: (), 1: (), 2: ()})), config(kernels=kernels)
    )
    assert isinstance(own.error, Aborted)
    assert len(own.tokens) == 1


def test_blocks_of_sparse_tokens_are_not_shared_and_prompts_are_where_they_need_not_be_seen() -> None:
    asked = job(sparse("fovea", 0.1), max_tokens=3 * BLOCK)
    with Bench("llama", config()) as bench:
        (first,) = bench.run([asked])
        again = Job((*asked.prompt, *first.tokens), max_tokens=2)
        (dense, fresh) = bench.run([again, asked])
        (unseen,) = bench.run([replace(asked, sparsity=sparse("griffin", 0.1))])
    assert_same("llama", again, dense, reuse=True)
    assert dense.end().usage.cached_prompt_tokens <= LENGTH
    assert fresh.end().usage.cached_prompt_tokens == LENGTH // BLOCK * BLOCK
    assert_same_outcome(fresh, first)
    assert unseen.end().usage.cached_prompt_tokens == 0


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("keep", [0.0, 0.5])
def test_a_prompt_of_one_token_and_an_empty_set_are_defined(name: str, keep: float) -> None:
    asked = Job((7,), max_tokens=4, sparsity=sparse(name, keep))
    outcome = run_alone("llama", asked, config())
    assert len(outcome.tokens) == 4
    assert report(outcome).sparse_tokens == 3
    if keep == 0.0 and name not in ("dense", "exact_zero"):
        assert report(outcome).active_ratio == 0.0


def test_positive_rankings_of_a_prompt_without_positive_activations_are_filled_up() -> None:
    """All-negative neurons have no core by value: the mean chooses as many as were asked for, and it is said."""
    negative = Program(
        tuple(
            Edit(
                NeuronEdit(tuple(range(80)), values=(-1.0,)),
                Site.MLP_POST,
                name=f"negative {layer}",
                layers=(layer,),
                scope=PROMPT,
            )
            for layer in range(3)
        )
    )
    inference = sparse("coreinfer_stability", 0.5, rank_by="value")
    outcome = run_alone("llama", job(inference, "negative", negative), config())
    assert report(outcome).sparse_tokens == TOKENS - 1
    assert report(outcome).filled_ratio == 1.0


@pytest.mark.parametrize("kernels", KERNELS)
def test_core_infer_after_a_prompt_of_one_token_computes_what_it_was_asked_for(kernels: bool) -> None:
    asked = Job((7,), max_tokens=4, sparsity=sparse("coreinfer_stability", 0.5))
    outcome = run_alone("llama", asked, config(kernels=kernels))
    assert report(outcome).active_ratio == pytest.approx(0.5)
    # Of 80 neurons 16 are the core of a token, and 24 more make the half.
    assert report(outcome).filled_ratio == pytest.approx(24 / 40)


@pytest.mark.parametrize("kernels", KERNELS)
def test_a_guard_that_is_not_hurt_samples_and_changes_nothing(kernels: bool) -> None:
    """Also receipts, readouts and a latched gate are those of the request without a guard."""
    asked = job(sparse("cats", 0.5), "guard", mixed(shapes("llama"))["gate latched"], max_tokens=12)
    plain = run_alone("llama", asked, config(kernels=kernels))
    assert asked.sparsity is not None
    watched = replace(asked.sparsity, guard=QualityGuard(max_divergence=1e9, sample_rate=0.5, window=2))
    guarded = run_alone("llama", replace(asked, sparsity=watched), config(kernels=kernels))
    assert guarded.tokens == plain.tokens
    assert all(torch.equal(a, b) for a, b in zip(guarded.logits, plain.logits, strict=True))
    assert guarded.end().receipt == plain.end().receipt
    assert guarded.readouts == plain.readouts
    found = report(guarded).guard
    assert found is not None
    assert (found.sampled_tokens, found.dense_from) == (5, None)
    assert found.mean_divergence > 0.0


@pytest.mark.parametrize("kernels", KERNELS)
def test_a_guard_samples_the_divergence_from_the_dense_model(kernels: bool) -> None:
    """Of the first generated token: everything before it was dense."""
    asked = job(sparse("griffin", 0.0), "divergence", max_tokens=2)
    assert asked.sparsity is not None
    guard = QualityGuard(max_divergence=1e9, sample_rate=1.0, window=1)
    own = run_alone("llama", replace(asked, sparsity=replace(asked.sparsity, guard=guard)), config(kernels=kernels))
    continued = Job((*asked.prompt, own.tokens[0]), max_tokens=1)
    dense = torch.log_softmax(run_alone("llama", continued, config()).logits[0].double(), 0)
    drifted = torch.log_softmax(own.logits[1].double(), 0)
    found = report(own).guard
    assert found is not None
    assert found.sampled_tokens == 1
    assert found.mean_divergence == pytest.approx(float((dense.exp() * (dense - drifted)).sum()), rel=1e-3)


def test_a_divergence_that_is_no_number_has_drifted() -> None:
    guard = GuardState(QualityGuard(max_divergence=1e9, sample_rate=1.0, window=2))
    assert not guard.add(0.1, True)
    assert not guard.add(0.1, True)
    assert guard.add(math.nan, False)


@pytest.mark.parametrize("kernels", KERNELS)
@pytest.mark.parametrize("preempted", [False, True])
def test_a_guard_that_is_hurt_falls_back_to_dense_and_says_so(kernels: bool, preempted: bool) -> None:
    kept: dict[int, tuple[int, ...]] = {0: (), 1: (), 2: ()}
    inference = replace(static(kept), guard=QualityGuard(max_divergence=1e-9, sample_rate=1.0, window=2))
    asked = job(inference, "fallback", max_tokens=10)
    rival = Job(prompt("rival", LENGTH), max_tokens=10)
    tight = {"kv_cache_tokens": 14 * BLOCK} if preempted else {}
    with Bench("llama", config(kernels=kernels, **tight)) as bench:
        _, own = bench.run([rival, asked])
    assert (own.end().usage.preemptions > 0) == preempted
    found = report(own)
    assert found.guard is not None
    # Samples at the first two generated tokens; the third is dense.
    assert found.guard.dense_from == LENGTH + 2
    assert (found.sparse_tokens, found.dense_tokens) == (2, 7)
    assert found.guard.sampled_tokens == 2
    both = Scope((TokenSelector(positions=PositionRange(LENGTH, LENGTH + 2)),))
    silent = tuple(replace(e, scope=both) for e in silenced(kept))
    truth = run_alone("llama", replace(asked, sparsity=None, program=Program(silent)), config())
    assert_same_outcome_of_tokens(own, truth)


@pytest.mark.parametrize("kernels", KERNELS)
def test_a_dense_sample_opens_no_latch(kernels: bool) -> None:
    """A gate whose condition holds at the first generated token of the dense model, and not of the sparse one."""
    s = shapes("llama")
    first = Scope((TokenSelector(positions=PositionRange(LENGTH, LENGTH + 1)),))
    vector = Vector(values=torch.nn.functional.normalize(torch.ones(s.sites[Site.MLP_OUT]), dim=0))
    read = Program((), (Readout(ProjectionReadout((vector,)), Site.MLP_OUT, name="p", layers=(0,), scope=first),))
    asked = job(static({0: (), 1: (), 2: ()}), "latch", read, max_tokens=4)
    projections = [
        run_alone("llama", replace(asked, sparsity=sparsity), config()).readouts[0].values[0]
        for sparsity in (None, asked.sparsity)
    ]
    above = projections[0] > projections[1]
    condition = Condition(
        Site.MLP_OUT,
        0,
        vector,
        Comparison.ABOVE if above else Comparison.BELOW,
        sum(projections) / 2,
        scope=first,
    )
    gated = Program((edit("add", Site.RESID_POST, s, gate=Gate(condition, latched=True)),))
    assert run_alone("llama", replace(asked, program=gated, sparsity=None), config()).end().receipt.edits[0].rows > 0
    assert asked.sparsity is not None
    guarded = replace(asked.sparsity, guard=QualityGuard(max_divergence=1e9, sample_rate=1.0, window=1))
    own = run_alone("llama", replace(asked, program=gated, sparsity=guarded), config(kernels=kernels))
    assert own.end().receipt.edits[0].rows == 0


class Recorder(Selector):
    """Selects nothing; counts the prompt tokens it saw when the prompt ended, in each layer."""

    def __init__(self) -> None:
        super().__init__(Dense(), sparse_model())
        self.seen: list[dict[int, int]] = []

    def observe_prompt(self, state: SequenceState, layer: int, neurons: torch.Tensor) -> None:
        state.statistics[layer] = state.statistics.get(layer, 0) + len(neurons)

    def end_prompt(self, state: SequenceState) -> None:
        self.seen.append(dict(state.statistics))

    def cost(self, layer: int, weight_bits: int = 16) -> Cost:
        return ONLY_ACTIVE


def test_a_prompt_that_is_preempted_in_its_middle_is_seen_once() -> None:
    recorder = Recorder()
    asked = Job(prompt("recorded", LENGTH), max_tokens=2, sparsity=SparseInference("recorder", recorder))
    # It grows while the other prompt is computed in parts, and takes the last blocks.
    rival = Job(prompt("rival", LENGTH), max_tokens=2 * TOKENS)
    with Bench("llama", config(kv_cache_tokens=12 * BLOCK, max_tokens_per_step=5, enable_prefix_cache=False)) as bench:
        _, own = bench.run([rival, asked])
    assert own.end().usage.preemptions > 0
    assert recorder.seen == [dict.fromkeys(range(3), LENGTH)]
