"""Makes the control of a policy: a random choice of the same size in every layer.

It chooses neurons for policies of neurons, and input channels of the same four products for TEAL and WINA. Where a
policy has no ratio of its own (exact zeros, a given set), the share that it was found to keep is spread evenly.
"""

from patchclamp_server.sparsity.mlp import SparseModel
from patchclamp_server.sparsity.policies.random_set import RandomSet
from patchclamp_server.sparsity.policies.static_set import StaticSet
from patchclamp_server.sparsity.policy import Policy, Selector


def control_of(policy: Policy, selector: Selector, model: SparseModel, sparsity: float) -> Selector:
    """Returns the control. `sparsity` is the share that the policy did not compute, as measured; it is not used where
    the policy has a ratio."""
    layers = range(model.n_layers)
    keep = tuple(1.0 if selector.is_dense(layer) else selector.keep[layer] for layer in layers)
    if asked_ratio(policy) is None:
        keep = tuple(1.0 - sparsity for _ in layers)
    # A random set is not its own control.
    seed = policy.seed + 1 if isinstance(policy, RandomSet) else 0
    return RandomSet(keep_ratio=keep, seed=seed, channels=policy.name in ("teal", "wina")).bind(model)


def asked_ratio(policy: Policy) -> float | None:
    """Returns the keep ratio of a policy, the mean of its layers, or None where something else decides what is kept."""
    if policy.name == "exact_zero" or (isinstance(policy, StaticSet) and policy.neurons is not None):
        return None
    ratio = policy.keep_ratio
    return sum(ratio) / len(ratio) if isinstance(ratio, tuple) else ratio
