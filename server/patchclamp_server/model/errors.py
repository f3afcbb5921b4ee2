"""What can go wrong before a model serves: at start-up, shown to the operator, not to a client of the rpc layer."""

from collections.abc import Iterator
from contextlib import contextmanager

from patchclamp_server.errors import RequestError


class ModelSourceError(Exception):
    """The model cannot be had or must not be loaded. The message says what would be accepted.

    It is one line, whatever lines another library's message had.
    """

    def __str__(self) -> str:
        return " ".join(super().__str__().split())


@contextmanager
def foreign_errors(message: str) -> Iterator[None]:
    """Around code of other libraries that reads a file of unknown origin: what it raises becomes ModelSourceError.

    Every exception, since what transformers and tokenizers raise for a broken file is no closed set. Only for calls
    that do nothing but read such a file.
    """
    try:
        yield
    except ModelSourceError:
        raise
    except RequestError as error:
        raise ModelSourceError(f"{message}: {error.message}") from error
    except Exception as error:
        raise ModelSourceError(f"{message}: {type(error).__name__}: {error}") from error
