"""The provenance of a profile keeps the parameters of a policy as JSON: {"keep_ratio": 0.5, "bits": 3}."""

from collections.abc import Mapping
from dataclasses import MISSING, Field, fields
from typing import Any

from patchclamp_server.errors import InvalidArgument
from patchclamp_server.sparsity.policies import POLICIES
from patchclamp_server.sparsity.policy import Policy

# A set of neurons is an artifact of its own.
NOT_STORED = frozenset({"neurons"})


def parameters_of(policy: Policy) -> dict[str, Any]:
    """Returns every parameter but those that are artifacts of their own, defaults included."""
    found = {field.name: getattr(policy, field.name) for field in _fields(policy)}
    return {name: list(value) if isinstance(value, tuple) else value for name, value in found.items()}


def policy_with(name: str, parameters: Mapping[str, Any]) -> Policy:
    """Returns the policy of a name with these parameters, and defaults for the others.

    Raises InvalidArgument("sparsity.<parameter>") for an unknown policy or parameter, or a value that it does not take.
    """
    if name not in POLICIES:
        raise InvalidArgument("sparsity.policy", f"{name!r:.80} is not a policy; there are {', '.join(POLICIES)}")
    known = {field.name: field for field in _fields(POLICIES[name])}
    for parameter in parameters:
        if parameter not in known:
            raise InvalidArgument(
                f"sparsity.{parameter:.80}", f"{name} has no such parameter; it has {', '.join(known)}"
            )
    checked = {parameter: _checked(known[parameter], value) for parameter, value in parameters.items()}
    return POLICIES[name](**checked)


def _fields(policy: Policy | type[Policy]) -> list[Field[Any]]:
    return [field for field in fields(policy) if field.name not in NOT_STORED]


def _checked(field: Field[Any], value: Any) -> Any:
    """Converts a value: JSON does not tell 1.0 from 1, protobuf's Struct knows only 1.0, and neither knows tuples."""
    default = field.default
    assert default is not MISSING
    if field.name == "keep_ratio" and isinstance(value, list | tuple) and all(map(_is_number, value)):
        return tuple(map(float, value))
    if isinstance(default, float) and _is_number(value):
        return float(value)
    if isinstance(default, bool | str) and type(value) is type(default):
        return value
    if isinstance(default, int | None) and not isinstance(default, bool) and _is_number(value) and value == value // 1:
        return int(value)
    if default is None and value is None:
        return None
    raise InvalidArgument(f"sparsity.{field.name}", f"{value!r:.80} is not of the kind of {default!r}")


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
