"""Triton kernels for white-box serving, each with the torch reference that defines it.

On CUDA tensors an op runs its kernel; on CPU tensors its reference, or its kernel in Triton's interpreter where
TRITON_INTERPRET=1 was set before Triton was imported. Every op says in its module what it computes:

    attention          paged_attention, rope_kv_write
    residual stream    residual_edits, edit_rows, accumulate_receipts
    neurons            gated_activation, neuron_receipts, neuron_statistics
    sparse MLP         sparse_mlp, sparse_up, sparse_down, sparse_linear, Int4Weight
    features, probes   feature_clamp, probe_statistics
    vocabulary         logit_lens_topk, greedy_choice, token_logprobs
"""

from patchclamp_kernels.feature_clamp import feature_clamp
from patchclamp_kernels.gated_activation import (
    NeuronProgram,
    gated_activation,
    neuron_receipts,
    neuron_statistics,
    neuron_tiles,
)
from patchclamp_kernels.logit_lens_topk import LensTopK, logit_lens_topk
from patchclamp_kernels.paged_attention import Attended, RaggedBatch, Streaming, paged_attention
from patchclamp_kernels.probe_statistics import probe_statistics
from patchclamp_kernels.program_table import EntryFlag, EntryKind, ProgramRows, ProgramTable
from patchclamp_kernels.receipts import accumulate_receipts
from patchclamp_kernels.residual_edits import NormParams, ProgramStep, edit_rows, residual_edits
from patchclamp_kernels.rope_kv_write import rope_kv_write
from patchclamp_kernels.runtime import reference_only
from patchclamp_kernels.sparse_mlp import (
    Int4Weight,
    NeuronSets,
    quantise,
    sparse_down,
    sparse_linear,
    sparse_mlp,
    sparse_up,
)
from patchclamp_kernels.token_choice import greedy_choice, token_logprobs

__all__ = [
    "Attended",
    "EntryFlag",
    "EntryKind",
    "Int4Weight",
    "LensTopK",
    "NeuronProgram",
    "NeuronSets",
    "NormParams",
    "ProgramRows",
    "ProgramStep",
    "ProgramTable",
    "RaggedBatch",
    "Streaming",
    "accumulate_receipts",
    "edit_rows",
    "feature_clamp",
    "gated_activation",
    "greedy_choice",
    "logit_lens_topk",
    "neuron_receipts",
    "neuron_statistics",
    "neuron_tiles",
    "paged_attention",
    "probe_statistics",
    "quantise",
    "reference_only",
    "residual_edits",
    "rope_kv_write",
    "sparse_down",
    "sparse_linear",
    "sparse_mlp",
    "sparse_up",
    "token_logprobs",
]
