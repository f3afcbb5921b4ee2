"""Features of autoencoders in programs: what is refused by its field, and that only the rows of chosen ones are read.

What the edits, readouts and conditions compute is compared with the oracle in tests/engine/test_features.py.
"""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from autoencoders import N_FEATURES, put_autoencoder
from engine_runs import Bench, Job, loaded
from programs import prompt

from patchclamp.v1 import program_pb2 as pb
from patchclamp_server.artifacts.store import ArtifactStore
from patchclamp_server.artifacts.types import ArtifactKind
from patchclamp_server.engine.config import EngineConfig
from patchclamp_server.errors import FailedPrecondition, InvalidArgument, NotFound, RequestError
from patchclamp_server.interventions import encoders
from patchclamp_server.interventions.bind import bind
from patchclamp_server.interventions.bound import BoundProgram
from patchclamp_server.interventions.edit_kinds import inline_numbers, kind_name
from patchclamp_server.interventions.features import MAX_FEATURES
from patchclamp_server.interventions.kinds.features import FeatureEdit, TopFeaturesReadout
from patchclamp_server.interventions.program import Edit, NeuronOp, Program, Readout
from patchclamp_server.interventions.request_warnings import WarningCode
from patchclamp_server.interventions.tables import Tables
from patchclamp_server.model.sites import Site
from patchclamp_server.rpc.codecs.program import decode_program

LAYER, SITE = 1, pb.SITE_RESID_POST
INFO = loaded("llama").info


@pytest.fixture
def store(tmp_path: Path) -> ArtifactStore:
    return ArtifactStore(tmp_path)


@pytest.fixture
def refs(store: ArtifactStore) -> dict[str, str]:
    """Ids by the names that the cases below use."""
    made = {
        name: put_autoencoder(store, "llama", Site.RESID_POST, LAYER, name, seed=name)
        for name in ("relu", "jumprelu", "batchtopk", "topk")
    }
    made["transcoder"] = put_autoencoder(store, "llama", Site.RESID_MID, LAYER, output=(Site.MLP_OUT, LAYER))
    made["backwards"] = put_autoencoder(store, "llama", Site.MLP_OUT, LAYER, output=(Site.RESID_MID, LAYER))
    made["wide"] = put_autoencoder(store, "llama", Site.MLP_POST, LAYER, output=(Site.MLP_OUT, INFO.n_layers))
    made["of another model"] = put_autoencoder(
        store, "llama", Site.RESID_POST, LAYER, model_fingerprint="sha256:" + "0" * 64
    )
    vector = {"layer.1": torch.ones(INFO.d_model)}
    made["vector"] = store.put(ArtifactKind.VECTOR, vector, model_fingerprint=INFO.fingerprint, site=Site.RESID_POST).id
    for name, ref in made.items():
        store.tag(name.replace(" ", "-"), ref)
    return made


def bound(store: ArtifactStore, proto: pb.Program) -> BoundProgram:
    return bind(decode_program(proto), INFO, store)


def edit(ref: str, features: list[int] | None = None, *, site: int = SITE, layers: tuple[int, ...] = (), **op: object):  # type: ignore[no-untyped-def]
    op = op or {"set": {"values": [1.0]}}
    kind = pb.FeatureEdit(autoencoder=ref, features=[3, 5] if features is None else features, **op)  # type: ignore[arg-type]
    return pb.Program(edits=[pb.Edit(site=site, layers=layers, features=kind)])  # type: ignore[arg-type]


def readout(ref: str, *, site: int = SITE, layers: tuple[int, ...] = (LAYER,), **kind: object):  # type: ignore[no-untyped-def]
    own = pb.Readout(site=site, layers=layers, features=pb.FeatureReadout(autoencoder=ref, **kind))  # type: ignore[arg-type]
    return pb.Program(readouts=[own])


def gate(ref: str, feature: int = 3, *, site: int = SITE, layer: int = LAYER, **options: object):  # type: ignore[no-untyped-def]
    named = pb.FeatureReference(autoencoder=ref, feature=feature)
    options.setdefault("comparison", pb.COMPARISON_ABOVE)
    condition = pb.Condition(site=site, layer=layer, feature=named, **options)  # type: ignore[arg-type]
    add = pb.AddVector(vector=pb.Vector(artifact="vector", artifact_layer=1))
    return pb.Program(edits=[pb.Edit(site=SITE, layers=[2], add=add, gate=pb.Gate(condition=condition))])


@pytest.mark.parametrize(
    ("program", "field", "error"),
    [
        (edit(""), "edits[0].features.autoencoder", InvalidArgument),
        (edit("nobody"), "edits[0].features.autoencoder", NotFound),
        (edit("vector"), "edits[0].features.autoencoder", InvalidArgument),
        (edit("of-another-model"), "edits[0].features.autoencoder", FailedPrecondition),
        (edit("topk"), "edits[0].features.autoencoder", InvalidArgument),
        (edit("transcoder"), "edits[0].site", InvalidArgument),
        (edit("transcoder", site=pb.SITE_MLP_OUT, layers=(0,)), "edits[0].layers", InvalidArgument),
        (edit("backwards", site=pb.SITE_RESID_MID), "edits[0].features.autoencoder", InvalidArgument),
        (edit("wide", site=pb.SITE_MLP_OUT), "edits[0].features.autoencoder", FailedPrecondition),
        (readout("transcoder", features=[1], site=pb.SITE_MLP_OUT), "readouts[0].site", InvalidArgument),
        (edit("relu", []), "edits[0].features.features", InvalidArgument),
        (edit("relu", [3, 3]), "edits[0].features.features[1]", InvalidArgument),
        (edit("relu", [3, N_FEATURES]), "edits[0].features.features[1]", InvalidArgument),
        (edit("relu", list(range(MAX_FEATURES + 1))), "edits[0].features.features", InvalidArgument),
        (edit("relu", set={"values": [1.0, 2.0, 3.0]}), "edits[0].features.set.values", InvalidArgument),
        (edit("relu", set={"values": []}), "edits[0].features.set.values", InvalidArgument),
        (edit("relu", add={"values": [float("nan")]}), "edits[0].features.add.values[0]", InvalidArgument),
        (edit("relu", clamp={}), "edits[0].features.clamp.min", InvalidArgument),
        (edit("relu", clamp={"min": 2.0, "max": 1.0}), "edits[0].features.clamp.max", InvalidArgument),
        (edit("relu", site=pb.SITE_MLP_OUT), "edits[0].site", InvalidArgument),
        (edit("relu", layers=(0,)), "edits[0].layers", InvalidArgument),
        (edit("relu", layers=(LAYER, 2)), "edits[0].layers", InvalidArgument),
        (readout(""), "readouts[0].features.autoencoder", InvalidArgument),
        (readout("relu"), "readouts[0].features.features", InvalidArgument),
        (readout("relu", features=[1], k=2), "readouts[0].features.k", InvalidArgument),
        (readout("relu", features=[N_FEATURES]), "readouts[0].features.features[0]", InvalidArgument),
        (readout("topk", features=[1]), "readouts[0].features.autoencoder", InvalidArgument),
        (readout("relu", k=N_FEATURES + 1), "readouts[0].features.k", InvalidArgument),
        (readout("relu", features=[1], site=pb.SITE_RESID_PRE), "readouts[0].site", InvalidArgument),
        (readout("relu", k=1, layers=(2,)), "readouts[0].layers", InvalidArgument),
        (gate(""), "edits[0].gate.condition.feature.autoencoder", InvalidArgument),
        (gate("relu", N_FEATURES), "edits[0].gate.condition.feature.feature", InvalidArgument),
        (gate("topk"), "edits[0].gate.condition.feature.autoencoder", InvalidArgument),
        (gate("relu", layer=0), "edits[0].gate.condition.layer", InvalidArgument),
        (gate("relu", site=pb.SITE_RESID_PRE), "edits[0].gate.condition.site", InvalidArgument),
        (gate("relu", cosine=True), "edits[0].gate.condition.cosine", InvalidArgument),
        (gate("relu", threshold=float("inf")), "edits[0].gate.condition.threshold", InvalidArgument),
        (
            gate("relu", stored_threshold=pb.STORED_THRESHOLD_MIDPOINT),
            "edits[0].gate.condition.stored_threshold",
            InvalidArgument,
        ),
        (gate("relu", vector=pb.Vector(artifact="vector")), "edits[0].gate.condition.feature", InvalidArgument),
    ],
)
def test_what_is_no_feature_of_the_site_is_refused_by_its_field(
    program: pb.Program, field: str, error: type[RequestError], store: ArtifactStore, refs: dict[str, str]
) -> None:
    with pytest.raises(error) as refused:
        bound(store, program)
    assert refused.value.field == f"program.{field}"


def test_policies_see_a_kind_of_its_own_that_brings_no_numbers() -> None:
    [own] = decode_program(edit("sae")).edits
    assert kind_name(own.kind) == "features"
    assert inline_numbers(own) == ""


def test_an_edit_without_layers_is_at_that_of_its_autoencoder(store: ArtifactStore, refs: dict[str, str]) -> None:
    assert bound(store, edit("relu")).edits[0].layers == (LAYER,)
    assert bound(store, edit("relu")).fingerprint == bound(store, edit("relu", layers=(LAYER,))).fingerprint


@pytest.mark.parametrize(
    "change",
    [
        lambda: edit("relu", [5, 3]),
        lambda: edit("relu", [3, 6]),
        lambda: edit("relu", set={"values": [1.5]}),
        lambda: edit("relu", scale={"values": [1.0]}),
        lambda: edit("relu", clamp={"max": 1.0}),
        lambda: edit("jumprelu"),
    ],
)
def test_every_number_of_an_edit_shows_in_the_fingerprint(
    change: Callable[[], pb.Program], store: ArtifactStore, refs: dict[str, str]
) -> None:
    assert bound(store, change()).fingerprint != bound(store, edit("relu")).fingerprint


def test_what_a_transcoder_reads_shows_in_the_fingerprint(store: ArtifactStore) -> None:
    refs = [
        put_autoencoder(store, "llama", site, LAYER, output=(Site.MLP_OUT, LAYER), seed=seed)
        for site, seed in ((Site.RESID_MID, ""), (Site.RESID_PRE, ""), (Site.RESID_MID, "another"))
    ]
    bounds = [bound(store, edit(ref, site=pb.SITE_MLP_OUT)) for ref in refs]
    assert len({own.fingerprint for own in bounds}) == 3
    assert [own.edits[0].input.site for own in bounds if own.edits[0].input] == [
        Site.RESID_MID,
        Site.RESID_PRE,
        Site.RESID_MID,
    ]


def test_readouts_of_other_features_and_of_other_autoencoders_have_other_fingerprints(
    store: ArtifactStore, refs: dict[str, str]
) -> None:
    programs = [readout(ref, **kind) for ref in ("relu", "jumprelu") for kind in ({"features": [1]}, {"k": 1})]  # type: ignore[arg-type]
    assert len({bound(store, program).fingerprint for program in programs}) == len(programs)


def test_the_rows_of_chosen_features_are_all_that_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = ArtifactStore(tmp_path)
    ref = put_autoencoder(store, "llama", Site.RESID_POST, LAYER, n_features=65_536)
    bound(store, edit(ref))  # the first call verifies the bytes against the id
    read: list[int] = []
    whole = store._blobs.read_range

    def counted(path: str, start: int, end: int) -> bytes:
        read.append(end - start)
        return whole(path, start, end)

    monkeypatch.setattr(store._blobs, "read_range", counted)
    program = bound(store, edit(ref, [3, 65_535]))
    # The biases are read whole; of both matrices two rows.
    assert sum(read) <= 4 * (65_536 + INFO.d_model) + 4 * 4 * INFO.d_model + 65_536
    tables = Tables(torch.float32, torch.device("cpu"))
    loaded_program = tables.load(program)
    assert len(loaded_program.held[INFO.d_model]) == 4


def test_programs_share_a_whole_encoder_and_it_is_forgotten_with_the_last(
    store: ArtifactStore, refs: dict[str, str]
) -> None:
    first, second = bound(store, readout("relu", k=2)), bound(store, readout("relu", k=3))
    assert first.readouts[0].encoder is second.readouts[0].encoder
    assert refs["relu"] in encoders._HELD
    del first, second
    assert refs["relu"] not in encoders._HELD


@pytest.mark.parametrize(
    ("kind", "field", "warned"),
    [
        ("set below", "set", True),
        ("set above", "set", False),
        ("set 0", "set", False),
        ("clamp below", "clamp", True),
        ("scale", "scale", False),
    ],
)
def test_the_receipt_says_that_a_target_is_below_the_threshold_of_a_jumprelu(
    kind: str, field: str, warned: bool, store: ArtifactStore, refs: dict[str, str]
) -> None:
    threshold = store.get(refs["jumprelu"]).tensors["threshold"]
    feature = int(threshold.argmax())
    at = float(threshold[feature])
    edit = {
        "set below": FeatureEdit(refs["jumprelu"], (feature,), NeuronOp.SET, (0.9 * at,)),
        "set above": FeatureEdit(refs["jumprelu"], (feature,), NeuronOp.SET, (1.1 * at,)),
        "set 0": FeatureEdit(refs["jumprelu"], (feature,), NeuronOp.SET, (0.0,)),
        "clamp below": FeatureEdit(refs["jumprelu"], (feature,), NeuronOp.CLAMP, max=0.9 * at),
        "scale": FeatureEdit(refs["jumprelu"], (feature,), NeuronOp.SCALE, (0.5,)),
    }[kind]
    program = Program((Edit(edit, Site.RESID_POST, layers=(LAYER,)),))
    with Bench("llama", EngineConfig(kv_block_size=4)) as bench:
        [outcome] = bench.run([Job(prompt("warned", 5), program, max_tokens=1, artifacts=store)])
    found = [w for w in outcome.end().receipt.warnings if w.code is WarningCode.BELOW_JUMP]
    assert [w.field for w in found] == ([f"program.edits[0].features.{field}"] if warned else [])
    if warned:
        assert f"feature {feature} " in found[0].message
        assert f"{0.9 * at:.6g} off" in found[0].message


def test_a_program_without_features_holds_no_encoder(store: ArtifactStore, refs: dict[str, str]) -> None:
    asked = Program(readouts=(Readout(TopFeaturesReadout(refs["relu"], 2), Site.RESID_POST, layers=(LAYER,)),))
    tables = Tables(torch.float32, torch.device("cpu"))
    held = tables.load(bind(asked, INFO, store))
    assert len(tables.objects) == 1
    tables.release(held)
    assert not tables.objects
