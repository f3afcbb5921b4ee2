"""Part 5: transformers with a static cache, and the dense MLP of cuBLAS, on the same shapes and random weights."""

import time
from collections.abc import Iterator
from statistics import median

import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM, StoppingCriteria, StoppingCriteriaList

from gpu.models import config_of
from gpu.setting import Setting, Shape
from gpu.timing import Timer, bounded

Row = dict[str, object]


class Clock(StoppingCriteria):
    """When each token of `generate` was there. It never stops."""

    def __init__(self) -> None:
        self.at: list[float] = []

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **_: object) -> torch.Tensor:
        self.at.append(time.perf_counter())
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)

    def step(self) -> float:
        """Median seconds of a decode step; `generate` waits for the device in every step."""
        return median(b - a for a, b in zip(self.at[2:], self.at[3:], strict=False))


def measure(setting: Setting) -> Iterator[tuple[str, Row]]:
    (shape,) = setting.shapes
    yield from _mlp(setting, shape)
    yield from _generate(setting, shape)


def _mlp(setting: Setting, shape: Shape) -> Iterator[tuple[str, Row]]:
    timer, device, dtype = Timer(setting), torch.device(setting.device), torch.bfloat16
    d, d_ff = shape.d_model, shape.d_ff
    up, down = (torch.randn(n, m, device=device, dtype=dtype) * m**-0.5 for n, m in ((2 * d_ff, d), (d, d_ff)))
    copies = [(up, down)] + [(up.clone(), down.clone()) for _ in range(timer.n_sets(6 * d * d_ff, most=4) - 1)]
    for rows in setting.pick((1, 8, 64, 256), (1, 256), (3,)):
        x = torch.randn(rows, d, device=device, dtype=dtype)

        def run(up: torch.Tensor, down: torch.Tensor, x: torch.Tensor = x) -> torch.Tensor:
            gate, value = F.linear(x, up).chunk(2, dim=1)
            return F.linear(F.silu(gate) * value, down)

        timing = timer.one([lambda u=u, w=w, run=run: run(u, w) for u, w in copies])
        row = bounded(setting, timing, byte_count=3 * d * d_ff * dtype.itemsize, flops=6 * rows * d * d_ff)
        yield "cublas", {"op": "dense mlp", "model": shape.name, "case": f"{rows} rows", **row}


def _generate(setting: Setting, shape: Shape) -> Iterator[tuple[str, Row]]:
    device = torch.device(setting.device)
    with device:
        model = AutoModelForCausalLM.from_config(config_of(shape), dtype=torch.bfloat16).eval()
    model.generation_config.eos_token_id = None
    tokens, length = setting.pick(64, 32, 6), setting.pick(128, 128, 8)
    for batch in setting.pick((1, 8, 64), (1, 64), (1, 2)):
        if setting.seconds_left < 15:
            return
        yield "baselines", _row(setting, shape, model, batch, length, tokens, compiled=False)
    # Compiling the forward pass takes about a minute: only where there is time for it.
    if setting.cuda and not setting.quick and setting.seconds_left > 120:
        try:
            yield "baselines", _row(setting, shape, model, 1, length, tokens, compiled=True)
        except Exception as error:
            # Of the compiler of torch, which is nothing of ours.
            print(f"  the compiled baseline is left out: {type(error).__name__}: {error}", flush=True)


def _row(setting: Setting, shape: Shape, model, batch: int, length: int, tokens: int, *, compiled: bool) -> Row:
    prompts = torch.randint(0, shape.vocab_size, (batch, length), device=setting.device)
    times = []
    for i in range(setting.pick(3, 2, 1) + 1):
        clock = Clock()
        model.generate(
            prompts,
            attention_mask=torch.ones_like(prompts),
            max_new_tokens=tokens,
            do_sample=False,
            cache_implementation="static",
            disable_compile=not compiled,
            stopping_criteria=StoppingCriteriaList([clock]),
        )
        if i:
            times.append(clock.step())
    seconds = median(times)
    return {
        "model": shape.name,
        "case": "transformers, static cache" + (", compiled" if compiled else ""),
        "batch": batch,
        "tokens_per_second": round(batch / seconds, 1),
        "step_ms": round(seconds * 1e3, 4),
        "spread": round((max(times) - min(times)) / seconds, 4),
    }
