"""A caller is the tenant of a bearer token, or the name on the client's certificate."""

import hashlib
import ssl
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from patchclamp_server.errors import Unauthenticated
from patchclamp_server.security.security import Security

Context = Any


@dataclass(frozen=True)
class Identity:
    """`token` and `certificate` name them in the audit log; they are "" where there is none."""

    tenant: str = ""
    token: str = ""
    certificate: str = ""


def identify(context: Context, security: Security) -> Identity:
    """Returns who calls: tenant "" where neither tokens nor certificates are asked for. Raises Unauthenticated."""
    certificate = _certificate_id(context)
    if security.tokens is not None:
        token = security.tokens.value.find(_bearer(context))
        return Identity(token.tenant, token.id, certificate)
    if security.names_by_certificate:
        return Identity(_name(context, security.tenants.is_listed), "", certificate)
    return Identity("", "", certificate)


def _bearer(context: Context) -> str:
    given = [value for key, value in context.invocation_metadata() or () if key == "authorization"]
    if not given:
        raise Unauthenticated("", "expected the metadata authorization: Bearer <token>", "TOKEN_MISSING")
    scheme, _, token = str(given[0]).partition(" ")
    if len(given) > 1 or scheme.lower() != "bearer" or not token.strip():
        raise Unauthenticated("", "expected authorization once, as Bearer <token>", "TOKEN_MALFORMED")
    return token.strip()


def _name(context: Context, is_listed: Callable[[str], bool]) -> str:
    """Returns the common name or an alternative name that the policy lists, else the common name."""
    peer = context.auth_context()
    properties = ("x509_common_name", "x509_subject_alternative_name")
    names: list[str] = [name.decode("utf-8", "replace") for key in properties for name in peer.get(key, ())]
    if not names:
        raise Unauthenticated("", "the certificate has no common name and no alternative", "CERTIFICATE_NAMELESS")
    return next(filter(is_listed, names), names[0])


def _certificate_id(context: Context) -> str:
    """Returns the SHA-256 of the certificate, as openssl's -fingerprint has it, without colons."""
    given = context.auth_context().get("x509_pem_cert", ())
    return hashlib.sha256(ssl.PEM_cert_to_DER_cert(given[0].decode("ascii"))).hexdigest() if given else ""
