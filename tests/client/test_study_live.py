"""VectorStudy: from pairs to a program, against a whole server of a tiny random llama."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from live import LiveServer

from patchclamp import Client, PatchclampError, Program, VectorStudy, effects
from patchclamp.programs import add, generated, read_projection, rotate_towards
from patchclamp.results import DetectedText, DosePoint
from patchclamp_server.model.load import load_model

PAIRS = [(f"good day {i}", f"bad night {i}") for i in range(12)]
PROMPTS = ["It was", "She has"]
SMALL: dict[str, Any] = {"strengths": [0.5, 1.0], "random_vectors": 1, "max_tokens": 3, "max_repetition": 1.0}


@pytest.fixture(scope="module")
def client(tiny_llama_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Client]:
    server = LiveServer(load_model(str(tiny_llama_dir)), tmp_path_factory.mktemp("artifacts"))
    with server, Client(server.address) as client:
        yield client


def test_five_lines_lead_from_pairs_to_a_program_that_is_served(client: Client) -> None:
    events: list[object] = []
    study = VectorStudy(client, "glad", PAIRS, replace_tags=True, on_event=events.append)
    study.extract(pooling="mean")
    study.calibrate(PROMPTS, instruction="Be glad.", max_perplexity_ratio=1e6, **SMALL)
    study.detect()
    answer = client.generate("It was", program=study.program(strength=1.0), max_tokens=2).result()
    [edit] = answer.receipt.edits
    assert (edit.name, edit.rows > 0) == ("glad", True)
    assert [value.name for token in answer.tokens for value in token.readouts]
    assert {DosePoint, DetectedText} <= {type(event) for event in events}
    assert [line.split(":")[0] for line in str(study).splitlines()] == ["glad", "extracted", "calibrated", "tested"]


def test_the_vector_is_that_of_the_pairs_that_are_not_kept_for_the_test(client: Client) -> None:
    study = VectorStudy(client, "apart", PAIRS, test_fraction=0.5, seed=3, replace_tags=True)
    assert sorted(study.pairs + study.held_out) == sorted(PAIRS)
    assert (len(study.pairs), len(study.held_out)) == (6, 6)
    assert VectorStudy(client, "apart", PAIRS, test_fraction=0.5, seed=3).held_out == study.held_out
    found = study.extract(layers=[1])
    alone = client.extract_vectors(study.pairs, layers=[1], seed=3).result()
    assert found.artifact.id == alone.artifact.id
    detection = study.detect()
    assert detection.texts == 12
    texts = {"positive": [good for good, _ in study.held_out], "negative": [bad for _, bad in study.held_out]}
    assert detection == client.detect_concept("apart", texts, "positive", seed=3).result()


def test_the_name_is_that_of_the_calibrated_vector(client: Client) -> None:
    study = VectorStudy(client, "dosed", PAIRS, replace_tags=True)
    best = study.extract(layers=[0, 1]).best_layer
    result = study.calibrate(PROMPTS, effect=effects.target_texts(" a"), scope=generated(), **SMALL)
    assert client.get_artifact("dosed").id == result.artifact.id
    assert {point.layer for point in result.points if point.arm == "vector"} == {best}
    edit = add("dosed", layers=1, strength=0.25, scope=generated(), name="dosed")
    readout = read_projection(["dosed"], layers=1, name="dosed")
    assert study.program(layer=1, strength=0.25) == Program(edit, readouts=readout)
    assert study.watch_item().direction.layers == [result.layer]


def test_another_method_may_be_tried_under_the_same_name(client: Client) -> None:
    study = VectorStudy(client, "again", PAIRS)
    study.extract(layers=[1])
    study.calibrate(PROMPTS, **SMALL)
    found = study.extract("logistic_probe", layers=[1])
    assert client.get_artifact("again").id == found.artifact.id
    assert (study.calibration, study.detection) == (None, None)


def test_a_name_or_tag_of_another_vector_is_not_taken_unasked(client: Client) -> None:
    VectorStudy(client, "taken", PAIRS).extract(layers=[1])
    with pytest.raises(PatchclampError, match="ALREADY_EXISTS"):
        VectorStudy(client, "taken", PAIRS, seed=1).extract(layers=[1])
    study = VectorStudy(client, "free", PAIRS, seed=2)
    study.extract(layers=[1])
    with pytest.raises(PatchclampError, match="ALREADY_EXISTS"):
        study.calibrate(PROMPTS, tags=["taken"], **SMALL)


def test_without_a_strength_the_program_has_that_at_the_knee(client: Client) -> None:
    study = VectorStudy(client, "knee", PAIRS, replace_tags=True)
    study.extract(layers=[1])
    # On one side of 0 a text becomes likelier.
    either = {**SMALL, "strengths": [-1.0, -0.5, 0.5, 1.0]}
    result = study.calibrate(PROMPTS, effect=effects.target_texts(" a"), max_perplexity_ratio=1e6, **either)
    assert result.strength != 0.0
    [edit] = study.program().edits
    assert (edit.layers, edit.strength) == ([1], result.strength)


def test_a_program_turns_where_the_calibration_turned(client: Client) -> None:
    study = VectorStudy(client, "turned", PAIRS, replace_tags=True)
    study.extract(layers=[1])
    study.calibrate(PROMPTS, application="rotate_towards", **{**SMALL, "strengths": [0.1, 0.2]})
    [edit] = study.program(layer=1, strength=0.1).edits
    assert edit == rotate_towards("turned", 0.1, layers=1, name="turned")


def test_a_step_before_its_turn_is_refused_with_what_comes_first(client: Client) -> None:
    study = VectorStudy(client, "early", PAIRS)
    for step in (study.detect, study.program, study.watch_item, lambda: study.calibrate(PROMPTS)):
        with pytest.raises(ValueError, match="extract first"):
            step()
    study.extract(layers=[1])
    with pytest.raises(ValueError, match="calibrate first"):
        study.program()
    with pytest.raises(ValueError, match=r"pairs: 4 of 7 are kept for the test, .* give 8 or more"):
        VectorStudy(client, "few", PAIRS[:7])
    with pytest.raises(TypeError, match="layer"):
        study.extract(layer=[1])  # type: ignore[call-arg]
