"""The request that tests a set of neurons by editing it."""

from collections.abc import Iterable
from typing import TypedDict

from patchclamp.fields import build, one_text_or_several
from patchclamp.names import NEURON_EDIT_MODES, NeuronEditModeName, value_of
from patchclamp.neurons import NeuronsLike, NeuronTestLike, check_messages, selection_message
from patchclamp.programs.scopes import ScopeLike, scope_message
from patchclamp.v1 import neuron_pb2 as pb


class EvaluateNeuronEditOptions(TypedDict, total=False):
    """Options of an evaluation of a neuron edit.

    sides: tests of what should not change. top_k: of a neuron set, only the k best. value: of the mode "scale" the
    factor; of "clamp" the value, by default the one that the set has for each neuron. fractions: shares of the set that
    are edited, the best neurons first. random_sets: how many controls with as many neurons in each layer there are.
    scope: tokens that are edited, by default every one. mean_texts: of the mode "mean", by default built-in text.
    """

    sides: NeuronTestLike | Iterable[NeuronTestLike]
    top_k: int
    value: float | None
    fractions: Iterable[float]
    random_sets: int
    seed: int
    scope: ScopeLike | None
    mean_texts: str | Iterable[str]
    model: str


def evaluate_neuron_edit(
    neurons: NeuronsLike,
    mode: NeuronEditModeName,
    targets: NeuronTestLike | Iterable[NeuronTestLike],
    *,
    sides: NeuronTestLike | Iterable[NeuronTestLike] = (),
    top_k: int = 0,
    value: float | None = None,
    fractions: Iterable[float] = (),
    random_sets: int = 0,
    seed: int = 0,
    scope: ScopeLike | None = None,
    mean_texts: str | Iterable[str] = (),
    model: str = "",
) -> pb.EvaluateNeuronEditRequest:
    """Returns a request to edit neurons.

    Raises ValueError for no target, for two tests of one name, for a value with the modes "zero" and "mean", and for
    none with "scale".
    """
    request = build(
        pb.EvaluateNeuronEditRequest,
        model=model,
        neurons=selection_message(neurons, top_k),
        mode=value_of(NEURON_EDIT_MODES, mode, "mode"),
        value=value,
        fractions=fractions,
        targets=check_messages(targets, "targets"),
        sides=check_messages(sides, "sides"),
        random_sets=random_sets,
        seed=seed,
        scope=scope_message(scope),
        mean_texts=one_text_or_several(mean_texts),
    )
    if not request.targets:
        raise ValueError("targets: give at least one test of what should change")
    names = [test.name for test in (*request.targets, *request.sides)]
    if len(set(names)) < len(names):
        raise ValueError(f"targets, sides: each test has a name of its own, got {', '.join(names)}")
    if value is not None and mode in ("zero", "mean"):
        raise ValueError('value: is given with the modes "clamp" and "scale"')
    if value is None and mode == "scale":
        raise ValueError('value: the mode "scale" needs the factor')
    return request
