"""What the store asks before it reads or changes anything: whether whoever calls may."""

from collections.abc import Callable, Iterable
from typing import Protocol

# Read only when they are needed: it takes a file each.
Tags = Callable[[], Iterable[str]]


class ArtifactAccess(Protocol):
    """Called on the thread of the caller. All but `sees` and `changed` raise PermissionDenied."""

    def sees(self, artifact_id: str, tags: Iterable[str]) -> bool:
        """Whether a listing shows it."""
        ...

    def use(self, artifact_id: str, ref: str, tags: Tags) -> None: ...

    def put(self, tags: Iterable[str]) -> None: ...

    def tag(self, tag: str) -> None:
        """To set it, to move it, or to remove it."""
        ...

    def delete(self, artifact_id: str, tags: Iterable[str]) -> None: ...

    def changed(self, action: str, artifact_id: str, tags: Iterable[str]) -> None:
        """Told after "put", "tag", "untag" and "delete"."""
        ...


class OpenStore:
    """Everybody may do anything."""

    def sees(self, artifact_id: str, tags: Iterable[str]) -> bool:
        return True

    def use(self, artifact_id: str, ref: str, tags: Tags) -> None: ...

    def put(self, tags: Iterable[str]) -> None: ...

    def tag(self, tag: str) -> None: ...

    def delete(self, artifact_id: str, tags: Iterable[str]) -> None: ...

    def changed(self, action: str, artifact_id: str, tags: Iterable[str]) -> None: ...
