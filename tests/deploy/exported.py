"""What a server exports."""

from prometheus_client.parser import text_string_to_metric_families

SERIES = {"counter": ("_total",), "histogram": ("_bucket", "_sum", "_count"), "gauge": ("",)}


def exported_names(text: str) -> set[str]:
    """Names of all series that the families of a /metrics page have, or will have once something is counted."""
    families = text_string_to_metric_families(text)
    return {family.name + suffix for family in families for suffix in SERIES.get(family.type, ())}
