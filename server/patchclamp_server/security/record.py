"""A record of what one call did, for the audit log. It has no numbers of vectors, and prompts only if asked for."""

import threading
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from typing import Any

from patchclamp_server.engine.request import Request
from patchclamp_server.interventions.bound import BoundProgram
from patchclamp_server.interventions.edit_kinds import kind_name
from patchclamp_server.interventions.program import Receipt

# An analysis job runs thousands of requests, most of them alike, so the length of a line is bounded.
MAX_ENTRIES = 64


@dataclass
class ProgramRecord:
    """Counts requests with one program. `rows` is as in the receipts and includes rows from the prefix cache."""

    fingerprint: str
    edits: list[dict[str, Any]]
    requests: int = 0
    finished: int = 0
    touched: bool = False
    rows: int = 0


class CallRecord:
    """The threads of the call and of the engine fill it. `text_of` decodes prompts, if they are to be recorded."""

    def __init__(self, text_of: Callable[[tuple[int, ...]], str] | None = None) -> None:
        self._lock = threading.Lock()
        self._text_of = text_of
        self._programs: dict[str, ProgramRecord] = {}
        self._sparsity: dict[tuple[str, str], None] = {}
        self._artifacts: dict[str, None] = {}
        self._strengths: list[dict[str, Any]] = []
        self._changes: list[dict[str, Any]] = []
        self._prompts: list[str] = []
        self._prompt_tokens = self._generated_tokens = self._left_out = 0

    def request(self, request: Request) -> None:
        prompt = None if self._text_of is None else self._text_of(request.tokens)
        with self._lock:
            self._prompt_tokens += len(request.tokens)
            if prompt is not None:
                self._add(self._prompts, prompt)
            if request.sparsity is not None:
                self._set(self._sparsity, (request.sparsity.policy, request.sparsity.profile), None)
            if request.program is not None and request.program.edits:
                program = request.program
                self._set(self._programs, program.fingerprint, ProgramRecord(program.fingerprint, _edits(program)))
                if program.fingerprint in self._programs:
                    self._programs[program.fingerprint].requests += 1

    def token(self) -> None:
        with self._lock:
            self._generated_tokens += 1

    def receipt(self, receipt: Receipt) -> None:
        with self._lock:
            record = self._programs.get(receipt.program_fingerprint)
            if record is not None:
                record.finished += 1
                record.touched |= receipt.touched
                record.rows += sum(edit.rows + edit.rows_from_cache for edit in receipt.edits)

    def strength(self, edit: str, strength: float) -> None:
        with self._lock:
            self._add(self._strengths, {"edit": edit, "strength": strength})

    def artifact(self, artifact_id: str) -> None:
        with self._lock:
            self._set(self._artifacts, artifact_id, None)

    def change(self, action: str, artifact_id: str, tags: Iterable[str]) -> None:
        with self._lock:
            self._add(self._changes, {"action": action, "artifact": artifact_id, "tags": list(tags)})

    @property
    def is_of_note(self) -> bool:
        """Whether the call edited the model, computed sparsely, or changed an artifact."""
        return bool(self._programs or self._sparsity or self._changes)

    def to_dict(self) -> dict[str, Any]:
        """Returns the record as JSON fields; `left_out` counts the entries beyond the first 64 of a kind."""
        with self._lock:
            fields: dict[str, Any] = {
                "programs": [asdict(program) for program in self._programs.values()],
                "strengths": list(self._strengths),
                "sparsity": [{"policy": policy, "profile": profile} for policy, profile in self._sparsity],
                "artifacts": list(self._artifacts),
                "changes": list(self._changes),
                "prompt_tokens": self._prompt_tokens,
                "generated_tokens": self._generated_tokens,
                "left_out": self._left_out,
            }
            return fields if self._text_of is None else {**fields, "prompts": list(self._prompts)}

    def _add(self, entries: list[Any], entry: object) -> None:
        if len(entries) < MAX_ENTRIES:
            entries.append(entry)
        else:
            self._left_out += 1

    def _set(self, entries: dict[Any, Any], key: object, value: object) -> None:
        if key in entries:
            return
        if len(entries) < MAX_ENTRIES:
            entries[key] = value
        else:
            self._left_out += 1


def _edits(program: BoundProgram) -> list[dict[str, Any]]:
    return [
        {
            "name": bound.name,
            "kind": kind_name(edit.kind),
            "site": edit.site.value,
            "layers": list(bound.layers),
            "strength": bound.strength,
        }
        for bound, edit in zip(program.edits, program.program.edits, strict=True)
    ]
