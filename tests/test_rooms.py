"""Rooms of the server stand in one order, and each imports only from those before it."""

import ast
from pathlib import Path

import pytest

import patchclamp_server

ROOMS = (
    # What everybody may use imports nothing of ours but errors.
    {"errors"},
    {"callers", "addresses", "files", "sizes", "threads"},
    {"cpu"},
    {"model"},
    {"text", "artifacts"},
    {"interventions"},
    {"sparsity"},
    {"monitoring"},
    {"engine"},
    {"analysis"},
    {"security"},
    {"rpc"},
    {"cli"},
)
PLACE = {room: place for place, rooms in enumerate(ROOMS) for room in sorted(rooms)}
SERVER = Path(patchclamp_server.__file__).parent


def room_of(file: Path) -> str:
    return file.relative_to(SERVER).with_suffix("").parts[0]


FILES = [file for file in sorted(SERVER.rglob("*.py")) if room_of(file) != "__init__"]


def imported_rooms(file: Path) -> set[str]:
    """Also those of imports within functions, and of those that only type checkers see."""
    names = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{file}: {ast.unparse(node)} is relative"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return {name.split(".")[1] for name in names if name.startswith("patchclamp_server.")}


def test_every_module_stands_in_a_room() -> None:
    assert {room_of(file) for file in FILES} == set(PLACE)


@pytest.mark.parametrize("room", PLACE)
def test_a_room_imports_only_from_those_before_it(room: str) -> None:
    upward = {
        f"{file.relative_to(SERVER)} imports {other}"
        for file in FILES
        if room_of(file) == room
        for other in imported_rooms(file) - {room}
        if PLACE[other] >= PLACE[room]
    }
    assert not upward
