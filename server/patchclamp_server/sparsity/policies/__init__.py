"""Sparse-activation policies are found here by name. A policy is one file; adding one is adding it here.

policy = POLICIES["fovea"](keep_ratio=0.5)
profile = ...                                            # where `policy.needs_profile`: calibrate.py makes one
selector = policy.bind(model, profile)                   # one for all sequences
state = selector.begin(); selector.observe_prompt(state, layer, neurons); selector.end_prompt(state)
selection = selector.select(state, layer, MlpInput(x, model.layers[layer]))
"""

from collections.abc import Mapping

from patchclamp_server.sparsity.policies.cats import Cats
from patchclamp_server.sparsity.policies.coreinfer_similarity import CoreInferSimilarity
from patchclamp_server.sparsity.policies.coreinfer_stability import CoreInferStability
from patchclamp_server.sparsity.policies.dense import Dense
from patchclamp_server.sparsity.policies.exact_zero import ExactZero
from patchclamp_server.sparsity.policies.fovea import Fovea
from patchclamp_server.sparsity.policies.glance import Glance
from patchclamp_server.sparsity.policies.griffin import Griffin
from patchclamp_server.sparsity.policies.oracle import Oracle
from patchclamp_server.sparsity.policies.random_set import RandomSet
from patchclamp_server.sparsity.policies.static_set import StaticSet
from patchclamp_server.sparsity.policies.teal import Teal
from patchclamp_server.sparsity.policies.wina import Wina
from patchclamp_server.sparsity.policy import Policy

# `random` and `oracle` are controls of evaluations, not policies to serve.
POLICIES: Mapping[str, type[Policy]] = {
    policy.name: policy
    for policy in (
        Dense,
        ExactZero,
        CoreInferStability,
        CoreInferSimilarity,
        Griffin,
        Teal,
        Wina,
        Cats,
        StaticSet,
        Fovea,
        Glance,
        RandomSet,
        Oracle,
    )
}
CONTROLS = frozenset({"random", "oracle"})
