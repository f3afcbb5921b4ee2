"""A page token is opaque: it holds where the next page starts, and the query it belongs to."""

import base64
import binascii
import hashlib
import json

from patchclamp_server.errors import InvalidArgument


def page_token(after: str, *query: str) -> str:
    """Returns a token for the entries after `after` of the listing with these filters."""
    text = json.dumps([after, _digest(query)])
    return base64.urlsafe_b64encode(text.encode()).decode()


def parse_page_token(token: str, *query: str) -> str:
    """Returns the entry after which a page starts, "" for the first. InvalidArgument: not a token of this listing."""
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
