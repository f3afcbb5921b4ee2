"""Sparse-activation policies by name. A policy is one file; adding one is adding it here.

policy = POLICIES["fovea"](keep_ratio=0.5)
profile = ...                                            # where `policy.needs_profile`: calibrate.py makes one
selector = policy.bind(model, profile)                   # one for all sequences
state = selector.begin(); selector.observe_prompt(state, layer, neurons); selector.end_prompt(state)
selection = selector.select(state, layer, MlpInput(x, model.layers[layer]))
"""

from collections.abc import Mapping

from patchclamp_server.sparsity.cats import Cats
from patchclamp_server.sparsity.coreinfer_similarity import CoreInferSimilarity
from patchclamp_server.sparsity.coreinfer_stability import CoreInferStability
from patchclamp_server.sparsity.dense import Dense
from patchclamp_server.sparsity.exact_zero import ExactZero
from patchclamp_server.sparsity.fovea import Fovea
from patchclamp_server.sparsity.griffin import Griffin
from patchclamp_server.sparsity.mlp import MlpInput, MlpWeights, SparseModel
from patchclamp_server.sparsity.oracle import Oracle
from patchclamp_server.sparsity.policy import Cost, Policy, Selection, Selector, SequenceState
from patchclamp_server.sparsity.profile import Profile
from patchclamp_server.sparsity.random_set import RandomSet
from patchclamp_server.sparsity.static_set import StaticSet
from patchclamp_server.sparsity.teal import Teal
from patchclamp_server.sparsity.wina import Wina

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
        RandomSet,
        Oracle,
    )
}
CONTROLS = frozenset({"random", "oracle"})

__all__ = [
    "CONTROLS",
    "POLICIES",
    "Cost",
    "MlpInput",
    "MlpWeights",
    "Policy",
    "Profile",
    "Selection",
    "Selector",
    "SequenceState",
    "SparseModel",
]
