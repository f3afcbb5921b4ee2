"""What the search for a subspace finds."""

from dataclasses import dataclass

from patchclamp.results.artifacts import Artifact
from patchclamp.results.jobs import Progress
from patchclamp.results.record import Record


@dataclass(frozen=True)
class SubspaceEvidence(Record):
    """Holds what was measured at one layer; what the method does not measure is 0 or empty.

    accuracy, random_accuracy, full_accuracy: of interchange interventions on held-out pairs, the share whose answer is
    likelier than what the base says, for the subspace, a random one of its rank, and the whole state. kept_accuracy: of
    kept pairs, the share whose answer stays likelier than what the source says. loss: held-out. steps: of training.

    circularity: circular correlation of the angles with the cycle; shuffled_circularity: the same for shuffled values.
    explained_variance: share of the variance of the means that lies in the plane. angles: of each value, radians.
    """

    layer: int
    accuracy: float = 0.0
    random_accuracy: float = 0.0
    full_accuracy: float = 0.0
    kept_accuracy: float = 0.0
    loss: float = 0.0
    steps: int = 0
    circularity: float = 0.0
    shuffled_circularity: float = 0.0
    explained_variance: float = 0.0
    angles: tuple[float, ...] = ()


@dataclass(frozen=True)
class FoundSubspace(Record):
    """Holds the stored subspace and its evidence at each layer; `best_layer` has the best accuracy, or circularity."""

    artifact: Artifact
    layers: tuple[SubspaceEvidence, ...]
    best_layer: int
    warnings: tuple[str, ...] = ()


SubspaceEvent = Progress | FoundSubspace
