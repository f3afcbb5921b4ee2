"""The record of a started watch in the artifact store, and a server's report of the watches that it finds, are JSON."""

import math
import time
import uuid
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from patchclamp_server.errors import InvalidArgument
from patchclamp_server.interventions.program import Phase
from patchclamp_server.monitoring.running import RunningWatch
from patchclamp_server.monitoring.watch import WatchOptions

# WatchOptions checks ranges, and leaves the types to whoever makes it.
_OPTION_TYPES = {
    "name": str,
    "sampling_rate": float,
    "window_tokens": int,
    "calibration_tokens": int,
    "export_items": bool,
}


@dataclass(frozen=True)
class StoredRun:
    """`watch` and `reference` are ids. A later watch of the same name has another `revision`."""

    watch: str
    options: WatchOptions
    reference: str
    started: float
    revision: str = field(default_factory=lambda: uuid.uuid4().hex)

    @classmethod
    def of(cls, running: RunningWatch) -> "StoredRun":
        return cls(running.watch_id, running.options, running.reference_id, running.started)

    def to_json(self) -> dict[str, Any]:
        options = asdict(self.options)
        options["phases"] = sorted(phase.value for phase in self.options.phases)
        return {**asdict(self), "options": options}

    @classmethod
    def from_json(cls, name: str, content: Any) -> "StoredRun":
        """Raises InvalidArgument for content that is not a record."""
        try:
            options = dict(content["options"])
            options["phases"] = frozenset(map(Phase, options["phases"]))
            options["buckets"] = tuple(map(float, options["buckets"]))
            for field_name in options.keys() & _OPTION_TYPES.keys():
                if type(options[field_name]) is not _OPTION_TYPES[field_name]:
                    raise TypeError(f"{field_name} is {options[field_name]!r:.40}")
            run = cls(
                watch=_text(content["watch"]),
                options=WatchOptions(**options),
                reference=_text(content["reference"]),
                started=float(content["started"]),
                revision=_text(content["revision"]),
            )
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            raise InvalidArgument("", f"the record of the watch {name!r} in the store is damaged ({error})") from error
        if run.options.name != name or not math.isfinite(run.started):
            raise InvalidArgument("", f"the record of the watch {name!r} in the store is damaged")
        return run


@dataclass(frozen=True)
class Said:
    """What a server reports of one watch. `reason` tells why it does not run, and is "" where it does."""

    reason: str
    tokens: int


@dataclass(frozen=True)
class Report:
    """What a server reports of the watches of the store."""

    replica: str
    watches: Mapping[str, Said]
    reported: float = field(default_factory=time.time)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, content: Any) -> "Report | None":
        """Returns None for content that is not a report."""
        try:
            watches = {_text(n): Said(_text(s["reason"]), int(s["tokens"])) for n, s in content["watches"].items()}
            return cls(_text(content["replica"]), watches, float(content["reported"]))
        except (KeyError, TypeError, ValueError, AttributeError, OverflowError):
            return None


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"expected text, found {type(value).__name__}")
    return value
