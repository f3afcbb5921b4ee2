"""These errors occur before a model serves: the operator sees them at start-up, not a client of the rpc layer."""

from collections.abc import Iterator
from contextlib import contextmanager

from patchclamp_server.errors import RequestError


class ModelSourceError(Exception):
    """The model cannot be found or must not be loaded. The message says what would be accepted.

    It is one line, whatever lines another library's message had.
    """

    def __str__(self) -> str:
        return " ".join(super().__str__().split())


@contextmanager
def foreign_errors(message: str) -> Iterator[None]:
    """Turns what other libraries raise for a file of unknown origin into ModelSourceError.

    It catches every exception, since transformers and tokenizers raise no closed set for a broken file. So it may only
    enclose calls that do nothing but read such a file.
    """
    try:
        yield
    except ModelSourceError:
        raise
    except RequestError as error:
        raise ModelSourceError(f"{message}: {error.message}") from error
    except Exception as error:
        raise ModelSourceError(f"{message}: {type(error).__name__}: {error}") from error
