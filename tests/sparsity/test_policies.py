"""What holds for every policy: exactness at keep 1, keep 0, forced neurons, neighbours, refusals."""

from dataclasses import replace

import pytest
import torch
from sparse_models import NAMES, bound, calibrated, dense_run, documents, profile, run, sparse_model

from patchclamp_server.analysis.documents import inputs_of, pools_for
from patchclamp_server.analysis.sparsity.calibrate import CALIBRATIONS
from patchclamp_server.errors import FailedPrecondition, InvalidArgument
from patchclamp_server.sparsity.apply import Rows, Step, forced_neurons
from patchclamp_server.sparsity.blocks import sparse_blocks
from patchclamp_server.sparsity.mlp import MlpInput
from patchclamp_server.sparsity.policies import POLICIES
from patchclamp_server.sparsity.policies.fovea import Fovea
from patchclamp_server.sparsity.policies.static_set import StaticSet
from patchclamp_server.sparsity.profile import Profile

PROMPT, TOKENS = 12, 24
CHANNEL_POLICIES = ("teal", "wina")


@pytest.mark.parametrize("name", [name for name in NAMES if name != "exact_zero"])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_keep_one_is_bit_identical_to_dense(name: str, family: str) -> None:
    model, tokens = sparse_model(family), documents(2, TOKENS)
    selector = bound(POLICIES[name](keep_ratio=1.0), family)
    sparse, _ = run(model, tokens, PROMPT, [selector] * 2)
    for ours, dense in zip(sparse, dense_run(model, tokens, PROMPT), strict=True):
        assert torch.equal(ours, dense)


def test_exact_zero_equals_dense_on_a_relu_model_and_skips_what_is_zero() -> None:
    model, tokens = sparse_model("opt"), documents(2, TOKENS)
    selector = bound(POLICIES["exact_zero"](), "opt")
    sparse, _ = run(model, tokens, PROMPT, [selector] * 2)
    for ours, dense in zip(sparse, dense_run(model, tokens, PROMPT), strict=True):
        assert torch.equal(ours, dense)
    mlp = MlpInput(torch.randn(5, model.spec.d_model), model.layers[0])
    selection = selector.select(selector.begin(), 0, mlp)
    assert selection is not None
    assert torch.equal(selection.active, mlp.neurons > 0)
    assert 0 < selection.active.sum() < selection.active.numel()


@pytest.mark.parametrize("name", [name for name in NAMES if name not in ("dense", "exact_zero", *CHANNEL_POLICIES)])
@pytest.mark.parametrize("keep", [0.0, 0.25])
def test_a_policy_keeps_the_share_it_was_asked_for(name: str, keep: float) -> None:
    policy = POLICIES[name](keep_ratio=keep)
    if isinstance(policy, Fovea):
        policy = replace(policy, budget="uniform")
    selector, model = bound(policy), sparse_model()
    _, (state,) = run(model, documents(1, TOKENS), PROMPT, [selector])
    mlp = MlpInput(torch.randn(6, model.spec.d_model), model.layers[1])
    selection = selector.select(state, 1, mlp)
    assert selection is not None
    assert selection.active.shape == (6, model.spec.d_ff)
    kept = selection.active.sum(1)
    assert bool((kept == round(keep * model.spec.d_ff)).all())


@pytest.mark.parametrize("name", CHANNEL_POLICIES)
def test_keep_zero_of_a_channel_policy_reads_no_input(name: str) -> None:
    selector = bound(POLICIES[name](keep_ratio=0.0))
    mask = selector.channels(0, "mlp_input", torch.randn(3, sparse_model().spec.d_model))
    assert mask is not None
    assert not mask.any()


@pytest.mark.parametrize("name", [name for name in NAMES if name not in CHANNEL_POLICIES])
def test_forced_neurons_are_computed_whatever_the_policy_says(name: str) -> None:
    """At keep 0 with every neuron forced, the output is that of the dense model."""
    model, tokens = sparse_model(), documents(1, TOKENS)
    everything = {layer: forced_neurons(range(model.spec.d_ff)) for layer in range(model.n_layers)}
    sparse, _ = run(model, tokens, PROMPT, [bound(POLICIES[name](keep_ratio=0.0))], everything)
    torch.testing.assert_close(sparse[0], dense_run(model, tokens, PROMPT)[0], rtol=0, atol=0)


@pytest.mark.parametrize("name", CHANNEL_POLICIES)
def test_forced_neurons_are_read_by_the_down_projection_of_channel_policies(name: str) -> None:
    """At keep 0 only forced neurons reach the residual stream, whatever the channels of the other products."""
    model, tokens, neurons = sparse_model(), documents(1, TOKENS), forced_neurons([3], [5, 3])
    step, selector = Step(), bound(POLICIES[name](keep_ratio=0.0))
    step.rows = [Rows(slice(0, TOKENS), selector, selector.begin(), forced={0: neurons})]
    decoder, products = model.decoder, sparse_blocks(model, step)
    decoder.forward(inputs_of(tokens, 0, TOKENS, decoder), pools_for(decoder, tokens), products=products)
    active, among = step.active[0, "mlp_output"]
    assert (int(active), among) == (2 * TOKENS, model.spec.d_ff * TOKENS)
    assert int(step.active[1, "mlp_output"][0]) == 0


def test_eight_rows_of_eight_policies_equal_eight_solo_runs() -> None:
    names = ["dense", "fovea", "cats", "griffin", "coreinfer_stability", "teal", "wina", "static_set"]
    model, tokens = sparse_model(), documents(8, TOKENS, seed=3)
    selectors = [bound(POLICIES[name](keep_ratio=0.4)) for name in names]
    together, _ = run(model, tokens, PROMPT, selectors)
    for i, selector in enumerate(selectors):
        alone, _ = run(model, tokens[i : i + 1], PROMPT, [selector])
        torch.testing.assert_close(together[i], alone[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_a_prompt_of_one_token_is_enough(name: str) -> None:
    sparse, _ = run(sparse_model(), documents(1, 9), 1, [bound(POLICIES[name](keep_ratio=0.5))])
    assert torch.isfinite(sparse[0]).all()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("keep", [-0.1, 1.1, float("nan")])
def test_a_share_outside_zero_to_one_is_refused(name: str, keep: float) -> None:
    with pytest.raises(InvalidArgument) as refusal:
        POLICIES[name](keep_ratio=keep)
    assert refusal.value.field == "sparsity.keep_ratio"


@pytest.mark.parametrize(
    ("name", "parameters", "field"),
    [
        ("coreinfer_stability", {"rank_by": "size"}, "rank_by"),
        ("coreinfer_stability", {"token_keep": 2.0}, "token_keep"),
        ("teal", {"allocation": "random"}, "allocation"),
        ("fovea", {"bits": 1}, "bits"),
        ("fovea", {"gate": "none"}, "gate"),
        ("fovea", {"budget": "none"}, "budget"),
        ("griffin", {"first_layer": -1}, "first_layer"),
        ("griffin", {"first_layer": 2, "end_layer": 1}, "end_layer"),
    ],
)
def test_a_parameter_that_means_nothing_is_refused_by_its_path(name: str, parameters: dict, field: str) -> None:
    with pytest.raises(InvalidArgument) as refusal:
        POLICIES[name](**parameters)
    assert refusal.value.field == f"sparsity.{field}"


@pytest.mark.parametrize("parameters", [{"keep_ratio": (0.5, 0.5)}, {"end_layer": 9}])
def test_what_does_not_fit_the_model_is_refused_when_it_is_bound(parameters: dict) -> None:
    with pytest.raises(InvalidArgument):
        POLICIES["griffin"](**parameters).bind(sparse_model())


def test_layers_outside_the_range_stay_dense() -> None:
    selector = bound(POLICIES["griffin"](keep_ratio=0.5, first_layer=1, end_layer=2))
    assert [selector.is_dense(layer) for layer in range(3)] == [True, False, True]


@pytest.mark.parametrize("name", CALIBRATIONS)
def test_a_profile_of_another_model_or_policy_is_refused(name: str) -> None:
    made = profile(name)
    assert made is not None
    for wrong in (replace(made, model_fingerprint="another"), replace(made, policy="another")):
        with pytest.raises(FailedPrecondition) as refusal:
            POLICIES[name]().bind(sparse_model(), wrong)
        assert refusal.value.field == "sparsity.profile"


@pytest.mark.parametrize("policy", [policy() for policy in POLICIES.values() if policy.needs_profile] + [StaticSet()])
def test_a_policy_that_needs_a_profile_says_so(policy) -> None:
    with pytest.raises(FailedPrecondition):
        policy.bind(sparse_model())


def test_a_profile_of_other_sketches_is_refused() -> None:
    with pytest.raises(FailedPrecondition):
        Fovea(bits=4).bind(sparse_model(), profile("fovea"))


def test_a_policy_without_a_profile_is_not_calibrated() -> None:
    with pytest.raises(InvalidArgument):
        calibrated(POLICIES["griffin"](), documents(2, 16))


def test_a_profile_is_named_tensors_and_a_card_that_is_json() -> None:
    import json

    made = profile("fovea")
    assert isinstance(made, Profile)
    assert {tensor.dtype for tensor in made.tensors.values()} == {torch.float32}
    assert json.loads(json.dumps(made.card))["calibration_tokens"] == 128


@pytest.mark.parametrize("name", ["fovea", "cats", "oracle", "exact_zero"])
def test_cost_counts_the_matrices_that_a_selector_reads_densely(name: str) -> None:
    selector, model = bound(POLICIES[name]()), sparse_model()
    mlp = MlpInput(torch.randn(2, model.spec.d_model), model.layers[0])
    selector.select(selector.begin(), 0, mlp)
    dense = len(mlp.read) / 3
    always = selector.cost(0, 16).always
    # What fovea reads instead is its low-bit copy: not free, but less than one matrix of three.
    assert always == pytest.approx(dense) if name != "fovea" else 0 < always < 1 / 3
    assert selector.cost(0, 16).bytes_read(1.0) <= 1.0 + always
