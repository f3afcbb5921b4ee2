"""Compiled code that takes the address of its own array keeps the array until the function ends: numba frees an array
after its last use, which an address is not, and another thread then gets the memory."""

import ast
from pathlib import Path

import pytest

import patchclamp_server

SOURCES = sorted(Path(patchclamp_server.__file__).parent.rglob("*.py"))
FREED_TOO_EARLY = """
@compiled
def total(n):
    own = np.zeros(n)
    call(own.ctypes.data)
"""


def compiled_functions(source: str) -> list[ast.FunctionDef]:
    return [
        node
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.FunctionDef)
        and any(word in ast.unparse(d) for d in node.decorator_list for word in ("compiled", "njit", "cfunc"))
    ]


def addressed(function: ast.FunctionDef) -> set[str]:
    """Returns the names of arrays of the function's own whose addresses it takes."""
    names = {node.value.value.id for node in ast.walk(function) if _is_address(node)}
    return names - {argument.arg for argument in function.args.args}


def kept(function: ast.FunctionDef) -> set[str]:
    calls = [node for node in ast.walk(function) if isinstance(node, ast.Call) and ast.unparse(node.func) == "keep"]
    return {ast.unparse(call.args[0]) for call in calls}


def _is_address(node: ast.AST) -> bool:
    if not (isinstance(node, ast.Attribute) and node.attr == "data" and ast.unparse(node).endswith(".ctypes.data")):
        return False
    array = node.value.value
    if isinstance(array, ast.Subscript):
        node.value.value = array.value
    return isinstance(node.value.value, ast.Name)


def test_the_rule_sees_what_it_forbids() -> None:
    (function,) = compiled_functions(FREED_TOO_EARLY)
    assert addressed(function) - kept(function) == {"own"}


def test_arrays_whose_addresses_are_taken_are_kept() -> None:
    found = 0
    for path in SOURCES:
        for function in compiled_functions(path.read_text()):
            names = addressed(function)
            found += len(names)
            assert names <= kept(function), f"{path.name}: {function.name} does not keep {names - kept(function)}"
    assert found > 0


@pytest.mark.parametrize("name", ["multiply_chosen", "_multiply_panels", "multiply_rounded", "attend"])
def test_functions_that_take_addresses_are_found(name: str) -> None:
    functions = [f for path in SOURCES for f in compiled_functions(path.read_text())]
    assert any(f.name == name and addressed(f) for f in functions)
