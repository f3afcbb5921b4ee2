"""A bearer token is 256 random bits, which the client keeps; the server keeps their SHA-256.

The file has a line for each token; `#` begins a comment:

    <tenant> sha256:<64 hex digits> [expires=<time as 2026-12-31T23:59:59Z>]

A slow hash such as scrypt defends words that people choose. 256 random bits cannot be guessed however fast the hash is,
and a slow one would let anybody keep the server busy with wrong tokens.
"""

import hashlib
import hmac
import re
import secrets
import time
from dataclasses import dataclass
from datetime import UTC, datetime

from patchclamp_server.errors import Unauthenticated
from patchclamp_server.security.configuration import ConfigurationError

PREFIX = "patchclamp_"
TENANT = re.compile(r"[a-z0-9][a-z0-9._-]{0,62}")
DIGEST = re.compile(r"sha256:([0-9a-f]{64})")
DURATION = re.compile(r"([1-9][0-9]{0,5})([smhdw])")
SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86400, "w": 7 * 86400}
TIME_FORMAT = "%Y-%m-%dT%H:%M:%SZ"
ID_DIGITS = 12


@dataclass(frozen=True)
class Token:
    """`digest` is the SHA-256 of the token. `expires` is in seconds since the epoch; None stands for never."""

    tenant: str
    digest: bytes
    expires: float | None = None

    @property
    def id(self) -> str:
        """The id names the token in the audit log, and is of no use to whoever reads it there."""
        return self.digest.hex()[:ID_DIGITS]

    @property
    def line(self) -> str:
        """The token's line in the file."""
        expiry = "" if self.expires is None else f" expires={_time_text(self.expires)}"
        return f"{self.tenant} sha256:{self.digest.hex()}{expiry}"


class TokenTable:
    """The tokens of one file."""

    def __init__(self, tokens: tuple[Token, ...]) -> None:
        self.tokens = tokens

    def find(self, presented: str) -> Token:
        """Finds a token. Raises Unauthenticated for one that is not in the file or has expired."""
        digest = _digest(presented)
        found = None
        # All tokens are compared, each in constant time, so that the time taken tells nothing about any of them.
        for token in self.tokens:
            if hmac.compare_digest(token.digest, digest):
                found = token
        if found is None:
            raise Unauthenticated("", "the token is not known here", "TOKEN_UNKNOWN")
        if found.expires is not None and found.expires <= time.time():
            raise Unauthenticated("", f"the token has expired at {_time_text(found.expires)}", "TOKEN_EXPIRED")
        return found


def parse_tokens(text: str, source: str) -> TokenTable:
    """Parses the file. Raises ConfigurationError with the number of the line."""
    tokens: list[Token] = []
    for number, line in enumerate(text.splitlines(), 1):
        words = line.partition("#")[0].split()
        if words:
            token = _parse_line(words, f"{source}, line {number}")
            if any(token.digest == other.digest for other in tokens):
                raise ConfigurationError(f"{source}, line {number}: the token is listed twice")
            tokens.append(token)
    return TokenTable(tuple(tokens))


def new_token(tenant: str, expires: float | None = None) -> tuple[str, Token]:
    """Returns a fresh token, and what the server keeps of it. Raises ValueError for a name that no tenant can have."""
    if not TENANT.fullmatch(tenant):
        raise ValueError(f"{tenant!r} is not the name of a tenant; accepted: {TENANT.pattern}")
    presented = PREFIX + secrets.token_urlsafe(32)
    return presented, Token(tenant, _digest(presented), expires)


def parse_duration(text: str) -> float:
    """Returns the seconds of "90s", "15m", "12h", "30d" or "4w". Raises ValueError for other texts."""
    match = DURATION.fullmatch(text)
    if match is None:
        raise ValueError(f"{text!r} is not a duration such as 12h or 30d")
    return float(int(match[1]) * SECONDS[match[2]])


def _parse_line(words: list[str], place: str) -> Token:
    tenant, digest, expiry = (*words, "", "")[:3]
    if len(words) > 3:
        raise ConfigurationError(f"{place}: {len(words)} words; expected a tenant, a digest and perhaps expires=<time>")
    if not TENANT.fullmatch(tenant):
        raise ConfigurationError(f"{place}: {tenant!r} is not the name of a tenant; accepted: {TENANT.pattern}")
    if not (match := DIGEST.fullmatch(digest)):
        # The digest is not quoted: whoever writes the token itself into the file shall not find it in the log.
        raise ConfigurationError(f"{place}: after the tenant, expected sha256: and 64 hex digits")
    if not expiry:
        return Token(tenant, bytes.fromhex(match[1]))
    try:
        expires = datetime.strptime(expiry, f"expires={TIME_FORMAT}").replace(tzinfo=UTC).timestamp()
    except ValueError:
        raise ConfigurationError(f"{place}: expected expires= and a time as 2026-12-31T23:59:59Z") from None
    return Token(tenant, bytes.fromhex(match[1]), expires)


def _digest(presented: str) -> bytes:
    return hashlib.sha256(presented.encode("utf-8", "surrogatepass")).digest()


def _time_text(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).strftime(TIME_FORMAT)
