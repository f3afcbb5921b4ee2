"""What the messages of NeuronService share: neurons, sets that are stored, progress."""

from collections import Counter
from collections.abc import Sequence

from patchclamp.v1 import neuron_pb2 as pb
from patchclamp_server.analysis.neurons.stored import StoredSet
from patchclamp_server.artifacts.neuron_sets import Neuron, NeuronSelection
from patchclamp_server.errors import InvalidArgument
from patchclamp_server.interventions.field_checks import chosen, count, distinct
from patchclamp_server.model.info import ModelInfo
from patchclamp_server.model.sites import Site
from patchclamp_server.rpc.codecs.artifact import encode_artifact
from patchclamp_server.rpc.codecs.program import decode_site

# Above or below it no activation is looked for.
MAX_THRESHOLD = 1e4
MAX_BEST = 1000


def decode_selection(proto: pb.NeuronSelection, field: str) -> NeuronSelection:
    """Neurons that are named here, or in a set; whether the model has them is seen when they are selected."""
    if chosen(proto, "source", field) == "neurons":
        if not proto.neurons.neurons:
            raise InvalidArgument(f"{field}.neurons.neurons", "expected at least one neuron")
        return NeuronSelection(tuple(Neuron(n.layer, n.neuron) for n in proto.neurons.neurons), top_k=proto.top_k)
    if not proto.neuron_set:
        raise InvalidArgument(f"{field}.neuron_set", "expected the id or tag of a neuron_set artifact")
    return NeuronSelection(neuron_set=proto.neuron_set, top_k=count(proto.top_k, f"{field}.top_k"))


def decode_layers(layers: Sequence[int], info: ModelInfo, field: str = "layers") -> tuple[int, ...]:
    """Layers of the model, ascending; all of them where none is named."""
    for i, layer in enumerate(layers):
        count(layer, f"{field}[{i}]", high=info.n_layers - 1)
    return tuple(sorted(distinct(layers, field))) or tuple(range(info.n_layers))


def decode_neuron_site(number: int, info: ModelInfo, field: str = "site", *, default: Site = Site.MLP_POST) -> Site:
    """A site whose units are neurons and that the model has; `default` where none is named."""
    site = decode_site(number, field) if number else default
    accepted = [s.value for s in info.sites if s.value.startswith("mlp_") and s is not Site.MLP_OUT]
    if site.value not in accepted:
        raise InvalidArgument(
            field, f"{site.value} has no neurons of this model; expected one of {', '.join(accepted)}"
        )
    return site


def encode_neuron(neuron: Neuron) -> pb.NeuronId:
    return pb.NeuronId(layer=neuron.layer, neuron=neuron.neuron)


def encode_counts(counts: dict[int, int]) -> list[pb.LayerCount]:
    return [pb.LayerCount(layer=layer, neurons=n) for layer, n in sorted(counts.items())]


def encode_stored(stored: StoredSet) -> pb.StoredNeurons:
    """The artifact, and the MAX_BEST best of its neurons."""
    found = stored.found
    best = []
    for i, neuron in enumerate(found.neurons[:MAX_BEST]):
        scored = pb.ScoredNeuron(neuron=encode_neuron(neuron))
        if found.scores is not None:
            scored.score = float(found.scores[i])
        if found.values is not None:
            scored.value = float(found.values[i])
        best.append(scored)
    return pb.StoredNeurons(
        artifact=encode_artifact(stored.artifact),
        neurons=len(found.neurons),
        best=best,
        layers=encode_counts(Counter(neuron.layer for neuron in found.neurons)),
    )
