"""Neurons of an MLP have activations and edits (activation.py), receipts (receipts.py), watches (statistics.py)."""

import torch

from patchclamp_kernels.cases import CompileCase, TuningCase
from patchclamp_kernels.gated_activation import activation, receipts, statistics
from patchclamp_kernels.gated_activation.activation import gated_activation, neuron_tiles
from patchclamp_kernels.gated_activation.program import NeuronProgram
from patchclamp_kernels.gated_activation.receipts import neuron_receipts, neuron_receipts_reference
from patchclamp_kernels.gated_activation.reference import gated_activation_reference
from patchclamp_kernels.gated_activation.statistics import neuron_statistics, neuron_statistics_reference

__all__ = [
    "NeuronProgram",
    "compile_cases",
    "gated_activation",
    "gated_activation_reference",
    "neuron_receipts",
    "neuron_receipts_reference",
    "neuron_statistics",
    "neuron_statistics_reference",
    "neuron_tiles",
    "tuning_cases",
]


def compile_cases() -> list[CompileCase]:
    return activation.compile_cases() + receipts.compile_cases() + statistics.compile_cases()


def tuning_cases(device: torch.device) -> list[TuningCase]:
    return activation.tuning_cases(device) + statistics.tuning_cases(device)
