"""Every public function of the client with arguments it accepts, found by introspection."""

import inspect
from collections.abc import Callable
from typing import Any

from patchclamp import (
    AsyncClient,
    Client,
    effects,
    heads,
    monitoring,
    neurons,
    patching,
    programs,
    requests,
    sparsity,
    subspaces,
)
from patchclamp.heads import CleanCorruptPair
from patchclamp.patching import PatchPair

Arguments = dict[str, Any]

# Calls that only name their object, or take what has no default.
_REQUIRED: dict[str, Arguments] = {
    "generate": {"prompt": "hi"},
    "session": {"prompt": "hi"},
    "score": {"prompt": "hi", "continuation": " you"},
    "compare": {"prompt": "hi"},
    "tokenize": {"prompt": "hi"},
    "detokenize": {"ids": [1]},
    "extract_vectors": {"pairs": [("yes", "no")]},
    "calibrate_vector": {"vector": "mine", "prompts": ["hi"]},
    "detect_concept": {"detectors": "mine", "texts": "corpus"},
    "train_probe": {"texts": {"a": ["x"], "b": ["y"]}},
    "find_concept_circuit": {"scenarios": [{"a": "x", "b": ["y"]}], "target": "a"},
    "find_subspace": {"method": subspaces.circular_plane({"a": ["1"]})},
    "circular_plane": {"values": {"a": ["1"]}},
    "interchange": {"pairs": [("base", "source", "answer")]},
    "calibrate_profile": {"policy": sparsity.cats(), "texts": "words"},
    "evaluate_profile": {"sparsities": ["mine"], "texts": "words"},
    "predict_core_neurons": {"prompts": ["hi"], "sparsity": "mine"},
    "score_heads": {"method": "induction"},
    "evaluate_head_edit": {"heads": "mine", "mode": "scale", "scale": 0.5},
    "find_circuit": {"pairs": [CleanCorruptPair("a", "b", "c", "d")], "method": "path_patching"},
    "compare_head_sets": {"head_sets": ["one", "two"]},
    "patch_activations": {"pairs": [PatchPair("a", "b", "c", "d")]},
    "attribute_logits": {"prompt": "hi", "target": " you"},
    "read_activations": {"texts": ["hi"], "sites": "resid_post"},
    "find_neurons": {"words": "dog"},
    "localize_neurons": {"method": neurons.welch_t({"a": ["x"], "b": ["y"]}, "a")},
    "evaluate_neuron_edit": {"neurons": "mine", "mode": "clamp", "targets": [neurons.TextsTest("t", "words")]},
    "census_neurons": {"texts": "corpus"},
    "describe_neurons": {"neurons": "mine", "texts": "corpus", "descriptions": ["dogs"]},
    "match_neurons": {"other": "theirs", "texts": "corpus"},
    "compare_neuron_sets": {"neuron_sets": ["one", "two"]},
    "search_features": {"autoencoder": "mine", "label": "dogs"},
    "export_autoencoder": {"ref": "mine"},
    "create_watch": {"items": [monitoring.watch_neurons("n", 1, [2])]},
    "start_watch": {"watch": "mine"},
    "stop_watch": {"name": "mine"},
    "watch_statistics": {"name": "mine"},
    "record_reference": {"name": "mine"},
    "watch_activations": {"name": "mine"},
    "put_artifact": {"data": b"data"},
    "download_artifact": {"ref": "mine"},
    "get_artifact": {"ref": "mine"},
    "tag_artifact": {"tag": "mine", "ref": "other"},
    "untag_artifact": {"tag": "mine"},
    "delete_artifact": {"ref": "mine"},
    "start_job": {"request": requests.record_reference("mine")},
    "follow_job": {"job_id": "job-1"},
    "job": {"job_id": "job-1"},
    "cancel_job": {"job_id": "job-1"},
    "add": {"direction": "v"},
    "project_out": {"direction": "v"},
    "cap_projection": {"direction": "v", "max": 1.0},
    "set_projection": {"direction": "v", "target": 1.0},
    "replace": {"direction": "v"},
    "rotate_towards": {"direction": "v", "radians": 1.0},
    "rotate_in_plane": {"plane": [[1.0, 0.0], [0.0, 1.0]], "radians": 1.0},
    "low_rank": {"rotation": [[1.0]], "weight": [[1.0]], "bias": [1.0]},
    "affine": {"matrix": [[1.0]], "bias": [1.0]},
    "patch": {"activations": "run"},
    "set_neurons": {"neurons": [1], "values": 1.0},
    "scale_neurons": {"neurons": [1], "values": 1.0},
    "add_neurons": {"neurons": [1], "values": 1.0},
    "clamp_neurons": {"neurons": [1], "min": 0.0},
    "set_features": {"autoencoder": "sae", "features": [1], "values": 1.0},
    "scale_features": {"autoencoder": "sae", "features": [1], "values": 0.0},
    "add_features": {"autoencoder": "sae", "features": [1], "values": 1.0},
    "clamp_features": {"autoencoder": "sae", "features": [1], "min": 0.0},
    "scale_heads": {"heads": [1], "factor": 0.5},
    "ablate_heads": {"heads": [1]},
    "mean_heads": {"heads": [1], "mean": [[1.0]]},
    "uniform_heads": {"heads": [1]},
    "read_projection": {"directions": ["v"]},
    "read_neurons": {"neurons": [1]},
    "read_top_neurons": {"k": 1},
    "read_features": {"autoencoder": "sae", "features": [1]},
    "read_top_features": {"autoencoder": "sae", "k": 1},
    "read_logit_lens": {"k": 1},
    "read_probe": {"probe": "mine"},
    "when_probe": {"probe": "mine"},
    "abort_when_probe": {"probe": "mine"},
    "when": {"direction": "v", "layer": 1, "above": 0.0},
    "abort_when": {"direction": "v", "layer": 1, "above": 0.0},
    "when_feature": {"autoencoder": "sae", "feature": 1, "layer": 1, "above": 0.0},
    "abort_when_feature": {"autoencoder": "sae", "feature": 1, "layer": 1, "above": 0.0},
    "vector": {"source": "v"},
    "positions": {"start": 0},
    "last": {"k": 1},
    "tokens": {"ids": [1]},
    "role": {"name": "user"},
    "watch_neurons": {"name": "n", "layer": 1, "neurons": [2]},
    "watch_neuron_set": {"name": "n", "neuron_set": "mine"},
    "watch_direction": {"name": "n", "direction": "v"},
    "watch_features": {"name": "n", "layer": 1, "encoder": [[1.0, 2.0]]},
    "watch_probe": {"name": "n", "probe": "mine"},
    "watch_autoencoder": {"name": "n", "autoencoder": "sae", "features": [1]},
    "watch_heads": {"name": "n", "heads": "mine"},
    "Sparsity": {"profile": "mine"},
    "Grounding": {"head_set": "mine"},
    "Needle": {"question": "q", "needle": "n", "answer": "a"},
    "TemporalFact": {"prompt": "p", "answer": "a", "time_conditioned": True},
    "TextSource": {"texts": ["words"]},
    "Fact": {"prompt": "p", "answer": "a"},
    "FactsTest": {"name": "n", "facts": [("p", "a")]},
    "TextsTest": {"name": "n", "texts": "words"},
    "GenerationTest": {"name": "n", "prompts": ["hi"]},
    "words": {"words": "glad"},
    "target_texts": {"texts": " glad"},
    "classifier": {"texts": "corpus", "target": "a"},
    "probe": {"probe": "mine"},
    "average_precision": {"texts": "corpus", "target": "a"},
    "activation_entropy": {"texts": "corpus"},
    "gradient_times_activation": {"facts": [("p", "a")]},
    "integrated_gradients": {"facts": [("p", "a")]},
    "welch_t": {"texts": "corpus", "target": "a"},
    "contrast_set": {"texts": "corpus", "target": "a"},
    "sparse_probe": {"texts": "corpus", "target": "a"},
    "PatchPair": {"clean": "a", "corrupt": "b"},
    "CleanCorruptPair": {"clean": "a", "corrupt": "b", "clean_answer": "c", "corrupt_answer": "d"},
}
# Words of the package that are no call: types, and what makes a message of a value.
_NO_CALLS = {
    "Head",
    "Scope",
    "program_message",
    "sparsity_message",
    "grounding_message",
    "confidence_message",
    "selection_message",
    "selection_or_layers",
    "quantile_of",
    "texts_message",
    "fact_messages",
    "check_messages",
    "position_messages",
    "Neuron",
    "LocalizationMethod",
}


def client_methods(kind: type[Client] | type[AsyncClient]) -> list[str]:
    """Calls of the server: close() and with_token() are none."""
    functions = [(name, each) for name, each in inspect.getmembers(kind, inspect.isfunction) if name[0] != "_"]
    return [name for name, function in functions if "timeout" in inspect.signature(function).parameters]


def builders() -> dict[str, Callable[..., Any]]:
    """Functions and dataclasses that make parts of a request."""
    found = {name: getattr(package, name) for package in (programs, neurons) for name in package.__all__}
    for module in (sparsity, heads, monitoring, patching, effects, subspaces):
        found |= {
            name: value
            for name, value in vars(module).items()
            if name[0] != "_" and getattr(value, "__module__", None) == module.__name__
        }
    return {
        name: value
        for name, value in found.items()
        if name not in _NO_CALLS and (inspect.isfunction(value) or hasattr(value, "message"))
    }


def arguments_of(name: str) -> Arguments:
    """What is required, so that the call would be accepted."""
    return _REQUIRED.get(name, {})


def made(result: Any) -> Any:
    """The result of a call of the sync client, or the message of a builder."""
    if inspect.isgenerator(result):
        return next(result)
    return result.message() if hasattr(result, "message") else result


async def awaited(result: Any) -> Any:
    """The result of a call of the async client."""
    if inspect.isasyncgen(result):
        return await anext(result)
    return await result if inspect.isawaitable(result) else result
