"""Policies bound to the served model: stored profiles and neuron sets are looked up, and selectors shared.

Requests that ask for the same get the same Selector: the engine computes the rows of one selector together.
"""

import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from patchclamp_server.artifacts.types import Artifact, ArtifactKind
from patchclamp_server.errors import FailedPrecondition, InvalidArgument, RequestError, about
from patchclamp_server.interventions.resolver import ArtifactLookup
from patchclamp_server.sparsity.mlp import SparseModel
from patchclamp_server.sparsity.parameters import policy_with
from patchclamp_server.sparsity.policies.static_set import StaticSet
from patchclamp_server.sparsity.policy import Policy, Selector
from patchclamp_server.sparsity.profile import Profile

MAX_SELECTORS = 64


@dataclass(frozen=True, eq=False)
class StoredProfile:
    """A profile artifact: what it was calibrated for, and the divergence on its quality card where it has one."""

    id: str
    policy: Policy
    profile: Profile
    divergence: float | None


@dataclass(frozen=True, eq=False)
class StoredNeurons:
    """A neuron set artifact, with indices by layer."""

    id: str
    neurons: Mapping[int, tuple[int, ...]]


@dataclass(frozen=True, eq=False)
class Bound:
    """A policy with its selector. `profile` is the id of its artifact, or "" without one."""

    policy: Policy
    selector: Selector
    profile: str = ""


class Binder:
    """Binds policies. It is thread-safe; it may read all weights of the model: do not call it on an event loop."""

    def __init__(
        self, model: SparseModel, artifacts: ArtifactLookup, ready: Callable[[Selector], object] = lambda _: None
    ) -> None:
        """`ready` is called with what is bound: what runs it is made then, while nobody waits for a step."""
        self.model = model
        self._artifacts = artifacts
        self._ready = ready
        self._selectors: OrderedDict[tuple[Policy, str], Selector] = OrderedDict()
        self._lock = threading.Lock()
        # Two that derive the same from the weights at once would hold it twice.
        self._binding = threading.Lock()

    def profile(self, ref: str, path: str) -> StoredProfile:
        """Returns the profile of an id or tag. Raises, at `path`, NotFound, and FailedPrecondition for another kind or
        model, or for tensors and parameters that its policy does not take."""
        artifact = self._artifact(ref, ArtifactKind.SPARSITY_PROFILE, path)
        info, tensors = artifact.info, artifact.profile_tensors()
        try:
            policy = policy_of(info.provenance, tensors, n_layers=self.model.n_layers, d_ff=self.model.spec.d_ff)
        except RequestError as error:
            reason = f"{error.field.removeprefix('sparsity.')}: {error.message}"
            raise FailedPrecondition(path, f"{ref} cannot be used: {reason}") from error
        profile = Profile(policy.name, info.model_fingerprint, tensors, info.evidence)
        return StoredProfile(info.id, policy, profile, _divergence(info.evidence))

    def neuron_set(self, ref: str, path: str) -> StoredNeurons:
        """Returns the neuron set of an id or tag; raises what profile() raises."""
        artifact = self._artifact(ref, ArtifactKind.NEURON_SET, path)
        neurons = {layer: tuple(artifact.neurons(layer)[0].tolist()) for layer in artifact.info.layers}
        return StoredNeurons(artifact.info.id, neurons)

    def bind(self, policy: Policy, source: StoredProfile | StoredNeurons | None = None) -> Bound:
        """Binds a policy. `source` is a profile, or the neurons of a static set.

        Raises InvalidArgument("sparsity.<parameter>") where it does not fit the model, and
        FailedPrecondition("sparsity.profile") for a profile of another policy, or none where one is needed.
        """
        stored = source if isinstance(source, StoredProfile) else None
        key = (policy, "" if source is None else source.id)
        if isinstance(source, StoredNeurons):
            assert isinstance(policy, StaticSet)
            policy = replace(policy, neurons=source.neurons)
        selector = self._shared(key)
        if selector is None:
            with self._binding:
                selector = self._shared(key) or self._made(key, policy, stored)
        return Bound(policy, selector, "" if stored is None else stored.id)

    def _shared(self, key: tuple[Policy, str]) -> Selector | None:
        with self._lock:
            if key in self._selectors:
                self._selectors.move_to_end(key)
            return self._selectors.get(key)

    def _made(self, key: tuple[Policy, str], policy: Policy, stored: StoredProfile | None) -> Selector:
        selector = policy.bind(self.model, None if stored is None else self._on_device(stored.profile))
        selector.prepare()
        self._ready(selector)
        with self._lock:
            self._selectors[key] = selector
            if len(self._selectors) > MAX_SELECTORS:
                self._selectors.popitem(last=False)
        return selector

    def _on_device(self, profile: Profile) -> Profile:
        device = self.model.decoder.device
        return replace(profile, tensors={name: tensor.to(device) for name, tensor in profile.tensors.items()})

    def _artifact(self, ref: str, kind: ArtifactKind, path: str) -> Artifact:
        with about(path):
            artifact = self._artifacts.get(ref)
        info, served = artifact.info, self.model.fingerprint
        if info.kind is not kind:
            raise FailedPrecondition(path, f"{ref} is a {info.kind.value}, not a {kind.value}")
        if info.model_fingerprint != served:
            raise FailedPrecondition(path, f"{ref} was made for model {info.model_fingerprint}, served is {served}")
        return artifact


def policy_of(
    provenance: Mapping[str, Any], tensors: Mapping[str, torch.Tensor], *, n_layers: int, d_ff: int
) -> Policy:
    """Returns the policy of a profile, with the parameters it was calibrated for. Raises InvalidArgument or
    FailedPrecondition ("sparsity.<parameter>") where there is no such policy, or it does not take these parameters or
    tensors."""
    parameters = provenance.get("parameters", {})
    if not isinstance(parameters, Mapping):
        raise InvalidArgument("sparsity.parameters", "expected an object")
    policy = policy_with(str(provenance.get("policy")), parameters)
    if not policy.profile_tensors:
        raise InvalidArgument("sparsity.policy", f"{policy.name} has no profiles")
    policy.keep_by_layer(n_layers)
    Profile(policy.name, "", tensors).check_tensors(policy.profile_tensors, n_layers=n_layers, d_ff=d_ff)
    return policy


def _divergence(evidence: Mapping[str, Any]) -> float | None:
    """Returns the divergence of the quality card, unless whoever wrote it left it out."""
    card = evidence.get("quality")
    value = card.get("divergence") if isinstance(card, Mapping) else None
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None
