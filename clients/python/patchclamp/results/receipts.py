"""What a program did: receipts and readouts."""

from dataclasses import dataclass

from patchclamp.results.record import Record
from patchclamp.v1 import program_pb2 as pb


@dataclass(frozen=True)
class ReadoutValue(Record):
    """What one readout saw at one token and layer; `ids`: the neurons, tokens or positions of the values.

    texts: of the ids where they are tokens, as in a logit lens.
    """

    name: str
    layer: int
    position: int
    values: tuple[float, ...]
    ids: tuple[int, ...]
    texts: tuple[str, ...] = ()

    @classmethod
    def from_proto(cls, message: pb.ReadoutValue) -> "ReadoutValue":
        values, ids, texts = tuple(message.values), tuple(message.ids), tuple(message.texts)
        return cls(message.name, message.layer, message.position, values, ids, texts)


@dataclass(frozen=True)
class EditReceipt(Record):
    """rows: (token, layer) pairs written; mean_relative_change: mean of ‖Δ‖/‖h‖ over them."""

    name: str
    rows: int
    mean_relative_change: float
    gate_firings: int
    rows_from_cache: int

    @classmethod
    def from_proto(cls, message: pb.EditReceipt) -> "EditReceipt":
        return cls(
            message.name,
            message.rows,
            message.mean_relative_change,
            message.gate_firings,
            message.rows_from_cache,
        )

    def __str__(self) -> str:
        parts = [f"{self.rows} token-layer rows", f"mean change {self.mean_relative_change:.2%} of the norm"]
        if self.rows_from_cache:
            parts.append(f"{self.rows_from_cache} more rows from the prefix cache")
        if self.gate_firings:
            parts.append(f"gate open {self.gate_firings} times")
        return f"{self.name}: {', '.join(parts)}"


@dataclass(frozen=True)
class Receipt(Record):
    """Counted by the server where it happened. `touched` is False when no edit touched any activation."""

    program_fingerprint: str
    edits: tuple[EditReceipt, ...]
    touched: bool

    @classmethod
    def from_proto(cls, message: pb.Receipt) -> "Receipt":
        edits = tuple(EditReceipt.from_proto(e) for e in message.edits)
        return cls(message.program_fingerprint, edits, message.touched)

    def __str__(self) -> str:
        if not self.edits:
            return "receipt: no edits"
        outcome = "edited" if self.touched else "NO activation was touched"
        return "\n".join([f"receipt {self.program_fingerprint[:19]}: {outcome}", *(f"  {edit}" for edit in self.edits)])
