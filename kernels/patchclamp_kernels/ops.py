"""This is the one list of ops. A module is imported when it is asked for, so that one tool can run on one op."""

from collections.abc import Iterable
from importlib import import_module
from typing import Any

import torch

from patchclamp_kernels.cases import CompileCase, TuningCase

OPS = {
    "paged_attention": "patchclamp_kernels.paged_attention",
    "rope_kv_write": "patchclamp_kernels.rope_kv_write",
    "residual_edits": "patchclamp_kernels.residual_edits",
    "receipts": "patchclamp_kernels.receipts",
    "gated_activation": "patchclamp_kernels.gated_activation",
    "feature_clamp": "patchclamp_kernels.feature_clamp",
    "sparse_mlp": "patchclamp_kernels.sparse_mlp",
    "probe_statistics": "patchclamp_kernels.probe_statistics",
    "logit_lens_topk": "patchclamp_kernels.logit_lens_topk",
    "token_choice": "patchclamp_kernels.token_choice",
}


def op_module(name: str) -> Any:
    """Returns the module of an op. Raises ValueError for an unknown name."""
    if name not in OPS:
        raise ValueError(f"no op is called {name!r}: {', '.join(OPS)}")
    return import_module(OPS[name])


def compile_cases(names: Iterable[str] = OPS) -> dict[str, list[CompileCase]]:
    """Returns the cases by op, in the order of the op's module. ValueError: two cases of an op have one name."""
    cases = {name: list(op_module(name).compile_cases()) for name in names}
    for name, of_op in cases.items():
        seen = [case.name for case in of_op]
        if twice := {case for case in seen if seen.count(case) > 1}:
            raise ValueError(f"{name} has two compile cases called {', '.join(sorted(twice))}")
    return cases


def tuning_cases(device: torch.device, names: Iterable[str] = OPS) -> list[TuningCase]:
    return [case for name in names for case in op_module(name).tuning_cases(device)]
