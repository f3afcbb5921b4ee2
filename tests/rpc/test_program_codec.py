"""Messages of the intervention language as the dataclasses the engine binds."""

import struct
from typing import Any

import pytest
import torch

from patchclamp.v1 import program_pb2 as pb
from patchclamp.v1 import tensor_pb2
from patchclamp_server.errors import InvalidArgument
from patchclamp_server.interventions import program as p
from patchclamp_server.interventions.tensor_messages import decode_tensor
from patchclamp_server.rpc.codecs.program import SITES, decode_program, encode_receipt
from patchclamp_server.rpc.codecs.tensor import encode_tensor

VALUES = torch.tensor([1.0, -2.5, 0.125])
VECTOR = pb.Vector(values=encode_tensor(VALUES), unit=True)


def one_edit(**fields: Any) -> p.Edit:
    [edit] = decode_program(pb.Program(edits=[pb.Edit(**{"site": pb.SITE_RESID_POST, "layers": [3], **fields})])).edits
    return edit


def test_every_site_but_that_of_the_queries_has_a_number():
    assert set(SITES.values()) == set(p.Site) - {p.Site.ATTN_Q}
    assert len(SITES) == len(pb.Site.keys()) - 1


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "float64", "int64", "int32"])
def test_tensors_of_every_type_become_float32(dtype: str):
    given = torch.tensor([[1, -2], [4, 8]], dtype=getattr(torch, dtype))
    proto = tensor_pb2.Tensor(
        dtype=tensor_pb2.DataType.Value(f"DATA_TYPE_{dtype.upper()}"),
        shape=[2, 2],
        data=bytes(given.view(torch.uint8).flatten().tolist()),
    )
    decoded = decode_tensor(proto, "t", ndims=(2,))
    assert decoded.dtype is torch.float32
    assert torch.equal(decoded, given.float())


def test_a_float64_beyond_float32_is_refused():
    proto = tensor_pb2.Tensor(dtype=tensor_pb2.DATA_TYPE_FLOAT64, shape=[1], data=struct.pack("<d", 1e300))
    with pytest.raises(InvalidArgument) as caught:
        decode_tensor(proto, "t", ndims=(1,))
    assert caught.value.field == "t"


def test_a_tensor_is_independent_of_its_message():
    proto = encode_tensor(VALUES)
    decoded = decode_tensor(proto, "t", ndims=(1,))
    decoded.zero_()
    assert torch.equal(decode_tensor(proto, "t", ndims=(1,)), VALUES)


@pytest.mark.parametrize(
    ("fields", "kind"),
    [
        ({"add": pb.AddVector(vector=VECTOR)}, p.AddVector),
        ({"project_out": pb.ProjectOut(vector=VECTOR)}, p.ProjectOut),
        ({"cap_projection": pb.CapProjection(vector=VECTOR, max=1)}, p.CapProjection),
        ({"set_projection": pb.SetProjection(vector=VECTOR, target=2)}, p.SetProjection),
        ({"replace": pb.ReplaceVector(vector=VECTOR)}, p.ReplaceVector),
        ({"rotate_towards": pb.RotateTowards(vector=VECTOR, radians=1)}, p.RotateTowards),
    ],
)
def test_vector_kinds_keep_their_vector(fields: dict[str, Any], kind: type):
    edit = one_edit(**fields)
    assert isinstance(edit.kind, kind)
    assert torch.equal(edit.kind.vector.values, VALUES)
    assert edit.kind.vector.unit


def test_low_rank_keeps_its_three_tensors():
    matrix, bias = torch.ones(1, 3), torch.ones(1)
    low_rank = pb.LowRank(rotation=encode_tensor(matrix), weight=encode_tensor(2 * matrix), bias=encode_tensor(bias))
    kind = one_edit(low_rank=low_rank).kind
    assert isinstance(kind, p.LowRank)
    assert [t.tolist() for t in (kind.rotation, kind.weight, kind.bias)] == [[[1, 1, 1]], [[2, 2, 2]], [1]]


@pytest.mark.parametrize("op", ["set", "scale", "add"])
def test_neuron_values(op: str):
    edit = one_edit(neurons=pb.NeuronEdit(neurons=[4, 2], **{op: pb.NeuronValues(values=[0.5, 1])}))
    assert isinstance(edit.kind, p.NeuronEdit)
    assert (edit.kind.neurons, edit.kind.op, edit.kind.values) == ((4, 2), p.NeuronOp(op), (0.5, 1.0))


def test_a_clamp_may_be_open_at_one_end():
    kind = one_edit(neurons=pb.NeuronEdit(neurons=[4], clamp=pb.NeuronBounds(max=0))).kind
    assert isinstance(kind, p.NeuronEdit)
    assert (kind.op, kind.min, kind.max) == (p.NeuronOp.CLAMP, None, 0.0)


def test_a_neuron_set_brings_its_layers_and_values():
    edit = one_edit(layers=[], neurons=pb.NeuronEdit(neuron_set="tag", scale=pb.NeuronValues()))
    assert isinstance(edit.kind, p.NeuronEdit)
    assert (edit.layers, edit.kind.neuron_set, edit.kind.values) == ((), "tag", ())


def test_heads_are_scaled_or_set_to_their_mean():
    scaled = one_edit(heads=pb.HeadEdit(heads=[1, 0], scale=0)).kind
    replaced = one_edit(heads=pb.HeadEdit(heads=[1], mean=encode_tensor(torch.ones(1, 4)))).kind
    assert isinstance(scaled, p.HeadEdit)
    assert isinstance(replaced, p.HeadEdit)
    assert (scaled.heads, scaled.scale, scaled.mean) == ((1, 0), 0.0, None)
    assert replaced.scale is None
    assert replaced.mean is not None


def test_defaults_are_the_whole_sequence_at_full_strength():
    edit = one_edit(add=pb.AddVector(vector=VECTOR))
    assert (edit.strength, edit.scope, edit.gate, edit.preserve_norm) == (1.0, p.Scope(), None, False)


def test_a_strength_of_zero_is_not_the_default():
    assert one_edit(add=pb.AddVector(vector=VECTOR), strength=0.0).strength == 0.0


def test_scopes_and_gates():
    selector = pb.TokenSelector(
        phase=pb.PHASE_PROMPT, positions=pb.PositionRange(start=-4), last_k=3, token_ids=[9], role="user"
    )
    condition = pb.Condition(
        site=pb.SITE_RESID_PRE, layer=1, vector=VECTOR, comparison=pb.COMPARISON_BELOW, threshold=-0.5, cosine=True
    )
    edit = one_edit(
        add=pb.AddVector(vector=VECTOR),
        scope=pb.Scope(include=[selector], exclude=[pb.TokenSelector(token_ids=[1])]),
        gate=pb.Gate(condition=condition, latched=True),
    )
    assert edit.scope == p.Scope(
        include=(p.TokenSelector(p.Phase.PROMPT, p.PositionRange(-4, None), 3, (9,), "user"),),
        exclude=(p.TokenSelector(token_ids=(1,)),),
    )
    assert edit.gate is not None
    gate = edit.gate.condition
    assert edit.gate.latched
    assert (gate.site, gate.layer, gate.comparison, gate.threshold, gate.cosine) == (
        p.Site.RESID_PRE,
        1,
        p.Comparison.BELOW,
        -0.5,
        True,
    )


def test_readouts_of_every_kind():
    where = {"site": pb.SITE_MLP_POST, "all_layers": True}
    program = decode_program(
        pb.Program(
            readouts=[
                pb.Readout(projection=pb.ProjectionReadout(vectors=[VECTOR]), **where),
                pb.Readout(neurons=pb.NeuronReadout(neurons=[5, 1]), **where),
                pb.Readout(top_neurons=pb.TopNeuronsReadout(k=3), **where),
                pb.Readout(name="lens", logit_lens=pb.LogitLensReadout(k=2), **where),
            ]
        )
    )
    kinds = [type(r.kind) for r in program.readouts]
    assert kinds == [p.ProjectionReadout, p.NeuronReadout, p.TopNeuronsReadout, p.LogitLensReadout]
    assert [r.name for r in program.readouts] == ["", "", "", "lens"]


def test_a_receipt_keeps_every_count():
    receipt = p.Receipt("sha256:1", (p.EditReceipt("e", 3, 0.25, 2, 1),))
    proto = encode_receipt(receipt)
    assert (proto.program_fingerprint, proto.touched) == ("sha256:1", True)
    [edit] = proto.edits
    assert (edit.name, edit.rows, edit.mean_relative_change, edit.gate_firings, edit.rows_from_cache) == (
        "e",
        3,
        0.25,
        2,
        1,
    )
