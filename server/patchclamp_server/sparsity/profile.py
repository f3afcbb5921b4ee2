"""A sparsity profile: what calibration found out about one model, and the card that says how good it is."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from torch import Tensor

from patchclamp_server.errors import FailedPrecondition

if TYPE_CHECKING:
    from patchclamp_server.sparsity.mlp import SparseModel


@dataclass(frozen=True, eq=False)
class Profile:
    """`tensors` are float32 or int64, by names of the policy's own; `card` is JSON: settings, text, quality."""

    policy: str
    model_fingerprint: str
    tensors: Mapping[str, Tensor]
    card: Mapping[str, Any] = field(default_factory=dict)

    def check(self, policy: str, model: "SparseModel") -> None:
        """FailedPrecondition: made for another policy or another model."""
        if self.policy != policy:
            raise FailedPrecondition("sparsity.profile", f"is a profile of {self.policy}, not of {policy}")
        if self.model_fingerprint != model.fingerprint:
            raise FailedPrecondition(
                "sparsity.profile",
                f"was calibrated on model {self.model_fingerprint[:12]}, this is {model.fingerprint[:12]}",
            )
