"""Edits by a stored subspace or affine map: what they compute, and what is refused by its field."""

import math
from pathlib import Path

import pytest
import torch
from engine_runs import Outcome, loaded
from oracle import run_oracle
from patience import PATIENCE_SECONDS
from programs import numbers, prompt, shapes
from tiny_models import tiny_model

from patchclamp_server.artifacts.store import ArtifactStore
from patchclamp_server.artifacts.types import ArtifactKind
from patchclamp_server.engine.config import EngineConfig
from patchclamp_server.engine.engine import Engine
from patchclamp_server.engine.request import Request, StopParams
from patchclamp_server.errors import InvalidArgument
from patchclamp_server.interventions.bind import bind
from patchclamp_server.interventions.edit_kinds import inline_numbers
from patchclamp_server.interventions.kinds.affine import Affine
from patchclamp_server.interventions.kinds.rotate_in_plane import RotateInPlane
from patchclamp_server.interventions.program import Edit, EditKind, LowRank, Program
from patchclamp_server.model.sites import Site

INFO = loaded("llama").info
WIDTH = shapes("llama").sites[Site.RESID_POST]


def rotation(seed: str, rank: int) -> torch.Tensor:
    return torch.linalg.qr(numbers(seed, WIDTH, rank))[0].T.contiguous()


@pytest.fixture
def store(tmp_path: Path) -> ArtifactStore:
    store = ArtifactStore(tmp_path)
    small = 1 / math.sqrt(WIDTH)
    subspaces = {
        "reft": {
            name: tensor
            for layer in (0, 2)
            for name, tensor in (
                (f"layer.{layer}.rotation", rotation(f"R{layer}", 3)),
                (f"layer.{layer}.weight", small * numbers(f"W{layer}", 3, WIDTH)),
                (f"layer.{layer}.bias", numbers(f"b{layer}", 3)),
            )
        },
        "plane": {
            "layer.0.rotation": rotation("P0", 2),
            "layer.1.rotation": rotation("P1", 2),
            "layer.1.centre": 0.1 * numbers("c", WIDTH),
        },
    }
    maps = {
        "mixed": {
            "layer.0.matrix": small * numbers("A", WIDTH, WIDTH),
            "layer.0.bias": 0.1 * numbers("b", WIDTH),
            "layer.2.left": small * numbers("U", WIDTH, 2),
            "layer.2.right": numbers("V", WIDTH, 2),
        },
        "factors": {
            "layer.1.left": small * numbers("U", WIDTH, 2),
            "layer.1.right": numbers("V", WIDTH, 2),
            "layer.1.bias": 0.1 * numbers("b", WIDTH),
        },
    }
    for kind, named in ((ArtifactKind.SUBSPACE, subspaces), (ArtifactKind.AFFINE_MAP, maps)):
        for tag, tensors in named.items():
            store.put(kind, tensors, model_fingerprint=INFO.fingerprint, site=Site.RESID_POST, tags=[tag])
    return store


EDITS = {
    "low_rank of each layer": Edit(LowRank(subspace="reft"), Site.RESID_POST, "e", layers=(2, 0), strength=0.6),
    "a turn about its own centres": Edit(RotateInPlane(1.1, subspace="plane"), Site.RESID_POST, "e", layers=(0, 1)),
    "a turn about a centre": Edit(
        RotateInPlane(-2.0, subspace="plane", centre=0.2 * numbers("d", WIDTH)), Site.RESID_PRE, "e", layers=(1,)
    ),
    "maps of both forms": Edit(Affine(affine_map="mixed"), Site.RESID_POST, "e", layers=(0, 2), strength=0.3),
    "a map in factors": Edit(Affine(affine_map="factors"), Site.MLP_OUT, "e", layers=(1,)),
}


@pytest.mark.parametrize("kernels", [False, True])
@pytest.mark.parametrize("edit", EDITS.values(), ids=EDITS.keys())
def test_a_stored_map_is_applied_as_the_oracle_does(store: ArtifactStore, edit: Edit, kernels: bool) -> None:
    program, tokens = Program((edit,)), prompt("stored maps", 9)
    outcome = Outcome()
    engine = Engine(loaded("llama"), EngineConfig(kv_block_size=4, kernels=kernels))
    bound = bind(program, INFO, store)
    engine.submit(Request(tokens, outcome.on_event, program=bound, stop=StopParams(max_tokens=3, ignore_eos=True)))
    engine.start()
    try:
        assert outcome.done.wait(PATIENCE_SECONDS)
    finally:
        engine.shutdown()
    artifacts = {tag: store.get(tag) for tag in ("reft", "plane", "mixed", "factors")}
    expected = run_oracle(tiny_model("llama"), tokens, program, 3, artifacts=artifacts)
    assert outcome.tokens == list(expected.tokens)
    own, count = outcome.end().receipt.edits[0], expected.receipts[0]
    assert own.rows == count.rows > 0
    assert own.mean_relative_change == pytest.approx(count.mean_relative_change, rel=1e-4)


def test_a_turn_there_and_back_leaves_the_state_as_it_was() -> None:
    plane, centre = numbers("plane", 2, WIDTH), numbers("centre", WIDTH)
    there, back = (Edit(RotateInPlane(angle, plane, centre=centre), Site.RESID_POST, layers=(1,)) for angle in (1, -1))
    bound = bind(Program((there, back)), INFO)
    h = numbers("h", WIDTH)
    for edit in bound.edits:
        rows, weight, bias = edit.payload[1]
        h = h + rows.T @ (weight @ h + bias - rows @ h)
    torch.testing.assert_close(h, numbers("h", WIDTH), rtol=1e-5, atol=1e-5)


def test_the_fingerprint_is_that_of_what_a_tag_names_now(store: ArtifactStore) -> None:
    program = Program((Edit(RotateInPlane(1.0, subspace="plane"), Site.RESID_POST, layers=(0,)),))
    before = bind(program, INFO, store)
    other = {"layer.0.rotation": rotation("other", 2)}
    info = store.put(ArtifactKind.SUBSPACE, other, model_fingerprint=INFO.fingerprint, site=Site.RESID_POST)
    store.tag("plane", info.id, replace_tag=True)
    after = bind(program, INFO, store)
    assert before.edits[0].fingerprint != after.edits[0].fingerprint
    assert after.fingerprint == bind(program, INFO, store).fingerprint != before.fingerprint


def test_policies_tell_numbers_of_an_artifact_from_those_of_a_request() -> None:
    matrix = torch.eye(WIDTH)
    kinds = {
        LowRank(subspace="reft"): "",
        LowRank(matrix, matrix, matrix[0]): "low_rank",
        Affine(affine_map="mixed"): "",
        RotateInPlane(1.0, subspace="plane"): "",
        RotateInPlane(1.0, matrix[:2]): "rotate_in_plane.plane",
        RotateInPlane(1.0, subspace="plane", centre=matrix[0]): "rotate_in_plane.centre",
    }
    for kind, field in kinds.items():
        assert inline_numbers(Edit(kind, Site.RESID_POST, layers=(0,))) == field


ROWS = torch.eye(WIDTH)[:2]
REFUSED: dict[str, tuple[EditKind, int, str]] = {
    "a layer that it lacks": (LowRank(subspace="reft"), 1, "low_rank.subspace"),
    "a plane, which is no intervention": (LowRank(subspace="plane"), 0, "low_rank.subspace"),
    "another kind": (LowRank(subspace="mixed"), 0, "low_rank.subspace"),
    "three dimensions": (RotateInPlane(1.0, subspace="reft"), 0, "rotate_in_plane.subspace"),
    "a line": (RotateInPlane(1.0, torch.stack((ROWS[0], 2 * ROWS[0]))), 0, "rotate_in_plane.plane"),
    "a zero row": (RotateInPlane(1.0, ROWS * torch.tensor([[1.0], [0.0]])), 0, "rotate_in_plane.plane"),
    "another width": (RotateInPlane(1.0, ROWS[:, 1:]), 0, "rotate_in_plane.plane"),
    "a centre of another width": (RotateInPlane(1.0, ROWS, centre=ROWS[0, 1:]), 0, "rotate_in_plane.centre"),
    "more than a turn": (RotateInPlane(6.3, ROWS), 0, "rotate_in_plane.radians"),
    "a map's layer that it lacks": (Affine(affine_map="factors"), 0, "affine.affine_map"),
}


@pytest.mark.parametrize(("kind", "layer", "field"), REFUSED.values(), ids=REFUSED.keys())
def test_what_does_not_fit_is_refused_by_its_field(
    store: ArtifactStore, kind: EditKind, layer: int, field: str
) -> None:
    with pytest.raises(InvalidArgument) as refused:
        bind(Program((Edit(kind, Site.RESID_POST, layers=(layer,)),)), INFO, store)
    assert refused.value.field == f"program.edits[0].{field}"
