"""What can be watched, under which names, and how it is stored."""

from dataclasses import replace

import pytest
import torch
from engine_runs import loaded
from watch_runs import neurons_watch, watch_of_everything

from patchclamp_server.artifacts.head_sets import Head, HeadSelection
from patchclamp_server.errors import FailedPrecondition, InvalidArgument, RequestError, ResourceExhausted
from patchclamp_server.interventions.program import Vector
from patchclamp_server.model.sites import NEURON_SITES, Site
from patchclamp_server.monitoring.bind import bind_watch
from patchclamp_server.monitoring.items import (
    Encoder,
    WatchedDirection,
    WatchedFeatures,
    WatchedHeads,
    WatchedNeurons,
    WatchItem,
)
from patchclamp_server.monitoring.watch import ItemKind, Watch, WatchOptions, check_watch

INFO = loaded("llama").info
WIDTH, FF = INFO.d_model, INFO.d_ff
ONES = torch.ones(WIDTH)


def features(
    encoder: torch.Tensor, layer: int, field: str = "encoder_features_by_width", **given: torch.Tensor
) -> WatchedFeatures:
    return WatchedFeatures(Encoder(field, encoder), layer, **given)  # type: ignore[arg-type]


def bound(*items: WatchItem) -> Watch:
    return bind_watch(items, INFO, None, max_items=100)


def test_several_things_of_one_item_are_named_by_layer_and_number() -> None:
    watch = bound(
        WatchItem("one", WatchedNeurons(2, (5,))),
        WatchItem("n", WatchedNeurons(0, (3, 1))),
        WatchItem("d", WatchedDirection(Vector(values=ONES), layers=(0, 2))),
        WatchItem("f", features(torch.ones(2, WIDTH), 1)),
        WatchItem("h", WatchedHeads(HeadSelection((Head(1, 3), Head(0, 2))))),
    )
    expected = ("one", "n/L0N3", "n/L0N1", "d/L0", "d/L2", "f/L1F0", "f/L1F1", "h/L1H3", "h/L0H2")
    assert watch.names == expected
    assert watch.sites == (Site.RESID_POST,) * 4


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox"])
def test_a_watch_is_the_same_after_it_was_stored(family: str) -> None:
    for watch in (watch_of_everything(family), neurons_watch(family)):
        tensors = watch.tensors()
        assert all(tensor.numel() for tensor in tensors.values())
        again = Watch.from_tensors(tensors)
        check_watch(again, loaded(family).decoder.spec)
        check_watch(again, loaded(family).info)
        assert (again.names, again.sites) == (watch.names, watch.sites)
        for name in ("kinds", "layers", "units", "thresholds", "bias", "jump"):
            assert torch.equal(getattr(again, name), getattr(watch, name))
        assert again.vectors.tolist() == watch.vectors.tolist()


NEURON = WatchedNeurons(0, (1,))


@pytest.mark.parametrize(
    ("item", "path"),
    [
        (WatchItem("", NEURON), "items[0].name"),
        (WatchItem("x" * 200, NEURON), "items[0].name"),
        (WatchItem("x", NEURON, threshold=float("nan")), "items[0].threshold"),
        (WatchItem("x", WatchedNeurons(3, (1,))), "items[0].neurons.layer"),
        (WatchItem("x", WatchedNeurons(0, (FF,))), "items[0].neurons.neurons[0]"),
        (WatchItem("x", WatchedNeurons(0)), "items[0].neurons.neurons"),
        (WatchItem("x", WatchedNeurons(neuron_set="a")), "items[0].neurons.neuron_set"),
        (WatchItem("x", WatchedNeurons(0, (1,), site=Site.MLP_OUT)), "items[0].neurons.site"),
        (WatchItem("x", WatchedDirection(Vector(values=ONES))), "items[0].direction.layers"),
        (WatchItem("x", WatchedDirection(Vector(values=ONES[1:]), layers=(0,))), "items[0].direction.vector.values"),
        (WatchItem("x", WatchedDirection(Vector(values=ONES), Site.MLP_POST, (0,))), "items[0].direction.site"),
        (WatchItem("x", NEURON, threshold=1.0, quantile=0.5), "items[0].threshold_quantile"),
        (WatchItem("x", NEURON, quantile=1.0), "items[0].threshold_quantile"),
        (WatchItem("x", NEURON, quantile=float("nan")), "items[0].threshold_quantile"),
        (WatchItem("x", features(torch.ones(2, 3), 0)), "items[0].features.encoder_features_by_width"),
        (WatchItem("x", features(torch.ones(2, WIDTH), 9)), "items[0].features.layer"),
        (WatchItem("x", features(torch.ones(2, WIDTH), 0, bias=torch.ones(3))), "items[0].features.bias"),
        (
            WatchItem("x", features(torch.ones(1, WIDTH), 0, jump=torch.tensor([torch.inf]))),
            "items[0].features.jump",
        ),
        (WatchItem("x", WatchedHeads(HeadSelection((Head(0, 4),)))), "items[0].heads.heads.heads.heads[0].head"),
        (WatchItem("x", WatchedHeads(HeadSelection(head_set="a"))), "items[0].heads.heads.head_set"),
    ],
)
def test_what_the_model_does_not_have_is_refused_by_its_field(item: WatchItem, path: str) -> None:
    with pytest.raises(RequestError) as refused:
        bound(item)
    assert refused.value.field == path


def test_two_items_of_one_name_are_refused() -> None:
    with pytest.raises(InvalidArgument, match=r"items\[1\]\.name"):
        bound(WatchItem("x", NEURON), WatchItem("x", NEURON))


def test_more_items_than_the_server_watches_are_refused() -> None:
    with pytest.raises(ResourceExhausted, match="items"):
        bind_watch([WatchItem("x", WatchedNeurons(0, (1, 2, 3)))], INFO, None, max_items=2)


@pytest.mark.parametrize(
    "broken",
    [
        {"names": None},
        {"names": torch.tensor(list(b'["a", "a"]'), dtype=torch.uint8)},
        {"names": torch.tensor(list(b"[1, 2"), dtype=torch.uint8)},
        {"sites": torch.tensor(list(b'["attn_q"]'), dtype=torch.uint8)},
        {"kinds": torch.zeros(3)},
        {"kinds": torch.full((3,), len(ItemKind))},
        {"quantiles": torch.full((3,), 1.0, dtype=torch.float64)},
        {"quantiles": torch.full((2,), 0.5, dtype=torch.float64)},
        {"units": torch.full((3,), -1)},
        {"layers": torch.full((3,), -1)},
        {"thresholds": torch.full((3,), torch.inf, dtype=torch.float64)},
        {"kinds": torch.full((3,), 1)},
        {"vectors": torch.ones(1, 48)},
        {"other": torch.ones(1)},
    ],
)
def test_a_stored_watch_that_is_none_is_refused(broken: dict[str, torch.Tensor | None]) -> None:
    tensors = {**neurons_watch().tensors(), **broken}
    with pytest.raises(InvalidArgument):
        Watch.from_tensors({name: tensor for name, tensor in tensors.items() if tensor is not None})


def test_a_watch_whose_directions_are_on_another_scale_is_refused() -> None:
    """As they were stored before values were those on unit vectors."""
    watch = watch_of_everything("llama")
    row = int(watch.units[watch.kinds == ItemKind.DIRECTION][0])
    vectors = watch.vectors.clone()
    vectors[row] *= 60
    with pytest.raises(FailedPrecondition, match="a direction of length 60"):
        check_watch(replace(watch, vectors=vectors), loaded("llama").decoder.spec)


def test_a_watch_of_another_model_is_refused() -> None:
    spec = loaded("llama").decoder.spec
    for other in (neurons_watch(neurons=(79,)), watch_of_everything("llama")):
        check_watch(other, spec)
    # gpt_neox has vectors of another width, and no resid_mid.
    with pytest.raises(FailedPrecondition, match="watch"):
        check_watch(watch_of_everything("llama"), loaded("gpt_neox").decoder.spec)


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({"name": ""}, "name"),
        ({"name": "9"}, "name"),
        ({"name": "a" * 64}, "name"),
        ({"name": "A"}, "name"),
        ({"sampling_rate": 0.0}, "sampling_rate"),
        ({"sampling_rate": 1.5}, "sampling_rate"),
        ({"sampling_rate": float("nan")}, "sampling_rate"),
        ({"phases": frozenset()}, "phases"),
        ({"window_tokens": 0}, "window_tokens"),
        ({"calibration_tokens": 0}, "calibration_tokens"),
        ({"calibration_tokens": 4097}, "calibration_tokens"),
        ({"buckets": (1.0, 1.0)}, "buckets"),
        ({"buckets": (1.0, float("inf"))}, "buckets"),
        ({"buckets": tuple(map(float, range(33)))}, "buckets"),
    ],
)
def test_options_out_of_range_are_refused_by_their_field(options: dict[str, object], field: str) -> None:
    with pytest.raises(InvalidArgument) as refused:
        WatchOptions(**{"name": "w", **options})  # type: ignore[arg-type]
    assert refused.value.field == field


def test_an_item_fires_above_a_quantile_of_its_own_values_unless_told_otherwise() -> None:
    """Features, whose values are cut off at 0, fire when they are above it."""
    watch = bound(
        WatchItem("n", NEURON),
        WatchItem("h", WatchedHeads(HeadSelection((Head(0, 1),))), quantile=0.9),
        WatchItem("f", features(torch.ones(1, WIDTH), 0)),
        WatchItem("t", WatchedNeurons(0, (2,)), threshold=1.5),
    )
    assert watch.quantiles.tolist() == [0.99, 0.9, 0.0, 0.0]
    assert watch.thresholds.tolist() == [0.0, 0.0, 0.0, 1.5]
    assert torch.equal(Watch.from_tensors(watch.tensors()).quantiles, watch.quantiles)
    assert watch.kind_names == ("neuron", "feature", "head")
    assert watch.kind_of.tolist() == [0, 2, 1, 0]


def test_a_watch_stored_before_there_were_quantiles_keeps_its_thresholds_and_its_heads() -> None:
    stored = bound(
        WatchItem("n", NEURON, threshold=0.5),
        WatchItem("h", WatchedHeads(HeadSelection((Head(0, 1),)), include_sink=True), threshold=0.0),
    ).tensors()
    assert "quantiles" not in stored
    watch = Watch.from_tensors(stored)
    assert watch.kinds.tolist() == [0, 3]
    assert watch.kind_names == ("neuron", "head")


def test_an_encoder_is_read_by_the_layout_that_its_field_names() -> None:
    """W_enc of SAELens is [d_in, d_sae]."""
    square = torch.randn(WIDTH, WIDTH, generator=torch.Generator().manual_seed(0))
    rows = bound(WatchItem("f", features(square, 0)))
    columns = bound(WatchItem("f", features(square.t(), 0, "encoder_width_by_features")))
    assert torch.equal(rows.vectors, square)
    assert torch.equal(columns.vectors, square)
    assert torch.equal(bound(WatchItem("f", features(square[:3], 0, "encoder"))).vectors, square[:3])


@pytest.mark.parametrize(
    ("field", "shape", "message"),
    [
        ("encoder", (WIDTH, WIDTH), "square .* encoder_features_by_width .* encoder_width_by_features"),
        ("encoder", (WIDTH, 3), r"is not \[features, \d+\]; .* encoder_width_by_features"),
        ("encoder_features_by_width", (WIDTH, 3), r"is not \[features, \d+\]; .* encoder_width_by_features"),
        ("encoder_width_by_features", (3, WIDTH), r"is not \[\d+, features\]; .* encoder_features_by_width"),
        ("encoder_width_by_features", (WIDTH, 0), r"is not \[\d+, features\]"),
    ],
)
def test_an_encoder_that_could_stand_either_way_or_stands_the_other_is_refused(
    field: str, shape: tuple[int, int], message: str
) -> None:
    with pytest.raises(InvalidArgument, match=message) as refused:
        bound(WatchItem("f", features(torch.ones(shape), 0, field)))
    assert refused.value.field == f"items[0].features.{field}"


def test_neurons_watched_at_different_sites_are_of_different_places_and_one_kind() -> None:
    items = [WatchItem(site.value, WatchedNeurons(1, (2,), site=site)) for site in NEURON_SITES]
    watch = bound(*items, WatchItem("by default", WatchedNeurons(1, (2,))))
    assert watch.places == tuple((site, 1) for site in NEURON_SITES)
    assert watch.place_of.tolist() == [0, 1, 2, 2]
    assert watch.kind_names == ("neuron",)


def test_a_watched_gate_is_refused_where_there_is_none_also_of_a_stored_watch() -> None:
    gates = [WatchItem("x", WatchedNeurons(0, (1,), site=Site.MLP_GATE))]
    ungated = loaded("gpt2").info
    with pytest.raises(InvalidArgument, match="gpt2 has no site mlp_gate") as refused:
        bind_watch(gates, ungated, None, max_items=10)
    assert refused.value.field == "items[0].neurons.site"
    with pytest.raises(FailedPrecondition, match="watches mlp_gate, which gpt2 has not"):
        check_watch(bound(*gates), ungated)
