"""What torch's rules know of the model, and the tables that hold the numbers of programs."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from patchclamp_server.model.decoder import Decoder
from patchclamp_server.model.sites import Site

if TYPE_CHECKING:
    # An import at run time would be circular: the tables import the kinds, whose rules import this module.
    from patchclamp_server.interventions.tables import Tables


@dataclass(frozen=True, eq=False)
class Setting:
    tables: "Tables"
    n_heads: int
    head_dim: int
    widths: dict[Site, int]
    device: torch.device
    # Reads states by final norm and unembedding; rules do not run it.
    decoder: Decoder
