"""Builders of programs.

from patchclamp.programs import Program, add, clamp_neurons, generated, when

Program([
    add("joyful", layers=range(10, 15), strength=4.0, scope=generated(), name="joy"),
    clamp_neurons([345], layers=12, max=0.0, gate=when("toxic", layer=8, above=2.5)),
])
"""

from patchclamp.programs.conditions import abort_when, abort_when_probe, when, when_probe
from patchclamp.programs.edits import (
    EditOptions,
    NeuronEditOptions,
    VectorEditOptions,
    ablate_heads,
    add,
    add_neurons,
    affine,
    cap_projection,
    clamp_neurons,
    low_rank,
    mean_heads,
    patch,
    project_out,
    replace,
    rotate_in_plane,
    rotate_towards,
    scale_heads,
    scale_neurons,
    set_neurons,
    set_projection,
    uniform_heads,
)
from patchclamp.programs.program import Program, ProgramLike, program_message
from patchclamp.programs.readouts import (
    ReadoutOptions,
    read_activation,
    read_heads,
    read_logit_lens,
    read_neurons,
    read_probe,
    read_projection,
    read_top_neurons,
)
from patchclamp.programs.scopes import Scope, ScopeLike, everything, generated, last, positions, prompt, role, tokens
from patchclamp.programs.vectors import VectorLike, vector

__all__ = [
    "EditOptions",
    "NeuronEditOptions",
    "Program",
    "ProgramLike",
    "ReadoutOptions",
    "Scope",
    "ScopeLike",
    "VectorEditOptions",
    "VectorLike",
    "ablate_heads",
    "abort_when",
    "abort_when_probe",
    "add",
    "add_neurons",
    "affine",
    "cap_projection",
    "clamp_neurons",
    "everything",
    "generated",
    "last",
    "low_rank",
    "mean_heads",
    "patch",
    "positions",
    "program_message",
    "project_out",
    "prompt",
    "read_activation",
    "read_heads",
    "read_logit_lens",
    "read_neurons",
    "read_probe",
    "read_projection",
    "read_top_neurons",
    "replace",
    "role",
    "rotate_in_plane",
    "rotate_towards",
    "scale_heads",
    "scale_neurons",
    "set_neurons",
    "set_projection",
    "tokens",
    "uniform_heads",
    "vector",
    "when",
    "when_probe",
]
