"""A GGUF file that is damaged, cut or of another kind is refused in a line, whatever its bytes lead to."""

import random
import struct
from contextlib import suppress
from pathlib import Path

import pytest
from gguf import GGUFReader

from patchclamp_server.model.errors import ModelSourceError
from patchclamp_server.model.gguf.header import read_header
from patchclamp_server.model.load import load_model


def string(text: str) -> bytes:
    encoded = text.encode()
    return struct.pack("<Q", len(encoded)) + encoded


def written(path: Path, keys: list[bytes] = [], tensors: list[bytes] = [], *, version: int = 3) -> Path:  # noqa: B006
    """A header and 64 bytes of data."""
    content = b"GGUF" + struct.pack("<IQQ", version, len(tensors), len(keys)) + b"".join(keys) + b"".join(tensors)
    path.write_bytes(content + bytes(-len(content) % 32) + bytes(64))
    return path


def key(name: str, kind: int, value: bytes) -> bytes:
    return string(name) + struct.pack("<I", kind) + value


def tensor(name: str, shape: tuple[int, ...] = (4,), *, kind: int = 0, offset: int = 0) -> bytes:
    return string(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, kind, offset)


def refusal(path: Path) -> str:
    with pytest.raises(ModelSourceError) as refused:
        read_header(path)
    return str(refused.value).removeprefix(f"{path} is not a whole GGUF file: ")


def test_keys_and_tensors_are_those_that_the_package_gguf_reads(tiny_gguf: Path) -> None:
    ours, theirs = read_header(tiny_gguf), GGUFReader(tiny_gguf)
    for name, value in ours.values.items():
        assert theirs.fields[name].contents() == value
    assert {name for name in theirs.fields if not name.startswith("GGUF.")} == set(ours.values)
    assert len(ours.entries) == len(theirs.tensors)
    for other in theirs.tensors:
        entry = ours.entries[other.name]
        assert (entry.format, entry.offset) == (other.tensor_type, other.data_offset)
        assert entry.shape == tuple(reversed(other.shape.tolist()))
        assert bytes(entry.memory[: other.n_bytes]) == other.data.tobytes()


@pytest.mark.parametrize(
    ("kind", "data", "value"),
    [
        (0, b"\xff", 255),
        (1, b"\xff", -1),
        (2, b"\xff\xff", 65535),
        (3, b"\xff\xff", -1),
        (4, struct.pack("<I", 7), 7),
        (5, struct.pack("<i", -7), -7),
        (6, struct.pack("<f", 0.5), 0.5),
        (7, b"\x01", True),
        (8, string("é"), "é"),
        (10, struct.pack("<Q", 2**63), 2**63),
        (11, struct.pack("<q", -(2**63)), -(2**63)),
        (12, struct.pack("<d", 0.1), 0.1),
        (9, struct.pack("<IQ3h", 3, 3, 1, -2, 3), [1, -2, 3]),
        (9, struct.pack("<IQ", 7, 2) + b"\x01\x00", [True, False]),
        (9, struct.pack("<IQ", 8, 2) + string("a") + string(""), ["a", ""]),
        (9, struct.pack("<IQ", 8, 0), []),
    ],
)
def test_values_of_every_type_are_read(kind: int, data: bytes, value: object, tmp_path: Path) -> None:
    found = read_header(written(tmp_path / "m.gguf", [key("k", kind, data)])).values["k"]
    assert (found, type(found)) == (value, type(value))


def test_a_file_that_is_not_gguf_is_refused(tmp_path: Path) -> None:
    for content in (b"PK\x03\x04", b"", b"GGU"):
        (tmp_path / "no.gguf").write_bytes(content)
        assert "is not a GGUF file" in refusal(tmp_path / "no.gguf")


BROKEN: dict[str, tuple[list[bytes], list[bytes], str]] = {
    "a key twice": ([key("k", 0, b"1")] * 2, [], "the key k is there twice"),
    "a type of tomorrow": ([key("k", 13, b"")], [], "it has a value of type 13"),
    "lists of lists": ([key("k", 9, struct.pack("<IQ", 9, 1))], [], "it has a value of type 9"),
    "a string without end": ([key("k", 8, struct.pack("<Q", 2**63))], [], "it ends within its header"),
    "a list without end": ([key("k", 9, struct.pack("<IQ", 10, 2**61))], [], "it ends within its header"),
    "a name that is no text": ([struct.pack("<Q", 1) + b"\xff"], [], "codec can't decode"),
    "a tensor twice": ([], [tensor("t")] * 2, "the tensor t is there twice"),
    "a tensor without a shape": ([], [tensor("t", ())], "the tensor t has 0 dimensions"),
    "a tensor of nothing": ([], [tensor("t", (4, 0))], "the tensor t has shape [0, 4]"),
    "five dimensions": ([], [tensor("t", (1,) * 5)], "the tensor t has 5 dimensions"),
    "between two places": ([], [tensor("t", offset=16)], "the tensor t begins at 16, not at a multiple of 32"),
    "behind the end": ([], [tensor("t", offset=64)], "the tensor t begins behind its end"),
    "far behind the end": ([], [tensor("t", offset=2**63)], "the tensor t begins behind its end"),
    "no alignment": ([key("general.alignment", 4, bytes(4))], [], "general.alignment is 0, not a power of two"),
    "an odd alignment": ([key("general.alignment", 4, struct.pack("<I", 48))], [], "general.alignment is 48"),
    "a named alignment": ([key("general.alignment", 8, string("32"))], [], "general.alignment is 32, not a power"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_header_that_cannot_be_is_refused(name: str, tmp_path: Path) -> None:
    keys, tensors, message = BROKEN[name]
    assert message in refusal(written(tmp_path / "m.gguf", keys, tensors))


@pytest.mark.parametrize(("version", "said"), [(1, "1"), (4, "4"), (3 << 24, "that of another byte order")])
def test_another_version_is_refused(version: int, said: str, tmp_path: Path) -> None:
    assert refusal(written(tmp_path / "m.gguf", version=version)) == f"its version is {said}, not one of 2, 3"


def test_data_begins_at_the_alignment_that_the_file_names(tmp_path: Path) -> None:
    path = written(tmp_path / "m.gguf", [key("general.alignment", 4, struct.pack("<I", 8))], [tensor("t")])
    entry = read_header(path).entries["t"]
    header = 24 + len(key("general.alignment", 4, bytes(4))) + len(tensor("t"))
    assert entry.offset == -(-header // 8) * 8


@pytest.mark.usefixtures("own_cache")
@pytest.mark.parametrize("kept", [8, 100, 3000, 8000, -1000, -1])
def test_a_cut_gguf_file_is_refused(tiny_gguf: Path, tmp_path: Path, kept: int) -> None:
    path = tmp_path / "cut.gguf"
    # The writer pads the last tensor.
    whole = tiny_gguf.read_bytes()
    path.write_bytes(whole[:kept])
    with pytest.raises(ModelSourceError, match="not a whole GGUF file"):
        load_model(str(path))


@pytest.mark.parametrize("seed", range(20))
def test_no_change_of_bytes_raises_anything_else(seed: int, tiny_gguf: Path, tmp_path: Path) -> None:
    content, chance = bytearray(tiny_gguf.read_bytes()), random.Random(seed)
    for _ in range(chance.choice((1, 5, 50))):
        content[chance.randrange(9_000)] = chance.randrange(256)
    (tmp_path / "m.gguf").write_bytes(content)
    with suppress(ModelSourceError):
        assert read_header(tmp_path / "m.gguf").values
