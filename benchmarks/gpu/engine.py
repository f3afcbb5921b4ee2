"""Part 4: the engine with random weights. Decode unsteered and steered, prefill, and where the time of a step goes.

Decode is timed between steps of a full batch, as the engine's observer sees them: scheduling, kernels, sampling and the
events to 256 listeners are in it, prompts are not. Steered and unsteered runs take turns in one process; a ratio is the
median over the rounds of the ratio within a round. Beside that, one step is timed at the executor, without the engine's
Python (`execute_ms`), and as a bare replay of its graph (`replay_ms`): what is left of a step is Python.
"""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from statistics import median

import numpy as np
import torch
from measure import alternate, run_requests

from gpu.models import loaded_model
from gpu.programs import add_program, clamp_program, mixed_program, readout_program
from gpu.setting import Setting, Shape
from patchclamp_server.engine.batch import StepBatch
from patchclamp_server.engine.config import EngineConfig, Unobserved
from patchclamp_server.engine.engine import Engine
from patchclamp_server.interventions.bound import BoundProgram
from patchclamp_server.interventions.program import Scope
from patchclamp_server.interventions.scopes import SequenceTokens
from patchclamp_server.interventions.spans import ProgramSpan
from patchclamp_server.interventions.state import ProgramState
from patchclamp_server.model.attention.spans import Span, Spans

Programs = list[BoundProgram | None]
Row = dict[str, object]


class Compilations:
    """Every variant of a kernel that Triton compiles, or loads from its cache on disk, from now on."""

    def __init__(self) -> None:
        import triton

        self.names: list[str] = []
        triton.knobs.runtime.jit_post_compile_hook = self._add

    def _add(self, *, repr: str, fn: object, **_: object) -> None:
        self.names.append(f"{getattr(fn, 'module', '')}.{repr}"[:400])


class Steps(Unobserved):
    """When each step ended, and what was in it."""

    def __init__(self) -> None:
        self.ended: list[tuple[float, int, int]] = []

    def on_step(self, *, seconds: float, rows: int, generated: int) -> None:
        self.ended.append((time.perf_counter(), rows, generated))

    def full(self, rows: int) -> list[float]:
        """Seconds of the steps of `rows` decode rows alone that follow one of the same kind."""
        pairs = zip(self.ended, self.ended[1:], strict=False)
        return [b[0] - a[0] for a, b in pairs if a[1:] == (rows, rows) and b[1:] == (rows, rows)]


@dataclass(frozen=True)
class Case:
    name: str
    programs: Programs
    # Of the case that it is compared with.
    versus: str = ""


def measure(setting: Setting) -> Iterator[tuple[str, Row]]:
    (shape,) = setting.shapes
    device = torch.device(setting.device)
    compilations = Compilations()
    model = loaded_model(shape, torch.float32 if setting.tiny else torch.bfloat16, device)
    batches = setting.pick((1, 8, 64, 256), (1, 256), (1, 4))
    started = time.perf_counter()
    engine = Engine(
        model,
        EngineConfig(
            max_sequences=batches[-1],
            max_tokens_per_step=setting.pick(4096, 4096, 128),
            kv_cache_tokens=setting.pick(131072, 131072, 4096),
            kernels=True,
            decode_graphs=True,
        ),
    )
    engine.start()
    ready = time.perf_counter() - started
    before = len(compilations.names)
    print(f"{shape.name}: the engine is ready after {ready:.1f} s", flush=True)
    bench = _Bench(setting, shape, engine)
    try:
        yield from bench.rows(batches)
    finally:
        engine.shutdown()
    late = compilations.names[before:]
    row = {"seconds": round(ready, 2), "compiled_before_ready": before, "compiled_after_ready": late, "ok": not late}
    yield "readiness", {"model": shape.name, **row}
    if bench.failures:
        raise RuntimeError("; ".join(f"{case}: {error}" for case, error in bench.failures.items()))


class _Bench:
    def __init__(self, setting: Setting, shape: Shape, engine: Engine) -> None:
        self.setting, self.shape, self.engine = setting, shape, engine
        self.rounds = setting.pick(3, 2, 1)
        self.tokens = setting.pick(64, 32, 10)
        self.prompt_length = setting.pick(128, 128, 20)
        self.layers = tuple(range(shape.n_layers))
        self.uid = 0
        self.seed = 0
        self.failures: dict[str, str] = {}

    def rows(self, batches: Sequence[int]) -> Iterator[tuple[str, Row]]:
        most = batches[-1]
        yield from self._decode([Case("unsteered", [None])])
        yield from self._decode(self._steered(most))
        for batch in batches[1:-1]:
            yield from self._decode([Case("unsteered", [None] * batch)])
        yield from self._prefill()
        yield from self._long_contexts(batches)

    def _steered(self, n: int) -> list[Case]:
        shape, every = self.shape, self.layers
        neurons = min(64, shape.d_ff // 2)
        read = tuple(sorted({0, shape.n_layers // 3, 2 * shape.n_layers // 3, shape.n_layers - 1}))
        return [
            Case("unsteered", [None] * n),
            Case("one layer", [add_program(shape, 0, (shape.n_layers // 2,))] * n, "unsteered"),
            Case("all layers", [add_program(shape, 0, every)] * n, "unsteered"),
            Case(f"{n} programs", [add_program(shape, i, every) for i in range(n)], "all layers"),
            Case(f"{n} programs, all kinds", [mixed_program(shape, i, every, False) for i in range(n)], "unsteered"),
            Case("neuron clamps", [clamp_program(shape, 0, neurons, every)] * n, "unsteered"),
            Case(f"projections, {len(read)} layers", [readout_program(shape, 0, read)] * n, "unsteered"),
        ]

    def _decode(self, cases: list[Case]) -> Iterator[tuple[str, Row]]:
        if self.setting.seconds_left < 15:
            print("  the time is up", flush=True)
            return
        n = len(cases[0].programs)
        prompts = self._prompts(n, self.prompt_length)
        took = alternate({c.name: self._decoder(c.name, prompts, c.programs) for c in cases}, self.rounds)
        cases = [c for c in cases if c.name not in self.failures]
        context = self.prompt_length + self.tokens // 2
        apart = {c.name: self._apart(c.programs, context) for c in cases}
        bound = self._step_bound(n, context)
        for case in cases:
            seconds = median(took[case.name])
            replay, execute = apart[case.name]
            row: Row = {
                "model": self.shape.name,
                "case": case.name,
                "batch": n,
                "tokens_per_second": round(n / seconds, 1),
                "step_ms": round(seconds * 1e3, 4),
                "execute_ms": round(execute * 1e3, 4),
                "replay_ms": None if replay is None else round(replay * 1e3, 4),
                "spread": round((max(took[case.name]) - min(took[case.name])) / seconds, 4),
                "rounds": self.rounds,
                "context": context,
                "bound_ms": round(bound * 1e3, 4),
                "ratio": round(bound / seconds, 4),
                "replay_ratio": None if replay is None else round(bound / replay, 4),
            }
            if case.versus in apart:
                ratios = [a / b for a, b in zip(took[case.versus], took[case.name], strict=True)]
                base = apart[case.versus][0]
                row |= {"vs": case.versus, "vs_ratio": round(median(ratios), 4)}
                row["vs_replay_ratio"] = None if replay is None or base is None else round(base / replay, 4)
            yield "engine", row

    def _decoder(self, name: str, prompts: list[list[int]], programs: Programs) -> Callable[[], float]:
        """A run that fails costs its own case, not those that it takes turns with."""

        def run() -> float:
            if name in self.failures:
                return math.nan
            steps = Steps()
            self.engine.observer = steps
            try:
                run_requests(self.engine, prompts, programs, self.tokens)
            except RuntimeError as error:
                self.failures[name] = str(error)
                return math.nan
            full = steps.full(len(prompts))
            if not full:
                raise RuntimeError(f"no two steps in a row had {len(prompts)} decode rows")
            return median(full)

        return run

    def _prefill(self) -> Iterator[tuple[str, Row]]:
        if self.setting.seconds_left < 15:
            return
        n, length = self.setting.pick((8, 2048), (4, 2048), (2, 100))
        programs = {"prefill, unsteered": None, "prefill, all layers": add_program(self.shape, 0, self.layers, Scope())}

        def runner(program: BoundProgram | None) -> Callable[[], float]:
            # New prompts each time: nothing of them is in the prefix cache.
            return lambda: run_requests(self.engine, self._prompts(n, length), [program] * n, 1)

        took = alternate({name: runner(program) for name, program in programs.items()}, self.rounds)
        shape = self.shape
        weights = sum(w.numel() for w in self._matrices()[:-1])
        flops = 2 * weights * n * length
        flops += n * 2 * length * (length + 1) * shape.n_heads * shape.head_dim * shape.n_layers
        bound = flops / self.setting.flops_per_second
        for name, times in took.items():
            seconds = median(times)
            row: Row = {
                "model": shape.name,
                "case": name,
                "batch": n,
                "tokens_per_second": round(n * length / seconds, 1),
                "spread": round((max(times) - min(times)) / seconds, 4),
                "prompt_tokens": length,
                "bound_ms": round(bound * 1e3, 3),
                "ratio": round(bound / seconds, 4),
            }
            base = took["prefill, unsteered"]
            if times is not base:
                ratio = median(a / b for a, b in zip(base, times, strict=True))
                row |= {"vs": "unsteered", "vs_ratio": round(ratio, 4)}
            yield "engine", row

    def _prompts(self, n: int, length: int) -> list[list[int]]:
        """Random, so that no two share a prefix."""
        self.seed += 1
        generator = torch.Generator().manual_seed(self.seed)
        return torch.randint(0, self.shape.vocab_size, (n, length), generator=generator).tolist()

    def _matrices(self) -> list[torch.Tensor]:
        """Weights of all products of a step, the unembedding last."""
        decoder = self.engine.model.decoder
        linears = [
            linear
            for block in decoder.blocks
            for linear in (block.qkv, block.attn_output, block.mlp_input, block.mlp_output)
        ]
        shapes = [linear.weight if linear.weight is not None else linear.packed for linear in linears]
        return [*shapes, decoder.embedding.weight]

    def _step_bound(self, n: int, context: int) -> float:
        """Every weight read once, and the keys and values of the contexts; or the products, where those take longer."""
        shape = self.shape
        element = self.engine.model.decoder.dtype.itemsize
        numbers = sum(w.numel() for w in self._matrices())
        tokens = 2 * shape.n_layers * shape.n_kv_heads * shape.head_dim * context * n
        by_bytes = (numbers + tokens) * element / self.setting.copy_bytes_per_second
        return max(by_bytes, 2 * numbers * n / self.setting.flops_per_second)

    def _long_contexts(self, batches: Sequence[int]) -> Iterator[tuple[str, Row]]:
        """Steps at the executor alone: no prompt is needed for them. Those that do not fit into the cache are run on
        shared blocks, to see that their kernels are compiled, and are not timed."""
        cache = self.engine.cache
        for context in self.setting.pick((1500, 8000), (1500, 8000), (100,)):
            for n in batches:
                fits = n * (context // cache.block_size + 1) <= cache.n_free
                replay, execute = self._apart([None] * n, context, shared=not fits)
                if fits:
                    bound = self._step_bound(n, context)
                    row: Row = {
                        "model": self.shape.name,
                        "case": f"executor, context {context}",
                        "batch": n,
                        "tokens_per_second": round(n / execute, 1),
                        "execute_ms": round(execute * 1e3, 4),
                        "replay_ms": None if replay is None else round(replay * 1e3, 4),
                        "bound_ms": round(bound * 1e3, 4),
                        "ratio": round(bound / execute, 4),
                        "replay_ratio": None if replay is None else round(bound / replay, 4),
                    }
                    yield "engine", row

    @torch.inference_mode()
    def _apart(self, programs: Programs, context: int, shared: bool = False) -> tuple[float | None, float]:
        """Seconds of a bare replay, and of a step at the executor. The engine is idle meanwhile.

        `shared`: all rows read, and write, the same blocks.
        """
        executor, cache = self.engine.executor, self.engine.cache
        n, needed = len(programs), context // cache.block_size + 1
        taken = [cache.allocate() for _ in range(needed if shared else n * needed)]
        assert None not in taken
        spans, loaded, given = [], [], []
        try:
            for i, program in enumerate(programs):
                spans.append(Span(i, 1, context, taken[:needed] if shared else taken[i * needed : (i + 1) * needed]))
                if program is not None:
                    self.uid -= 1
                    entry = executor.tables.load(program)
                    loaded.append(entry)
                    state = ProgramState(self.uid, program, SequenceTokens(1, None), entry)
                    given.append(ProgramSpan(state, i, context, np.zeros(1, dtype=np.int64), 1))
            batch = StepBatch(np.full(n, 7), Spans.of(spans, cache.block_size), given, list(range(n)), cache.block_size)
            replay = self._replay(batch)
            times = []
            for _ in range(self.setting.pick(25, 15, 2)):
                started = time.perf_counter()
                executor.execute(batch)
                times.append(time.perf_counter() - started)
        finally:
            for entry in loaded:
                executor.tables.release(entry)
            cache.release(taken)
        return replay, median(times)

    def _replay(self, batch: StepBatch) -> float | None:
        graphs = self.engine.executor.graphs
        used = []
        found = graphs._graph
        graphs._graph = lambda key: used.append(found(key)) or used[-1]
        try:
            self.engine.executor.execute(batch)
        finally:
            del graphs._graph
        if not used or not self.setting.cuda:
            return None
        times = []
        for _ in range(7):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            for _ in range(5):
                used[-1].replay()
            end.record()
            end.synchronize()
            times.append(start.elapsed_time(end) / 5e3)
        return median(times)
