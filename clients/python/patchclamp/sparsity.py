"""Sparse inference of one request: which MLP neurons are computed while tokens are generated.

from patchclamp.sparsity import QualityGuard, Sparsity, cats, fovea

client.generate("I feel", sparsity=cats(keep_ratio=0.5))                         # a policy
client.generate("I feel", sparsity="my-profile")                                 # a calibrated profile, as it is
client.generate("I feel", sparsity=Sparsity("my-profile", fovea(keep_ratio=0.3), QualityGuard(max_divergence=0.1)))

One function a policy; sparse_policy.proto says what each computes. What is left out is the server's default.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, TypedDict, Unpack

from patchclamp.fields import build, build_as, instance, one_or_several, shown
from patchclamp.keywords import takes_options_of
from patchclamp.names import (
    CORE_INFER_RANKINGS,
    TEAL_ALLOCATIONS,
    CoreInferRankingName,
    TealAllocationName,
    value_or_unspecified,
)
from patchclamp.v1 import sparse_policy_pb2 as pb

FoveaBits = Literal[2, 3, 4, 8]


class LayerOptions(TypedDict, total=False):
    """Options of every policy: layers outside first_layer ≤ l < end_layer stay dense."""

    first_layer: int
    end_layer: int | None


class PolicyOptions(LayerOptions, total=False):
    """Options of policies that keep a share, besides LayerOptions.

    keep_ratio: share of neurons (teal, wina: of input channels) that is kept, or one share for each layer.
    """

    keep_ratio: float | Sequence[float] | None


def _layers(policy: pb.SparsePolicy, *, first_layer: int = 0, end_layer: int | None = None) -> pb.SparsePolicy:
    """Fills in what every policy has."""
    policy.MergeFrom(build(pb.SparsePolicy, first_layer=first_layer, end_layer=end_layer))
    return policy


@takes_options_of(_layers)
def _policy(
    policy: pb.SparsePolicy,
    *,
    keep_ratio: float | Sequence[float] | None = None,
    **options: Unpack[LayerOptions],
) -> pb.SparsePolicy:
    """Fills in what every policy has that keeps a share."""
    if keep_ratio is not None:
        ratios = one_or_several(keep_ratio, "keep_ratio", "a number")
        listed = build_as({"layer_keep_ratios": "keep_ratio"}, pb.SparsePolicy, layer_keep_ratios=ratios)
        if isinstance(keep_ratio, Iterable):
            policy.MergeFrom(listed)
        else:
            policy.keep_ratio = ratios[0]
    return _layers(policy, **options)


def _core_infer(token_keep: float | None, rank_by: CoreInferRankingName | None) -> pb.CoreInferPolicy:
    rank = value_or_unspecified(CORE_INFER_RANKINGS, rank_by, "rank_by")
    return build(pb.CoreInferPolicy, token_keep=token_keep, rank_by=rank)


def dense() -> pb.SparsePolicy:
    """Computes everything."""
    return pb.SparsePolicy(dense=pb.DensePolicy())


@takes_options_of(_layers)
def exact_zero(**options: Unpack[LayerOptions]) -> pb.SparsePolicy:
    """Skips neurons that are exactly zero (ReLU models): the activations say how many."""
    return _layers(pb.SparsePolicy(exact_zero=pb.ExactZeroPolicy()), **options)


@takes_options_of(_policy)
def coreinfer_stability(
    *,
    token_keep: float | None = None,
    rank_by: CoreInferRankingName | None = None,
    **options: Unpack[PolicyOptions],
) -> pb.SparsePolicy:
    """Keeps the neurons that are most often in the core of a prompt token.

    token_keep: share of a token's positive neurons that is its core.
    """
    return _policy(pb.SparsePolicy(coreinfer_stability=_core_infer(token_keep, rank_by)), **options)


@takes_options_of(_policy)
def coreinfer_similarity(
    *,
    token_keep: float | None = None,
    rank_by: CoreInferRankingName | None = None,
    **options: Unpack[PolicyOptions],
) -> pb.SparsePolicy:
    """Keeps the neurons of the cluster of calibration sentences that the prompt is nearest to. It needs a profile."""
    return _policy(pb.SparsePolicy(coreinfer_similarity=_core_infer(token_keep, rank_by)), **options)


@takes_options_of(_policy)
def griffin(**options: Unpack[PolicyOptions]) -> pb.SparsePolicy:
    """Keeps the neurons with the largest share in the normalised activations of the prompt."""
    return _policy(pb.SparsePolicy(griffin=pb.GriffinPolicy()), **options)


@takes_options_of(_policy)
def teal(*, allocation: TealAllocationName | None = None, **options: Unpack[PolicyOptions]) -> pb.SparsePolicy:
    """Keeps input channels above a calibrated magnitude. It needs a profile."""
    value = value_or_unspecified(TEAL_ALLOCATIONS, allocation, "allocation")
    return _policy(pb.SparsePolicy(teal=pb.TealPolicy(allocation=value)), **options)


@takes_options_of(_policy)
def wina(**options: Unpack[PolicyOptions]) -> pb.SparsePolicy:
    """Keeps input channels by magnitude times the norm of their weights."""
    return _policy(pb.SparsePolicy(wina=pb.WinaPolicy()), **options)


@takes_options_of(_policy)
def cats(**options: Unpack[PolicyOptions]) -> pb.SparsePolicy:
    """Keeps neurons with the largest |act(gate)| of each token; with a profile, those above a calibrated threshold."""
    return _policy(pb.SparsePolicy(cats=pb.CatsPolicy()), **options)


@takes_options_of(_policy)
def static_set(neuron_set: str = "", **options: Unpack[PolicyOptions]) -> pb.SparsePolicy:
    """Keeps the same neurons for every token: those of a neuron_set artifact (id or tag), else of the profile."""
    return _policy(pb.SparsePolicy(static_set=build(pb.StaticSetPolicy, neuron_set=neuron_set)), **options)


@takes_options_of(_policy)
def fovea(
    *,
    bits: FoveaBits | None = None,
    exact_gate: bool = False,
    without_compensation: bool = False,
    uniform_budget: bool = False,
    **options: Unpack[PolicyOptions],
) -> pb.SparsePolicy:
    """Scores neurons by a low-bit copy of the weights, which stands in for those dropped. It needs a profile."""
    kind = build(
        pb.FoveaPolicy,
        bits=bits,
        exact_gate=exact_gate,
        without_compensation=without_compensation,
        uniform_budget=uniform_budget,
    )
    return _policy(pb.SparsePolicy(fovea=kind), **options)


@takes_options_of(_policy)
def glance(**options: Unpack[PolicyOptions]) -> pb.SparsePolicy:
    """Keeps the neurons that add most, seen with activations in 8 bits: fast on a CPU with weights in codes."""
    return _policy(pb.SparsePolicy(glance=pb.GlancePolicy()), **options)


@takes_options_of(_policy)
def random_set(*, seed: int = 0, **options: Unpack[PolicyOptions]) -> pb.SparsePolicy:
    """Keeps a random set for each layer: a control, for evaluations only."""
    return _policy(pb.SparsePolicy(random_set=build(pb.RandomSetPolicy, seed=seed)), **options)


@takes_options_of(_policy)
def oracle(**options: Unpack[PolicyOptions]) -> pb.SparsePolicy:
    """Keeps the neurons with the largest contribution, found by computing all: a control, for evaluations only."""
    return _policy(pb.SparsePolicy(oracle=pb.OraclePolicy()), **options)


@dataclass(frozen=True)
class QualityGuard:
    """Computes some tokens densely as well, and ends sparse inference for the sequence when both drift apart.

    sample_rate: share of the generated tokens that is sampled. max_divergence: mean KL(dense ‖ sparse) of the last
    `window` samples, in nats, above which the rest of the sequence is dense. None: the server's defaults.
    """

    sample_rate: float | None = None
    max_divergence: float | None = None
    window: int | None = None

    def message(self) -> pb.QualityGuard:
        return build(
            pb.QualityGuard, sample_rate=self.sample_rate, max_divergence=self.max_divergence, window=self.window
        )


@dataclass(frozen=True)
class Sparsity:
    """Says which neurons of a request are computed.

    profile: id or tag of a sparsity profile; alone, it says the policy too. guard: by default none.
    Raises TypeError for a policy in the place of the profile.
    """

    profile: str = ""
    policy: pb.SparsePolicy | None = None
    guard: QualityGuard | None = None

    def __post_init__(self) -> None:
        what = "the id or tag of a profile; a policy is given as Sparsity(policy=...)"
        instance(self.profile, str, "profile", what)
        if self.policy is not None:
            instance(self.policy, pb.SparsePolicy, "policy", "a policy such as cats(keep_ratio=0.5)")
        if self.guard is not None:
            instance(self.guard, QualityGuard, "guard", "a QualityGuard(...)")

    def message(self) -> pb.Sparsity:
        """Returns the message. Raises ValueError when there is neither a profile nor a policy."""
        if not self.profile and self.policy is None:
            raise ValueError("give a profile, a policy or both")
        guard = None if self.guard is None else self.guard.message()
        return pb.Sparsity(profile=self.profile, policy=self.policy, guard=guard)


SparsityLike = Sparsity | pb.Sparsity | pb.SparsePolicy | str


def sparsity_message(sparsity: SparsityLike | None, field: str = "sparsity") -> pb.Sparsity | None:
    """Returns the message of a sparsity, of a policy alone, or of the id or tag of a profile.

    Raises TypeError for anything else.
    """
    match sparsity:
        case None | pb.Sparsity():
            return sparsity
        case pb.SparsePolicy():
            return Sparsity(policy=sparsity).message()
        case str():
            return Sparsity(profile=sparsity).message()
        case Sparsity():
            return sparsity.message()
        case _:
            what = "a Sparsity, a policy such as cats(keep_ratio=0.5), or the id or tag of a profile"
            raise TypeError(f"{field}: expected {what}, got {shown(sparsity)}")
