"""An edit of a set of heads as a program, in every mode that a head can be edited in. The modes differ:

    zero     z_h ← 0
    mean     z_h ← mean of z_h over ordinary text
    uniform  a_h ← the same for all visible tokens, which is what the published masking of retrieval heads does
    scale    z_h ← scale · z_h

z_h [head_dim] is the head's output before the output projection, a_h its attention; at every token, of prompt and
answer.
"""

from collections import defaultdict
from collections.abc import Sequence
from enum import Enum

from torch import Tensor

from patchclamp_server.artifacts.head_sets import Head
from patchclamp_server.interventions.bind import bind
from patchclamp_server.interventions.bound import BoundProgram
from patchclamp_server.interventions.program import Edit, HeadEdit, Program
from patchclamp_server.model.info import ModelInfo
from patchclamp_server.model.sites import Site


class HeadEditMode(Enum):
    """Has the names of the enum HeadEditMode, in lower case and without its prefix."""

    ZERO = "zero"
    MEAN = "mean"
    UNIFORM = "uniform"
    SCALE = "scale"


def head_program(
    heads: Sequence[Head], mode: HeadEditMode, info: ModelInfo, *, scale: float = 0.0, means: Tensor | None = None
) -> BoundProgram:
    """Returns the program. `means` [n_layers, n_heads, head_dim] are for the mode MEAN. Raises InvalidArgument for a
    scale that is not finite."""
    return bind(Program(head_edits(heads, mode, scale=scale, means=means)), info)


def head_edits(
    heads: Sequence[Head], mode: HeadEditMode, *, scale: float = 0.0, means: Tensor | None = None
) -> tuple[Edit, ...]:
    """Returns one edit for each layer."""
    by_layer: dict[int, list[int]] = defaultdict(list)
    for layer, head in heads:
        by_layer[layer].append(head)

    def edit(layer: int, named: list[int]) -> HeadEdit:
        match mode:
            case HeadEditMode.ZERO:
                return HeadEdit(tuple(named), scale=0.0)
            case HeadEditMode.SCALE:
                return HeadEdit(tuple(named), scale=scale)
            case HeadEditMode.UNIFORM:
                return HeadEdit(tuple(named), uniform=True)
            case HeadEditMode.MEAN:
                assert means is not None
                return HeadEdit(tuple(named), mean=means[layer, named])

    return tuple(Edit(edit(layer, named), Site.ATTN_Z, layers=(layer,)) for layer, named in sorted(by_layer.items()))
