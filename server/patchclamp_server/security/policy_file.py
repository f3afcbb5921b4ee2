"""The policy file is YAML and is checked field by field. An example:

kill: false
default: {methods: [ModelService/*]}
tenants:
  research:
    artifacts: {use: ["joy*"], upload: false}
    edits: {kinds: [add], max_strength: 2.0, max_edits: 4}
    max_concurrent: 8
    max_waiting: 100
    tokens_per_minute: 60000
"""

import math
import reprlib
from collections.abc import Collection
from typing import Any

import yaml

from patchclamp_server.engine.request import Priority
from patchclamp_server.errors import below
from patchclamp_server.security.configuration import ConfigurationError
from patchclamp_server.security.metrics import OTHER_TENANT
from patchclamp_server.security.policy import (
    ANYTHING,
    EDIT_KINDS,
    ArtifactRules,
    EditRules,
    Policy,
    TenantRules,
    matches,
)
from patchclamp_server.security.tokens import TENANT

PRIORITIES = {priority.name.lower(): priority for priority in Priority}
# This is far above any file that people write; aliases of YAML could make a small file a huge tree.
MAX_CHARACTERS = 1 << 20


def parse_policy(text: str, source: str, methods: Collection[str]) -> Policy:
    """Parses a policy; `methods` are all "Service/Method" served. ConfigurationError names the path of a field."""
    if len(text) > MAX_CHARACTERS:
        raise ConfigurationError(f"{source}: {len(text)} characters; at most {MAX_CHARACTERS} are read")
    try:
        tree = yaml.safe_load(text)
    # A date that no calendar has raises ValueError, and thousands of brackets raise RecursionError.
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ConfigurationError(f"{source} is not YAML: {error}") from error
    try:
        return _policy(_Fields(tree, ""), methods)
    except ConfigurationError as error:
        raise ConfigurationError(f"{source}: {error}") from None


class _Fields:
    """The fields of one mapping. Every one must be asked for: a field that is left at the end is unknown."""

    def __init__(self, tree: Any, path: str) -> None:
        self._path = path
        if not isinstance(tree, dict):
            raise ConfigurationError(f"{path or 'the file'}: expected a mapping, got {_shown(tree)}")
        self._left = dict(tree)
        self._asked: list[str] = []

    def path(self, name: str) -> str:
        return below(self._path, name)

    def take(self, name: str, default: Any) -> Any:
        self._asked.append(name)
        return self._left.pop(name, default)

    def mapping(self, name: str) -> "_Fields | None":
        tree = self.take(name, None)
        return None if tree is None else _Fields(tree, self.path(name))

    def flag(self, name: str, default: bool) -> bool:
        value = self.take(name, default)
        if not isinstance(value, bool):
            raise self.refuse(name, "true or false", value)
        return value

    def count(self, name: str, *, low: int) -> int | None:
        value = self.take(name, None)
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < low):
            raise self.refuse(name, f"a whole number of at least {low}", value)
        return value

    def number(self, name: str, default: float | None, *, positive: bool) -> float | None:
        value = self.take(name, default)
        if value is None:
            return None
        is_number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
        if not is_number or value < 0 or (positive and value == 0):
            raise self.refuse(name, "a number above 0" if positive else "a number of at least 0", value)
        return float(value)

    def words(self, name: str, default: tuple[str, ...]) -> tuple[str, ...]:
        value = self.take(name, list(default))
        if not isinstance(value, list):
            raise self.refuse(name, "a list", value)
        for i, word in enumerate(value):
            if not isinstance(word, str) or not word:
                raise self.refuse(f"{name}[{i}]", "text", word)
        return tuple(value)

    def entries(self) -> "list[tuple[str, _Fields]]":
        """Returns the fields as named mappings."""
        names = list(self._left)
        return [(name, _Fields(self.take(name, None), self.path(str(name)))) for name in names]

    def refuse(self, name: str, expected: str, value: object) -> ConfigurationError:
        return ConfigurationError(f"{self.path(name)}: expected {expected}, got {_shown(value)}")

    def end(self) -> None:
        for name in self._left:
            raise ConfigurationError(f"{self.path(str(name))}: unknown; accepted: {', '.join(self._asked)}")


def _policy(fields: _Fields, methods: Collection[str]) -> Policy:
    kill = fields.flag("kill", False)
    default = fields.mapping("default")
    listed = fields.mapping("tenants")
    fields.end()
    tenants = {}
    for name, entry in listed.entries() if listed is not None else ():
        if not isinstance(name, str) or not TENANT.fullmatch(name) or name == OTHER_TENANT:
            accepted = f"{TENANT.pattern}, but not {OTHER_TENANT}"
            raise ConfigurationError(f"tenants: {name!r} is not the name of a tenant; accepted: {accepted}")
        tenants[name] = _rules(entry, methods)
    return Policy(tenants, None if default is None else _rules(default, methods), kill)


def _rules(fields: _Fields, methods: Collection[str]) -> TenantRules:
    allowed = fields.words("methods", ANYTHING)
    for i, pattern in enumerate(allowed):
        if not any(matches((pattern,), method) for method in methods):
            accepted = ", ".join(sorted({f"{method.partition('/')[0]}/*" for method in methods}))
            raise fields.refuse(f"methods[{i}]", f"a pattern of methods that exist, such as {accepted}", pattern)
    priority = fields.take("max_priority", "interactive")
    if not isinstance(priority, str) or priority not in PRIORITIES:
        raise fields.refuse("max_priority", f"one of {', '.join(PRIORITIES)}", priority)
    artifacts, edits = fields.mapping("artifacts"), fields.mapping("edits")
    weight = fields.number("weight", 1.0, positive=True)
    assert weight is not None
    rules = TenantRules(
        kill=fields.flag("kill", False),
        methods=allowed,
        models=fields.words("models", ANYTHING),
        artifacts=ArtifactRules() if artifacts is None else _artifact_rules(artifacts),
        edits=EditRules() if edits is None else _edit_rules(edits),
        max_concurrent=fields.count("max_concurrent", low=1),
        max_waiting=fields.count("max_waiting", low=0),
        tokens_per_minute=fields.count("tokens_per_minute", low=1),
        max_priority=PRIORITIES[priority],
        weight=weight,
    )
    fields.end()
    return rules


def _artifact_rules(fields: _Fields) -> ArtifactRules:
    rules = ArtifactRules(
        use=fields.words("use", ANYTHING),
        tag=fields.words("tag", ANYTHING),
        delete=fields.words("delete", ANYTHING),
        upload=fields.flag("upload", True),
    )
    fields.end()
    return rules


def _edit_rules(fields: _Fields) -> EditRules:
    kinds = fields.words("kinds", EDIT_KINDS)
    for i, kind in enumerate(kinds):
        if kind not in EDIT_KINDS:
            raise fields.refuse(f"kinds[{i}]", f"one of {', '.join(EDIT_KINDS)}", kind)
    rules = EditRules(
        kinds=kinds,
        max_edits=fields.count("max_edits", low=0),
        max_strength=fields.number("max_strength", None, positive=False),
        inline_vectors=fields.flag("inline_vectors", True),
    )
    fields.end()
    return rules


def _shown(value: object) -> str:
    # This is not repr, because what aliases of YAML unfold to may be larger than any memory.
    return reprlib.repr(value)
