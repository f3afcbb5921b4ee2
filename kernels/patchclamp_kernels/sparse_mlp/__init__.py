"""These linear layers and MLPs read only the weights that they need; each part has a file.

`sparse_mlp` (and its halves `sparse_up`, `sparse_down`) takes a set of active neurons for each row, `sparse_linear` a
threshold on the input. Both take weights of float32, float16, bfloat16, or four bits (`Int4Weight`).
"""

from patchclamp_kernels.sparse_mlp.cases import compile_cases, tuning_cases
from patchclamp_kernels.sparse_mlp.index_sets import (
    sparse_down,
    sparse_down_reference,
    sparse_mlp,
    sparse_mlp_reference,
    sparse_up,
    sparse_up_reference,
)
from patchclamp_kernels.sparse_mlp.int4 import Int4Weight, pack, quantise, unpack
from patchclamp_kernels.sparse_mlp.sets import NeuronSets
from patchclamp_kernels.sparse_mlp.threshold import sparse_linear, sparse_linear_reference

__all__ = [
    "Int4Weight",
    "NeuronSets",
    "compile_cases",
    "pack",
    "quantise",
    "sparse_down",
    "sparse_down_reference",
    "sparse_linear",
    "sparse_linear_reference",
    "sparse_mlp",
    "sparse_mlp_reference",
    "sparse_up",
    "sparse_up_reference",
    "tuning_cases",
    "unpack",
]
