"""A NeuronService that answers with fixed messages, and remembers what it was asked: two layers of eight neurons."""

from collections.abc import Iterator
from typing import Any

from patchclamp.v1 import artifact_pb2
from patchclamp.v1 import neuron_pb2 as pb
from patchclamp.v1.neuron_pb2_grpc import NeuronServiceServicer

NEURON_SET = artifact_pb2.Artifact(id="sha256:" + "23" * 32, kind=artifact_pb2.ARTIFACT_KIND_NEURON_SET)


def neuron_id(layer: int, neuron: int) -> pb.NeuronId:
    return pb.NeuronId(layer=layer, neuron=neuron)


STORED = pb.StoredNeurons(
    artifact=NEURON_SET,
    neurons=2,
    best=[
        pb.ScoredNeuron(neuron=neuron_id(1, 5), score=9.5, value=20.0),
        pb.ScoredNeuron(neuron=neuron_id(0, 3), score=4.25, value=-20.0),
    ],
    layers=[pb.LayerCount(layer=0, neurons=1), pb.LayerCount(layer=1, neurons=1)],
)
DOG = pb.DecodedToken(id=7, text=" dog", product=2.5, effect=2.5)
CAT = pb.DecodedToken(id=8, text=" cat", product=-1.5, effect=-1.5)
PROGRESS = pb.NeuronProgress(stage="activations", done=3, total=4, resumed=2)


def measurement(test: str, metric: int, change: float, *, side: bool = False) -> pb.NeuronMeasurement:
    return pb.NeuronMeasurement(
        test=test,
        side=side,
        metric=metric,  # type: ignore[arg-type]
        unedited=0.75,
        edited=0.75 + change,
        change=change,
        low=change - 0.125,
        high=change + 0.125,
        random=[-0.0625, 0.0],
        random_mean=-0.03125,
        random_deviation=0.03125,
        beyond_random=change + 0.03125,
        beyond_random_low=change - 0.125,
        beyond_random_high=change + 0.1875,
    )


def point(fraction: float, neurons: int, change: float) -> pb.NeuronEditPoint:
    return pb.NeuronEditPoint(
        fraction=fraction,
        neurons=neurons,
        measurements=[
            measurement("capitals", pb.NEURON_METRIC_ACCURACY, change),
            measurement("prose", pb.NEURON_METRIC_PERPLEXITY, 0.0, side=True),
        ],
    )


class Neurons(NeuronServiceServicer):
    """Finds L1N5, then L0N3, whatever is asked for."""

    def __init__(self) -> None:
        self.request: Any = None

    def DecodeNeurons(self, request: Any, context: Any) -> Iterator[pb.DecodeNeuronsResponse]:
        self.request = request
        yield pb.DecodeNeuronsResponse(progress=pb.NeuronProgress(stage="neurons", done=1, total=3))
        for batch in ([(1, 5), (1, 6)], [(0, 3)]):
            row = pb.DecodedRow(weights=pb.NEURON_WEIGHTS_DOWN, top=[DOG], bottom=[CAT], top_z=9.5, bottom_z=-3.0)
            decoded = [pb.DecodedNeuron(neuron=neuron_id(*each), rows=[row]) for each in batch]
            yield pb.DecodeNeuronsResponse(decoded=pb.DecodedNeurons(neurons=decoded))

    def FindNeurons(self, request: Any, context: Any) -> Iterator[pb.FindNeuronsResponse]:
        self.request = request
        yield pb.FindNeuronsResponse(progress=PROGRESS)
        yield pb.FindNeuronsResponse(result=pb.FoundNeurons(found=STORED, tokens=[DOG]))

    def LocalizeNeurons(self, request: Any, context: Any) -> Iterator[pb.LocalizeNeuronsResponse]:
        self.request = request
        yield pb.LocalizeNeuronsResponse(progress=PROGRESS)
        found = pb.LocalizedSet(
            label="capitals",
            stored=STORED,
            measure="average precision",
            heldout=0.875,
            random=[0.5, 0.25],
            random_mean=0.375,
            random_deviation=0.125,
            layer_mean=[0.25, 0.5],
            layer_max=[0.5, 0.875],
        )
        probe = pb.SparseProbe(k=2, f1=0.9, precision=0.8, recall=1.0, random_f1_mean=0.5, neurons=[neuron_id(1, 5)])
        result = pb.LocalizedNeurons(
            sets=[found],
            texts=12,
            tokens=340,
            steps=16,
            completeness_gap=0.005,
            probes=[probe] if request.HasField("sparse_probe") else [],
            warnings=["few texts"],
        )
        yield pb.LocalizeNeuronsResponse(result=result)

    def EvaluateNeuronEdit(self, request: Any, context: Any) -> Iterator[pb.EvaluateNeuronEditResponse]:
        self.request = request
        yield pb.EvaluateNeuronEditResponse(progress=PROGRESS)
        points = [point(0.5, 1, -0.25), point(1.0, 2, -0.5)]
        for each in points:
            yield pb.EvaluateNeuronEditResponse(point=each)
        result = pb.NeuronEditEffect(points=points, neurons=[neuron_id(1, 5), neuron_id(0, 3)])
        yield pb.EvaluateNeuronEditResponse(result=result)

    def CensusNeurons(self, request: Any, context: Any) -> Iterator[pb.CensusNeuronsResponse]:
        self.request = request
        yield pb.CensusNeuronsResponse(progress=PROGRESS)
        layers = [
            pb.LayerCensus(layer=0, neurons=8, dead=2, rare=1, always=1, token_detectors=1, mean_rate=0.25),
            pb.LayerCensus(layer=1, neurons=8, dead=1, ngram_detectors=2, positional=3, mean_rate=0.125),
        ]
        detector = pb.TokenDetector(
            neuron=neuron_id(1, 5),
            token_ids=[7, 8],
            text=" dog cat",
            occurrences=20,
            fired=19,
            recall=0.95,
            elsewhere=0.05,
        )
        census = pb.NeuronCensus(
            tokens=100_000,
            texts=400,
            resumed_tokens=50_000,
            tokens_per_second=1250.0,
            layers=layers,
            classes=[pb.CensusClass(neuron_class=pb.NEURON_CLASS_DEAD, stored=STORED)],
            detectors=[detector],
            positional=[pb.PositionalNeuron(neuron=neuron_id(0, 3), bits=0.25, rates=[1.0, 0.5])],
        )
        yield pb.CensusNeuronsResponse(result=census)

    def DescribeNeurons(self, request: Any, context: Any) -> Iterator[pb.DescribeNeuronsResponse]:
        self.request = request
        yield pb.DescribeNeuronsResponse(progress=PROGRESS)
        tokens = [
            pb.ContextToken(id=6, text=" my", value=0.0),
            pb.ContextToken(id=7, text=" dog", value=8.0),
            pb.ContextToken(id=9, text=" barks\n", value=1.0),
        ]
        for layer, neuron in ((1, 5), (0, 3)):
            description = pb.NeuronDescription(
                neuron=neuron_id(layer, neuron),
                contexts=[pb.NeuronContext(text_index=4, position=9, value=8.0, tokens=tokens)],
                scores=[
                    pb.DescriptionScore(description=each, pmi=0.5, causal=1.25 if request.causal else None)
                    for each in request.descriptions
                ],
                tokens_seen=340,
                rate=0.125,
                mean=0.5,
                max=8.0,
            )
            yield pb.DescribeNeuronsResponse(description=description)

    def MatchNeurons(self, request: Any, context: Any) -> Iterator[pb.MatchNeuronsResponse]:
        self.request = request
        yield pb.MatchNeuronsResponse(progress=PROGRESS)
        match = pb.NeuronMatch(neuron=neuron_id(1, 5), other=neuron_id(1, 2), correlation=0.75, mutual=True)
        result = pb.MatchedNeurons(
            ported=STORED,
            matches=[match],
            neurons=16,
            mutual=2,
            tokens=340,
            mean_correlation=0.5,
            shuffled_mean_correlation=0.0625,
        )
        yield pb.MatchNeuronsResponse(result=result)

    def CompareNeuronSets(self, request: Any, context: Any) -> pb.CompareNeuronSetsResponse:
        self.request = request
        comparison = pb.NeuronSetComparison(
            first=0,
            second=1,
            jaccard=0.5,
            overlap_coefficient=0.75,
            common=3,
            expected_common=0.25,
            p_value=0.001,
            common_by_layer=[pb.LayerCount(layer=1, neurons=3)],
        )
        return pb.CompareNeuronSetsResponse(comparisons=[comparison])
