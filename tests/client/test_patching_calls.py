"""Activation patching: what the client sends, what it makes of the answers, and what `patchclamp activations patch`
prints and draws."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from patchclamp import AsyncClient, Client, requests
from patchclamp.cli import main
from patchclamp.cli.activations.patch import column, pair_file
from patchclamp.patching import PatchPair
from patchclamp.pictures.patching import patching_figure
from patchclamp.results import PatchCell, PatchGrid, Progress
from patchclamp.v1 import activation_pb2 as pb
from patchclamp.v1 import program_pb2
from patchclamp.v1.activation_pb2_grpc import ActivationServiceServicer

PAIR = PatchPair("The capital of France is", "The capital of Italy is", " Paris", " Rome")
LINE = {"clean": "a", "corrupt": "b", "answer": "c", "other_answer": "d"}


def cells() -> Iterator[pb.PatchCell]:
    """Two sites at layers 2 and 5, two columns; at attn_z two heads too."""
    for site in (program_pb2.SITE_RESID_PRE, program_pb2.SITE_ATTN_Z):
        for layer in (2, 5):
            for at in (0, 1):
                effect = 0.1 * layer + at
                cell = pb.PatchCell(site=site, layer=layer, positions=at, metric=1.5, effect=effect, low=0.0, high=1.0)
                yield cell
                for head in (0, 1) if site == program_pb2.SITE_ATTN_Z else ():
                    own = pb.PatchCell(head=head, effect=-effect)
                    own.MergeFrom(pb.PatchCell(site=site, layer=layer, positions=at, metric=1.5, low=0.0, high=1.0))
                    yield own


class Activations(ActivationServiceServicer):
    def __init__(self) -> None:
        self.asked: list[pb.PatchActivationsRequest] = []

    def PatchActivations(
        self, request: pb.PatchActivationsRequest, context: Any
    ) -> Iterator[pb.PatchActivationsResponse]:
        self.asked.append(request)
        yield pb.PatchActivationsResponse(progress={"stage": "runs", "done": 3, "total": 12})
        for cell in cells():
            yield pb.PatchActivationsResponse(cell=cell)
        result = pb.PatchResult(
            source_metric=2.0,
            unpatched_metric=-1.0,
            sites=["SITE_RESID_PRE", "SITE_ATTN_Z"],
            layers=[2, 5],
            positions=["first", "last"],
            requests=12,
            warnings=["mind the intervals"],
        )
        yield pb.PatchActivationsResponse(result=result)


@pytest.fixture
def server() -> Activations:
    return Activations()


@pytest.fixture
def client(serve: Callable[..., str], server: Activations) -> Iterator[Client]:
    with Client(serve(activations=server)) as client:
        yield client


def test_a_request_says_pairs_grid_and_metric() -> None:
    request = requests.patch_activations(
        PAIR,
        direction="corrupt",
        sites=["attn_z", "resid_post"],
        layers=[3, 4],
        layer_window=3,
        positions={"last": -1, "country": (3, 5), "rest": (5, None)},
        by_head=True,
        metric="divergence",
        seed=7,
    )
    [pair] = request.pairs
    assert (pair.clean.text, pair.corrupt.text) == (PAIR.clean, PAIR.corrupt)
    assert (pair.answer, pair.other_answer) == (" Paris", " Rome")
    assert (request.direction, request.metric) == (pb.PATCH_DIRECTION_CORRUPT, pb.PATCH_METRIC_DIVERGENCE)
    assert list(request.sites) == [program_pb2.SITE_ATTN_Z, program_pb2.SITE_RESID_POST]
    assert (list(request.layers), request.layer_window, request.by_head, request.seed) == ([3, 4], 3, True, 7)
    columns = [(c.name, c.positions.start, c.positions.end, c.positions.HasField("end")) for c in request.positions]
    assert columns == [("last", -1, 0, True), ("country", 3, 5, True), ("rest", 5, 0, False)]


def test_what_is_left_out_is_left_to_the_server() -> None:
    plain = requests.patch_activations([PAIR])
    assert [field.name for field, _ in plain.ListFields()] == ["pairs"]


@pytest.mark.parametrize("where", ["3", 1.5, True, (1,), (1, 2, 3), ("a", 2)])
def test_positions_that_are_neither_a_number_nor_a_range_are_refused_by_name(where: Any) -> None:
    with pytest.raises(TypeError, match=r"positions\['last'\]"):
        requests.patch_activations(PAIR, positions={"last": where})


def test_pairs_are_refused_by_their_index() -> None:
    with pytest.raises(TypeError, match=r"pairs\[1\]"):
        requests.patch_activations([PAIR, ("a", "b")])  # type: ignore[list-item]
    with pytest.raises(TypeError, match=r"pairs\[0\].answer"):
        requests.patch_activations([PatchPair("a", "b", 5)])  # type: ignore[arg-type]


def test_a_grid_has_the_effects_by_layer_and_column(client: Client) -> None:
    with client.patch_activations([PAIR]) as stream:
        events = list(stream)
    grid = client.patch_activations([PAIR]).result()
    assert isinstance(events[0], Progress)
    assert [type(event) for event in events[1:]] == [PatchCell] * 16 + [PatchGrid]
    assert grid.effects("resid_pre") == ((0.2, 1.2), (0.5, 1.5))
    assert grid.effects("attn_z", head=1) == ((-0.2, -1.2), (-0.5, -1.5))
    assert (grid.heads, grid.positions, grid.warnings) == ((0, 1), ("first", "last"), ("mind the intervals",))
    assert [abs(cell.effect) for cell in grid.best(4)] == [1.5, 1.5, 1.5, 1.5]
    with pytest.raises(ValueError, match="mlp_out was not patched; the sites are resid_pre, attn_z"):
        grid.effects("mlp_out")


async def test_the_asynchronous_client_brings_the_same_grid(serve: Callable[..., str], server: Activations) -> None:
    async with AsyncClient(serve(activations=server)) as client:
        grid = await client.patch_activations(PAIR).result()
    assert (grid.source_metric, grid.unpatched_metric, len(grid.cells)) == (2.0, -1.0, 16)


def test_a_picture_has_a_panel_for_each_site_and_for_the_heads_of_each_column(client: Client, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    grid = client.patch_activations([PAIR]).result()
    figure = patching_figure(grid, "restore")
    *panels, _ = figure.axes
    assert [axes.get_title() for axes in panels] == ["resid_pre", "attn_z", "heads at first", "heads at last"]
    images = [axes.get_images()[0] for axes in panels]
    assert images[0].get_array().tolist() == [[0.2, 1.2], [0.5, 1.5]]
    assert images[3].get_array().tolist() == [[-1.2, -1.2], [-1.5, -1.5]]
    assert {image.get_clim() for image in images} == {(-1.5, 1.5)}
    assert [label.get_text() for label in panels[0].get_yticklabels()] == ["2", "5"]
    figure.savefig(tmp_path / "grid.png")
    assert (tmp_path / "grid.png").read_bytes()[:4] == b"\x89PNG"


@pytest.fixture
def pairs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, serve: Callable[..., str], server: Activations) -> str:
    monkeypatch.setenv("PATCHCLAMP_ADDRESS", serve(activations=server))
    file = tmp_path / "pairs.jsonl"
    file.write_text(json.dumps(LINE) + "\n\n" + json.dumps({"clean": "x", "corrupt": "y"}) + "\n")
    return str(file)


def test_the_command_sends_what_it_is_given(
    pairs: str, server: Activations, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    pytest.importorskip("matplotlib")
    picture = str(tmp_path / "grid.png")
    options = ["--sites", "attn_z", "--layers", "2", "5", "--positions", "first=0", "rest=1:", "--by-head"]
    options += ["--metric", "divergence", "--direction", "corrupt", "--layer-window", "3", "--seed", "4"]
    assert main(["activations", "patch", pairs, *options, "--json", "--picture", picture]) == 0
    told = json.loads(capsys.readouterr().out)
    assert (len(told["cells"]), told["layers"]) == (16, [2, 5])
    [asked] = server.asked
    expected = requests.patch_activations(
        pair_file(pairs),
        direction="corrupt",
        sites="attn_z",
        layers=[2, 5],
        layer_window=3,
        positions={"first": 0, "rest": (1, None)},
        by_head=True,
        metric="divergence",
        seed=4,
    )
    assert asked == expected
    assert Path(picture).read_bytes()[:4] == b"\x89PNG"


@pytest.mark.parametrize(("layers", "asked"), [(["0,10-12", "20"], [0, 10, 11, 12, 20]), (["all"], []), (["7"], [7])])
def test_layers_are_written_as_for_other_commands(
    pairs: str, server: Activations, layers: list[str], asked: list[int]
) -> None:
    assert main(["activations", "patch", pairs, "--layers", *layers]) == 0
    assert list(server.asked[0].layers) == asked


def test_the_command_prints_the_largest_effects_and_a_map_of_each_site(
    pairs: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["activations", "patch", pairs]) == 0
    told = capsys.readouterr()
    assert "L5H1" in told.out
    assert "resid_pre at first, last" in told.out
    assert "metric 2.0000 of the source, -1.0000 without a patch" in told.out
    assert "mind the intervals" in told.err


@pytest.mark.parametrize("text", ["last", "=1", "last=", "last=x", "last=1:x"])
def test_positions_of_the_command_are_refused_with_an_example(text: str) -> None:
    with pytest.raises(Exception, match="last=-1"):
        column(text)


def test_columns_of_the_command_are_read_as_ranges() -> None:
    assert [column(text) for text in ("a=-1", "b=2:5", "c=3:", "d=-3:0")] == [
        ("a", -1),
        ("b", (2, 5)),
        ("c", (3, None)),
        ("d", (-3, 0)),
    ]
