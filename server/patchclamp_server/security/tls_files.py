"""The server's certificate, key and client CA are PEM files, checked together before they are used."""

import ssl
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from patchclamp_server.security.configuration import ConfigurationError
from patchclamp_server.security.watched_file import read_text


@dataclass(frozen=True)
class TlsMaterial:
    """All are PEM. `client_ca` holds the roots of the certificates that clients must show; None asks for none."""

    certificate: bytes
    key: bytes
    client_ca: bytes | None


@dataclass(frozen=True)
class TlsFiles:
    certificate: Path
    key: Path
    client_ca: Path | None = None

    @property
    def paths(self) -> tuple[Path, ...]:
        return (self.certificate, self.key) if self.client_ca is None else (self.certificate, self.key, self.client_ca)

    def read(self) -> TlsMaterial:
        """Reads the files. Raises ConfigurationError for files that are missing, broken, or do not belong together."""
        read = [read_text(path) for path in self.paths]
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        try:
            context.load_cert_chain(self.certificate, self.key, password=_no_password)
        except (ssl.SSLError, OSError) as error:
            message = f"{self.certificate} and {self.key} are not a certificate and its key: {error}"
            raise ConfigurationError(message) from error
        client_ca = read[2] if self.client_ca is not None else None
        if client_ca is not None:
            try:
                context.load_verify_locations(cadata=client_ca)
            # A file without a certificate raises ValueError.
            except (ssl.SSLError, ValueError) as error:
                raise ConfigurationError(f"{self.client_ca} holds no certificates of a CA: {error}") from error
        if [read_text(path) for path in self.paths] != read:
            raise ConfigurationError(f"{self.certificate} or {self.key} changed while it was read")
        return TlsMaterial(read[0].encode(), read[1].encode(), None if client_ca is None else client_ca.encode())


def _no_password() -> NoReturn:
    """Raises ConfigurationError, in place of OpenSSL's question on the terminal."""
    raise ConfigurationError("the key is encrypted; the server has nobody to ask for its password")
