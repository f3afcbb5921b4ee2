"""Random texts and chats, small and large, and messages in which they stand."""

from collections.abc import Callable, Iterator
from random import Random

from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message

from patchclamp.v1 import generation_pb2 as pb

PIECES = (
    "once",
    " upon",
    " a",
    "time",
    " ",
    "\n",
    "</s>",
    "<s>",
    "<unk>",
    "[PAD]",
    "<|im_end|>",
    "é",
    "\0",
    "🦜",
    "日本",
    "▁",
)
ROLES = ("user", "assistant", "system", "tool", "r", "</s>", "")
# Below what a server takes in one message.
LARGE = 3_000_000


def text(random: Random) -> str:
    if random.randrange(12) == 0:
        piece = random.choice((*PIECES, "x", "ab1!"))
        return piece * (random.choice((1000, 30_000, LARGE)) // len(piece.encode()))
    return "".join(random.choices(PIECES, k=random.randrange(20)))


def prompt(random: Random) -> pb.Prompt:
    match random.randrange(4):
        case 0:
            return pb.Prompt(text=text(random))
        case 1:
            ids = [random.choice((random.randrange(500), random.randrange(2**32))) for _ in range(random.randrange(9))]
            return pb.Prompt(tokens={"ids": ids})
        case 2:
            turns = [(random.choice(ROLES), text(random)) for _ in range(random.randrange(6))]
        case _:
            n = random.choice((50, 250, 1500, 20_000))
            few = random.randint(0, 1)
            turns = [(ROLES[i % 2] if few else f"r{i}", "x") for i in range(n)]
            turns[random.randrange(n)] = (random.choice(ROLES), "y")
    messages = [pb.ChatMessage(role=role, content=content) for role, content in turns]
    return pb.Prompt(chat={"messages": messages, "continue_final_message": bool(random.randint(0, 1))})


def retold(random: Random, message: Message) -> Message:
    """A copy in which one prompt or string, where it has any, is another."""
    copy = type(message)()
    copy.CopyFrom(message)
    changes = list(_changes(random, copy))
    if changes:
        random.choice(changes)()
    size = copy.ByteSize()
    assert size < 4 << 20, size
    return copy


def renamed(message: Message, names: frozenset[str], name: str) -> Message:
    """A copy in which every string that is one of `names` is `name`."""
    copy = type(message)()
    copy.CopyFrom(message)
    for holder, field in _strings(copy):
        if getattr(holder, field.name) in names:
            setattr(holder, field.name, name)
    return copy


def _changes(random: Random, message: Message) -> Iterator[Callable[[], object]]:
    for part in _messages(message):
        if isinstance(part, pb.Prompt):
            yield lambda part=part: part.CopyFrom(prompt(random))
    for holder, field in _strings(message):
        yield lambda holder=holder, field=field: setattr(holder, field.name, text(random))
    for part in _messages(message):
        for field, values in part.ListFields():
            if field.type == FieldDescriptor.TYPE_STRING and field.is_repeated:
                yield lambda values=values: values.__setitem__(random.randrange(len(values)), text(random))


def _messages(message: Message) -> Iterator[Message]:
    yield message
    for field, value in message.ListFields():
        if field.type == FieldDescriptor.TYPE_MESSAGE and not field.message_type.GetOptions().map_entry:
            for each in value if field.is_repeated else [value]:
                yield from _messages(each)


def _strings(message: Message) -> Iterator[tuple[Message, FieldDescriptor]]:
    for part in _messages(message):
        for field, _ in part.ListFields():
            if field.type == FieldDescriptor.TYPE_STRING and not field.is_repeated:
                yield part, field
