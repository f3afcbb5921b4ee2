"""A policy says what a tenant may do. Whatever a tenant's entry in the file leaves out is not limited."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase

from patchclamp_server.engine.request import Priority
from patchclamp_server.interventions.kinds import EDITS

# These are the fields of the oneof `kind` of the message Edit.
EDIT_KINDS = tuple(spec.name for spec in EDITS)
ANYTHING = ("*",)
WAITING_PER_PLACE = 16


@dataclass(frozen=True)
class ArtifactRules:
    """Patterns of ids and tags. `use` must match one of an artifact's names, `tag` the tag that is set, moved or
    removed, and `delete` the id or every tag, so that what others have tagged stays."""

    use: tuple[str, ...] = ANYTHING
    tag: tuple[str, ...] = ANYTHING
    delete: tuple[str, ...] = ANYTHING
    # Whether a tenant may store an artifact: a file that it uploads, or what a job of its own found.
    upload: bool = True


@dataclass(frozen=True)
class EditRules:
    """`inline_vectors` tells whether a request may bring its own numbers. Without them a ceiling on the strength also
    bounds what is added, since the vectors are those of artifacts."""

    kinds: tuple[str, ...] = EDIT_KINDS
    max_edits: int | None = None
    max_strength: float | None = None
    inline_vectors: bool = True


@dataclass(frozen=True)
class TenantRules:
    """`methods` holds patterns of "Service/Method". Requests run at `max_priority` at most. `max_concurrent` calls may
    run at once, and `max_waiting` may wait for a place beside them; None stands for 16 for each place."""

    kill: bool = False
    methods: tuple[str, ...] = ANYTHING
    models: tuple[str, ...] = ANYTHING
    artifacts: ArtifactRules = field(default_factory=ArtifactRules)
    edits: EditRules = field(default_factory=EditRules)
    max_concurrent: int | None = None
    max_waiting: int | None = None
    tokens_per_minute: int | None = None
    max_priority: Priority = Priority.INTERACTIVE
    weight: float = 1.0

    @property
    def line(self) -> int:
        """Returns how many calls may wait for a place."""
        return WAITING_PER_PLACE * (self.max_concurrent or 0) if self.max_waiting is None else self.max_waiting


UNLIMITED = TenantRules()


@dataclass(frozen=True)
class Policy:
    """`default` has the rules of everybody who is not listed; None refuses them. `kill` ends the calls of all."""

    tenants: Mapping[str, TenantRules] = field(default_factory=dict)
    default: TenantRules | None = UNLIMITED
    kill: bool = False


def matches(patterns: Iterable[str], name: str) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)
