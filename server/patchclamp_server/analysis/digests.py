"""Makes digests of what a job was given, which the provenance of its result keeps in place of the data."""

import hashlib
import json
from typing import Any


def json_digest(value: Any) -> str:
    """Returns the SHA-256 of a value as JSON without spaces, in the order that it has."""
    return "sha256:" + hashlib.sha256(json.dumps(value, separators=(",", ":")).encode()).hexdigest()
