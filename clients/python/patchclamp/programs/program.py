"""A program: everything one request does to the model while it runs."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from google.protobuf import json_format

from patchclamp.fields import MessageT, instances
from patchclamp.v1 import program_pb2 as pb


@dataclass(frozen=True, init=False)
class Program:
    """Holds edits in the order they are applied, readouts, and conditions that abort the stream."""

    edits: tuple[pb.Edit, ...]
    readouts: tuple[pb.Readout, ...]
    abort_when: tuple[pb.AbortCondition, ...]

    def __init__(
        self,
        edits: Iterable[pb.Edit] | pb.Edit = (),
        *,
        readouts: Iterable[pb.Readout] | pb.Readout = (),
        abort_when: Iterable[pb.AbortCondition] | pb.AbortCondition = (),
    ) -> None:
        """Takes several of each, or one that is in no list. Raises TypeError for one in the place of another."""
        object.__setattr__(self, "edits", _all(edits, pb.Edit, "edits", "an edit such as add(...)"))
        object.__setattr__(
            self, "readouts", _all(readouts, pb.Readout, "readouts", "a readout such as read_heads(...)")
        )
        conditions = _all(abort_when, pb.AbortCondition, "abort_when", "a condition such as abort_when(...)")
        object.__setattr__(self, "abort_when", conditions)

    def message(self) -> pb.Program:
        return pb.Program(edits=self.edits, readouts=self.readouts, abort_when=self.abort_when)

    def to_json(self) -> str:
        """Returns the message Program in protobuf JSON, with the field names of the contract."""
        return json_format.MessageToJson(self.message(), preserving_proto_field_name=True)

    @classmethod
    def from_json(cls, text: str) -> "Program":
        """Reads what to_json writes. Raises ValueError for JSON that is not a Program."""
        try:
            message = json_format.Parse(text, pb.Program())
        except json_format.ParseError as error:
            raise ValueError(f"not a program in protobuf JSON: {error}") from None
        return cls(message.edits, readouts=message.readouts, abort_when=message.abort_when)


ProgramLike = Program | pb.Program | pb.Edit | Sequence[pb.Edit]


def program_message(program: ProgramLike | None) -> pb.Program | None:
    """Returns the message of a program, of a plain list of edits, or of one edit."""
    if program is None or isinstance(program, pb.Program):
        return program
    if isinstance(program, Program):
        return program.message()
    edits = _all(program, pb.Edit, "program", "an edit such as add(...); Program(...) holds readouts and conditions")
    return pb.Program(edits=edits)


def _all(values: Iterable[MessageT] | MessageT, kind: type[MessageT], field: str, what: str) -> tuple[MessageT, ...]:
    """Returns the values, each of which must be a `kind`; one alone will do."""
    return (values,) if isinstance(values, kind) else tuple(instances(values, kind, field, what))
