"""The registry of kinds: what the messages offer, what clients build and what policies name is one list."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import patchclamp.programs
from patchclamp.v1 import program_pb2 as pb
from patchclamp_kernels import program_table
from patchclamp_server import interventions
from patchclamp_server.interventions import columns, slots
from patchclamp_server.interventions.edit_kinds import NAMES
from patchclamp_server.interventions.kinds import EDIT_TABLES, EDITS, READOUT_TABLES, READOUTS, RULES
from patchclamp_server.interventions.program import HeadReadout, LatentReadout
from patchclamp_server.security.policy import EDIT_KINDS

# model/attention/peaks.py is moved out of the engine with the attention it belongs to.
MOVING = {"patchclamp_server.model.attention.peaks"}
ABOVE = ("rpc", "engine", "security", "monitoring")


def fields(message: type) -> set[str]:
    return {field.name for field in message.DESCRIPTOR.oneofs_by_name["kind"].fields}  # type: ignore[attr-defined]


def test_every_kind_that_a_message_offers_is_registered() -> None:
    assert {spec.name for spec in EDITS} == fields(pb.Edit)
    assert {spec.name for spec in READOUTS} == fields(pb.Readout)


def test_every_builder_of_the_client_builds_a_registered_kind() -> None:
    builders = {name for spec in (*EDITS, *READOUTS) for name in spec.builders}
    assert builders <= set(patchclamp.programs.__all__)
    built = {name for name in patchclamp.programs.__all__ if name.startswith("read_")}
    assert built <= builders


def test_policies_know_every_kind_by_the_name_of_its_field() -> None:
    assert set(NAMES.values()) == set(EDIT_KINDS) == fields(pb.Edit)


def test_every_kind_of_entry_has_a_rule_of_torch() -> None:
    assert set(RULES) == set(columns.EntryKind)
    assert set(EDIT_TABLES) == {kind for kind in columns.EntryKind if kind.edits}
    # Attention answers for heads, and no message asks for latent predictions.
    assert set(READOUT_TABLES) == {spec.kind for spec in READOUTS} - {HeadReadout} | {LatentReadout}


def test_the_host_writes_the_format_that_kernels_read() -> None:
    ours, theirs = slots.formats()
    assert ours == theirs
    assert {kind.name for kind in program_table.EntryKind} == {k.name for k in columns.EntryKind if k.in_kernels}


def imports() -> Iterator[tuple[str, str]]:
    [root] = interventions.__path__
    for path in sorted(Path(root).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.module:
                yield str(path.relative_to(root)), node.module


@pytest.mark.parametrize("package", ABOVE)
def test_programs_know_nothing_of_who_runs_them(package: str) -> None:
    name = f"patchclamp_server.{package}"
    above = [found for found in imports() if found[1].startswith(name) and found[1] not in MOVING]
    assert not above
