"""Builders of programs: what they put into the message, and what they refuse before anything is sent."""

from array import array

import numpy as np
import pytest
import torch

from patchclamp.programs import (
    Program,
    ablate_heads,
    abort_when,
    abort_when_feature,
    add,
    add_features,
    add_neurons,
    affine,
    cap_projection,
    clamp_features,
    clamp_neurons,
    everything,
    generated,
    last,
    low_rank,
    mean_heads,
    patch,
    positions,
    program_message,
    project_out,
    prompt,
    read_features,
    read_heads,
    read_logit_lens,
    read_neurons,
    read_projection,
    read_top_features,
    read_top_neurons,
    replace,
    role,
    rotate_in_plane,
    rotate_towards,
    scale_features,
    scale_heads,
    scale_neurons,
    set_features,
    set_neurons,
    set_projection,
    tokens,
    uniform_heads,
    vector,
    when,
    when_feature,
)
from patchclamp.v1 import program_pb2 as pb
from patchclamp.v1 import tensor_pb2


def test_an_edit_says_site_layers_strength_and_name() -> None:
    edit = add("joyful", layers=[10], strength=4.0, name="joy")
    assert (edit.name, edit.site, list(edit.layers), edit.strength) == ("joy", pb.SITE_RESID_POST, [10], 4.0)
    assert edit.add.vector.artifact == "joyful"


def test_what_is_left_out_stays_unset() -> None:
    edit = add("joyful", layers=3)
    assert not any(edit.HasField(name) for name in ("strength", "scope", "gate"))
    assert not edit.all_layers


@pytest.mark.parametrize(
    ("edit", "kind"),
    [
        (add("v", layers=1), "add"),
        (project_out("v", layers=1), "project_out"),
        (cap_projection("v", max=2.0, layers=1), "cap_projection"),
        (set_projection("v", 1.5, layers=1), "set_projection"),
        (replace("v", layers=1), "replace"),
        (rotate_towards("v", 0.5, layers=1), "rotate_towards"),
        (low_rank("reft", layers=1), "low_rank"),
        (rotate_in_plane([[1.0, 0.0], [0.0, 1.0]], 0.5, layers=1), "rotate_in_plane"),
        (rotate_in_plane("days", 0.5, centre=[1.0, 0.0], layers=1), "rotate_in_plane"),
        (affine("map", layers=1), "affine"),
        (low_rank([[1.0, 0.0]], [[0.0, 1.0]], [0.5], layers=1), "low_rank"),
        (affine([[1.0, 0.0], [0.0, 1.0]], bias=[0.5, 0.0], layers=1), "affine"),
        (affine(left=[[1.0], [0.0]], right=[[0.0], [1.0]], layers=1), "affine"),
        (patch("run", layers=1), "patch"),
        (set_neurons([4], 1.0, layers=1), "neurons"),
        (scale_neurons([4], 1.0, layers=1), "neurons"),
        (add_neurons([4], 1.0, layers=1), "neurons"),
        (clamp_neurons([4], min=0.0, layers=1), "neurons"),
        (set_features("sae", [4], 1.0), "features"),
        (scale_features("sae", 4, 0.0, layers=1), "features"),
        (add_features("sae", [4], 1.0, layers=1), "features"),
        (clamp_features("sae", [4], max=0.5, layers=1), "features"),
        (scale_heads([0], 0.5, layers=1), "heads"),
        (mean_heads([0], [[1.0, 2.0]], layers=1), "heads"),
        (uniform_heads([0], layers=1), "heads"),
    ],
)
def test_every_builder_sets_its_own_kind(edit: pb.Edit, kind: str) -> None:
    assert edit.WhichOneof("kind") == kind


@pytest.mark.parametrize(
    ("edit", "operation"),
    [
        (set_neurons([4], 1.0, layers=1), "set"),
        (scale_neurons([4], 1.0, layers=1), "scale"),
        (add_neurons([4], 1.0, layers=1), "add"),
        (clamp_neurons([4], min=0.0, layers=1), "clamp"),
    ],
)
def test_every_neuron_builder_sets_its_own_operation(edit: pb.Edit, operation: str) -> None:
    assert (edit.neurons.WhichOneof("op"), edit.site) == (operation, pb.SITE_MLP_POST)


@pytest.mark.parametrize(
    ("edit", "operation"),
    [
        (set_features("sae", [4, 2], [1.0, 0.5]), "set"),
        (scale_features("sae", [4, 2], 0.0), "scale"),
        (add_features("sae", [4, 2], 1.0), "add"),
        (clamp_features("sae", [4, 2], min=0.0), "clamp"),
    ],
)
def test_every_feature_builder_sets_its_own_operation(edit: pb.Edit, operation: str) -> None:
    assert (edit.features.WhichOneof("op"), edit.site) == (operation, pb.SITE_RESID_POST)
    assert (edit.features.autoencoder, list(edit.features.features), list(edit.layers)) == ("sae", [4, 2], [])


def test_features_are_read_by_number_or_as_the_largest_and_compared_in_conditions() -> None:
    chosen, largest = read_features("sae", 7, layers=1, site="mlp_out"), read_top_features("sae", 3, layers=1)
    assert (list(chosen.features.features), chosen.features.k, chosen.site) == ([7], 0, pb.SITE_MLP_OUT)
    assert (list(largest.features.features), largest.features.k) == ([], 3)
    gate = when_feature("sae", 7, layer=2, above=0.0, latched=True)
    abort = abort_when_feature("sae", 7, layer=2, below=1.5, name="low")
    for condition in (gate.condition, abort.condition):
        assert (condition.feature.autoencoder, condition.feature.feature, condition.layer) == ("sae", 7, 2)
        assert not condition.HasField("vector")
    assert (gate.latched, gate.condition.comparison, abort.name) == (True, pb.COMPARISON_ABOVE, "low")
    assert (abort.condition.comparison, abort.condition.threshold) == (pb.COMPARISON_BELOW, 1.5)


def test_neurons_are_edited_and_read_at_the_site_that_is_named() -> None:
    assert clamp_neurons([4], min=0.0, layers=1, site="mlp_gate").site == pb.SITE_MLP_GATE
    assert set_neurons("suspects", site="mlp_up").site == pb.SITE_MLP_UP
    assert (read_neurons([4], layers=1).site, read_top_neurons(3, layers=1).site) == (pb.SITE_MLP_POST,) * 2
    assert read_neurons([4], layers=1, site="mlp_up").site == pb.SITE_MLP_UP
    assert read_top_neurons(3, layers=1, site="mlp_gate").site == pb.SITE_MLP_GATE


def test_a_patch_maps_positions_and_goes_to_the_site_of_its_heads() -> None:
    edit = patch("run", text=2, positions={-1: -1, 3: 5}, source_layer=4, units=7, layers="all", strength=0.5)
    assert [(each.position, each.source) for each in edit.patch.positions] == [(-1, -1), (3, 5)]
    assert (edit.patch.activations, edit.patch.text, edit.patch.source_layer) == ("run", 2, 4)
    assert (list(edit.patch.units), edit.site, edit.strength) == ([7], pb.SITE_RESID_POST, 0.5)
    kept = patch("run", positions=[2, -3]).patch.positions
    assert [(each.position, each.source) for each in kept] == [(2, 2), (-3, -3)]
    assert patch("run", layers=1, subspace="plane").patch.subspace == "plane"
    heads = patch("run", heads=[0, 3], layers=1)
    assert (list(heads.patch.heads), heads.site, heads.patch.HasField("source_layer")) == (
        [0, 3],
        pb.SITE_ATTN_Z,
        False,
    )
    with pytest.raises(TypeError, match=r"positions\[3\]"):
        patch("run", positions={3: "x"})  # type: ignore[dict-item]


def test_ablating_heads_is_scaling_them_by_a_zero_that_is_sent() -> None:
    edit = ablate_heads([2, 3], layers=0)
    assert edit.heads.WhichOneof("op") == "scale"
    assert (edit.heads.scale, list(edit.heads.heads), edit.site) == (0.0, [2, 3], pb.SITE_ATTN_Z)


def test_uniform_heads_attend_to_all_tokens_alike() -> None:
    edit = uniform_heads(3, layers=[1, 2])
    assert edit.heads.WhichOneof("op") == "uniform"
    assert (edit.heads.uniform, list(edit.heads.heads), edit.site) == (True, [3], pb.SITE_ATTN_Z)


def test_where_heads_look_is_read_for_some_heads_or_all() -> None:
    readout = read_heads([2, 5], layers=1, name="looks")
    assert (readout.WhichOneof("kind"), readout.site, readout.name) == ("heads", pb.SITE_ATTN_Z, "looks")
    assert list(readout.heads.heads) == [2, 5]
    assert read_heads(layers="all").WhichOneof("kind") == "heads"


def test_bounds_of_zero_are_sent_and_absent_bounds_are_not() -> None:
    bounds = clamp_neurons(7, max=0.0, layers=1).neurons.clamp
    assert bounds.HasField("max")
    assert not bounds.HasField("min")


def test_a_neuron_set_may_bring_its_own_layers_and_values() -> None:
    edit = set_neurons("sad-neurons")
    assert edit.neurons.neuron_set == "sad-neurons"
    assert edit.neurons.WhichOneof("op") == "set"
    assert not edit.layers


@pytest.mark.parametrize(
    ("layers", "expected"), [(5, ([5], False)), (range(2, 5), ([2, 3, 4], False)), ("all", ([], True))]
)
def test_layers_are_one_several_or_all(layers: object, expected: tuple[list[int], bool]) -> None:
    edit = add("v", layers=layers)
    assert (list(edit.layers), edit.all_layers) == expected


def test_and_narrows_one_selector() -> None:
    scope = (role("user") & last(4)).message()
    assert scope.include == [pb.TokenSelector(role="user", last_k=4)]


def test_or_adds_a_selector_and_except_excludes() -> None:
    scope = (prompt() | tokens([7, 9])).except_(positions(0, 1)).message()
    assert list(scope.include) == [pb.TokenSelector(phase=pb.PHASE_PROMPT), pb.TokenSelector(token_ids=[7, 9])]
    assert scope.exclude == [pb.TokenSelector(positions=pb.PositionRange(start=0, end=1))]


def test_and_distributes_over_or() -> None:
    scope = ((prompt() | generated()) & tokens([7])).message()
    assert list(scope.include) == [
        pb.TokenSelector(phase=pb.PHASE_PROMPT, token_ids=[7]),
        pb.TokenSelector(phase=pb.PHASE_GENERATED, token_ids=[7]),
    ]


def test_everything_needs_no_selector_and_absorbs_a_union() -> None:
    assert everything().message() == pb.Scope()
    assert (everything() | prompt()).message() == pb.Scope()
    assert (everything() & prompt()) == prompt()


def test_a_position_zero_is_distinct_from_no_end() -> None:
    assert not positions(-3).message().include[0].positions.HasField("end")
    assert positions(-3, 0).message().include[0].positions.HasField("end")


@pytest.mark.parametrize(
    "build",
    [
        lambda: prompt() & generated(),
        lambda: prompt().except_(last(1)) | generated(),
        lambda: prompt().except_(everything()),
        lambda: last(0),
        lambda: tokens([]),
        lambda: role(""),
        lambda: cap_projection("v", layers=1),
        lambda: clamp_neurons([1], min=2.0, max=1.0, layers=1),
        lambda: set_neurons([1], layers=1),
        lambda: when("v", layer=1),
        lambda: when("v", layer=1, above=0.0, below=0.0),
        lambda: add("v", layers="every"),
        lambda: add("v", layers=1, site="residual"),
        lambda: vector([[1.0, 2.0], [3.0]]),
    ],
)
def test_contradictions_are_refused_before_anything_is_sent(build: object) -> None:
    with pytest.raises(ValueError, match=r"\w"):
        build()


def test_an_unknown_site_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"'residual' is unknown; accepted: resid_pre, .*resid_post"):
        add("v", layers=1, site="residual")


def test_a_gate_compares_a_projection_with_its_threshold() -> None:
    gate = when("toxic", layer=8, above=0.0, cosine=True, latched=True)
    assert gate.latched
    condition = gate.condition
    assert (condition.layer, condition.comparison, condition.threshold) == (8, pb.COMPARISON_ABOVE, 0.0)
    assert condition.cosine


def test_a_lens_reads_the_largest_chosen_tokens_or_single_neurons() -> None:
    assert read_logit_lens(4, layers=2).site == pb.SITE_RESID_POST
    chosen = read_logit_lens(token_ids=[7, 8], site="mlp_out", layers="all")
    assert (chosen.site, chosen.logit_lens) == (pb.SITE_MLP_OUT, pb.LogitLensReadout(token_ids=[7, 8]))
    single = read_logit_lens(2, neurons=5, layers=3)
    assert (single.site, single.logit_lens) == (pb.SITE_MLP_POST, pb.LogitLensReadout(k=2, neurons=[5]))


def test_a_program_keeps_the_order_of_edits_with_readouts_and_aborts() -> None:
    readouts = [read_projection(["joyful"], layers=3), read_neurons([1], layers=3), read_top_neurons(5, layers="all")]
    program = Program(
        [replace("b", layers=1), add("a", layers=1)],
        readouts=[*readouts, read_logit_lens(4, layers=2, name="lens")],
        abort_when=[abort_when("harm", layer=5, above=3.0, name="harm")],
    )
    message = program.message()
    assert [e.WhichOneof("kind") for e in message.edits] == ["replace", "add"]
    assert [r.WhichOneof("kind") for r in message.readouts] == ["projection", "neurons", "top_neurons", "logit_lens"]
    assert message.abort_when[0].name == "harm"


def test_a_program_survives_json() -> None:
    program = Program([add([1.0, -2.0], layers="all", scope=generated(), gate=when("g", layer=0, below=1.0))])
    assert Program.from_json(program.to_json()).message() == program.message()


def test_json_that_is_no_program_is_refused() -> None:
    with pytest.raises(ValueError, match="edit_list"):
        Program.from_json('{"edit_list": []}')


def test_a_plain_list_of_edits_is_a_program() -> None:
    edit = add("v", layers=1)
    assert program_message([edit]) == pb.Program(edits=[edit])


@pytest.mark.parametrize(
    "numbers",
    [
        [1.0, -2.5],
        (1.0, -2.5),
        array("f", [1.0, -2.5]),
        np.array([1.0, -2.5], np.float32),
        memoryview(np.array([1.0, -2.5], np.float32)),
        torch.tensor([1.0, -2.5]),
        torch.tensor([1.0, -2.5], dtype=torch.bfloat16, requires_grad=True),
    ],
)
def test_every_kind_of_numbers_gives_the_same_tensor(numbers: object) -> None:
    values = vector(numbers).values
    assert (values.dtype, list(values.shape)) == (tensor_pb2.DATA_TYPE_FLOAT32, [2])
    assert np.frombuffer(values.data, "<f4").tolist() == [1.0, -2.5]


@pytest.mark.parametrize(
    ("dtype", "expected"),
    [
        (np.float16, tensor_pb2.DATA_TYPE_FLOAT16),
        (np.float64, tensor_pb2.DATA_TYPE_FLOAT64),
        (np.int64, tensor_pb2.DATA_TYPE_FLOAT32),
    ],
)
def test_a_buffer_of_floats_travels_unchanged_and_one_of_integers_as_float32(dtype: type, expected: int) -> None:
    assert vector(np.ones(3, dtype)).values.dtype == expected


def test_a_transposed_array_is_sent_in_row_major_order() -> None:
    values = vector(np.array([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]]).T).values
    assert list(values.shape) == [3, 2]
    assert np.frombuffer(values.data, "<f8").tolist() == [1.0, 4.0, 2.0, 5.0, 3.0, 6.0]


def test_an_object_with_only_the_array_protocol_is_accepted() -> None:
    class Direction:
        def __array__(self) -> np.ndarray:
            return np.array([1.0, 2.0], np.float32)

    assert list(vector(Direction()).values.shape) == [2]


def test_bytes_are_no_vector() -> None:
    with pytest.raises(TypeError, match="source: expected numbers, got b"):
        vector(b"\0\0\0\0")


def test_options_of_a_vector_are_added_to_its_source() -> None:
    direction = vector(vector("joyful", unit=True), layer=12)
    assert (direction.artifact, direction.artifact_layer, direction.unit) == ("joyful", 12, True)


@pytest.mark.parametrize("side", ["above", "below"])
def test_a_threshold_by_name_is_one_that_the_vector_carries(side: str):
    condition = when("joyful", layer=3, **{side: "midpoint"}).condition
    assert condition.stored_threshold == pb.STORED_THRESHOLD_MIDPOINT
    assert condition.threshold == 0
    assert not when("joyful", layer=3, **{side: 2.0}).condition.stored_threshold


def test_a_threshold_of_an_unknown_name_is_refused():
    with pytest.raises(ValueError, match="above 'midpont' is unknown; accepted: midpoint"):
        when("joyful", layer=3, above="midpont")
