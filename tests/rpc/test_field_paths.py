"""Paths of fields in errors: what raised them saw a part of the request, or what was made of it."""

import ast
from pathlib import Path

import pytest

import patchclamp_server
from patchclamp_server.errors import (
    InvalidArgument,
    NotFound,
    RequestError,
    about,
    below,
    fields_as,
    renaming_fields,
    within,
)

SERVER = Path(patchclamp_server.__file__).parent


def named(context: object, error: RequestError) -> str:
    with pytest.raises(type(error)) as raised, context:  # type: ignore[attr-defined]
        raise error
    assert raised.value is error
    return raised.value.field


@pytest.mark.parametrize(
    ("path", "name", "joined"), [("a", "b", "a.b"), ("", "b", "b"), ("a", "", "a"), ("a.b[2]", "c", "a.b[2].c")]
)
def test_a_field_is_below_the_message_that_holds_it(path: str, name: str, joined: str) -> None:
    assert below(path, name) == joined


def test_errors_within_a_message_name_its_fields() -> None:
    assert named(within("header"), NotFound("tags[1]", "?")) == "header.tags[1]"


def test_an_error_of_no_field_is_about_the_message_it_is_within() -> None:
    assert named(within("header"), InvalidArgument("", "?")) == "header"


def test_errors_about_a_field_name_it_whatever_they_named() -> None:
    assert named(about("vector.artifact"), NotFound("ref", "?")) == "vector.artifact"


@pytest.mark.parametrize(("field", "name"), [("prompt", "facts"), ("prompts", "prompts"), ("", "")])
def test_only_the_fields_that_are_listed_are_renamed(field: str, name: str) -> None:
    assert named(renaming_fields({"prompt": "facts"}), InvalidArgument(field, "?")) == name


def test_what_is_no_refusal_passes() -> None:
    with pytest.raises(KeyError), fields_as(lambda name: name + "!"):
        raise KeyError


def test_fields_of_errors_are_set_in_one_place() -> None:
    """Elsewhere a context says it, so that none is forgotten and none renamed twice."""
    setting = {
        str(file.relative_to(SERVER))
        for file in SERVER.rglob("*.py")
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and node.attr == "field"
    }
    assert setting == {"errors.py"}
