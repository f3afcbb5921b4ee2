"""A socket by which this process alone reaches its own gRPC server."""

from tempfile import TemporaryDirectory


class LocalSocket:
    """Lies in a directory that no other user may enter."""

    def __init__(self) -> None:
        self._directory = TemporaryDirectory(prefix="patchclamp-")
        self.address = f"unix:{self._directory.name}/grpc"

    def close(self) -> None:
        self._directory.cleanup()
