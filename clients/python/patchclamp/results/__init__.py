"""Typed results of every call: frozen dataclasses, each with ``to_dict()``."""

from patchclamp.results.artifacts import (
    Artifact,
    DownloadCollector,
    ExtractionCollector,
    ExtractionEvent,
    ExtractionProgress,
    ExtractionResult,
    LayerEvidence,
)
from patchclamp.results.comparison import (
    CompareCollector,
    CompareEvent,
    CompareResult,
    CompareSummary,
    CompareText,
    Divergence,
)
from patchclamp.results.generation import (
    Chunk,
    Finished,
    GenerateCollector,
    GenerateResult,
    ScoreResult,
    Token,
    Usage,
)
from patchclamp.results.models import Model, Tokenization
from patchclamp.results.receipts import EditReceipt, ReadoutValue, Receipt

__all__ = [
    "Artifact",
    "Chunk",
    "CompareCollector",
    "CompareEvent",
    "CompareResult",
    "CompareSummary",
    "CompareText",
    "Divergence",
    "DownloadCollector",
    "EditReceipt",
    "ExtractionCollector",
    "ExtractionEvent",
    "ExtractionProgress",
    "ExtractionResult",
    "Finished",
    "GenerateCollector",
    "GenerateResult",
    "LayerEvidence",
    "Model",
    "ReadoutValue",
    "Receipt",
    "ScoreResult",
    "Token",
    "Tokenization",
    "Usage",
]
