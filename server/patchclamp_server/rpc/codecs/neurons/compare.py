"""Messages of CompareNeuronSets ↔ analysis/neurons/compare.py."""

from collections.abc import Iterable

from patchclamp.v1 import neuron_pb2 as pb
from patchclamp_server.analysis.neurons.compare import NeuronSetOverlap
from patchclamp_server.rpc.codecs.neurons.common import encode_counts


def encode_overlaps(overlaps: Iterable[NeuronSetOverlap]) -> pb.CompareNeuronSetsResponse:
    return pb.CompareNeuronSetsResponse(
        comparisons=[
            pb.NeuronSetComparison(
                first=o.first,
                second=o.second,
                jaccard=o.jaccard,
                overlap_coefficient=o.overlap_coefficient,
                common=o.common,
                expected_common=o.expected_common,
                p_value=o.p_value,
                common_by_layer=encode_counts(o.by_layer),
            )
            for o in overlaps
        ]
    )
