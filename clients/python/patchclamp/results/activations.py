"""ReadActivations that were read: rows with the text, position and token of each, or what they were reduced to."""

from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import chain
from sys import byteorder
from typing import Any

from patchclamp.names import name_of
from patchclamp.results.artifacts import Artifact
from patchclamp.results.jobs import Progress
from patchclamp.results.record import Record
from patchclamp.v1 import activation_pb2 as pb
from patchclamp.v1 import tensor_pb2

# Formats of struct, and types of numpy.
_FORMATS = {"float32": ("f", "<f4"), "float16": ("e", "<f2"), "int32": ("i", "<i4")}


@dataclass(frozen=True)
class Array:
    """Numbers [rows, width] or [width] as they came: numpy.asarray(it) has them, and tolist() without numpy.

    dtype: "float32", "float16", "bfloat16" or "int32". numpy has no bfloat16: it gets float32.
    """

    dtype: str
    shape: tuple[int, ...]
    data: bytes = field(repr=False)

    @classmethod
    def from_proto(cls, message: tensor_pb2.Tensor) -> "Array":
        name = name_of(tensor_pb2.DataType.DESCRIPTOR, message.dtype)
        return cls(name, tuple(message.shape), message.data)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> Any:
        import numpy as np

        if self.dtype == "bfloat16":
            values = (np.frombuffer(self.data, dtype="<u2").astype(np.uint32) << 16).view(np.float32)
        else:
            values = np.frombuffer(self.data, dtype=_FORMATS[self.dtype][1])
        shaped = values.reshape(self.shape)
        return shaped if dtype is None else shaped.astype(dtype)

    def tolist(self) -> list[Any]:
        """Returns nested lists of numbers."""
        flat = self._numbers()
        for size in reversed(self.shape[1:]):
            flat = [flat[start : start + size] for start in range(0, len(flat), size)]
        return flat

    def _numbers(self) -> list[Any]:
        data = self.data
        if self.dtype == "bfloat16":
            # The upper half of a float32.
            pairs = zip(data[::2], data[1::2], strict=True)
            data = bytes(chain.from_iterable((0, 0, low, high) for low, high in pairs))
        numbers = memoryview(data).cast(_FORMATS["float32" if self.dtype == "bfloat16" else self.dtype][0])
        if byteorder != "little":
            swapped = array(numbers.format, data)
            swapped.byteswap()
            return swapped.tolist()
        return numbers.tolist()


@dataclass(frozen=True)
class ActivationRows(Record):
    """Holds rows of one site and layer.

    texts, labels, positions, token_ids: of each row its text, the index of its label or -1, and the position and id of
    its token in the text, which has `lengths` tokens. tokens: how many it stands for. values: [rows, width].
    unit_positions: of a maximum, where each unit has it.
    """

    site: str
    layer: int
    texts: tuple[int, ...]
    labels: tuple[int, ...]
    positions: tuple[int, ...]
    token_ids: tuple[int, ...]
    tokens: tuple[int, ...]
    lengths: tuple[int, ...]
    values: Array
    unit_positions: Array | None = None

    @classmethod
    def of(cls, message: pb.ActivationRows) -> "ActivationRows":
        at = Array.from_proto(message.unit_positions) if message.HasField("unit_positions") else None
        return cls.from_proto(message, values=Array.from_proto(message.values), unit_positions=at)

    def __len__(self) -> int:
        return len(self.texts)

    def to_dict(self) -> dict[str, Any]:
        """Returns lists and numbers, the values among them."""
        plain = {name: getattr(self, name) for name in ("site", "layer")}
        lists = {name: list(getattr(self, name)) for name in _INDICES}
        at = {} if self.unit_positions is None else {"unit_positions": self.unit_positions.tolist()}
        return {**plain, **lists, "values": self.values.tolist(), **at}


_INDICES = ("texts", "labels", "positions", "token_ids", "tokens", "lengths")


@dataclass(frozen=True)
class ActivationMoments(Record):
    """Holds the mean [width] and the covariance [width, width], over n, of the tokens of all texts."""

    site: str
    layer: int
    tokens: int
    mean: Array
    covariance: Array

    def to_dict(self) -> dict[str, Any]:
        numbers = {"mean": self.mean.tolist(), "covariance": self.covariance.tolist()}
        return {"site": self.site, "layer": self.layer, "tokens": self.tokens, **numbers}


@dataclass(frozen=True)
class ActivationMean(Record):
    """Holds the mean [width] of the tokens of one label."""

    site: str
    layer: int
    label: str
    tokens: int
    mean: Array

    def to_dict(self) -> dict[str, Any]:
        plain = {name: getattr(self, name) for name in ("site", "layer", "label", "tokens")}
        return {**plain, "mean": self.mean.tolist()}


@dataclass(frozen=True)
class ReadActivations(Record):
    """Holds all that was read. texts: of which a token was read. tokens: that were run. artifact: where it is stored.

    rows, moments: one for each site and layer; means: for each of these and label. labels: by their index.
    """

    artifact: Artifact | None
    texts: int
    tokens: int
    n_rows: int
    labels: tuple[str, ...]
    rows: tuple[ActivationRows, ...] = ()
    moments: tuple[ActivationMoments, ...] = ()
    means: tuple[ActivationMean, ...] = ()

    def of(self, site: str, layer: int) -> ActivationRows:
        """Returns the rows of a site and layer. KeyError where none came."""
        for rows in self.rows:
            if (rows.site, rows.layer) == (site, layer):
                return rows
        raise KeyError(f"no rows of {site} at layer {layer}")

    def to_dict(self) -> dict[str, Any]:
        plain = {name: getattr(self, name) for name in ("texts", "tokens", "n_rows")}
        artifact = None if self.artifact is None else self.artifact.to_dict()
        parts = {name: [each.to_dict() for each in getattr(self, name)] for name in ("rows", "moments", "means")}
        return {"artifact": artifact, **plain, "labels": list(self.labels), **parts}


ActivationEvent = Progress | ActivationRows | ActivationMoments | ActivationMean | ReadActivations


@dataclass
class ReadActivationsCollector:
    """Turns the messages of a reading into events, and keeps what has come."""

    _rows: dict[tuple[str, int], list[ActivationRows]] = field(default_factory=dict)
    _moments: dict[tuple[str, int], list[ActivationMoments]] = field(default_factory=dict)
    _means: list[ActivationMean] = field(default_factory=list)
    _result: pb.ReadActivationsResult | None = None

    def add(self, message: pb.ReadActivationsResponse) -> ActivationEvent:
        match message.WhichOneof("event"):
            case "progress":
                return Progress.from_proto(message.progress)
            case "rows":
                rows = ActivationRows.of(message.rows)
                self._rows.setdefault((rows.site, rows.layer), []).append(rows)
                return rows
            case "moments":
                arrays = {name: Array.from_proto(getattr(message.moments, name)) for name in ("mean", "covariance")}
                part = ActivationMoments.from_proto(message.moments, **arrays)
                self._moments.setdefault((part.site, part.layer), []).append(part)
                return part
            case "mean":
                mean = ActivationMean.from_proto(message.mean, mean=Array.from_proto(message.mean.mean))
                self._means.append(mean)
                return mean
            case "result":
                self._result = message.result
                return self._complete(message.result)
            case other:
                raise ValueError(f"a reading sent an event this client does not know: {other}")

    def result(self) -> ReadActivations | None:
        """Returns what was read; None while the end has not arrived."""
        return None if self._result is None else self._complete(self._result)

    def _complete(self, result: pb.ReadActivationsResult) -> ReadActivations:
        return ReadActivations(
            Artifact.from_proto(result.artifact) if result.HasField("artifact") else None,
            result.texts,
            result.tokens,
            result.rows,
            tuple(result.labels),
            tuple(map(_joined, self._rows.values())),
            tuple(map(_whole, self._moments.values())),
            tuple(self._means),
        )


def _joined(parts: Sequence[ActivationRows]) -> ActivationRows:
    indices = {name: tuple(chain.from_iterable(getattr(part, name) for part in parts)) for name in _INDICES}
    values = _stacked([part.values for part in parts])
    at = [part.unit_positions for part in parts if part.unit_positions is not None]
    return ActivationRows(
        parts[0].site, parts[0].layer, **indices, values=values, unit_positions=_stacked(at) if at else None
    )


def _whole(parts: Sequence[ActivationMoments]) -> ActivationMoments:
    first = parts[0]
    return ActivationMoments(
        first.site, first.layer, first.tokens, first.mean, _stacked([part.covariance for part in parts])
    )


def _stacked(parts: Sequence[Array]) -> Array:
    shape = (sum(part.shape[0] for part in parts), *parts[0].shape[1:])
    return Array(parts[0].dtype, shape, b"".join(part.data for part in parts))
