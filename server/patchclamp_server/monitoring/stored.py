"""Stored watches and references are checked here: they must belong to the served model, and to each other."""

from dataclasses import dataclass

from patchclamp_server.artifacts.store import ArtifactStore
from patchclamp_server.artifacts.types import Artifact, ArtifactInfo, ArtifactKind, Tags
from patchclamp_server.errors import FailedPrecondition, InvalidArgument
from patchclamp_server.interventions.resolver import Resolver
from patchclamp_server.model.info import ModelInfo
from patchclamp_server.monitoring.reference import Reference
from patchclamp_server.monitoring.registry import WatchRegistry
from patchclamp_server.monitoring.running import RunningWatch
from patchclamp_server.monitoring.watch import Watch, WatchOptions


@dataclass(frozen=True)
class WatchAsked:
    """A stored watch to run, and the reference to measure its drift against: ids or tags. "" means no reference."""

    watch: str
    options: WatchOptions
    reference: str = ""


def start_stored(registry: WatchRegistry, asked: WatchAsked, store: ArtifactStore, info: ModelInfo) -> RunningWatch:
    """Starts a stored watch. Raises the errors of WatchRegistry.start, and at `watch` and `reference`: NotFound,
    InvalidArgument (another kind of artifact), FailedPrecondition (of another model, or recorded with another
    watch)."""
    resolver = Resolver(info, store)
    artifact = _loaded(resolver, asked.watch, ArtifactKind.WATCH, "watch")
    watch = Watch.from_tensors(artifact.tensors)
    if not asked.reference:
        return registry.start(artifact.info.id, watch, asked.options)
    found = _loaded(resolver, asked.reference, ArtifactKind.WATCH_REFERENCE, "reference")
    made_for = found.info.provenance["watch"]
    if made_for != artifact.info.id:
        message = f"{asked.reference} was recorded with the watch {made_for}, not with {artifact.info.id}"
        raise FailedPrecondition("reference", message)
    return registry.start(artifact.info.id, watch, asked.options, Reference.from_tensors(found.tensors), found.info.id)


def store_watch(watch: Watch, store: ArtifactStore, info: ModelInfo, description: str, tags: Tags) -> ArtifactInfo:
    return store.put(
        ArtifactKind.WATCH,
        watch.tensors(),
        model_fingerprint=info.fingerprint,
        description=description,
        provenance={"items": len(watch)},
        tags=tags,
    )


def store_reference(
    reference: Reference,
    running: RunningWatch,
    tokens: int,
    store: ArtifactStore,
    info: ModelInfo,
    description: str,
    tags: Tags,
) -> ArtifactInfo:
    """Stores what `running` saw in `tokens` tokens."""
    return store.put(
        ArtifactKind.WATCH_REFERENCE,
        reference.tensors(),
        model_fingerprint=info.fingerprint,
        description=description,
        provenance={
            "watch": running.watch_id,
            "tokens": tokens,
            "sampling_rate": running.options.sampling_rate,
            "phases": sorted(phase.value for phase in running.options.phases),
        },
        tags=tags,
    )


def _loaded(resolver: Resolver, ref: str, kind: ArtifactKind, path: str) -> Artifact:
    if not ref:
        raise InvalidArgument(path, f"expected the id or tag of a {kind.value} artifact")
    return resolver.artifact(ref, kind, path)
