"""The store asks here, before it reads or changes anything, whether the caller may."""

from collections.abc import Callable, Iterable
from typing import Protocol

# Tags are read only when they are needed, because each takes a file.
Tags = Callable[[], Iterable[str]]


class ArtifactAccess(Protocol):
    """The store calls these on the thread of the caller. All but `sees` and `changed` raise PermissionDenied."""

    def sees(self, artifact_id: str, tags: Iterable[str]) -> bool:
        """Returns whether a listing shows the artifact."""
        ...

    def use(self, artifact_id: str, ref: str, tags: Tags) -> None: ...

    def put(self, tags: Iterable[str]) -> None: ...

    def tag(self, tag: str) -> None:
        """Asked before the tag is set, moved or removed."""
        ...

    def delete(self, artifact_id: str, tags: Iterable[str]) -> None: ...

    def changed(self, action: str, artifact_id: str, tags: Iterable[str]) -> None:
        """Told after each action: "put", "tag", "untag" or "delete"."""
        ...


class OpenStore:
    """Allows everybody everything."""

    def sees(self, artifact_id: str, tags: Iterable[str]) -> bool:
        return True

    def use(self, artifact_id: str, ref: str, tags: Tags) -> None: ...

    def put(self, tags: Iterable[str]) -> None: ...

    def tag(self, tag: str) -> None: ...

    def delete(self, artifact_id: str, tags: Iterable[str]) -> None: ...

    def changed(self, action: str, artifact_id: str, tags: Iterable[str]) -> None: ...
