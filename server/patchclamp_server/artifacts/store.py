"""The content-addressed store of artifacts.

    objects/ab/cdef….safetensors   bytes whose SHA-256 is abcdef…; the id is "sha256:abcdef…"
    tags/<name>                    holds an id
    checkpoints/<key>              jobs that have not ended (checkpoints.py)
    watches/…, watch_…/…           what servers tell each other of the watches that run (monitoring/shared.py)
    tmp/<random>                   unfinished writes

Objects never change; tags move. Methods may be called from any thread, and several processes may share a directory.
"""

import hashlib
import logging
import re
import threading
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from patchclamp_server.artifacts.access import ArtifactAccess, OpenStore
from patchclamp_server.artifacts.autoencoder_spec import autoencoder_spec, check_autoencoder, check_block
from patchclamp_server.artifacts.blobs import BlobStore
from patchclamp_server.artifacts.cache import ArtifactCache
from patchclamp_server.artifacts.checkpoints import Checkpoints
from patchclamp_server.artifacts.corpora import check_labels
from patchclamp_server.artifacts.feature_labels import check_about
from patchclamp_server.artifacts.formats import safetensors
from patchclamp_server.artifacts.formats.base import MalformedFile
from patchclamp_server.artifacts.pages import page_token, parse_page_token
from patchclamp_server.artifacts.records import Records
from patchclamp_server.artifacts.tensor_file import BLOCK_BYTES, TensorFile, TensorRows, blocks
from patchclamp_server.artifacts.tensors import check_tensors, layers_of, shapes_of, width_of
from patchclamp_server.artifacts.types import OF_ROWS, Artifact, ArtifactInfo, ArtifactKind, Metadata, Tags
from patchclamp_server.artifacts.validation import check_tag, check_tags, checked_metadata
from patchclamp_server.errors import AlreadyExists, FailedPrecondition, InvalidArgument, NotFound
from patchclamp_server.model.sites import Site

log = logging.getLogger(__name__)
ID = re.compile(r"sha256:[0-9a-f]{64}")
OBJECT = re.compile(r"([0-9a-f]{2})/([0-9a-f]{62})\.safetensors")
DEFAULT_PAGE_SIZE, MAX_PAGE_SIZE = 100, 1000
# A page ends early at this many bytes of metadata, so that it stays below the 4 MB of a gRPC message.
MAX_PAGE_BYTES = 512 * 1024
MAX_CACHED_HEADERS = 4096
# What is stored by rows and has more bytes is not loaded whole.
MAX_WHOLE_BYTES = 64 * 1024 * 1024
# Inside the class, ArtifactStore.list hides the built-in name.
Ids = list[str]


class ArtifactStore:
    """`url` is a directory or any fsspec URL (memory://, s3://…). `cache_bytes` bounds the loaded artifacts kept."""

    def __init__(self, url: str | Path, *, cache_bytes: int = 256 * 1024 * 1024) -> None:
        self.access: ArtifactAccess = OpenStore()
        self._blobs = BlobStore(url)
        self._loaded = ArtifactCache(cache_bytes)
        self._headers: dict[str, safetensors.Header] = {}
        self._damaged: set[str] = set()
        # Objects whose bytes have been verified for `open`.
        self._verified: set[str] = set()
        # This is held while objects and tags change, so that a tag is never set on an object that is being deleted.
        self._lock = threading.RLock()

    def put(
        self,
        kind: ArtifactKind,
        tensors: Mapping[str, torch.Tensor],
        *,
        model_fingerprint: str,
        site: Site | None = None,
        description: str = "",
        provenance: Mapping[str, Any] | None = None,
        evidence: Mapping[str, Any] | None = None,
        tags: Tags | Iterable[str] = (),
    ) -> ArtifactInfo:
        """Stores an artifact and points the tags at it. Equal content has one id and is stored once.

        Raises InvalidArgument (field = the argument's name) for content that tensors.py or validation.py refuses,
        AlreadyExists where a tag names another artifact and `tags` does not say that it may be replaced, and
        ResourceExhausted when there is no room.
        """
        tags = self._may_put(tags)
        metadata = checked_metadata(
            Metadata(kind, model_fingerprint, site, description, provenance or {}, evidence or {})
        )
        check_tensors(kind, tensors)
        if kind is ArtifactKind.CORPUS:
            check_labels(metadata.provenance, tensors)
        if kind is ArtifactKind.ACTIVATIONS:
            check_labels(metadata.provenance, tensors, "label")
        if kind is ArtifactKind.AUTOENCODER:
            check_autoencoder(metadata.site, metadata.provenance, shapes_of(tensors))
        if kind is ArtifactKind.FEATURE_LABELS:
            check_about(metadata.provenance)
        digest = hashlib.sha256()
        for part in safetensors.parts(metadata, tensors):
            digest.update(part)
        artifact_id = f"sha256:{digest.hexdigest()}"
        with self._lock:
            replaced = self._replaced(tags, artifact_id)
            contents: dict[str, Iterable[bytes]] = {}
            if not self._is_intact(artifact_id):
                # The bytes are made once more: those of a large artifact are never in memory together.
                contents[_object_path(artifact_id)] = safetensors.parts(metadata, tensors)
            # The object comes first: a crash in between leaves an object without a tag, not a tag without an object.
            self._blobs.write_all(contents | {f"tags/{tag}": (artifact_id.encode(),) for tag in tags.names})
            self._damaged.discard(artifact_id)
        self.access.changed("put", artifact_id, tags.names)
        return replace(self.info(artifact_id), replaced=replaced)

    def put_rows(
        self,
        kind: ArtifactKind,
        tensors: TensorRows,
        *,
        model_fingerprint: str,
        site: Site | None = None,
        description: str = "",
        provenance: Mapping[str, Any] | None = None,
        evidence: Mapping[str, Any] | None = None,
        tags: Tags | Iterable[str] = (),
    ) -> ArtifactInfo:
        """Stores an autoencoder as `put` does, to the same bytes, without ever having it in memory: block after block
        is read, checked and written. Raises as `put` does."""
        assert kind in OF_ROWS, f"a {kind.value} is checked whole"
        tags = self._may_put(tags)
        metadata = checked_metadata(
            Metadata(kind, model_fingerprint, site, description, provenance or {}, evidence or {})
        )
        layers_of(kind, tensors.shapes)
        check_autoencoder(metadata.site, metadata.provenance, tensors.shapes)
        types = {name: (tensors.dtypes[name], shape) for name, shape in tensors.shapes.items()}
        start, order = safetensors.layout({safetensors.METADATA_KEY: safetensors.metadata_json(metadata)}, types)
        with self._blobs.unfinished() as blob:
            digest = hashlib.sha256(start)
            blob.write(start)
            for name in order:
                for _, block in blocks(tensors, name):
                    check_block(name, block)
                    data = safetensors.tensor_bytes(block)
                    digest.update(data)
                    blob.write(data)
            artifact_id = f"sha256:{digest.hexdigest()}"
            with self._lock:
                replaced = self._replaced(tags, artifact_id)
                if not self._is_intact(artifact_id):
                    blob.keep(_object_path(artifact_id))
                self._blobs.write_all({f"tags/{tag}": (artifact_id.encode(),) for tag in tags.names})
                self._damaged.discard(artifact_id)
        self.access.changed("put", artifact_id, tags.names)
        return replace(self.info(artifact_id), replaced=replaced)

    def _may_put(self, tags: Tags | Iterable[str]) -> Tags:
        tags = tags if isinstance(tags, Tags) else Tags(tuple(tags))
        check_tags(tags.names)
        self.access.put(tags.names)
        return tags

    def check_tags(self, tags: Tags) -> None:
        """Checks tags before the work for a new artifact. Raises AlreadyExists as `put` would."""
        self._replaced(tags, "")

    def get(self, ref: str) -> Artifact:
        """Returns the artifact of an id or tag, verified against the id. `info.tags` is empty: ask info() for tags.

        Raises NotFound for an unknown artifact and FailedPrecondition where the stored bytes are damaged.
        """
        artifact_id = self._usable(ref)
        if artifact := self._loaded.get(artifact_id):
            return artifact
        self._refuse_large(artifact_id, ref)
        data = self._read_verified(artifact_id, ref)
        info = self._info(artifact_id, ref, tags=())
        artifact = Artifact(info, safetensors.decode(data).tensors)
        self._loaded.put(artifact)
        return artifact

    def _refuse_large(self, artifact_id: str, ref: str) -> None:
        """Whoever asks for a vector may name an autoencoder, which is not read for a refusal of its kind."""
        try:
            size, _ = self._blobs.stat(_object_path(artifact_id))
        except FileNotFoundError as error:
            raise NotFound("ref", f"no artifact {ref}") from error
        if size > MAX_WHOLE_BYTES and (kind := self._info(artifact_id, ref, ()).kind) in OF_ROWS:
            raise FailedPrecondition("ref", f"{ref} is a {kind.value} of {size} bytes, which is read by rows alone")

    def open(self, ref: str) -> tuple[ArtifactInfo, TensorFile]:
        """Returns the artifact of an id or tag with its tensors still in the store, to be read by rows.

        The bytes are verified against the id by the first call of this process, in blocks; the size by each. Raises as
        get() does.
        """
        artifact_id = self._usable(ref)
        info = self._info(artifact_id, ref, tags=())
        if artifact_id not in self._verified:
            self._verify(artifact_id, info.size_bytes)
            self._verified.add(artifact_id)
        path = _object_path(artifact_id)
        header = self._headers.get(artifact_id) or self._read_header(artifact_id)

        def read(start: int, end: int) -> bytes:
            try:
                return self._blobs.read_range(path, start, end)
            except FileNotFoundError as error:
                raise NotFound("ref", f"artifact {artifact_id} was deleted while it was read") from error

        return info, TensorFile(header, read)

    def info(self, ref: str) -> ArtifactInfo:
        """Returns what is known of an id or tag, from the header alone. Raises as get() does."""
        artifact_id = self._usable(ref)
        return self._info(artifact_id, ref, self._tags_by_id()[artifact_id])

    def list(
        self,
        kind: ArtifactKind | None = None,
        model_fingerprint: str = "",
        page_size: int = DEFAULT_PAGE_SIZE,
        page_token: str = "",
    ) -> tuple[list[ArtifactInfo], str]:
        """Returns one page in the order of the ids, and the token of the next page ("" at the end).

        A page may hold fewer than `page_size` entries before the end. Damaged objects are left out and logged.
        """
        if not 1 <= page_size <= MAX_PAGE_SIZE:
            raise InvalidArgument("page_size", f"{page_size} is not in 1 to {MAX_PAGE_SIZE}")
        query = (kind.value if kind else "", model_fingerprint)
        ids = self._ids()
        start = bisect_right(ids, parse_page_token(page_token, *query))
        tags = self._tags_by_id()
        page: list[ArtifactInfo] = []
        page_bytes = 0
        for index in range(start, len(ids)):
            try:
                info = self._info(ids[index], ids[index], tags[ids[index]])
            # The object was deleted since the ids were read, or is damaged, which is in the log.
            except (NotFound, FailedPrecondition):
                continue
            if (kind and info.kind is not kind) or model_fingerprint not in ("", info.model_fingerprint):
                continue
            if not self.access.sees(info.id, info.tags):
                continue
            size = len(safetensors.metadata_json(info.metadata)) + 16 * len(info.layers) + sum(map(len, info.tags))
            if len(page) == page_size or (page and page_bytes + size > MAX_PAGE_BYTES):
                return page, _next_token(page[-1].id, query)
            page.append(info)
            page_bytes += size
        return page, ""

    def tag(self, tag: str, ref: str, *, replace_tag: bool = False) -> ArtifactInfo:
        """Points a tag at the artifact of an id or another tag. Raises AlreadyExists where it names another artifact
        and may not be replaced."""
        check_tag(tag)
        self.access.tag(tag)
        with self._lock:
            artifact_id = self.info(ref).id
            replaced = self._replaced(Tags((tag,), replace_tag), artifact_id, "tag")
            self._blobs.write(f"tags/{tag}", artifact_id.encode())
        self.access.changed("tag", artifact_id, (tag,))
        return replace(self.info(artifact_id), replaced=replaced)

    def untag(self, tag: str) -> str:
        """Removes a tag and returns the id it held. The artifact stays. Raises NotFound for an unknown tag."""
        check_tag(tag)
        self.access.tag(tag)
        with self._lock:
            artifact_id = self.resolve(tag)
            # Another process may remove it at the same time.
            with suppress(FileNotFoundError):
                self._blobs.remove(f"tags/{tag}")
        self.access.changed("untag", artifact_id, (tag,))
        return artifact_id

    def delete(self, ref: str) -> tuple[str, tuple[str, ...]]:
        """Removes an artifact, damaged or not, with all its tags; returns its id and these.

        Raises NotFound for an unknown artifact, and FailedPrecondition where one tag of several named it, so that the
        others would go unnamed.
        """
        with self._lock:
            artifact_id = self.resolve(ref)
            tags = self._tags_by_id()[artifact_id]
            self.access.delete(artifact_id, tags)
            if ref != artifact_id and len(tags) > 1:
                others = ", ".join(repr(tag) for tag in tags if tag != ref)
                raise FailedPrecondition(
                    "ref", f"{ref!r} is also tagged {others}: remove a tag, or delete all of it as {artifact_id}"
                )
            # Tags go first: a crash in between leaves an object without a tag, not a tag without an object.
            for tag in tags:
                with suppress(FileNotFoundError):
                    self._blobs.remove(f"tags/{tag}")
            try:
                self._blobs.remove(_object_path(artifact_id))
            except FileNotFoundError as error:
                raise NotFound("ref", f"no artifact {ref}") from error
            finally:
                self._loaded.remove(artifact_id)
                self._headers.pop(artifact_id, None)
                self._verified.discard(artifact_id)
                self._damaged.discard(artifact_id)
        self.access.changed("delete", artifact_id, tags)
        return artifact_id, tags

    def checkpoints(self) -> Checkpoints:
        return Checkpoints(self._blobs)

    def records(self, directory: str) -> Records:
        """Returns the records in a directory of the store other than its own three."""
        return Records(self._blobs, directory)

    def resolve(self, ref: str) -> str:
        """Returns the id of a reference: "sha256:" + 64 hex digits, or a tag. Prefixes of an id are not accepted."""
        if ref.startswith("sha256:"):
            if not ID.fullmatch(ref):
                raise InvalidArgument("ref", f"{ref!r} is not an id: sha256: and 64 lower-case hex digits")
            return ref
        check_tag(ref, "ref")
        try:
            artifact_id = self._blobs.read(f"tags/{ref}").decode("ascii", "replace")
        except FileNotFoundError as error:
            raise NotFound("ref", f"no artifact has the tag {ref!r}") from error
        if not ID.fullmatch(artifact_id):
            raise FailedPrecondition("ref", f"the stored tag {ref!r} is damaged; set it again")
        return artifact_id

    def _replaced(self, tags: Tags, artifact_id: str, path: str = "tags[{}]") -> dict[str, str]:
        """Returns the tags that name another artifact, and its id. Raises AlreadyExists if they may not be moved."""
        replaced = {}
        for index, tag in enumerate(tags.names):
            try:
                held = self.resolve(tag)
                self._blobs.stat(_object_path(held))
            # A tag that is damaged, or whose object is gone, names nothing.
            except (NotFound, FailedPrecondition, FileNotFoundError):
                continue
            if held != artifact_id:
                replaced[tag] = held
                if not tags.replace:
                    message = f"the tag {tag!r} names {held}; ask to replace it, or choose another"
                    raise AlreadyExists(path.format(index), message)
        return replaced

    def _usable(self, ref: str) -> str:
        """Returns the id of a reference that the caller may use."""
        artifact_id = self.resolve(ref)
        self.access.use(artifact_id, ref, lambda: self._tags_by_id()[artifact_id])
        return artifact_id

    @property
    def damaged(self) -> frozenset[str]:
        """The ids of the objects that have been found damaged so far."""
        return frozenset(self._damaged)

    def _ids(self) -> Ids:
        matches = (OBJECT.fullmatch(name) for name in self._blobs.names("objects"))
        return sorted(f"sha256:{m[1]}{m[2]}" for m in matches if m)

    def _tags_by_id(self) -> defaultdict[str, tuple[str, ...]]:
        by_id: defaultdict[str, tuple[str, ...]] = defaultdict(tuple)
        for tag, content in sorted(self._blobs.read_all("tags").items()):
            by_id[content.decode("ascii", "replace")] += (tag,)
        return by_id

    def _is_intact(self, artifact_id: str) -> bool:
        try:
            self._verify(artifact_id, self._blobs.stat(_object_path(artifact_id))[0])
        except (FileNotFoundError, FailedPrecondition):
            return False
        return True

    def _read_verified(self, artifact_id: str, ref: str) -> bytes:
        try:
            data = self._blobs.read(_object_path(artifact_id))
        except FileNotFoundError as error:
            raise NotFound("ref", f"no artifact {ref}") from error
        if f"sha256:{hashlib.sha256(data).hexdigest()}" != artifact_id:
            raise self._damage(artifact_id, "its bytes do not have the SHA-256 of its id")
        return data

    def _verify(self, artifact_id: str, size: int) -> None:
        path, digest = _object_path(artifact_id), hashlib.sha256()
        for start in range(0, size, BLOCK_BYTES):
            digest.update(self._blobs.read_range(path, start, min(start + BLOCK_BYTES, size)))
        if f"sha256:{digest.hexdigest()}" != artifact_id:
            raise self._damage(artifact_id, "its bytes do not have the SHA-256 of its id")

    def _info(self, artifact_id: str, ref: str, tags: tuple[str, ...]) -> ArtifactInfo:
        path = _object_path(artifact_id)
        try:
            size, created = self._blobs.stat(path)
            header = self._headers.get(artifact_id) or self._read_header(artifact_id)
        except FileNotFoundError as error:
            raise NotFound("ref", f"no artifact {ref}") from error
        metadata = header.metadata
        if metadata is None or size != header.file_bytes:
            raise self._damage(artifact_id, f"{size} bytes instead of {header.file_bytes}")
        return ArtifactInfo(
            id=artifact_id,
            kind=metadata.kind,
            tags=tags,
            model_fingerprint=metadata.model_fingerprint,
            site=metadata.site,
            layers=_layers(metadata, header),
            width=width_of(metadata.kind, header.shapes),
            size_bytes=size,
            created=created,
            description=metadata.description,
            provenance=dict(metadata.provenance),
            evidence=dict(metadata.evidence),
        )

    def _read_header(self, artifact_id: str) -> safetensors.Header:
        path = _object_path(artifact_id)
        try:
            length = safetensors.header_length(self._blobs.read_range(path, 0, 8))
            header = safetensors.parse_header(self._blobs.read_range(path, 8, 8 + length))
            if header.metadata is None:
                raise MalformedFile("the header holds no metadata")
            _layers(header.metadata, header)
        except (MalformedFile, InvalidArgument) as error:
            raise self._damage(artifact_id, str(error)) from error
        if len(self._headers) >= MAX_CACHED_HEADERS:
            self._headers.clear()
        self._headers[artifact_id] = header
        return header

    def _damage(self, artifact_id: str, reason: str) -> FailedPrecondition:
        if artifact_id not in self._damaged:
            self._damaged.add(artifact_id)
            log.error("artifact %s is damaged: %s", artifact_id, reason)
        return FailedPrecondition("ref", f"artifact {artifact_id} is damaged in the store ({reason}); upload it again")


def _object_path(artifact_id: str) -> str:
    digest = artifact_id.removeprefix("sha256:")
    return f"objects/{digest[:2]}/{digest[2:]}.safetensors"


def _layers(metadata: Metadata, header: safetensors.Header) -> tuple[int, ...]:
    layers = layers_of(metadata.kind, header.shapes)
    if metadata.kind is ArtifactKind.AUTOENCODER:
        return (autoencoder_spec(metadata.site, metadata.provenance).layer,)
    return layers


def _next_token(after: str, query: tuple[str, ...]) -> str:
    # This is outside the class, because list() has a parameter of the function's name.
    return page_token(after, *query)
