"""Requests of ActivationService."""

from collections.abc import Iterable, Mapping, Sequence

from patchclamp.fields import build, several
from patchclamp.names import (
    ACTIVATION_REDUCTIONS,
    DATA_TYPES,
    SITES,
    ActivationDtypeName,
    ActivationReductionName,
    SiteName,
    value_of,
    value_or_unspecified,
)
from patchclamp.neurons.texts import TextsLike, TextSource, texts_message
from patchclamp.programs import ProgramLike, ScopeLike, program_message
from patchclamp.programs.scopes import scope_message
from patchclamp.prompts import prompt
from patchclamp.requests.artifacts import StoredOptions
from patchclamp.v1 import activation_pb2 as pb
from patchclamp.v1 import program_pb2


class ReadActivationsOptions(StoredOptions, total=False):
    """Options of a reading, besides StoredOptions, which are of what is stored.

    layers: by default every one. scope: which tokens, by default every one. reduction: "none", or what becomes of the
    rows of a text ("first", "last", "mean", "sum", "max") or of all ("moments", "mean_by_label"). dtype: "float32",
    "float16" or "bfloat16". program: what the model is run under. store: keep the rows as an artifact, and send none.
    """

    layers: Iterable[int]
    scope: ScopeLike | None
    reduction: ActivationReductionName | None
    dtype: ActivationDtypeName | None
    program: ProgramLike | None
    store: bool
    model: str


def read_activations(
    texts: TextsLike,
    sites: SiteName | Iterable[SiteName],
    *,
    layers: Iterable[int] = (),
    scope: ScopeLike | None = None,
    reduction: ActivationReductionName | None = None,
    dtype: ActivationDtypeName | None = None,
    program: ProgramLike | None = None,
    store: bool = False,
    description: str = "",
    tags: Sequence[str] = (),
    replace_tags: bool = False,
    model: str = "",
) -> pb.ReadActivationsRequest:
    """Returns a request to read activations: a list as prompts, each whole; all else in windows.

    Raises ValueError for no text.
    """
    request = build(
        pb.ReadActivationsRequest,
        model=model,
        sites=_sites(sites),
        layers=layers,
        scope=scope_message(scope),
        reduction=value_or_unspecified(ACTIVATION_REDUCTIONS, reduction, "reduction"),
        dtype=value_or_unspecified(DATA_TYPES, dtype, "dtype"),
        program=None if program is None else program_message(program),
        store=store,
        description=description,
        tags=tags,
        replace_tags=replace_tags,
    )
    if isinstance(texts, str | Mapping | TextSource):
        request.texts.CopyFrom(texts_message(texts))
        return request
    listed = several(texts, "texts", "a text")
    if not listed:
        raise ValueError("texts: give at least one text, or the id or tag of a corpus")
    request.prompts.extend(prompt(each, field=f"texts[{i}]") for i, each in enumerate(listed))
    return request


def _sites(sites: SiteName | Iterable[SiteName]) -> list[program_pb2.Site.ValueType]:
    listed = [sites] if isinstance(sites, str) else several(sites, "sites", "a site")
    return [value_of(SITES, site, f"sites[{i}]") for i, site in enumerate(listed)]
