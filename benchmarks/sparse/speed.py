"""How much faster an MLP is that reads its active neurons only, on this machine's CPU, beside its byte bound.

1. the 30 MLPs of the embedded model (d 576, d_ff 1536), served from 4-bit codes by one thread;
2. one MLP of an 8B shape (d 4096, d_ff 14336), random weights, float32 and bfloat16, by all threads.

Batch 1; keep .5 and .3. "fixed": a random set, compacted once (codes) or read where it is (floats). "token": a random
set that is known before the MLP. "gate": known after the gates, which are computed in full, as of CATS. "channels": the
output projection of h by a threshold, as of TEAL. "fovea": our policy with all that it does for a token, from choosing
to the stand-in of what was not chosen; its parts are timed alone as well.

`weight_bound` counts weights: fixed and token 1 / keep, gate 3 / (1 + 2 keep). `byte_bound` counts bytes: of an output
projection in 4-bit codes a third cannot be skipped, the scales of 32 neurons being read for one of them. Of fovea both
count the bytes of its sketch (Selector.cost).

"dense" is what the server does: cpu/linear.py. Beside it F.linear is measured, where there are float matrices, and
`vs_fastest` and the shares of the bounds are against the faster of the two, so that no slow baseline flatters them.
Before every run 64 MiB of other memory are read, so that no run finds its weights in a cache: in a model they are not
there either. Figures are medians of alternating runs.
"""

import time
from collections.abc import Callable, Mapping
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from measure import alternate
from torch import Tensor

from patchclamp_server.cpu.sparse.channels import SparseLinear
from patchclamp_server.cpu.sparse.mlp import SparseMlp
from patchclamp_server.sparsity.mlp import MlpInput, SparseModel
from patchclamp_server.sparsity.policies.fovea import Fovea
from patchclamp_server.sparsity.policy import Selector
from patchclamp_server.sparsity.profile import Profile

KEEPS = (0.5, 0.3)
KINDS = ("fixed", "token", "gate", "channels", "fovea")
DENSE = ("dense", "F.linear")
# Of a weight in 4-bit codes: the code, and its share of a float32 scale and low of 32 weights.
CODE_BITS = 4 + 64 / 32
SUMMARY = (
    "fixed_set_speed_vs_bound_keep50",
    "fixed_set_speed_vs_bound_keep30",
    "embedded_fixed_set_speed_vs_byte_bound_keep50",
    "embedded_fixed_set_speed_vs_byte_bound_keep30",
    "fovea_speedup_keep50",
    "fovea_speedup_keep30",
)
OTHER_MEMORY = torch.ones(16 << 20)
Runs = dict[str, Callable[[], float]]


def measure(models: Mapping[str, Callable[[], SparseModel]], rounds: int) -> dict[str, Any]:
    """Every case in turn; models are made when it is theirs."""
    cases = {}
    for name, make in models.items():
        print(f"{name}: …", flush=True)
        cases[name] = case = of_model(make(), rounds)
        for group in ("dense_ms", "part_ms"):
            print("    " + ", ".join(f"{key} {ms:.2f} ms" for key, ms in case[group].items()), flush=True)
        for row, figures in case["sparse"].items():
            print(f"    {row:13s}" + "  ".join(f"{key} {value:6.2f}" for key, value in figures.items()), flush=True)
    # Of all weights for the shape that shows what a CPU can do; of all bytes for the codes we serve by default.
    floats, codes = cases["8b_float32"]["sparse"], cases["embedded_codes"]["sparse"]
    return {
        "fixed_set_speed_vs_bound_keep50": floats["fixed 0.5"]["of_weight_bound"],
        "fixed_set_speed_vs_bound_keep30": floats["fixed 0.3"]["of_weight_bound"],
        "embedded_fixed_set_speed_vs_byte_bound_keep50": codes["fixed 0.5"]["of_byte_bound"],
        "embedded_fixed_set_speed_vs_byte_bound_keep30": codes["fixed 0.3"]["of_byte_bound"],
        "fovea_speedup_keep50": {name: case["sparse"]["fovea 0.5"]["vs_fastest"] for name, case in cases.items()},
        "fovea_speedup_keep30": {name: case["sparse"]["fovea 0.3"]["vs_fastest"] for name, case in cases.items()},
        "cases": cases,
        "rounds": rounds,
        "threads": torch.get_num_threads(),
    }


@torch.inference_mode()
def of_model(model: SparseModel, rounds: int) -> dict[str, Any]:
    selectors = {keep: _fovea(model, keep) for keep in KEEPS}
    figures = alternate(_runs_of(model, selectors), rounds)
    codes = model.decoder.blocks[0].mlp_output.matrix is not None
    weight_bits = CODE_BITS if codes else 8 * model.decoder.dtype.itemsize
    rows = {}
    for name, seconds in figures.items():
        kind, _, ratio = name.partition(" ")
        if kind not in KINDS:
            continue
        keep = float(ratio)
        part = " output" if kind == "channels" else ""
        fastest = min((d + part for d in DENSE if d + part in figures), key=lambda d: median(figures[d]))
        speed = _ratio(figures[fastest], seconds)
        if kind == "fovea":
            read = selectors[keep].cost(0, weight_bits).bytes_read(keep)
            bounds = 1 / read, 1 / (read + (_skippable("token", False) - _skippable("token", codes)) * (1 - keep))
        else:
            bounds = _bound(kind, keep, False), _bound(kind, keep, codes)
        rows[name] = {
            "ms": round(median(seconds) * 1000, 3),
            "vs_dense": round(_ratio(figures["dense" + part], seconds), 2),
            "vs_fastest": round(speed, 2),
            "weight_bound": round(bounds[0], 2),
            "of_weight_bound": round(speed / bounds[0], 2),
            "byte_bound": round(bounds[1], 2),
            "of_byte_bound": round(speed / bounds[1], 2),
        }
    others = {name: round(median(seconds) * 1000, 3) for name, seconds in figures.items() if name not in rows}
    return {
        "dense_ms": {name: ms for name, ms in others.items() if name.startswith(DENSE)},
        "part_ms": {name: ms for name, ms in others.items() if not name.startswith(DENSE)},
        "sparse": rows,
    }


def _runs_of(model: SparseModel, selectors: Mapping[float, Selector]) -> Runs:
    """One pass through all MLPs by every way."""
    generator = torch.Generator().manual_seed(0)
    spec, blocks = model.spec, model.decoder.blocks
    sparse = [SparseMlp(b.mlp_input, b.mlp_output, spec.activation, gated=True) for b in blocks]
    sparse[0].warm_up()
    x = torch.randn(1, spec.d_model, generator=generator).to(model.decoder.dtype)
    h = torch.rand(1, spec.d_ff, generator=generator).to(model.decoder.dtype)
    channels = [SparseLinear(s.mlp_output) for s in sparse]
    runs = {
        "dense": _timed(lambda: [s.mlp_output(s.dense_neurons(x)) for s in sparse]),
        "dense output": _timed(lambda: [s.mlp_output(h) for s in sparse]),
    }
    plain = [(b.mlp_input.weight, b.mlp_output.weight.contiguous()) for b in blocks if b.mlp_output.weight is not None]
    if plain:
        runs["F.linear"] = _timed(lambda: [F.linear(_gated(F.linear(x, w)), v) for w, v in plain])
        runs["F.linear output"] = _timed(lambda: [F.linear(h, v) for _, v in plain])
    for keep in KEEPS:
        sets = [torch.randperm(spec.d_ff, generator=generator)[: int(keep * spec.d_ff)].sort().values for _ in sparse]
        compact = [s.compact(index) for s, index in zip(sparse, sets, strict=True)]
        pairs = list(zip(sparse, sets, strict=True))
        runs[f"fixed {keep}"] = _timed(lambda compact=compact: [c(x) for c in compact])
        runs[f"token {keep}"] = _timed(lambda pairs=pairs: [s(x, index) for s, index in pairs])
        runs[f"gate {keep}"] = _timed(
            lambda pairs=pairs: [s.output(s.neurons(x, index, s.gate(x)), index) for s, index in pairs]
        )
        runs[f"channels {keep}"] = _timed(lambda keep=keep: [c(h, 1 - keep) for c in channels])
        runs |= _fovea_runs(model, selectors[keep], sparse, x, keep)
    return runs


def _fovea_runs(model: SparseModel, selector: Selector, sparse: list[SparseMlp], x: Tensor, keep: float) -> Runs:
    state = selector.begin()

    def select(layer: int) -> Any:
        return selector.select(state, layer, MlpInput(x, model.layers[layer]))

    def whole(layer: int) -> Tensor:
        selection = select(layer)
        y = sparse[layer](x, selection.active[0].nonzero()[:, 0])
        return y.add_(selection.remainder(selection.active))

    layers = range(model.n_layers)
    selections = [select(layer) for layer in layers]
    return {
        f"fovea {keep}": _timed(lambda: [whole(layer) for layer in layers]),
        f"select {keep}": _timed(lambda: [select(layer) for layer in layers]),
        f"stand-in {keep}": _timed(lambda: [s.remainder(s.active) for s in selections]),
    }


def _fovea(model: SparseModel, keep: float) -> Selector:
    """With a profile that was not calibrated: which neurons are chosen does not change how long it takes."""
    policy = Fovea(keep_ratio=keep, budget="uniform")
    errors = torch.full((model.n_layers, model.spec.d_ff), 0.1)
    tensors = {f"gate_error.{policy.bits}": errors, f"up_error.{policy.bits}": errors}
    selector = policy.bind(model, Profile(policy.name, model.fingerprint, tensors))
    selector.prepare()
    return selector


def _bound(kind: str, keep: float, codes: bool) -> float:
    """1 / (1 - f s): f of the bytes can be skipped, s = 1 - keep of them are."""
    return 1 / (1 - _skippable(kind, codes) * (1 - keep))


def _skippable(kind: str, codes: bool) -> float:
    output = 2 / 3 if codes else 1.0
    return {"gate": (1 + output) / 3, "channels": output}.get(kind, (2 + output) / 3)


def _timed(work: Callable[[], Any]) -> Callable[[], float]:
    def run() -> float:
        OTHER_MEMORY.sum()
        started = time.perf_counter()
        work()
        return time.perf_counter() - started

    return run


def _gated(hidden: Tensor) -> Tensor:
    gate, up = hidden.chunk(2, dim=1)
    return F.silu(gate) * up


def _ratio(dense: list[float], sparse: list[float]) -> float:
    """Median of the ratios within a round: a noisy moment hits both."""
    return median(a / b for a, b in zip(dense, sparse, strict=True))
