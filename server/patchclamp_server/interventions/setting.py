"""What the rules of torch know of the model, and where the numbers of programs are."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from patchclamp_server.model.sites import Site

if TYPE_CHECKING:
    # The tables are written by the kinds, whose rules read them.
    from patchclamp_server.interventions.tables import Tables


@dataclass(frozen=True, eq=False)
class Setting:
    tables: "Tables"
    n_heads: int
    head_dim: int
    widths: dict[Site, int]
    device: torch.device
    # [n, d_model] -> logits [n, vocab]
    unembed: Callable[[Tensor], Tensor]
