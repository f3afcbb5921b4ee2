"""The shape of a method of a generated stub, sync or async."""

from typing import Protocol, TypeVar

RequestT = TypeVar("RequestT")
RequestT_contra = TypeVar("RequestT_contra", contravariant=True)
ResponseT = TypeVar("ResponseT")
ResponseT_co = TypeVar("ResponseT_co", covariant=True)


class Method(Protocol[RequestT_contra, ResponseT_co]):
    """A method of a stub, unary or streaming."""

    def __call__(
        self, request: RequestT_contra, /, timeout: float | None, metadata: tuple[tuple[str, str], ...]
    ) -> ResponseT_co: ...
