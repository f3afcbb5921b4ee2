"""Defines what every sparse policy is: a frozen, validated description, and the same thing bound to a model.

A policy answers, per MLP layer and token row, which neurons are computed exactly (`Selector.select`), or which input
channels of a projection are read (`Selector.channels`). `keep_ratio` is the share that is kept; a tuple gives one for
each layer. A layer that keeps 1.0 is never asked, so its output is that of the dense model, bit for bit.

Life of a sequence: `begin` → `observe_prompt` for each chunk of its (dense) prefill and layer → `end_prompt` → `select`
for its decode rows. All that a policy knows of a sequence is in its SequenceState.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from patchclamp_server.cpu.sparse.glanced_mlp import GlancedMlp
from patchclamp_server.errors import FailedPrecondition, InvalidArgument
from patchclamp_server.model.spec import DecoderSpec
from patchclamp_server.sparsity.mlp import MlpInput, MlpWeights, SparseModel
from patchclamp_server.sparsity.profile import Profile, ProfileTensor

# The four products of a block whose inputs TEAL and WINA thin out.
PROJECTIONS = ("qkv", "attn_output", "mlp_input", "mlp_output")


@dataclass(frozen=True)
class Cost:
    """Weight bytes read by one row, over those of the dense MLP (for channel policies: of the four projections).

    always + active · share + dropped · (1 - share), where `share` is the share of active neurons (or channels).
    """

    always: float
    active: float
    dropped: float = 0.0

    def bytes_read(self, share: float) -> float:
        return self.always + self.active * share + self.dropped * (1.0 - share)


# A neuron's three vectors are read when it is active, and nothing else.
ONLY_ACTIVE = Cost(0.0, 1.0)


@dataclass(frozen=True, eq=False)
class Selection:
    """What is computed: `active` [n, d_ff] bool. `remainder` maps the final set (with the forced neurons in it) to [n,
    d_model], what the neurons that are not in it are taken to add, or is None for nothing."""

    active: Tensor
    remainder: Callable[[Tensor], Tensor] | None = None


@dataclass(eq=False)
class FixedSet:
    """The neurons of a layer that are computed for every token of a sequence, forced ones among them."""

    mask: Tensor  # [d_ff] bool
    index: Tensor  # [K] int64, ascending
    # Whoever computes the neurons keeps here what was made of the set, to be used again.
    prepared: Any = None


@dataclass(eq=False)
class SequenceState:
    """What a policy knows of one sequence. `sets` [d_ff] bool by layer: for all its decode; `statistics`: the rest.

    `fixed`: the final form of `sets`, made when first used. `selected` and `active`, by layer: the share of the weights
    of a block among which something was selected, and how much of them was computed, summed over rows. `chosen`:
    neurons in the sets of a policy that may have to fill them up, and `filled`: those of them that its rule had not
    found.
    """

    sets: dict[int, Tensor] = field(default_factory=dict)
    statistics: dict[int, Any] = field(default_factory=dict)
    fixed: dict[int, FixedSet] = field(default_factory=dict)
    selected: dict[int, float] = field(default_factory=dict)
    active: dict[int, float | Tensor] = field(default_factory=dict)
    chosen: int = 0
    filled: int = 0
    # Of rows that compiled blocks chose neurons for, by layer: how many rows, and the share of neurons that they kept.
    glanced_rows: NDArray[np.float64] | None = None
    glanced: NDArray[np.float64] | None = None

    def add_glanced(self, rows: NDArray[Any], shares: NDArray[Any]) -> None:
        """Counts rows [layers] for which something was chosen, and the shares [layers] that they kept, summed."""
        if self.glanced_rows is None or self.glanced is None:
            self.glanced_rows, self.glanced = np.zeros(len(rows)), np.zeros(len(rows))
        self.glanced_rows += rows
        self.glanced += shares

    def dropped(self) -> dict[int, float]:
        """Returns what was selected among and not computed, by layer, summed over rows. Waits for the device once."""
        counted = [active for active in self.active.values() if isinstance(active, Tensor)]
        read = iter(torch.stack(counted).tolist() if counted else ())
        found = {
            layer: self.selected[layer] - (next(read) if isinstance(active, Tensor) else active)
            for layer, active in self.active.items()
        }
        if self.glanced_rows is not None and self.glanced is not None:
            for layer in self.glanced_rows.nonzero()[0].tolist():
                found[layer] = found.get(layer, 0.0) + float(self.glanced_rows[layer] - self.glanced[layer])
        return found

    @property
    def filled_ratio(self) -> float:
        return self.filled / self.chosen if self.chosen else 0.0


class Selector(ABC):
    """A policy bound to a model, and to a profile where it has one. Shared by all sequences: it holds no state."""

    def __init__(self, policy: "Policy", model: SparseModel, profile: Profile | None = None) -> None:
        if profile is not None:
            profile.check(policy.name, model)
            profile.check_tensors(policy.profile_tensors, n_layers=model.n_layers, d_ff=model.spec.d_ff)
        elif policy.needs_profile:
            raise FailedPrecondition("sparsity.profile", f"{policy.name} needs a calibrated profile")
        self.model = model
        self.profile = profile
        self.keep = policy.keep_by_layer(model.n_layers)

    @cached_property
    def shares(self) -> Mapping[str, float]:
        """Returns the shares of the weights of a block, by product."""
        return dict(zip(PROJECTIONS, weight_shares(self.model.spec), strict=True))

    @property
    def observes_prompt(self) -> bool:
        """Whether the policy must see the neurons of every prompt token."""
        return type(self).observe_prompt is not Selector.observe_prompt

    @property
    def glanced(self) -> Sequence[GlancedMlp] | None:
        """The MLPs by which the rows of this policy are computed, in place of those of the decoder."""
        return None

    @property
    def thins_channels(self) -> bool:
        """Whether the policy is about the inputs of all products, and not about neurons."""
        return type(self).channels is not Selector.channels

    def is_dense(self, layer: int) -> bool:
        """Whether the layer computes everything, so that nothing is selected."""
        return self.keep[layer] >= 1.0

    def prepare(self) -> None:  # noqa: B027
        """Makes now what is derived from the weights, so that no step of the engine has to wait for it."""

    def begin(self) -> SequenceState:
        return SequenceState()

    def observe_prompt(self, state: SequenceState, layer: int, neurons: Tensor) -> None:  # noqa: B027
        """Takes neurons [n, d_ff] of the next n prompt tokens, after the edits."""

    def end_prompt(self, state: SequenceState) -> None:  # noqa: B027
        """Is called when the whole prompt was observed: sets that come from it are fixed now."""

    def fixed_set(self, state: SequenceState, layer: int) -> Tensor | None:
        """Returns the set [d_ff] bool of a sequence where it is the same for every token, to be compacted once."""
        return state.sets.get(layer)

    def select(self, state: SequenceState, layer: int, mlp: MlpInput) -> Selection | None:
        """Returns which neurons of the rows of one sequence are computed, or None for all. Reads only what it must."""
        active = self.fixed_set(state, layer)
        return None if active is None else Selection(active.expand(mlp.rows, -1))

    def channels(self, layer: int, projection: str, x: Tensor) -> Tensor | None:
        """Returns which inputs [n, width] bool of a projection are read, or None for all."""
        return None

    @abstractmethod
    def cost(self, layer: int, weight_bits: int = 16) -> Cost:
        """Returns what a row reads, where the weights of the model have `weight_bits` bits."""

    def weights(self, layer: int) -> MlpWeights:
        return self.model.layers[layer]


@dataclass(frozen=True, kw_only=True)
class Policy(ABC):
    """Layers outside `first_layer` ≤ l < `end_layer` (None: the last) stay dense."""

    keep_ratio: float | tuple[float, ...] = 0.5
    first_layer: int = 0
    end_layer: int | None = None

    name: ClassVar[str]
    needs_profile: ClassVar[bool] = False
    # These tensors make up a profile of this policy; empty: there is nothing to calibrate.
    profile_tensors: ClassVar[Mapping[str, ProfileTensor]] = {}
    # This says that the neurons of a sequence are known after its prompt, and are the same for every token.
    fixes_sets: ClassVar[bool] = False

    def __post_init__(self) -> None:
        ratios = self.keep_ratio if isinstance(self.keep_ratio, tuple) else (self.keep_ratio,)
        for ratio in ratios:
            check_ratio("keep_ratio", ratio)
        if self.first_layer < 0:
            raise InvalidArgument("sparsity.first_layer", f"{self.first_layer} is negative")
        if self.end_layer is not None and self.end_layer < self.first_layer:
            raise InvalidArgument("sparsity.end_layer", f"{self.end_layer} is before layer {self.first_layer}")

    def keep_by_layer(self, n_layers: int) -> tuple[float, ...]:
        if (self.end_layer or 0) > n_layers or self.first_layer > n_layers:
            raise InvalidArgument("sparsity.end_layer", f"layers end at {n_layers}")
        keep = self.keep_ratio if isinstance(self.keep_ratio, tuple) else (self.keep_ratio,) * n_layers
        if len(keep) != n_layers:
            raise InvalidArgument("sparsity.layer_keep_ratios", f"{len(keep)} ratios for {n_layers} layers")
        end = n_layers if self.end_layer is None else self.end_layer
        return tuple(ratio if self.first_layer <= layer < end else 1.0 for layer, ratio in enumerate(keep))

    @abstractmethod
    def bind(self, model: SparseModel, profile: Profile | None = None) -> Selector:
        """Binds the policy. Raises FailedPrecondition for a profile of another model or policy, or none where one is
        needed."""


def check_ratio(field_name: str, value: float) -> None:
    if not 0.0 <= value <= 1.0:  # NaN fails too
        raise InvalidArgument(f"sparsity.{field_name}", f"{value} is not a share between 0 and 1")


def check_choice(field_name: str, value: object, accepted: tuple[object, ...]) -> None:
    if value not in accepted:
        raise InvalidArgument(f"sparsity.{field_name}", f"{value!r} is not one of {', '.join(map(str, accepted))}")


def input_widths(spec: DecoderSpec) -> list[int]:
    """Returns the number of channels by product, in the order of PROJECTIONS."""
    return [spec.d_model, spec.n_heads * spec.head_dim, spec.d_model, spec.d_ff]


def weight_shares(spec: DecoderSpec) -> list[float]:
    """Returns the shares of the weights of a block, by product, in the order of PROJECTIONS."""
    heads = spec.n_heads * spec.head_dim
    sizes = [
        spec.d_model * (heads + 2 * spec.n_kv_heads * spec.head_dim),
        heads * spec.d_model,
        spec.d_model * spec.d_ff * (2 if spec.family.gated else 1),
        spec.d_ff * spec.d_model,
    ]
    return [size / sum(sizes) for size in sizes]
