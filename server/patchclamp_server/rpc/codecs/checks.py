"""The checks of message fields under the name by which the codecs of rpc know them."""

from patchclamp_server.interventions.field_checks import (
    LARGEST_COUNT,
    chosen,
    count,
    distinct,
    distinct_names,
    finite,
    known,
    required,
)

__all__ = ["LARGEST_COUNT", "chosen", "count", "distinct", "distinct_names", "finite", "known", "required"]
