"""Products with weights as a file holds them, beside what else multiplies them on a CPU, in one run.

    python benchmarks/products.py [--formats Q4_1 Q8_0 Q4_K Q6_K] [--ggml DIRECTORY] [--seconds 1.0]

Each cell is a shape of the embedded model or of an 8B, and rows of x; so many matrices are multiplied in turn that they
do not stay in the cache. Least milliseconds of one matrix, of alternating runs on all threads:

- exact, int8: ours, with activations in float32 and rounded to 8 bits.
- ggml: `ggml_mul_mat` of the libraries that a wheel of llama.cpp brings (its directory; activations rounded to 8 bits).
- int4: `torch.ops.aten._weight_int4pack_mm_for_cpu`, groups of 32, bfloat16; torchao's int4 on a CPU calls the same.
- onednn: float32 packed by oneDNN; float32: `F.linear`.

Writes benchmarks/results/products.json, and prints a JSON object as its last line.
"""

from patchclamp_server.cpu.compiled_code import keep_compiled_code
from patchclamp_server.threads import configure_threads

configure_threads()
keep_compiled_code()

import argparse
import ctypes
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from measure import save
from torch import Tensor

from patchclamp_server.cpu.products import StoredProduct
from patchclamp_server.cpu.stored import Format, Part, StoredMatrix

SHAPES = ((3072, 576), (576, 1536), (28672, 4096), (4096, 14336))
ROWS = (1, 4, 16, 64, 512)
# Where the blocks of a format have halves.
HALVES = {Format.Q4_1: (0, 2), Format.Q5_0: (0,), Format.Q8_0: (0,), Format.Q4_K: (0, 2), Format.Q6_K: (208,)}
CACHE = 64 << 20
RUNS = 40
GROUP = 32
Run = Callable[[], object]


class Ggml:
    """`ggml_mul_mat` of a directory of libraries."""

    class Memory(ctypes.Structure):
        _fields_ = (("size", ctypes.c_size_t), ("buffer", ctypes.c_void_p), ("no_alloc", ctypes.c_bool))

    def __init__(self, directory: Path) -> None:
        self._base = ctypes.CDLL(str(directory / "libggml-base.so"), mode=ctypes.RTLD_GLOBAL)
        cpu = ctypes.CDLL(str(directory / "libggml-cpu.so"))
        cpu.ggml_backend_cpu_init.restype = ctypes.c_void_p
        cpu.ggml_backend_cpu_set_n_threads.argtypes = [ctypes.c_void_p, ctypes.c_int]
        self._backend = cpu.ggml_backend_cpu_init()
        cpu.ggml_backend_cpu_set_n_threads(self._backend, torch.get_num_threads())
        pointer = ctypes.c_void_p
        for name, takes in (
            ("init", [self.Memory]),
            ("new_tensor_2d", [pointer, ctypes.c_int, ctypes.c_int64, ctypes.c_int64]),
            ("mul_mat", [pointer] * 3),
            ("new_graph", [pointer]),
            ("get_data", [pointer]),
        ):
            function = getattr(self._base, f"ggml_{name}")
            function.restype, function.argtypes = pointer, takes
        self._base.ggml_build_forward_expand.argtypes = [pointer] * 2
        self._base.ggml_free.argtypes = [pointer]
        self._base.ggml_backend_graph_compute.argtypes = [pointer] * 2

    def product(self, matrix: StoredMatrix, x: Tensor) -> Run:
        (part,), (out, width) = matrix.parts, matrix.shape
        # Beside the numbers there are descriptions of tensors and of the graph.
        size = matrix.nbytes + x.nbytes + 4 * len(x) * out + (1 << 20)
        context = self._base.ggml_init(self.Memory(size, None, False))
        weights = self._base.ggml_new_tensor_2d(context, int(part.format), width, out)
        rows = self._base.ggml_new_tensor_2d(context, int(Format.F32), width, len(x))
        ctypes.memmove(self._base.ggml_get_data(weights), part.memory.ctypes.data, matrix.nbytes)
        ctypes.memmove(self._base.ggml_get_data(rows), x.data_ptr(), x.nbytes)
        result = self._base.ggml_mul_mat(context, weights, rows)
        graph = self._base.ggml_new_graph(context)
        self._base.ggml_build_forward_expand(graph, result)
        end = weakly(self._base.ggml_free, context)

        def run() -> Tensor:
            if status := self._base.ggml_backend_graph_compute(self._backend, graph):
                raise RuntimeError(f"ggml ended with {status}")
            # A view of its memory, which lives as long as `end`.
            assert end is not None
            place = (ctypes.c_float * (len(x) * out)).from_address(self._base.ggml_get_data(result))
            return torch.frombuffer(place, dtype=torch.float32).view(len(x), out)

        return run


class weakly:
    """Calls a function when it is let go of."""

    def __init__(self, function: Callable[[Any], object], argument: object) -> None:
        self._call = function, argument

    def __del__(self) -> None:
        function, argument = self._call
        function(argument)


def contenders(matrix: StoredMatrix, x: Tensor, ggml: Ggml | None) -> dict[str, Run]:
    exact, rounded = StoredProduct(matrix), StoredProduct(matrix, rounds=True)
    found: dict[str, Run] = {"exact": lambda: exact.multiply(x), "int8": lambda: rounded.multiply(x)}
    if ggml is not None:
        found["ggml"] = ggml.product(matrix, x)
    if matrix.parts[0].format is Format.Q4_1:
        found |= dense_contenders(matrix, x)
    return found


def dense_contenders(matrix: StoredMatrix, x: Tensor) -> dict[str, Run]:
    weight = matrix.dense()
    out, width = weight.shape
    codes = torch.randint(0, 16, (out, width), dtype=torch.int32)
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 1)
    scales = torch.full((width // GROUP, out, 2), 0.01, dtype=torch.bfloat16)
    narrow = x.bfloat16()
    onednn = torch.ops.mkldnn._reorder_linear_weight(weight, len(x))
    return {
        "int4": lambda: torch.ops.aten._weight_int4pack_mm_for_cpu(narrow, packed, GROUP, scales),
        "onednn": lambda: torch.ops.mkldnn._linear_pointwise(x, onednn, None, "none", [], ""),
        "float32": lambda: F.linear(x, weight),
    }


def random_matrix(format: Format, out: int, width: int, seed: int) -> StoredMatrix:
    generator = np.random.default_rng(seed)
    blocks = generator.integers(0, 256, (out * width // format.weights, format.size), dtype=np.uint8)
    for at in HALVES[format]:
        blocks[:, at : at + 2] = np.full(1, 0.01, dtype=np.float16).view(np.uint8)
    return StoredMatrix((Part.whole(format, blocks.reshape(-1), width),))


def row(format: Format, shape: tuple[int, int], rows: int, ggml: Ggml | None, seconds: float) -> dict[str, Any]:
    out, width = shape[0], shape[1] // format.weights * format.weights
    # Of float32 there is no room for as many.
    most = max(1, CACHE // (out * format.row_bytes(width))) if rows < 64 else 1
    matrices = [random_matrix(format, out, width, seed) for seed in range(min(most, 16))]
    x = torch.randn(rows, width, generator=torch.Generator().manual_seed(0))
    ways: dict[str, list[Run]] = {}
    for matrix in matrices:
        for way, run in contenders(matrix, x, ggml).items():
            ways.setdefault(way, []).append(run)
    check(matrices[0], x, {way: runs[0] for way, runs in ways.items()})
    least = dict.fromkeys(ways, float("inf"))
    ended = time.perf_counter() + seconds * len(ways)
    for i in range(RUNS):
        for way, runs in ways.items():
            started = time.perf_counter()
            for run in runs:
                run()
            least[way] = min(least[way], (time.perf_counter() - started) / len(runs))
        if i and time.perf_counter() > ended:
            break
    found = {"format": format.name, "out": out, "in": width, "rows": rows}
    return found | {"least_ms": {way: round(1e3 * own, 4) for way, own in least.items()}}


def check(matrix: StoredMatrix, x: Tensor, runs: dict[str, Run]) -> None:
    """What is compared is the same product, but for how activations are rounded. int4 has codes of its own."""
    expected = x.double() @ matrix.dense().double().T
    scale = expected.abs().mean()
    for way, bound in (("exact", 1e-5), ("float32", 1e-5), ("onednn", 1e-5), ("int8", 0.05), ("ggml", 0.05)):
        if way in runs:
            result = runs[way]()
            assert isinstance(result, Tensor)
            off = float((result - expected).abs().mean() / scale)
            if not off < bound:
                raise SystemExit(f"{way} is off by {off:.2g} of the mean for {matrix.parts[0].format.name}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [format.name for format in HALVES]
    parser.add_argument("--formats", nargs="+", choices=names, default=names)
    parser.add_argument("--ggml", type=Path, help="directory of libggml-base.so and libggml-cpu.so")
    parser.add_argument("--seconds", type=float, default=0.5, help="of each way in a cell")
    parser.add_argument("--quick", action="store_true", help="one small shape, not written")
    arguments = parser.parse_args()
    ggml = Ggml(arguments.ggml) if arguments.ggml else None
    shapes = SHAPES[:1] if arguments.quick else SHAPES
    rows = [
        row(Format[name], shape, n, ggml, arguments.seconds)
        for name in arguments.formats
        for shape in shapes
        for n in ROWS
    ]
    result = {"threads": torch.get_num_threads(), "rows": rows}
    if not arguments.quick:
        save("products", result)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
