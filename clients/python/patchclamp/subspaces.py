"""How subspaces are found: planes of a cycle, and directions that carry one variable.

from patchclamp.programs import last, rotate_in_plane
from patchclamp.subspaces import circular_plane, interchange

days = {"Monday": ["Let's meet on Monday", ...], "Tuesday": [...], ...}
found = client.find_subspace(circular_plane(days), layers=[10], tags=["days"]).result()
two_days_on = rotate_in_plane("days", 2 * 2 * math.pi / 7, layers=10, scope=last(1))

client.find_subspace(interchange([("Paris is in", "Rome is in", " Italy"), ...], rank=4), layers=[10], tags=["country"])
"""

from collections.abc import Iterable, Mapping
from typing import Any

from patchclamp.fields import build, several, shown
from patchclamp.prompts import PromptLike, prompt
from patchclamp.v1 import steering_pb2 as pb

# A request of which only the method is filled in.
SubspaceMethod = pb.FindSubspaceRequest
Interchange = tuple[PromptLike, PromptLike, str]


def circular_plane(values: Mapping[str, Iterable[PromptLike]], *, components: int = 0) -> SubspaceMethod:
    """Finds the plane in which the values of a cycle lie in a circle, with its centre.

    values: prompts by value, in the order of the cycle, at least four; the last token of each is read unless a scope is
    given. components: how many principal components of the means planes are made of, by default 5.
    """
    if not isinstance(values, Mapping):
        raise TypeError(f"values: expected prompts by value, got {shown(values)}")
    listed = []
    for value, texts in values.items():
        field = f"values[{value!r}]"
        own = several(texts, field, "a prompt")
        prompts = [prompt(each, field=f"{field}[{i}]") for i, each in enumerate(own)]
        listed.append(build(pb.CyclicValue, value=value, prompts=prompts))
    return pb.FindSubspaceRequest(circular_plane=build(pb.CircularPlane, values=listed, components=components))


def interchange(
    pairs: Iterable[Interchange],
    kept: Iterable[Interchange] = (),
    *,
    rank: int = 0,
    holdout_fraction: float | None = None,
    max_steps: int = 0,
    learning_rate: float | None = None,
    batch_size: int = 0,
    patience: int = 0,
) -> SubspaceMethod:
    """Trains a subspace by interchange interventions: distributed alignment search (DAS).

    pairs: (base, source, answer), where the answer is what the base should say once it has the variable of the source.
    kept: pairs that differ in another variable, with the answer that the base keeps (MDAS). rank: by default 1.
    max_steps, learning_rate, batch_size, patience: of Adam, by default 500, 0.005, 16 and 5 evaluations.
    """
    training = build(
        pb.Training, max_steps=max_steps, learning_rate=learning_rate, batch_size=batch_size, patience=patience
    )
    method = build(
        pb.DistributedAlignment,
        pairs=_pairs(pairs, "pairs"),
        kept=_pairs(kept, "kept"),
        rank=rank,
        training=training,
        holdout_fraction=holdout_fraction,
    )
    return pb.FindSubspaceRequest(distributed_alignment=method)


def _pairs(pairs: Iterable[Interchange], field: str) -> list[pb.InterchangePair]:
    return [_pair(pair, f"{field}[{i}]") for i, pair in enumerate(several(pairs, field, "(base, source, answer)"))]


def _pair(pair: Any, field: str) -> pb.InterchangePair:
    match pair:
        case (base, source, str() as answer):
            return pb.InterchangePair(
                base=prompt(base, field=f"{field}[0]"), source=prompt(source, field=f"{field}[1]"), answer=answer
            )
        case _:
            raise TypeError(f"{field}: expected (base, source, answer), got {shown(pair)}")
