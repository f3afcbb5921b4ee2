"""The code that each result of benchmarks/results measures, and a digest of it.

A result keeps the digest of the code that it measured. `benchmarks/readme.py` refuses to show a result whose code has
changed since. Comments, docstrings, formatting, imports and the places of modules do not count: they change no figure.
"""

import ast
import json
from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path

ROOT = Path(__file__).parents[1]
# Where packages of ours begin.
SOURCES = {
    "patchclamp_server": ROOT / "server",
    "patchclamp_kernels": ROOT / "kernels",
    "patchclamp": ROOT / "clients/python",
}

# What turns tokens into logits, and what a step of the engine does besides.
_FORWARD = (
    "patchclamp_server.model.decoder",
    "patchclamp_server.cpu.linear",
    "patchclamp_server.cpu.products",
    "patchclamp_server.cpu.formats",
    "patchclamp_server.cpu.integers",
    "patchclamp_server.cpu.stored",
)
_ATTENTION = (
    "patchclamp_server.cpu.invariant.attention",
    "patchclamp_server.model.attention.chunks",
    "patchclamp_server.model.attention.paged",
    "patchclamp_server.model.attention.parts",
    "patchclamp_server.model.attention.peaks",
    "patchclamp_server.model.attention.pools",
    "patchclamp_server.model.attention.row_attention",
    "patchclamp_server.model.attention.tiled",
)
_STEP = (
    *_FORWARD,
    *_ATTENTION,
    "patchclamp_server.cpu.atomics",
    "patchclamp_server.cpu.invariant",
    "patchclamp_server.model.compiled",
    "patchclamp_server.engine.engine",
    "patchclamp_server.engine.runner",
    "patchclamp_server.engine.places",
    "patchclamp_server.engine.scheduler",
    "patchclamp_server.engine.steps",
    "patchclamp_server.engine.sampler",
    "patchclamp_server.engine.delivery",
    "patchclamp_server.engine.executors.operator_executor",
)
_SPARSE = ("patchclamp_server.sparsity", "patchclamp_server.cpu.sparse")

# What finds neurons and edits them.
_NEURONS = (
    "decode",
    "edit_tests",
    "edits",
    "evaluation",
    "find",
    "gradients",
    "intervals",
    "localize",
    "products",
    "random_sets",
    "weights",
)

# By the name of a result: modules and packages by their dotted names, and scripts by their paths.
MEASURED: dict[str, tuple[str, ...]] = {
    "activations": ("benchmarks/activations.py", "benchmarks/cards.py", *_FORWARD, "patchclamp_server.model.compiled"),
    "beside": (
        "benchmarks/beside.py",
        "patchclamp_server.engine.analysis_share",
        "patchclamp_server.engine.exclusive",
        "patchclamp_server.engine.pace",
        "patchclamp_server.engine.places",
        "patchclamp_server.engine.scheduler",
        "patchclamp_server.engine.steps",
        "patchclamp_server.engine.yielding",
    ),
    "cpu": ("benchmarks/cpu.py", "benchmarks/edits.py", *_STEP, "patchclamp_server.interventions"),
    "faults": (
        "benchmarks/faults",
        "patchclamp_server.engine.engine",
        "patchclamp_server.engine.steps",
        "patchclamp_server.engine.live",
        "patchclamp_server.engine.faults",
        "patchclamp_server.artifacts.store",
        "patchclamp_server.rpc.server",
    ),
    "gpu": ("benchmarks/gpu", "patchclamp_kernels"),
    "heads_causal": (
        "benchmarks/heads.py",
        "patchclamp_server.analysis.heads.retrieval.detect",
        "patchclamp_server.analysis.heads.sets.evaluation",
    ),
    "heads_naive": ("benchmarks/heads.py", "patchclamp_server.analysis.heads.retrieval.detect"),
    "heads_readout": ("benchmarks/heads.py", *_ATTENTION, "patchclamp_server.interventions.head_readings"),
    "host": ("benchmarks/host.py", *_STEP, "patchclamp_server.interventions"),
    "invariance": ("benchmarks/invariance.py", *_FORWARD, *_ATTENTION, "patchclamp_server.cpu.invariant"),
    "kv": (
        "benchmarks/kv.py",
        *_FORWARD,
        *_ATTENTION,
        "patchclamp_server.cpu.invariant",
        "patchclamp_server.model.compiled",
    ),
    "load": (
        "benchmarks/load",
        "patchclamp_server.engine.admission",
        "patchclamp_server.engine.fair_queue",
        "patchclamp_server.engine.intake",
        "patchclamp_server.engine.live",
        "patchclamp_server.engine.places",
        "patchclamp_server.engine.scheduler",
    ),
    "monitoring": ("benchmarks/monitoring.py", "patchclamp_server.monitoring"),
    "neurons": (
        *(f"benchmarks/neurons/{name}" for name in ("words", "relations", "languages", "decoding", "shown")),
        *(f"patchclamp_server.analysis.neurons.{name}" for name in _NEURONS),
    ),
    "neurons_census": (
        "benchmarks/neurons/census",
        "patchclamp_server.analysis.corpora",
        "patchclamp_server.analysis.neurons.census",
        "patchclamp_server.analysis.neurons.census_counts",
        "patchclamp_server.engine.reducers",
    ),
    "neurons_census_speed": (
        "benchmarks/neurons/census_speed",
        *_FORWARD,
        "patchclamp_server.analysis.corpora",
        "patchclamp_server.analysis.neurons.census_counts",
        "patchclamp_server.engine.analysis_share",
        "patchclamp_server.engine.pace",
        "patchclamp_server.engine.reducers",
        "patchclamp_server.engine.scheduler",
        "patchclamp_server.engine.steps",
        "patchclamp_server.engine.yielding",
    ),
    "peers": (
        *(f"benchmarks/peers/{name}" for name in ("cases", "equality", "figures", "rounds", "summary", "workers")),
        "benchmarks/edits.py",
        *_STEP,
        "patchclamp_server.interventions",
        *_SPARSE,
    ),
    "rolling": (
        "benchmarks/rolling.py",
        "patchclamp_server.rpc.server",
        "patchclamp.connection",
        "patchclamp.transport",
    ),
    "sparse_decode": ("benchmarks/sparse/__main__.py", "benchmarks/sparse/decode.py", *_STEP, *_SPARSE),
    "sparse_quality": ("benchmarks/sparse/__main__.py", "benchmarks/sparse/quality.py", *_SPARSE),
    "sparse_speed": (
        "benchmarks/sparse/__main__.py",
        "benchmarks/sparse/speed.py",
        *_FORWARD,
        "patchclamp_server.cpu.sparse",
    ),
    "prefill": ("benchmarks/prefill.py", *_STEP),
    "products": ("benchmarks/products.py", *_FORWARD),
    "shapes": ("benchmarks/shapes.py", "benchmarks/random_gguf.py", *_STEP, "patchclamp_server.model"),
    "step": ("benchmarks/step.py", *_STEP),
    "threads": ("benchmarks/threads.py", *_STEP, "patchclamp_server.threads"),
    "vectors": (
        *(f"benchmarks/vectors/{name}" for name in ("concepts", "effects", "table")),
        "patchclamp_server.analysis.neurons.intervals",
        "patchclamp_server.analysis.steering",
        "patchclamp_server.engine.reducers.pooled_text",
    ),
    "vectors_probe": (
        "benchmarks/vectors/probe",
        "patchclamp_server.analysis.calibration",
        "patchclamp_server.analysis.probes",
        "patchclamp_server.interventions.kinds.probes",
    ),
    "vectors_readouts": (
        "benchmarks/vectors/readouts",
        *_STEP,
        "patchclamp_server.interventions.kinds.activations",
        "patchclamp_server.interventions.kinds.readings",
    ),
}


def code_digest(kind: str) -> str:
    """SHA-256 of the code that results of this kind measure. Raises FileNotFoundError for a name that is no file."""
    parts = sorted(_digest(path) for name in MEASURED[kind] for path in _files(name))
    return sha256(json.dumps(parts).encode()).hexdigest()[:16]


def _files(name: str) -> Iterator[Path]:
    path = ROOT / name if "/" in name else SOURCES[name.partition(".")[0]] / name.replace(".", "/")
    if path.is_dir():
        yield from sorted(path.rglob("*.py"))
    elif (file := path.with_suffix(".py")).is_file():
        yield file
    else:
        raise FileNotFoundError(f"{name} is neither a module nor a package: change benchmarks/measured_code.py")


def _digest(path: Path) -> str:
    tree = _Essence().visit(ast.parse(path.read_text(encoding="utf-8")))
    return sha256(ast.dump(tree).encode()).hexdigest()


class _Essence(ast.NodeTransformer):
    """Takes out what changes no figure."""

    def visit_Import(self, node: ast.Import) -> None:
        return None

    def visit_ImportFrom(self, node: ast.ImportFrom) -> None:
        return None

    def visit_Expr(self, node: ast.Expr) -> ast.AST | None:
        is_text = isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
        return None if is_text else self.generic_visit(node)
