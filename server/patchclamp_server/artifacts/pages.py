"""Opaque page tokens: where the next page starts, and the query it belongs to."""

import base64
import binascii
import hashlib
import json

from patchclamp_server.errors import InvalidArgument


def page_token(after: str, *query: str) -> str:
    """A token for the entries after `after` of the listing with these filters."""
    text = json.dumps([after, _digest(query)])
    return base64.urlsafe_b64encode(text.encode()).decode()


def parse_page_token(token: str, *query: str) -> str:
    """The entry a page starts after; "" for the first page. InvalidArgument: not a token of this listing."""
    if not token:
        return ""
    try:
        after, digest = json.loads(base64.urlsafe_b64decode(token.encode("ascii")))
    except (binascii.Error, ValueError, TypeError, RecursionError) as error:
        raise InvalidArgument("page_token", "not a token that a listing returned") from error
    if not isinstance(after, str) or digest != _digest(query):
        raise InvalidArgument("page_token", "the token belongs to a listing with other filters")
    return after


def _digest(query: tuple[str, ...]) -> str:
    return hashlib.sha256(json.dumps(query).encode()).hexdigest()[:16]
