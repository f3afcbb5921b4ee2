"""Comparison of what a kernel computes with what its reference computes in float64."""

from collections.abc import Iterator

import torch
from torch import Tensor

# Relative error ‖out - ref‖ / ‖ref‖ that rounding explains, by the dtype of the inputs.
BOUNDS = {torch.float32: 3e-5, torch.float16: 2e-3, torch.bfloat16: 1.2e-2}
DTYPES = tuple(BOUNDS)
# Exact products of 16 bits, summed by matrix units, which cut the float32 sums off instead of rounding them.
MATRIX_UNITS = 2e-4
# Share of discrete answers (positions, token ids) that may differ: near ties fall either way.
DISCRETE = 0.005
POISON = -77777

Row = dict[str, object]


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def poisoned(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device | str) -> Tensor:
    """An output in which nothing has been written yet."""
    return torch.full(shape, torch.nan if dtype.is_floating_point else POISON, dtype=dtype, device=device)


def exact(x: Tensor) -> Tensor:
    return x.double()


def relative_error(out: Tensor, reference: Tensor) -> float:
    """Infinite where anything is NaN: it was not written, or is wrong."""
    out, reference = out.double(), reference.double().to(out.device)
    error = float((out - reference).norm() / reference.norm().clamp_min(1e-30))
    return error if error == error else float("inf")


def differing(out: Tensor, reference: Tensor) -> float:
    """Share of elements that are not equal."""
    return float((out != reference.to(out.device)).double().mean()) if out.numel() else 0.0


class Checks:
    """Rows of one op: what was compared, how far it is from the reference, and how far it may be."""

    def __init__(self, op: str, seed: int) -> None:
        torch.manual_seed(seed)
        self.op = op
        self.rows: list[Row] = []

    def close(
        self, case: str, dtype: torch.dtype, *, bound: float | None = None, **pairs: tuple[Tensor, Tensor]
    ) -> None:
        """Each pair is (output, reference); `bound` where the dtype does not explain it."""
        for what, (out, reference) in pairs.items():
            self._add(case, dtype, what, relative_error(out, reference), BOUNDS[dtype] if bound is None else bound)

    def same(self, case: str, dtype: torch.dtype, *, share: float = DISCRETE, **pairs: tuple[Tensor, Tensor]) -> None:
        """Of discrete answers no more than `share` may differ."""
        for what, (out, reference) in pairs.items():
            self._add(case, dtype, what, differing(out, reference), share)

    def _add(self, case: str, dtype: torch.dtype, what: str, error: float, bound: float) -> None:
        row = {"op": self.op, "case": f"{case}: {what.replace('_', ' ')}", "dtype": name_of(dtype)}
        self.rows.append({**row, "error": error, "bound": bound, "ok": error <= bound})

    def taken(self) -> Iterator[tuple[str, Row]]:
        """The rows since the last call, for the report."""
        rows, self.rows = self.rows, []
        for row in rows:
            yield "checks", row
