"""Sparse inference of one request: which MLP neurons are computed while tokens are generated.

from patchclamp.sparsity import QualityGuard, Sparsity, cats, fovea

client.generate("I feel", sparsity=cats(keep_ratio=0.5))                         # a policy
client.generate("I feel", sparsity="my-profile")                                 # a calibrated profile, as it is
client.generate("I feel", sparsity=Sparsity("my-profile", fovea(keep_ratio=0.3), QualityGuard(max_divergence=0.1)))

One function a policy; sparse_policy.proto says what each computes. What is left out is the server's default.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, TypedDict, Unpack

from patchclamp.names import (
    CORE_INFER_RANKINGS,
    TEAL_ALLOCATIONS,
    CoreInferRankingName,
    TealAllocationName,
    value_or_unspecified,
)
from patchclamp.v1 import sparse_policy_pb2 as pb

FoveaBits = Literal[2, 3, 4, 8]


class PolicyOptions(TypedDict, total=False):
    """keep_ratio: share of neurons (teal, wina: of input channels) that is kept, or one share for each layer.

    Layers outside first_layer ≤ l < end_layer stay dense.
    """

    keep_ratio: float | Sequence[float]
    first_layer: int
    end_layer: int


def dense() -> pb.SparsePolicy:
    """Everything is computed."""
    return pb.SparsePolicy(dense=pb.DensePolicy())


def exact_zero(**options: Unpack[PolicyOptions]) -> pb.SparsePolicy:
    """Neurons that are exactly zero are skipped (ReLU models); keep_ratio is not used."""
    return _policy(options, pb.SparsePolicy(exact_zero=pb.ExactZeroPolicy()))


def coreinfer_stability(
    *,
    token_keep: float | None = None,
    rank_by: CoreInferRankingName | None = None,
    **options: Unpack[PolicyOptions],
) -> pb.SparsePolicy:
    """The neurons most often in the core of a prompt token.

    token_keep: share of a token's positive neurons that is its core.
    """
    return _policy(options, pb.SparsePolicy(coreinfer_stability=_core_infer(token_keep, rank_by)))


def coreinfer_similarity(
    *,
    token_keep: float | None = None,
    rank_by: CoreInferRankingName | None = None,
    **options: Unpack[PolicyOptions],
) -> pb.SparsePolicy:
    """The neurons of the cluster of calibration sentences that the prompt is nearest to. Needs a profile."""
    return _policy(options, pb.SparsePolicy(coreinfer_similarity=_core_infer(token_keep, rank_by)))


def griffin(**options: Unpack[PolicyOptions]) -> pb.SparsePolicy:
    """The neurons with the largest share in the normalised activations of the prompt."""
    return _policy(options, pb.SparsePolicy(griffin=pb.GriffinPolicy()))


def teal(*, allocation: TealAllocationName | None = None, **options: Unpack[PolicyOptions]) -> pb.SparsePolicy:
    """Input channels above a calibrated magnitude. Needs a profile."""
    value = value_or_unspecified(TEAL_ALLOCATIONS, allocation, "allocation")
    return _policy(options, pb.SparsePolicy(teal=pb.TealPolicy(allocation=value)))


def wina(**options: Unpack[PolicyOptions]) -> pb.SparsePolicy:
    """Input channels by magnitude times the norm of their weights."""
    return _policy(options, pb.SparsePolicy(wina=pb.WinaPolicy()))


def cats(**options: Unpack[PolicyOptions]) -> pb.SparsePolicy:
    """Neurons with the largest |act(gate)| of each token; with a profile, those above a calibrated threshold."""
    return _policy(options, pb.SparsePolicy(cats=pb.CatsPolicy()))


def static_set(neuron_set: str = "", **options: Unpack[PolicyOptions]) -> pb.SparsePolicy:
    """The same neurons for every token: those of a neuron_set artifact (id or tag), else of the profile."""
    return _policy(options, pb.SparsePolicy(static_set=pb.StaticSetPolicy(neuron_set=neuron_set)))


def fovea(
    *,
    bits: FoveaBits | None = None,
    exact_gate: bool = False,
    without_compensation: bool = False,
    uniform_budget: bool = False,
    **options: Unpack[PolicyOptions],
) -> pb.SparsePolicy:
    """A low-bit copy of the weights scores the neurons and stands in for those that are dropped. Needs a profile."""
    kind = pb.FoveaPolicy(
        bits=bits, exact_gate=exact_gate, without_compensation=without_compensation, uniform_budget=uniform_budget
    )
    return _policy(options, pb.SparsePolicy(fovea=kind))


def random_set(*, seed: int = 0, **options: Unpack[PolicyOptions]) -> pb.SparsePolicy:
    """A random set for each layer: a control, for evaluations only."""
    return _policy(options, pb.SparsePolicy(random_set=pb.RandomSetPolicy(seed=seed)))


def oracle(**options: Unpack[PolicyOptions]) -> pb.SparsePolicy:
    """The neurons with the largest contribution, found by computing all: a control, for evaluations only."""
    return _policy(options, pb.SparsePolicy(oracle=pb.OraclePolicy()))


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
        return pb.QualityGuard(sample_rate=self.sample_rate, max_divergence=self.max_divergence, window=self.window)


@dataclass(frozen=True)
class Sparsity:
    """profile: id or tag of a sparsity profile; alone, it says the policy too. guard: default none."""

    profile: str = ""
    policy: pb.SparsePolicy | None = None
    guard: QualityGuard | None = None

    def message(self) -> pb.Sparsity:
        """ValueError when there is neither a profile nor a policy."""
        if not self.profile and self.policy is None:
            raise ValueError("give a profile, a policy or both")
        return pb.Sparsity(
            profile=self.profile, policy=self.policy, guard=None if self.guard is None else self.guard.message()
        )


SparsityLike = Sparsity | pb.Sparsity | pb.SparsePolicy | str


def sparsity_message(sparsity: SparsityLike | None) -> pb.Sparsity | None:
    """The message of a sparsity, of a policy alone, or of the id or tag of a profile."""
    match sparsity:
        case None | pb.Sparsity():
            return sparsity
        case pb.SparsePolicy():
            return Sparsity(policy=sparsity).message()
        case str():
            return Sparsity(profile=sparsity).message()
        case Sparsity():
            return sparsity.message()


def _policy(options: PolicyOptions, policy: pb.SparsePolicy) -> pb.SparsePolicy:
    """Fills in what every policy has."""
    keep = options.get("keep_ratio")
    if isinstance(keep, int | float):
        policy.keep_ratio = keep
    elif keep is not None:
        policy.layer_keep_ratios.extend(keep)
    policy.MergeFrom(pb.SparsePolicy(first_layer=options.get("first_layer", 0), end_layer=options.get("end_layer")))
    return policy


def _core_infer(token_keep: float | None, rank_by: CoreInferRankingName | None) -> pb.CoreInferPolicy:
    rank = value_or_unspecified(CORE_INFER_RANKINGS, rank_by, "rank_by")
    return pb.CoreInferPolicy(token_keep=token_keep, rank_by=rank)
