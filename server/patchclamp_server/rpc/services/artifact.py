"""ArtifactService: uploads checked against the served model, downloads in any format, tags and listings."""

import asyncio
import shutil
import tempfile
import time
from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from patchclamp.v1 import artifact_pb2 as pb
from patchclamp.v1.artifact_pb2_grpc import ArtifactServiceServicer
from patchclamp_server.artifacts.activations import places_of, tensor_name
from patchclamp_server.artifacts.autoencoder_spec import check_autoencoder, check_place
from patchclamp_server.artifacts.blobs import STALE_AFTER, full_disk_is_resource_exhausted
from patchclamp_server.artifacts.formats.base import CannotExpress, Decoded, Format, MalformedFile
from patchclamp_server.artifacts.probes import probe_of
from patchclamp_server.artifacts.row_formats import Beside, RowFormat
from patchclamp_server.artifacts.store import DEFAULT_PAGE_SIZE, MAX_PAGE_SIZE, ArtifactStore
from patchclamp_server.artifacts.tensors import check_tensors, layers_of, shapes_of, width_of
from patchclamp_server.artifacts.types import (
    BY_ROWS,
    LAYERED,
    OF_NO_MODEL,
    OF_ROWS,
    SITED,
    ArtifactInfo,
    ArtifactKind,
    Tags,
)
from patchclamp_server.errors import FailedPrecondition, InvalidArgument, about, below, fields_as, within
from patchclamp_server.interventions.field_checks import count, distinct
from patchclamp_server.model.info import ModelInfo
from patchclamp_server.model.sites import PUBLIC_SITES, Site
from patchclamp_server.monitoring.watch import Watch, check_watch
from patchclamp_server.rpc.call.upload_space import UploadLimits, UploadSpace
from patchclamp_server.rpc.codecs.artifact import (
    decode_format,
    decode_kind,
    decode_struct,
    encode_artifact,
    file_format,
    row_format,
)
from patchclamp_server.rpc.codecs.program import decode_site
from patchclamp_server.sparsity.binder import policy_of

CHUNK_BYTES = 1024 * 1024
SPOOL_PREFIX = "patchclamp-upload-"
# Formats of two files.
WITH_CONFIG = ("saelens",)
Context = Any


class ArtifactService(ArtifactServiceServicer):
    """Raises the errors of errors.py; an interceptor turns them into statuses. Disk and hashing run in threads."""

    def __init__(self, store: ArtifactStore, model_info: ModelInfo, limits: UploadLimits | None = None) -> None:
        self._store = store
        self._model = model_info
        limits = limits or UploadLimits()
        self.uploads, self.row_uploads = UploadSpace(limits), UploadSpace(limits.of_rows())
        _sweep_spools()

    async def Upload(self, request_iterator: Any, context: Context) -> pb.UploadResponse:
        requests: AsyncIterator[pb.UploadRequest] = aiter(request_iterator)
        first = await anext(requests, None)
        if first is None or not first.HasField("header"):
            raise InvalidArgument("header", "the first message must be the header")
        header = first.header
        # What can be refused without the file is refused before it travels.
        with within("header"):
            self._store.access.put(header.tags)
        kind = decode_kind(header.kind, "header.kind")
        store_file = self._how_to_store(header, kind)
        uploads = self.row_uploads if kind in OF_ROWS else self.uploads
        size = count(header.size_bytes, "header.size_bytes", low=1, high=uploads.limits.largest)
        with (
            uploads.taken(size),
            full_disk_is_resource_exhausted("the space for uploads"),
            tempfile.TemporaryDirectory(prefix=SPOOL_PREFIX) as directory,
        ):
            path = Path(directory) / "file"
            await _spool(uploads.in_time(requests, size), path, size)
            info = await asyncio.to_thread(store_file, path)
        return pb.UploadResponse(artifact=encode_artifact(info))

    async def Download(self, request: pb.DownloadRequest, context: Context) -> AsyncIterator[pb.DownloadResponse]:
        name = decode_format(request.format, "format")
        layers = distinct(request.layers, "layers")
        info = await asyncio.to_thread(self._store.info, request.ref)
        if info.kind in BY_ROWS:
            async for response in self._download_rows(info, name, layers):
                yield response
            return
        info, data = await asyncio.to_thread(self._encode, request.ref, layers, file_format(name, "format"))
        for start in range(0, len(data), CHUNK_BYTES):
            artifact = encode_artifact(info) if start == 0 else None
            yield pb.DownloadResponse(artifact=artifact, chunk=data[start : start + CHUNK_BYTES])

    async def _download_rows(
        self, info: ArtifactInfo, name: str, layers: tuple[int, ...]
    ) -> AsyncIterator[pb.DownloadResponse]:
        """Reads the file piece by piece: the stored one, or one that is written for the format."""
        write = row_format(name, "format").write if info.kind in OF_ROWS else None
        if layers:
            raise FailedPrecondition("layers", f"a {info.kind.value} is exported whole; leave the layers empty")
        if write is None and name != "safetensors":
            raise FailedPrecondition("format", f"a {info.kind.value} is not written as {name}")
        with (
            full_disk_is_resource_exhausted("the space for downloads"),
            tempfile.TemporaryDirectory(prefix=SPOOL_PREFIX) as directory,
        ):
            _, file = await asyncio.to_thread(self._store.open, info.id)
            read: Callable[[int, int], bytes] = file.read
            size, config = info.size_bytes, ""
            if write is not None:
                path = Path(directory) / "file"
                try:
                    config = await asyncio.to_thread(write, info, file, path)
                except CannotExpress as error:
                    raise FailedPrecondition("format", str(error)) from error
                read, size = _reader(path), path.stat().st_size
            for start in range(0, size, CHUNK_BYTES):
                chunk = await asyncio.to_thread(read, start, min(start + CHUNK_BYTES, size))
                artifact = encode_artifact(info) if start == 0 else None
                yield pb.DownloadResponse(artifact=artifact, chunk=chunk, config=config if start == 0 else "")

    async def GetArtifact(self, request: pb.GetArtifactRequest, context: Context) -> pb.GetArtifactResponse:
        info = await asyncio.to_thread(self._store.info, request.ref)
        return pb.GetArtifactResponse(artifact=encode_artifact(info))

    async def ListArtifacts(self, request: pb.ListArtifactsRequest, context: Context) -> pb.ListArtifactsResponse:
        kind = decode_kind(request.kind, "kind") if request.kind else None
        page_size = count(request.page_size, "page_size", high=MAX_PAGE_SIZE) or DEFAULT_PAGE_SIZE
        page, token = await asyncio.to_thread(
            self._store.list, kind, request.model_fingerprint, page_size, request.page_token
        )
        return pb.ListArtifactsResponse(artifacts=map(encode_artifact, page), next_page_token=token)

    async def TagArtifact(self, request: pb.TagArtifactRequest, context: Context) -> pb.TagArtifactResponse:
        if request.ref:
            info = await asyncio.to_thread(self._store.tag, request.tag, request.ref, replace_tag=request.replace_tag)
        else:
            untagged = await asyncio.to_thread(self._store.untag, request.tag)
            info = await asyncio.to_thread(self._store.info, untagged)
        return pb.TagArtifactResponse(artifact=encode_artifact(info))

    async def DeleteArtifact(self, request: pb.DeleteArtifactRequest, context: Context) -> pb.DeleteArtifactResponse:
        artifact_id, tags = await asyncio.to_thread(self._store.delete, request.ref)
        return pb.DeleteArtifactResponse(id=artifact_id, tags=tags)

    def _how_to_store(self, header: pb.UploadHeader, kind: ArtifactKind) -> Callable[[Path], ArtifactInfo]:
        """Returns what stores the file that follows the header, of which it refuses what it can without the file."""
        name = decode_format(header.format, "header.format")
        site = decode_site(header.site, "header.site") if header.site else None
        provenance = decode_struct(header.provenance, "header.provenance")
        if header.config and name not in WITH_CONFIG:
            raise InvalidArgument("header.config", f"{name} has no second file; {', '.join(WITH_CONFIG)} has")
        if header.of and kind is not ArtifactKind.FEATURE_LABELS:
            raise InvalidArgument("header.of", f"a {kind.value} is about no artifact; feature_labels are")
        if kind in OF_ROWS:
            rows = row_format(name, "header.format")
            return lambda path: self._store_rows(header, kind, site, provenance, rows, path)
        if header.HasField("layer"):
            raise InvalidArgument("header.layer", f"a {kind.value} has the layers that its file names")
        whole = file_format(name, "header.format")
        return lambda path: self._store_upload(header, kind, site, provenance, _decode(whole, path))

    def _store_rows(
        self,
        header: pb.UploadHeader,
        kind: ArtifactKind,
        site: Site | None,
        provenance: dict[str, Any],
        rows: RowFormat,
        path: Path,
    ) -> ArtifactInfo:
        """As _store_upload, of a file that is never whole in memory. Site and layer of the header win; in all else what
        the file says of itself does."""
        served = header.model_fingerprint in ("", self._model.fingerprint)
        layer = header.layer if header.HasField("layer") else None
        beside = Beside(header.config, site, layer, self._model.sites if served else PUBLIC_SITES)
        try:
            with fields_as(_upload_path), rows.open(path, beside) as opened:
                own = opened.metadata
                if own and own.kind is not kind:
                    raise InvalidArgument("kind", f"the file holds a {own.kind.value}, not a {kind.value}")
                said = {**provenance, **(own.provenance if own else {}), **opened.provenance}
                fingerprint = header.model_fingerprint or (own.model_fingerprint if own else "")
                fingerprint = fingerprint or self._model.fingerprint
                found = opened.site or (own.site if own else None)
                layers_of(kind, opened.tensors.shapes)
                spec = check_autoencoder(found, said, opened.tensors.shapes)
                if fingerprint == self._model.fingerprint:
                    check_place(self._model, spec, opened.tensors.shapes)
                return self._store.put_rows(
                    kind,
                    opened.tensors,
                    model_fingerprint=fingerprint,
                    site=found,
                    description=header.description or (own.description if own else ""),
                    provenance=said,
                    evidence=own.evidence if own else {},
                    tags=Tags(tuple(header.tags), header.replace_tags),
                )
        except MalformedFile as error:
            raise InvalidArgument("chunk", str(error)) from error

    def _store_upload(
        self, header: pb.UploadHeader, kind: ArtifactKind, site: Site | None, provenance: dict[str, Any], file: Decoded
    ) -> ArtifactInfo:
        """The header wins; what it leaves empty comes from the file, if Patchclamp wrote it, and then from the server.

        So a downloaded file that is uploaded again keeps its evidence and its id.
        """
        own = file.metadata
        if own and own.kind is not kind:
            raise InvalidArgument("header.kind", f"the file holds a {own.kind.value}, not a {kind.value}")
        if kind in SITED:
            site = site or (own.site if own else None) or Site.RESID_POST
        said = dict(own.provenance if own else file.provenance)
        provenance = _with_labels(provenance, said) if kind is ArtifactKind.CORPUS else provenance or said
        fingerprint = header.model_fingerprint or (own.model_fingerprint if own else "")
        if kind is ArtifactKind.FEATURE_LABELS:
            about_autoencoder, fingerprint = self._labelled(header.of, provenance, file.tensors)
            provenance = provenance | about_autoencoder
        if kind not in OF_NO_MODEL:
            fingerprint = fingerprint or self._model.fingerprint
        with fields_as(_upload_path):
            tensors = file.tensors
            check_tensors(kind, tensors)
            if fingerprint == self._model.fingerprint:
                _check_fits(self._model, kind, site, tensors)
                if kind is ArtifactKind.SPARSITY_PROFILE:
                    _check_profile(self._model, provenance, tensors)
                if kind is ArtifactKind.WATCH:
                    _check_watch(self._model, tensors)
                if kind is ArtifactKind.PROBE:
                    _check_probe(self._model, provenance, tensors)
            return self._store.put(
                kind,
                tensors,
                model_fingerprint=fingerprint,
                site=site,
                description=header.description or (own.description if own else ""),
                provenance=provenance,
                evidence=own.evidence if own else {},
                tags=Tags(tuple(header.tags), header.replace_tags),
            )

    def _labelled(
        self, ref: str, provenance: dict[str, Any], tensors: dict[str, torch.Tensor]
    ) -> tuple[dict[str, Any], str]:
        """What provenance says of the autoencoder that labels are about, and the fingerprint of its model."""
        said = provenance.get("autoencoder")
        if not ref and not isinstance(said, str):
            raise InvalidArgument("header.of", "give the id or tag of the autoencoder that the labels are about")
        with about("header.of"):
            info, file = self._store.open(ref or str(said))
        if info.kind is not ArtifactKind.AUTOENCODER:
            raise InvalidArgument("header.of", f"{ref} is a {info.kind.value}, not an autoencoder")
        with fields_as(_upload_path):
            check_tensors(ArtifactKind.FEATURE_LABELS, tensors)
        largest, n_features = int(tensors["features"].max()), file.shapes["encoder"][0]
        if largest >= n_features:
            raise InvalidArgument("chunk", f"feature {largest}; the autoencoder has 0 to {n_features - 1}")
        return {"autoencoder": info.id}, info.model_fingerprint

    def _encode(self, ref: str, layers: tuple[int, ...], whole: Format) -> tuple[ArtifactInfo, bytes]:
        artifact = self._store.get(ref)
        for i, layer in enumerate(layers):
            if artifact.info.kind in LAYERED and layer not in artifact.info.layers:
                raise InvalidArgument(f"layers[{i}]", f"{ref} has no layer {layer}")
        if layers:
            artifact = artifact.only(layers)
        try:
            data = whole.encode(artifact, self._architecture(artifact.info))
        except CannotExpress as error:
            raise FailedPrecondition("format", str(error)) from error
        return self._store.info(artifact.info.id), data

    def _architecture(self, info: ArtifactInfo) -> str:
        """Architecture of the vector's model; "" for a model this server does not know."""
        return self._model.architecture if info.model_fingerprint == self._model.fingerprint else ""


def _with_labels(header: dict[str, Any], file: dict[str, Any]) -> dict[str, Any]:
    """Provenance of a corpus: of both, and the names of labels of the file, where it has any, since its documents have
    their numbers."""
    return {**file, **header, **{name: file[name] for name in ("labels",) if name in file}}


def _sweep_spools() -> None:
    """Removes what uploads left in the temporary directory when their process was killed.

    Chunks come within seconds: a file that was written to an hour ago is nobody's.
    """
    for directory in Path(tempfile.gettempdir()).glob(f"{SPOOL_PREFIX}*"):
        # Others may sweep at the same time, and may own it.
        with suppress(OSError):
            written = max(path.stat().st_mtime for path in (directory, *directory.iterdir()))
            if time.time() - written > STALE_AFTER.total_seconds():
                shutil.rmtree(directory)


async def _spool(requests: AsyncIterator[pb.UploadRequest], path: Path, size: int) -> None:
    """Writes the chunks to a file. InvalidArgument unless they are `size` bytes in chunks of at most 1 MiB."""
    received = 0
    with path.open("wb") as file:
        async for request in requests:
            if not request.HasField("chunk"):
                raise InvalidArgument("chunk", "after the header every message must be a chunk")
            if not 0 < len(request.chunk) <= CHUNK_BYTES:
                raise InvalidArgument("chunk", f"{len(request.chunk)} bytes; a chunk has 1 to {CHUNK_BYTES}")
            received += len(request.chunk)
            if received > size:
                raise InvalidArgument("chunk", f"more bytes than the {size} of header.size_bytes")
            await asyncio.to_thread(file.write, request.chunk)
    if received < size:
        raise InvalidArgument("chunk", f"{received} bytes arrived; header.size_bytes says {size}")


def _decode(whole: Format, path: Path) -> Decoded:
    try:
        return whole.decode(path)
    except MalformedFile as error:
        raise InvalidArgument("chunk", str(error)) from error


def _reader(path: Path) -> Callable[[int, int], bytes]:
    def read(start: int, end: int) -> bytes:
        with path.open("rb") as file:
            file.seek(start)
            return file.read(end - start)

    return read


def _check_fits(model: ModelInfo, kind: ArtifactKind, site: Site | None, tensors: dict[str, torch.Tensor]) -> None:
    """Layers, site and width (or neuron indices) exist in the model. Expects tensors that check_tensors accepted."""
    layers = layers_of(kind, shapes_of(tensors))
    if layers and layers[-1] >= model.n_layers:
        raise InvalidArgument("tensors", f"layer {layers[-1]}; {model.name} has layers 0 to {model.n_layers - 1}")
    if kind in SITED and site is not None:
        if site not in model.sites:
            accepted = ", ".join(s.value for s in model.sites)
            raise InvalidArgument("site", f"{model.name} has no {site.value}; it has {accepted}")
        width = width_of(kind, shapes_of(tensors))
        if width != model.sites[site]:
            message = f"width {width}; {site.value} of {model.name} has width {model.sites[site]}"
            raise InvalidArgument("tensors", message)
    if kind is ArtifactKind.ACTIVATIONS:
        _check_activations_fit(model, tensors)
    if kind is ArtifactKind.NEURON_SET:
        for layer in layers:
            largest = int(tensors[f"layer.{layer}.neurons"].max())
            if largest >= model.d_ff:
                message = f"layer.{layer}.neurons names neuron {largest}; {model.name} has 0 to {model.d_ff - 1}"
                raise InvalidArgument("tensors", message)
    if kind is ArtifactKind.HEAD_SET and tensors["scores"].shape != (model.n_layers, model.n_heads):
        n_layers, n_heads = tensors["scores"].shape
        message = f"scores [{n_layers}, {n_heads}]; {model.name} has {model.n_layers} layers of {model.n_heads} heads"
        if n_layers < model.n_layers or n_heads < model.n_heads:
            first = f"0-{n_heads}" if n_heads < model.n_heads else f"{n_layers}-0"
            message += f": the first that is missing is {first}"
        raise InvalidArgument("tensors", message)


def _check_activations_fit(model: ModelInfo, tensors: dict[str, torch.Tensor]) -> None:
    for (site, layer), width in places_of(shapes_of(tensors)).items():
        if model.sites.get(site) != width:
            has = f"has width {model.sites[site]}" if site in model.sites else "does not exist"
            message = f"{tensor_name(site, layer)} has width {width}; {site.value} of {model.name} {has}"
            raise InvalidArgument("tensors", message)


def _check_profile(model: ModelInfo, provenance: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
    """The policy exists, and takes these parameters and tensors."""
    try:
        policy_of(provenance, tensors, n_layers=model.n_layers, d_ff=model.d_ff)
    except InvalidArgument as error:
        name = error.field.removeprefix("sparsity.")
        path = f"provenance.{name}" if name in ("policy", "parameters") else f"provenance.parameters.{name}"
        raise InvalidArgument(path, error.message) from error
    except FailedPrecondition as error:
        raise InvalidArgument("tensors", error.message) from error


def _check_watch(model: ModelInfo, tensors: dict[str, torch.Tensor]) -> None:
    """The model has what is watched."""
    try:
        check_watch(Watch.from_tensors(tensors), model)
    except FailedPrecondition as error:
        raise InvalidArgument("tensors", error.message) from error


def _check_probe(model: ModelInfo, provenance: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
    """The provenance says what the tensors are, and the site has their width."""
    probe = probe_of(provenance, tensors)
    width = probe.weights[probe.layers[0]].shape[1]
    if model.sites.get(probe.site) != width:
        has = f"has width {model.sites[probe.site]}" if probe.site in model.sites else "does not exist"
        raise InvalidArgument("tensors", f"width {width}; {probe.site.value} of {model.name} {has}")


def _upload_path(argument: str) -> str:
    """The field of UploadRequest of an argument of ArtifactStore.put; evidence travels only inside the file."""
    return "chunk" if argument.startswith(("tensors", "evidence")) else below("header", argument)
