"""Messages TextSource ↔ analysis/neurons/texts.py: texts that came with the request, or a stored corpus."""

from patchclamp.v1 import generation_pb2
from patchclamp.v1 import neuron_pb2 as pb
from patchclamp_server.analysis.corpora.windows import DEFAULT_WINDOW_TOKENS, Corpus, ListedCorpus
from patchclamp_server.analysis.neurons.texts import TextSource
from patchclamp_server.artifacts.corpora import MAX_DOCUMENT_BYTES, MAX_LABELS, Document, StoredCorpus, check_label
from patchclamp_server.artifacts.store import ArtifactStore
from patchclamp_server.artifacts.types import ArtifactKind
from patchclamp_server.errors import InvalidArgument, about
from patchclamp_server.interventions.field_checks import count
from patchclamp_server.model.info import ModelInfo
from patchclamp_server.rpc.codecs.generation import decode_prompt
from patchclamp_server.text.prompt import PromptEncoder

MIN_WINDOW_TOKENS = 8
# What is longer belongs into a stored corpus.
MAX_LISTED_TEXTS = 65_536


def decode_texts(
    proto: pb.TextSource, field: str, prompts: PromptEncoder, store: ArtifactStore, info: ModelInfo
) -> TextSource:
    """Returns texts with their labels, none of them empty. It may tokenise and load a corpus: call it in a thread."""
    window = count(
        proto.window_tokens or min(DEFAULT_WINDOW_TOKENS, info.context_length),
        f"{field}.window_tokens",
        low=MIN_WINDOW_TOKENS,
        high=info.context_length,
    )
    if bool(proto.groups) == bool(proto.corpus):
        raise InvalidArgument(f"{field}.groups", "give groups of texts or a corpus, one of both")
    corpus = _stored(proto.corpus, store, f"{field}.corpus") if proto.corpus else _listed(proto, field, prompts)
    return TextSource(corpus, window, proto.max_tokens)


def text_fields(proto: pb.TextSource, field: str) -> dict[str, str]:
    """Returns the fields of the request by those that a job over the texts names (analysis/corpora/run.py)."""
    listed = ((i, j) for i, group in enumerate(proto.groups) for j in range(len(group.prompts)))
    documents = {f"documents[{n}]": f"{field}.groups[{i}].prompts[{j}]" for n, (i, j) in enumerate(listed)}
    return {"window_tokens": f"{field}.window_tokens", **documents}


def _stored(ref: str, store: ArtifactStore, field: str) -> Corpus:
    with about(field):
        artifact = store.get(ref)
    if artifact.info.kind is not ArtifactKind.CORPUS:
        raise InvalidArgument(field, f"{ref} is a {artifact.info.kind.value}, not a corpus")
    return StoredCorpus(artifact)


def _listed(proto: pb.TextSource, field: str, prompts: PromptEncoder) -> Corpus:
    if len(proto.groups) > MAX_LABELS:
        raise InvalidArgument(f"{field}.groups", f"expected at most {MAX_LABELS} labels, got {len(proto.groups)}")
    if sum(len(group.prompts) for group in proto.groups) > MAX_LISTED_TEXTS:
        raise InvalidArgument(f"{field}.groups", f"expected at most {MAX_LISTED_TEXTS} texts; store them as a corpus")
    labels: list[str] = []
    documents = []
    for i, group in enumerate(proto.groups):
        path = f"{field}.groups[{i}]"
        _check_label(group.label, labels, f"{path}.label")
        labels.append(group.label)
        if not group.prompts:
            raise InvalidArgument(f"{path}.prompts", "expected at least one text")
        documents += [_document(p, i, f"{path}.prompts[{j}]", prompts) for j, p in enumerate(group.prompts)]
    return ListedCorpus(documents, tuple(labels))


def _check_label(label: str, before: list[str], field: str) -> None:
    try:
        check_label(label)
    except ValueError as error:
        raise InvalidArgument(field, str(error)) from error
    if label in before:
        raise InvalidArgument(field, f"{label!r:.80} is already the label of groups[{before.index(label)}]")


def _document(prompt: generation_pb2.Prompt, label: int, field: str, prompts: PromptEncoder) -> Document:
    """A text is tokenised when its turn comes; other forms are tokens now, without those that start a text anyway."""
    if prompt.WhichOneof("form") == "text":
        if not prompt.text:
            raise InvalidArgument(f"{field}.text", "is empty")
        if (size := len(prompt.text.encode())) > MAX_DOCUMENT_BYTES:
            raise InvalidArgument(f"{field}.text", f"has {size} bytes; expected at most {MAX_DOCUMENT_BYTES}")
        return Document(prompt.text, label)
    ids, opening = decode_prompt(prompt, prompts, field).ids, prompts.text_start
    return Document(ids[len(opening) :] if opening and ids[: len(opening)] == opening else ids, label)
