"""A program: everything one request does to the model while it runs."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from google.protobuf import json_format

from patchclamp.v1 import program_pb2 as pb


@dataclass(frozen=True, init=False)
class Program:
    """Edits in the order they are applied, readouts, and conditions that abort the stream."""

    edits: tuple[pb.Edit, ...]
    readouts: tuple[pb.Readout, ...]
    abort_when: tuple[pb.AbortCondition, ...]

    def __init__(
        self,
        edits: Iterable[pb.Edit] = (),
        *,
        readouts: Iterable[pb.Readout] = (),
        abort_when: Iterable[pb.AbortCondition] = (),
    ) -> None:
        object.__setattr__(self, "edits", tuple(edits))
        object.__setattr__(self, "readouts", tuple(readouts))
        object.__setattr__(self, "abort_when", tuple(abort_when))

    def message(self) -> pb.Program:
        return pb.Program(edits=self.edits, readouts=self.readouts, abort_when=self.abort_when)

    def to_json(self) -> str:
        """Protobuf JSON of the message Program, with the field names of the contract."""
        return json_format.MessageToJson(self.message(), preserving_proto_field_name=True)

    @classmethod
    def from_json(cls, text: str) -> "Program":
        """Inverse of to_json. ValueError for JSON that is not a Program."""
        try:
            message = json_format.Parse(text, pb.Program())
        except json_format.ParseError as error:
            raise ValueError(f"not a program in protobuf JSON: {error}") from None
        return cls(message.edits, readouts=message.readouts, abort_when=message.abort_when)


ProgramLike = Program | pb.Program | Sequence[pb.Edit]


def program_message(program: ProgramLike | None) -> pb.Program | None:
    """The message of a program, or of a plain list of edits."""
    if program is None or isinstance(program, pb.Program):
        return program
    return (program if isinstance(program, Program) else Program(program)).message()
