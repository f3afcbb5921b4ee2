"""What a program did: receipts and readouts."""

from dataclasses import dataclass

from patchclamp.results.record import Record


@dataclass(frozen=True)
class ReadoutValue(Record):
    """Holds what one readout saw at one token and layer. The values of a projection are h·v/|v|.

    ids: the neurons, tokens or positions of the values. texts: those of the ids that are tokens, as in a logit lens.
    """

    name: str
    layer: int
    position: int
    values: tuple[float, ...]
    ids: tuple[int, ...]
    texts: tuple[str, ...] = ()


@dataclass(frozen=True)
class RequestWarning(Record):
    """Tells of what was served as asked, but can hardly have been meant.

    code: "strong_edit", "beyond_context" or "beyond_safe_range". field: path in the request, as in errors.
    """

    code: str
    field: str
    message: str

    def __str__(self) -> str:
        return f"warning: {self.field}: {self.message}"


@dataclass(frozen=True)
class EditReceipt(Record):
    """Says what one edit did.

    rows: (token, layer) pairs that this request computed and wrote. mean_relative_change: mean of ‖Δ‖/‖h‖ over them.
    rows_from_cache: pairs that an earlier request wrote, reused from the prefix cache; their change was measured there.
    gate_firings: tokens of the edit's own scope at which its gate was open, counted at each layer of the edit.
    gate_threshold: what the gate compared h·v/|v| (or the cosine) with; None without a gate.
    """

    name: str
    rows: int
    mean_relative_change: float
    gate_firings: int
    rows_from_cache: int
    gate_threshold: float | None = None

    def __str__(self) -> str:
        if self.rows_from_cache and not self.rows:
            parts = [
                f"all {self.rows_from_cache} token-layer rows came edited from the prefix cache",
                "their change was measured when they were computed",
            ]
        else:
            parts = [f"{self.rows} token-layer rows"]
            # Of no rows there is no mean.
            if self.rows:
                parts.append(f"mean change {self.mean_relative_change:.2%} of the norm")
            if self.rows_from_cache:
                parts.append(f"{self.rows_from_cache} more rows from the prefix cache")
        if self.gate_threshold is not None:
            parts.append(f"gate at {self.gate_threshold:.4g} open {self.gate_firings} times")
        return f"{self.name}: {', '.join(parts)}"


@dataclass(frozen=True)
class Receipt(Record):
    """Says what a program did, as the server counted it. `touched` is False when no edit touched any activation.

    warnings: those of the whole request, also those that are about no edit.
    """

    program_fingerprint: str
    edits: tuple[EditReceipt, ...]
    touched: bool
    warnings: tuple[RequestWarning, ...] = ()

    def __str__(self) -> str:
        outcome = "edited" if self.touched else "NO activation was touched"
        first = f"receipt {self.program_fingerprint[:19]}: {outcome}" if self.edits else "receipt: no edits"
        return "\n".join([first, *(f"  {edit}" for edit in self.edits), *map(str, self.warnings)])
