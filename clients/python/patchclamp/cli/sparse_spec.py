"""Sparsity in one argument.

PROFILE                            id or tag of a sparsity profile, with the policy it was calibrated for
POLICY[:SETTING,...]               cats:keep_ratio=.5   fovea:keep_ratio=.5,bits=3,profile=PROFILE
                                   keep_ratio=.5/.4/.3 gives a share for each layer
"""

import argparse
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from patchclamp import sparsity as policies
from patchclamp.cli.settings import Parse, settings
from patchclamp.sparsity import QualityGuard, Sparsity
from patchclamp.v1 import sparse_policy_pb2 as pb

Builder = Callable[..., pb.SparsePolicy]


def _ratios(text: str) -> float | list[float]:
    ratios = [float(part) for part in text.split("/")]
    return ratios[0] if len(ratios) == 1 else ratios


_LAYERS: dict[str, Parse | None] = {"first_layer": int, "end_layer": int}
_EVERY: dict[str, Parse | None] = {"keep_ratio": _ratios, **_LAYERS, "profile": str}
_CORE_INFER: dict[str, Parse | None] = {"token_keep": float, "rank_by": str}
_FOVEA: dict[str, Parse | None] = {
    "bits": int,
    "exact_gate": None,
    "without_compensation": None,
    "uniform_budget": None,
}

POLICIES: Mapping[str, tuple[Builder, Mapping[str, Parse | None]]] = {
    "dense": (policies.dense, {}),
    "exact_zero": (policies.exact_zero, _LAYERS),
    "coreinfer_stability": (policies.coreinfer_stability, {**_EVERY, **_CORE_INFER}),
    "coreinfer_similarity": (policies.coreinfer_similarity, {**_EVERY, **_CORE_INFER}),
    "griffin": (policies.griffin, _EVERY),
    "teal": (policies.teal, {**_EVERY, "allocation": str}),
    "wina": (policies.wina, _EVERY),
    "cats": (policies.cats, _EVERY),
    "static_set": (policies.static_set, {**_EVERY, "neuron_set": str}),
    "fovea": (policies.fovea, {**_EVERY, **_FOVEA}),
    "glance": (policies.glance, _EVERY),
    "random_set": (policies.random_set, {**_EVERY, "seed": int}),
    "oracle": (policies.oracle, _EVERY),
}


@dataclass(frozen=True)
class Spec:
    """Holds an argument as it was written, and what it means."""

    text: str
    sparsity: Sparsity

    def with_keep(self, keep_ratio: float) -> "Spec":
        """Returns the same policy at another ratio.

        Raises ValueError for a profile alone, whose policy only the server knows.
        """
        policy = self.sparsity.policy
        if policy is None:
            raise ValueError(f"--keep: {self.text!r} names no policy; say POLICY:profile={self.text}")
        other = pb.SparsePolicy()
        other.CopyFrom(policy)
        other.ClearField("layer_keep_ratios")
        other.keep_ratio = keep_ratio
        return Spec(self.text, replace(self.sparsity, policy=other))


def spec(text: str) -> Spec:
    """Reads a policy where its name comes first, and takes all else that can be an id or a tag for a profile."""
    name, colon, rest = text.partition(":")
    if name in POLICIES:
        return Spec(text, _of_policy(name, rest, text))
    if not text or (colon and name != "sha256"):
        raise argparse.ArgumentTypeError(
            f"{text!r}: {name!r} is no policy; accepted: {', '.join(POLICIES)}, or the id or tag of a profile"
        )
    return Spec(text, Sparsity(profile=text))


def policy(text: str) -> pb.SparsePolicy:
    """Reads what can be calibrated: a policy without a profile."""
    found = spec(text).sparsity
    if found.policy is None or found.profile:
        raise argparse.ArgumentTypeError(f"{text!r}: expected POLICY[:SETTING,...] of {', '.join(POLICIES)}")
    return found.policy


def guard(text: str) -> QualityGuard:
    """Reads "on", or settings such as max_divergence=.1,sample_rate=.125,window=8."""
    if text == "on":
        return QualityGuard()
    given = settings(text, {"sample_rate": float, "max_divergence": float, "window": int})
    if not given:
        raise argparse.ArgumentTypeError('expected "on" or settings such as max_divergence=.1,window=8')
    return QualityGuard(**given)


def add_sparsity_arguments(parser: argparse.ArgumentParser, *, with_guard: bool = True) -> None:
    group = parser.add_argument_group("sparse inference (default: dense)")
    group.add_argument(
        "--sparsity",
        type=spec,
        metavar="PROFILE|POLICY[:SETTING,...]",
        help="profile (id or tag), or policy with settings, as in cats:keep_ratio=.5 or fovea:bits=3,profile=TAG",
    )
    if with_guard:
        group.add_argument(
            "--sparsity-guard",
            type=guard,
            metavar="on|SETTING,...",
            help="fall back to dense when both drift apart, as in max_divergence=.1,sample_rate=.125,window=8",
        )


def sparsity_of(args: argparse.Namespace) -> Sparsity | None:
    """Returns the sparsity with its guard; None without --sparsity. Raises ValueError for a guard of nothing."""
    quality_guard: QualityGuard | None = getattr(args, "sparsity_guard", None)
    if args.sparsity is None:
        if quality_guard is not None:
            raise ValueError("--sparsity-guard needs --sparsity")
        return None
    chosen: Spec = args.sparsity
    return replace(chosen.sparsity, guard=quality_guard)


def _of_policy(name: str, rest: str, text: str) -> Sparsity:
    build, accepted = POLICIES[name]
    try:
        given = settings(rest, accepted)
        profile = given.pop("profile", "")
        return Sparsity(profile, build(**given))
    except (ValueError, argparse.ArgumentTypeError) as error:
        raise argparse.ArgumentTypeError(f"{text!r}: {error}") from None
