"""How much faster an MLP is that reads its active neurons only, on this machine's CPU, beside its byte bound.

    python benchmarks/sparse_speed.py [--rounds 41]

1. the 30 MLPs of the embedded model (d 576, d_ff 1536), served from 4-bit codes by one thread;
2. one MLP of an 8B shape (d 4096, d_ff 14336), random weights, float32 and bfloat16, by all threads.

Batch 1; random sets of keep .5 and .3. "fixed" sets are compacted once (codes) or kept as they are (floats); "token"
sets are known before the MLP; "gate" sets after the gates, which are then computed in full; "channels" is the output
projection of h by a threshold. `weight_bound` counts weights: fixed and token 1 / keep, gate 3 / (1 + 2 keep);
`byte_bound` counts bytes, of which a third of an output projection in 4-bit codes cannot be skipped: the scales of 32
neurons are read for one of them.

"dense" is what the server does: model/linear.py. Beside it are measured F.linear, where there are float matrices, and
our sparse products with all neurons but one, since both are faster at the 8B shape: `vs_fastest` and the share of the
bound are against the fastest of the three, so that no slow baseline flatters them. Before every run 64 MiB
of other memory are read, so that no run finds its weights in a cache: in a model they are not there either.

Prints the medians of alternating runs, writes benchmarks/results/sparse_speed.json, and as its last line JSON.
"""

from patchclamp_server.threads import configure_threads

configure_threads()

import argparse
import json
import time
from collections.abc import Callable
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from measure import alternate, save
from torch import Tensor

from patchclamp_server.model.linear import Linear
from patchclamp_server.model.load import load_model
from patchclamp_server.model.progress import RichProgress
from patchclamp_server.model.sparse import SparseLinear, SparseMlp

KEEPS = (0.5, 0.3)
DENSE = ("dense", "F.linear", "all but one")
OTHER_MEMORY = torch.ones(16 << 20)
Mlp = tuple[Linear, Linear]


def bound(kind: str, keep: float, codes: bool) -> float:
    """1 / (1 - f s): f of the bytes can be skipped, s = 1 - keep of them are."""
    output = 2 / 3 if codes else 1.0
    skippable = {"gate": (1 + output) / 3, "channels": output}.get(kind, (2 + output) / 3)
    return 1 / (1 - skippable * (1 - keep))


def timed(work: Callable[[], Any]) -> Callable[[], float]:
    def run() -> float:
        OTHER_MEMORY.sum()
        started = time.perf_counter()
        work()
        return time.perf_counter() - started

    return run


def runs_of(mlps: list[Mlp], x: Tensor, plain: list[tuple[Tensor, Tensor]]) -> dict[str, Callable[[], float]]:
    """One pass through all MLPs by every way; `plain` are their float matrices for F.linear, where there are any."""
    generator = torch.Generator().manual_seed(0)
    sparse = [SparseMlp(*mlp, "silu", gated=True) for mlp in mlps]
    sparse[0].warm_up()
    d_ff = sparse[0].d_ff
    runs = {"dense": timed(lambda: [s.mlp_output(s.dense_neurons(x)) for s in sparse])}
    if plain:
        runs["F.linear"] = timed(lambda: [F.linear(_gated(F.linear(x, w)), v) for w, v in plain])
    most = [s.compact(torch.arange(d_ff - 1)) for s in sparse]
    runs["all but one"] = timed(lambda: [m(x) for m in most])
    channels = [SparseLinear(s.mlp_output) for s in sparse]
    h = torch.rand(1, d_ff, generator=generator).to(x.dtype)
    runs["dense output"] = timed(lambda: [s.mlp_output(h) for s in sparse])
    runs["all but one output"] = timed(lambda: [c(h, float(h.min()) + 1e-9) for c in channels])
    if plain:
        runs["F.linear output"] = timed(lambda: [F.linear(h, v) for _, v in plain])
    for keep in KEEPS:
        sets = [torch.randperm(d_ff, generator=generator)[: int(keep * d_ff)].sort().values for _ in sparse]
        compact = [s.compact(index) for s, index in zip(sparse, sets, strict=True)]
        pairs = list(zip(sparse, sets, strict=True))
        runs[f"fixed {keep}"] = timed(lambda compact=compact: [c(x) for c in compact])
        runs[f"token {keep}"] = timed(lambda pairs=pairs: [s(x, index) for s, index in pairs])
        runs[f"gate {keep}"] = timed(
            lambda pairs=pairs: [s.output(s.neurons(x, index, s.gate(x)), index) for s, index in pairs]
        )
        runs[f"channels {keep}"] = timed(lambda keep=keep: [c(h, 1 - keep) for c in channels])
    return runs


def _gated(hidden: Tensor) -> Tensor:
    gate, up = hidden.chunk(2, dim=1)
    return F.silu(gate) * up


def measure(mlps: list[Mlp], x: Tensor, plain: list[tuple[Tensor, Tensor]], rounds: int) -> dict[str, Any]:
    with torch.inference_mode():
        figures = alternate(runs_of(mlps, x, plain), rounds)
    codes = mlps[0][1].quantized is not None
    rows = {}
    for name, seconds in figures.items():
        kind, _, keep = name.partition(" ")
        if kind not in ("fixed", "token", "gate", "channels"):
            continue
        part = " output" if kind == "channels" else ""
        fastest = min((d + part for d in DENSE if d + part in figures), key=lambda d: median(figures[d]))
        speed = ratio(figures[fastest], seconds)
        rows[name] = {
            "ms": round(median(seconds) * 1000, 3),
            "vs_dense": round(ratio(figures["dense" + part], seconds), 2),
            "vs_fastest": round(speed, 2),
            "weight_bound": round(bound(kind, float(keep), False), 2),
            "of_weight_bound": round(speed / bound(kind, float(keep), False), 2),
            "byte_bound": round(bound(kind, float(keep), codes), 2),
            "of_byte_bound": round(speed / bound(kind, float(keep), codes), 2),
        }
    dense = {name: round(median(seconds) * 1000, 3) for name, seconds in figures.items() if name not in rows}
    return {"dense_ms": dense, "sparse": rows}


def ratio(dense: list[float], sparse: list[float]) -> float:
    """Median of the ratios within a round: a noisy moment hits both."""
    return median(a / b for a, b in zip(dense, sparse, strict=True))


def embedded(rounds: int) -> dict[str, Any]:
    with RichProgress() as progress:
        decoder = load_model(progress=progress).decoder
    threads = torch.get_num_threads()
    torch.set_num_threads(decoder.threads_for(1, threads))
    x = torch.randn(1, decoder.spec.d_model)
    result = measure([(b.mlp_input, b.mlp_output) for b in decoder.blocks], x, [], rounds)
    torch.set_num_threads(threads)
    return result


def large(dtype: torch.dtype, rounds: int) -> dict[str, Any]:
    d, d_ff = 4096, 14336
    up, down = (torch.randn(2 * d_ff, d) / 64).to(dtype), (torch.randn(d, d_ff) / 120).to(dtype)
    mlp = Linear(up, None), Linear(down, None, input_major=True)
    return measure([mlp], torch.randn(1, d).to(dtype), [(up, down)], rounds)


def main() -> None:
    parser = argparse.ArgumentParser(description="Speed of sparse MLPs on the CPU.")
    parser.add_argument("--rounds", type=int, default=41)
    rounds = parser.parse_args().rounds
    cases = {
        "embedded_codes": embedded(rounds),
        "8b_float32": large(torch.float32, rounds // 2),
        "8b_bfloat16": large(torch.bfloat16, rounds // 2),
    }
    for name, case in cases.items():
        print(f"{name}: " + ", ".join(f"{key} {ms:.2f} ms" for key, ms in case["dense_ms"].items()))
        for row, figures in case["sparse"].items():
            print(f"    {row:13s}" + "  ".join(f"{key} {value:6.2f}" for key, value in figures.items()))
    # Of all weights for the shape that shows what a CPU can do; of all bytes for the codes we serve by default.
    floats, codes = cases["8b_float32"]["sparse"], cases["embedded_codes"]["sparse"]
    result = {
        "fixed_set_speed_vs_bound_keep50": floats["fixed 0.5"]["of_weight_bound"],
        "fixed_set_speed_vs_bound_keep30": floats["fixed 0.3"]["of_weight_bound"],
        "embedded_fixed_set_speed_vs_weight_bound_keep50": codes["fixed 0.5"]["of_weight_bound"],
        "embedded_fixed_set_speed_vs_weight_bound_keep30": codes["fixed 0.3"]["of_weight_bound"],
        "embedded_fixed_set_speed_vs_byte_bound_keep50": codes["fixed 0.5"]["of_byte_bound"],
        "embedded_fixed_set_speed_vs_byte_bound_keep30": codes["fixed 0.3"]["of_byte_bound"],
        "cases": cases,
        "rounds": rounds,
        "threads": torch.get_num_threads(),
    }
    print(f"written: {save('sparse_speed', result).name}")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
