"""A sparsity profile is what calibration found out about one model, with the card that says how good it is."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from torch import Tensor

from patchclamp_server.errors import FailedPrecondition

if TYPE_CHECKING:
    from patchclamp_server.sparsity.mlp import SparseModel


@dataclass(frozen=True)
class ProfileTensor:
    """The shape of a tensor of a profile has numbers, "layers", "neurons", or a name that stands for the same number in
    all tensors of the profile."""

    shape: tuple[int | str, ...]
    required: bool = True


@dataclass(frozen=True, eq=False)
class Profile:
    """`tensors` are float32 or int64, by names of the policy's own; `card` is JSON: settings, text, quality."""

    policy: str
    model_fingerprint: str
    tensors: Mapping[str, Tensor]
    card: Mapping[str, Any] = field(default_factory=dict)

    def check(self, policy: str, model: "SparseModel") -> None:
        """Raises FailedPrecondition for a profile that was made for another policy or another model."""
        if self.policy != policy:
            raise FailedPrecondition("sparsity.profile", f"is a profile of {self.policy}, not of {policy}")
        if self.model_fingerprint != model.fingerprint:
            raise FailedPrecondition(
                "sparsity.profile",
                f"was calibrated on model {self.model_fingerprint[:12]}, this is {model.fingerprint[:12]}",
            )

    def check_tensors(self, wanted: Mapping[str, ProfileTensor], *, n_layers: int, d_ff: int) -> None:
        """Raises FailedPrecondition where a tensor is missing, or lacks the shape that the policy reads."""
        sizes = {"layers": n_layers, "neurons": d_ff}
        for name, expected in wanted.items():
            tensor = self.tensors.get(name)
            if tensor is None:
                if expected.required:
                    raise FailedPrecondition("sparsity.profile", f"has no tensor {name}")
                continue
            fits = tensor.ndim == len(expected.shape)
            for size, should in zip(tensor.shape, expected.shape, strict=False):
                fits = fits and size == (sizes.setdefault(should, size) if isinstance(should, str) else should)
            if not fits:
                shape = ", ".join(str(sizes.get(should, should)) for should in expected.shape)  # type: ignore[arg-type]
                message = f"{name} has the shape {list(tensor.shape)}; for this model it is [{shape}]"
                raise FailedPrecondition("sparsity.profile", message)
