"""One or more right calls of every RPC, for a server of the tiny llama: what mutated requests begin from.

A call is the list of messages that the client sends. `preparation()` makes the artifacts and the running watch that
others name.
"""

import struct
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import gguf
from google.protobuf.message import Message
from safetensors.torch import save
from torch import Tensor, arange, eye, linspace, ones, zeros

from patchclamp.v1 import (
    activation_pb2,
    artifact_pb2,
    feature_pb2,
    generation_pb2,
    head_pb2,
    job_pb2,
    model_pb2,
    monitoring_pb2,
    neuron_pb2,
    probe_pb2,
    program_pb2,
    sparse_policy_pb2,
    sparsity_pb2,
    steering_pb2,
    tensor_pb2,
)

Call = Sequence[Message]
WIDTH, NEURONS, LAYERS, HEADS = 32, 64, 2, 4

PROMPT = generation_pb2.Prompt(text="hello")
CHAT = generation_pb2.Prompt(
    chat={"messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]}
)
TOKENS = generation_pb2.Prompt(tokens={"ids": [5, 6, 7, 8]})
STOP = generation_pb2.StopConditions(max_tokens=4, strings=["zq"], token_ids=[9], ignore_eos=True, min_tokens=1)
SAMPLING = generation_pb2.Sampling(
    temperature=0.8,
    top_k=20,
    top_p=0.9,
    min_p=0.01,
    repetition_penalty=1.1,
    presence_penalty=0.1,
    seed=1,
    logit_bias={7: 0.5},
)
NEEDLES = head_pb2.NeedleTest(
    haystacks=["It rained. " * 20],
    needles=[head_pb2.Needle(question="Which?", needle="The key is red.", answer="red")],
    lengths=[150],
    depths=[0.5],
    max_runs=1,
)
TEXT = sparsity_pb2.SparsityText(texts=["It rained. " * 8], document_tokens=16)
GRIFFIN = sparse_policy_pb2.SparsePolicy(griffin=sparse_policy_pb2.GriffinPolicy(), keep_ratio=0.5)
SELECTED = head_pb2.HeadSelection(head_set="heads", top_k=1)
PAIR = head_pb2.CleanCorruptPair(
    clean=generation_pb2.Prompt(text="AAAAAAAA is"),
    corrupt=generation_pb2.Prompt(text="zzzzzzzz is"),
    clean_answer="d",
    corrupt_answer="Y",
)
INTERCHANGE = steering_pb2.InterchangePair(base=PROMPT, source={"text": "there"}, answer="x")
SCORES = head_pb2.ScoreHeadsRequest(method="HEAD_SCORE_METHOD_NGRAM", ngram=2, sequence_tokens=8, sequences=2)
GROUPS = [
    {"label": label, "prompts": [{"text": f"{word} {i}" * (i + 1)} for i in range(4)]}
    for label, word in (("rain", "It rained."), ("sun", "It shone."))
]
FACTS = [head_pb2.TemporalFact(prompt=f"In 19{i}0", answer="x", time_conditioned=i < 2) for i in range(4)]


def tensor(*shape: int, value: float = 0.5) -> tensor_pb2.Tensor:
    n = 1
    for size in shape:
        n *= size
    return tensor_pb2.Tensor(dtype="DATA_TYPE_FLOAT32", shape=shape, data=struct.pack("<f", value) * n)


def plane() -> tensor_pb2.Tensor:
    data: bytes = eye(2, WIDTH).numpy().tobytes()
    return tensor_pb2.Tensor(dtype="DATA_TYPE_FLOAT32", shape=(2, WIDTH), data=data)


def vector(width: int = WIDTH) -> program_pb2.Vector:
    return program_pb2.Vector(values=tensor(width))


def condition(threshold: float) -> program_pb2.Condition:
    return program_pb2.Condition(
        site="SITE_RESID_PRE", layer=1, vector=vector(), comparison="COMPARISON_ABOVE", threshold=threshold
    )


def edit(site: str, **kind: Any) -> program_pb2.Edit:
    return program_pb2.Edit(site=site, layers=[1], strength=0.5, **kind)


SCOPE = program_pb2.Scope(include=[{"phase": "PHASE_PROMPT", "last_k": 2}, {"positions": {"start": -3, "end": -1}}])
EDITS = [
    edit("SITE_RESID_POST", name="steer", add={"vector": vector()}, scope=SCOPE, preserve_norm=True),
    edit("SITE_RESID_POST", add={"vector": program_pb2.Vector(artifact="vector", artifact_layer=0, unit=True)}),
    edit("SITE_RESID_PRE", project_out={"vector": vector()}),
    edit("SITE_RESID_MID", cap_projection={"vector": vector(), "min": -1.0, "max": 1.0}),
    edit("SITE_ATTN_OUT", set_projection={"vector": vector(), "target": 0.5}),
    edit("SITE_MLP_OUT", replace={"vector": vector()}),
    edit("SITE_RESID_POST", rotate_towards={"vector": vector(), "radians": 0.3}),
    edit("SITE_RESID_POST", low_rank={"rotation": tensor(2, WIDTH), "weight": tensor(2, WIDTH), "bias": tensor(2)}),
    edit("SITE_RESID_POST", low_rank={"subspace": "subspace"}),
    edit("SITE_RESID_POST", rotate_in_plane={"plane": plane(), "centre": tensor(WIDTH), "radians": 1.0}),
    edit("SITE_RESID_POST", rotate_in_plane={"subspace": "subspace", "radians": -1.0}),
    edit("SITE_RESID_POST", affine={"affine_map": "affine_map"}),
    edit("SITE_RESID_POST", affine={"matrix": tensor(WIDTH, WIDTH), "bias": tensor(WIDTH)}),
    edit("SITE_RESID_MID", affine={"left": tensor(WIDTH, 2), "right": tensor(WIDTH, 2)}),
    edit("SITE_MLP_POST", neurons={"neurons": [1, 2], "set": {"values": [0.5, 1.0]}}),
    edit("SITE_MLP_POST", neurons={"neurons": [3], "clamp": {"min": -1.0, "max": 1.0}}),
    edit("SITE_MLP_GATE", neurons={"neurons": [3], "add": {"values": [0.5]}}),
    edit("SITE_MLP_UP", neurons={"neurons": [1, 2], "clamp": {"max": 1.0}}),
    program_pb2.Edit(site="SITE_MLP_POST", neurons={"neuron_set": "neurons", "scale": {"values": [0.5]}}),
    edit("SITE_RESID_POST", features={"autoencoder": "sae", "features": [1, 2], "set": {"values": [1.0, 0.5]}}),
    program_pb2.Edit(
        site="SITE_RESID_POST", features={"autoencoder": "sae", "features": [3], "clamp": {"max": 0.5}}, strength=0.5
    ),
    edit("SITE_ATTN_Z", heads={"heads": [0, 1], "scale": 0.0}),
    edit("SITE_ATTN_Z", heads={"heads": [2], "mean": tensor(1, WIDTH // HEADS)}),
    edit("SITE_ATTN_Z", heads={"heads": [3], "uniform": True}),
    edit(
        "SITE_RESID_POST", patch={"activations": "run", "positions": [{"position": -1, "source": 2}], "units": [1, 5]}
    ),
    edit("SITE_ATTN_Z", patch={"activations": "run", "source_layer": 0, "heads": [2]}, scope=SCOPE),
    edit("SITE_RESID_POST", patch={"activations": "run", "subspace": "subspace"}),
]
READOUTS = [
    program_pb2.Readout(site="SITE_RESID_POST", layers=[0], projection={"vectors": [vector()]}),
    program_pb2.Readout(name="n", site="SITE_MLP_POST", all_layers=True, neurons={"neurons": [0, 5]}),
    program_pb2.Readout(site="SITE_MLP_POST", layers=[1], top_neurons={"k": 3}, scope=SCOPE),
    program_pb2.Readout(name="g", site="SITE_MLP_GATE", layers=[1], neurons={"neurons": [0]}),
    program_pb2.Readout(site="SITE_RESID_POST", layers=[1], logit_lens={"k": 2}),
    program_pb2.Readout(site="SITE_MLP_POST", layers=[0], logit_lens={"token_ids": [4, 9], "neurons": [2]}),
    program_pb2.Readout(site="SITE_MLP_OUT", layers=[1], activations={"units": [0, 3]}),
    program_pb2.Readout(site="SITE_ATTN_Z", layers=[1], heads={"heads": [0]}),
    program_pb2.Readout(name="f", site="SITE_RESID_POST", layers=[1], features={"autoencoder": "sae", "features": [4]}),
    program_pb2.Readout(name="k", site="SITE_RESID_POST", layers=[1], features={"autoencoder": "sae", "k": 2}),
]
FEATURE = program_pb2.Condition(
    site="SITE_RESID_POST",
    layer=1,
    feature={"autoencoder": "sae", "feature": 2},
    comparison="COMPARISON_ABOVE",
    threshold=1e6,
)
GATED = edit("SITE_RESID_POST", add={"vector": vector()}, gate={"condition": condition(0.1), "latched": True})
PROGRAM = program_pb2.Program(
    edits=[EDITS[0], GATED],
    readouts=READOUTS,
    abort_when=[{"name": "never", "condition": condition(1e6)}, {"name": "nor this", "condition": FEATURE}],
)


PROBED = program_pb2.Program(
    edits=[edit("SITE_RESID_POST", add={"vector": vector()}, gate={"condition": {"probe": "probe", "comparison": 1}})],
    readouts=[program_pb2.Readout(name="p", probe={"probe": "probe", "all_classes": True})],
    abort_when=[{"name": "sure", "condition": {"probe": "probe", "comparison": 1, "threshold": 0.999}}],
)


def generate(**fields: Any) -> generation_pb2.GenerateRequest:
    return generation_pb2.GenerateRequest(**{"prompt": PROMPT, "stop": STOP, **fields})


def session(*events: generation_pb2.SessionRequest, lockstep: bool) -> Call:
    start = generation_pb2.SessionStart(request=generate(program=PROGRAM), lockstep=lockstep)
    return [generation_pb2.SessionRequest(start=start), *events]


def upload(kind: str, tag: str, file: bytes, **header: Any) -> Call:
    fields = {"kind": kind, "format": "ARTIFACT_FORMAT_SAFETENSORS", "tags": [tag], "size_bytes": len(file), **header}
    middle = len(file) // 2
    return [
        artifact_pb2.UploadRequest(header=artifact_pb2.UploadHeader(**fields)),
        artifact_pb2.UploadRequest(chunk=file[:middle]),
        artifact_pb2.UploadRequest(chunk=file[middle:]),
    ]


def file(tensors: dict[str, Tensor]) -> bytes:
    data: bytes = save(tensors)
    return data


CORPUS = b'{"text": "a dog", "label": "en"}\n{"text": "ein Hund"}\n'


def activations() -> dict[str, Tensor]:
    """Rows of three tokens of one text."""
    places = {f"{site}.{layer}": ones(3, WIDTH) for site in ("resid_post", "attn_z") for layer in range(LAYERS)}
    return {"text": 0 * arange(3), "position": arange(3), "token": arange(3), "length": 0 * arange(3) + 3, **places}


def artifacts() -> list[Call]:
    scores = linspace(0, 1, LAYERS * HEADS).reshape(LAYERS, HEADS)
    probe = file({"layer.0.weight": ones(2, WIDTH) * 0.01 * arange(2)[:, None], "bias": zeros(2)})
    said = {"method": "logistic", "site": "resid_post", "labels": ["no", "yes"], "target": "yes"}
    vectors = file({f"layer.{layer}": ones(WIDTH) for layer in range(LAYERS)})
    parts = {"rotation": eye(WIDTH)[:2], "weight": ones(2, WIDTH), "bias": ones(2), "centre": ones(WIDTH)}
    subspace = {f"layer.{layer}.{name}": part.clone() for layer in range(LAYERS) for name, part in parts.items()}
    maps = {f"layer.{layer}.matrix": eye(WIDTH) for layer in range(LAYERS)}
    return [
        upload("ARTIFACT_KIND_VECTOR", "vector", vectors, site="SITE_RESID_POST", provenance={"method": "by hand"}),
        upload("ARTIFACT_KIND_NEURON_SET", "neurons", file({"layer.0.neurons": arange(4)})),
        upload("ARTIFACT_KIND_SUBSPACE", "subspace", file(subspace)),
        upload("ARTIFACT_KIND_AFFINE_MAP", "affine_map", file(maps)),
        upload("ARTIFACT_KIND_HEAD_SET", "heads", file({"scores": scores})),
        upload("ARTIFACT_KIND_ACTIVATIONS", "run", file(activations())),
        upload("ARTIFACT_KIND_PROBE", "probe", probe, provenance=said),
        upload(
            "ARTIFACT_KIND_AUTOENCODER",
            "sae",
            file(
                {
                    "encoder": ones(6, WIDTH),
                    "encoder_bias": ones(6),
                    "decoder": ones(6, WIDTH),
                    "decoder_bias": ones(WIDTH),
                }
            ),
            site="SITE_RESID_POST",
            provenance={"layer": 1, "function": "relu", "subtracted": "nothing"},
        ),
        upload("ARTIFACT_KIND_CORPUS", "corpus", CORPUS, format="ARTIFACT_FORMAT_TEXT_JSON_LINES"),
        upload("ARTIFACT_KIND_AUTOENCODER", "autoencoder", saelens(), format="ARTIFACT_FORMAT_SAELENS", config=SAE),
        upload("ARTIFACT_KIND_FEATURE_LABELS", "labels", LABELS, format=LABEL_JSON, of="autoencoder"),
        upload("ARTIFACT_KIND_VECTOR", "theirs", file({"rows": eye(WIDTH)}), tensor_names={"layer.0": "rows[2]"}),
        upload(
            "ARTIFACT_KIND_VECTOR",
            "counted",
            control_vector(),
            format="ARTIFACT_FORMAT_GGUF_CONTROL_VECTOR",
            layer_offset=-1,
        ),
        upload("ARTIFACT_KIND_HEAD_SET", "gates", GATES, format="ARTIFACT_FORMAT_DUO_ATTENTION_TSV"),
        upload("ARTIFACT_KIND_HEAD_SET", "listed", HEAD_LIST, format="ARTIFACT_FORMAT_QR_HEAD_YAML"),
    ]


SAE = '{"architecture": "topk", "k": 2, "metadata": {"hook_name": "blocks.1.hook_resid_post"}}'
LABELS, LABEL_JSON = b'{"1": "dogs", "3": "rain"}', "ARTIFACT_FORMAT_FEATURE_LABEL_JSON"
GATES, HEAD_LIST = b"0.25\t1.0\n0.5\t0.0\n", b'attn_head_set: "1-3,0-0"\n'


def control_vector() -> bytes:
    """As many directions as the model has hidden states."""
    with TemporaryDirectory() as directory:
        writer = gguf.GGUFWriter(f"{directory}/vector.gguf", "controlvector")
        for number in range(LAYERS + 1):
            writer.add_tensor(f"direction.{number}", ones(WIDTH).numpy())
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return Path(directory, "vector.gguf").read_bytes()


def saelens() -> bytes:
    weights = linspace(-1, 1, 6 * WIDTH).reshape(6, WIDTH)
    return file({"W_enc": weights.T.contiguous(), "b_enc": ones(6), "W_dec": weights, "b_dec": ones(WIDTH)})


def preparation() -> list[tuple[str, Call]]:
    """Full names of methods, and what to call them with, in order."""
    uploads = [("patchclamp.v1.ArtifactService/Upload", upload) for upload in artifacts()]
    create, start = "patchclamp.v1.MonitoringService/CreateWatch", "patchclamp.v1.MonitoringService/StartWatch"
    return [*uploads, (create, calls()[create][0]), (start, [start_watch("w")])]


def calls() -> dict[str, list[Call]]:
    """By the full name of the method."""
    named = {
        "GenerationService/Generate": [
            *([generate(program=program_pb2.Program(edits=[each]))] for each in EDITS),
            [generate(prompt=CHAT, program=PROGRAM, sampling=SAMPLING, logprobs=2, priority="PRIORITY_BATCH")],
            [generate(prompt=TOKENS, sparsity={"policy": GRIFFIN, "guard": {"max_divergence": 1.0}})],
            [generate(program=PROBED)],
            [generate(grounding={"head_set": "heads", "top_k": 1})],
            [generate(confidence={"layers": [0], "options": ["yes", "no"], "thresholds": [0.25]})],
        ],
        "GenerationService/Session": [
            session(generation_pb2.SessionRequest(advance={"tokens": 2}), lockstep=True),
            session(
                generation_pb2.SessionRequest(set_strength={"edit": "steer", "strength": 0.25}),
                generation_pb2.SessionRequest(stop={}),
                lockstep=False,
            ),
        ],
        "GenerationService/Score": [
            [generation_pb2.ScoreRequest(prompt=PROMPT, text=" there", program=PROGRAM, top_logprobs=2)],
            [generation_pb2.ScoreRequest(prompt=TOKENS, tokens={"ids": [9, 10]}, sparsity={"policy": GRIFFIN})],
            [generation_pb2.ScoreRequest(prompt=PROMPT, text=" there", confidence={"layers": [0, 1]})],
        ],
        "GenerationService/Compare": [[generation_pb2.CompareRequest(request=generate(program=PROGRAM))]],
        "SteeringService/ExtractVectors": [
            [
                steering_pb2.ExtractVectorsRequest(
                    method=method,
                    pairs=[
                        {"positive": {"text": f"good {i}" + "!" * i}, "negative": {"text": f"bad {i * i} day"}}
                        for i in range(4)
                    ],
                    layers=[1],
                    pooling="TOKEN_POOLING_MEAN",
                    holdout_fraction=0.5,
                    tags=["extracted"],
                )
            ]
            for method in ("EXTRACTION_METHOD_DIFFERENCE_OF_MEANS", "EXTRACTION_METHOD_PCA_OF_DIFFERENCES")
        ]
        + [
            [
                steering_pb2.ExtractVectorsRequest(
                    method="EXTRACTION_METHOD_LINEAR_DISCRIMINANT",
                    texts={
                        "groups": [
                            {"label": label, "prompts": [{"text": f"{label} {i}"} for i in range(4)]}
                            for label in ("good", "bad")
                        ]
                    },
                    target="good",
                    contrast="bad",
                    layers=[1],
                    scope={"include": [{"last_k": 2}]},
                )
            ],
            [
                steering_pb2.ExtractVectorsRequest(
                    method="EXTRACTION_METHOD_DEFINITION",
                    demonstrations=[{"input": f"in {i}", "output": f"out {i}"} for i in range(4)],
                    definition="in and out",
                    layers=[1],
                    holdout_fraction=0.5,
                )
            ],
            [
                steering_pb2.ExtractVectorsRequest(
                    method="EXTRACTION_METHOD_REFT_R1",
                    pairs=[{"positive": {"text": f"good {i}!"}, "negative": {"text": f"bad {i}?"}} for i in range(4)],
                    layers=[1],
                    training={"max_steps": 2, "learning_rate": 0.01, "batch_size": 2, "patience": 1},
                )
            ],
        ],
        "SteeringService/CalibrateVector": [
            [
                steering_pb2.CalibrateVectorRequest(
                    vector="vector",
                    layers=[1],
                    strengths=[-0.5, 1.0],
                    prompts=[PROMPT, CHAT],
                    instruction="Be glad.",
                    max_tokens=2,
                    effect=effect,
                    random_vectors=1,
                    max_perplexity_ratio=3.0,
                    max_repetition=0.5,
                    tags=["calibrated"],
                    replace_tags=True,
                )
            ]
            for effect in (
                {"projection": True},
                {"probe": "probe"},
                {"words": {"words": ["a"]}},
                {"target_texts": {"texts": [" you"]}},
                {"classifier": {"texts": {"groups": GROUPS}, "target": "rain"}},
            )
        ],
        "SteeringService/DetectConcept": [
            [
                steering_pb2.DetectConceptRequest(
                    detectors=["vector"],
                    texts={"groups": GROUPS, "window_tokens": 16},
                    target="rain",
                    layers=[1],
                    poolings=["DETECTION_POOLING_MEAN", "DETECTION_POOLING_MAX"],
                    calibration_fraction=0.5,
                )
            ],
            [
                steering_pb2.DetectConceptRequest(
                    detectors=["probe"],
                    features=[{"autoencoder": "sae", "feature": 1}],
                    texts={"groups": GROUPS, "window_tokens": 16},
                    target="rain",
                )
            ],
        ],
        "ProbeService/TrainProbe": [
            [
                probe_pb2.TrainProbeRequest(
                    method=method,
                    texts={
                        "groups": [
                            {"label": str(i), "prompts": [{"text": f"{word} {n}"} for n in range(5)]}
                            for i, word in enumerate(["yes", "never"])
                        ]
                    },
                    layers=[1],
                    tags=["probed"],
                    replace_tags=True,
                )
            ]
            for method in ("PROBE_METHOD_LOGISTIC", "PROBE_METHOD_RIDGE", "PROBE_METHOD_PROTOTYPE")
        ],
        "SteeringService/FindConceptCircuit": [
            [
                steering_pb2.FindConceptCircuitRequest(
                    scenarios=[
                        {
                            "values": [
                                {"label": value, "prompts": [{"text": f"{thing} {value}"}]} for value in ("good", "bad")
                            ]
                        }
                        for thing in ("rain", "a letter", "the road")
                    ],
                    target="good",
                    site="SITE_RESID_POST",
                    layers=[1],
                    neurons=4,
                    heads=2,
                    random_sets=1,
                    seed=3,
                    pooling="TOKEN_POOLING_MEAN",
                    holdout_fraction=0.3,
                    tags=["goodness"],
                    replace_tags=True,
                )
            ]
        ],
        "SteeringService/FindSubspace": [
            [
                steering_pb2.FindSubspaceRequest(
                    circular_plane={
                        "values": [{"value": str(i), "prompts": [{"text": f"on {i}"}]} for i in range(5)],
                        "components": 3,
                    },
                    layers=[1],
                    tags=["plane"],
                )
            ],
            [
                steering_pb2.FindSubspaceRequest(
                    distributed_alignment={
                        "pairs": [INTERCHANGE] * 3,
                        "kept": [INTERCHANGE] * 2,
                        "rank": 2,
                        "training": {"max_steps": 2, "learning_rate": 0.01, "batch_size": 2, "patience": 1},
                        "holdout_fraction": 0.5,
                    },
                    layers=[0],
                    scope=SCOPE,
                )
            ],
        ],
        "SparsityService/CalibrateProfile": [
            [
                sparsity_pb2.CalibrateProfileRequest(
                    policy=sparse_policy_pb2.SparsePolicy(**{name: {}}, keep_ratio=0.5),
                    text=TEXT,
                    holdout_fraction=0.25,
                )
            ]
            for name in ("teal", "cats", "fovea", "coreinfer_similarity", "static_set")
        ],
        "SparsityService/EvaluateProfile": [
            [sparsity_pb2.EvaluateProfileRequest(sparsities=[sparse_policy_pb2.Sparsity(policy=GRIFFIN)], text=TEXT)]
        ],
        "SparsityService/PredictCoreNeurons": [
            [
                sparsity_pb2.PredictCoreNeuronsRequest(
                    sparsity=sparse_policy_pb2.Sparsity(policy=GRIFFIN), prompts=[PROMPT, PROMPT], layers=[0]
                )
            ]
        ],
        "HeadService/DetectRetrievalHeads": [
            [
                head_pb2.DetectRetrievalHeadsRequest(
                    test=NEEDLES, stopping=head_pb2.StoppingRule(top_k=2), tags=["detected"]
                )
            ]
        ],
        "HeadService/ScoreHeads": [
            [SCORES],
            [head_pb2.ScoreHeadsRequest(method="HEAD_SCORE_METHOD_INDUCTION", sequence_tokens=8, sequences=1)],
            [head_pb2.ScoreHeadsRequest(method="HEAD_SCORE_METHOD_TEMPORAL", facts=FACTS)],
            [head_pb2.ScoreHeadsRequest(method="HEAD_SCORE_METHOD_SUCCESSOR")],
        ],
        "HeadService/EvaluateHeadEdit": [
            [
                head_pb2.EvaluateHeadEditRequest(
                    heads=SELECTED,
                    mode="HEAD_EDIT_MODE_SCALE",
                    scale=0.5,
                    random_sets=1,
                    test=NEEDLES,
                    texts=["It rained."],
                )
            ]
        ],
        "HeadService/FindCircuit": [
            [head_pb2.FindCircuitRequest(method=method, pairs=[PAIR], circuit_size=2, random_sets=1)]
            for method in ("CIRCUIT_METHOD_MEAN_ABLATION", "CIRCUIT_METHOD_PATH_PATCHING")
        ],
        "ActivationService/PatchActivations": patchings(),
        "HeadService/CompareHeadSets": [[head_pb2.CompareHeadSetsRequest(head_sets=["heads", "heads"], top_k=2)]],
        "HeadService/AttributeLogits": [
            [head_pb2.AttributeLogitsRequest(prompt=PROMPT, target="a", contrast="b", top_heads=1)]
        ],
        "ArtifactService/Upload": artifacts(),
        "ArtifactService/Download": [
            [artifact_pb2.DownloadRequest(ref="vector", format="ARTIFACT_FORMAT_SAFETENSORS", layers=[1])],
            [artifact_pb2.DownloadRequest(ref="heads", format="ARTIFACT_FORMAT_HEAD_SCORE_JSON")],
        ],
        "NeuronService/CensusNeurons": [
            [
                neuron_pb2.CensusNeuronsRequest(
                    texts={"groups": [{"label": "l", "prompts": [PROMPT, TOKENS]}], "window_tokens": 8},
                    layers=[1],
                    threshold=0.1,
                    rare_below=0.01,
                    min_occurrences=1,
                    checkpoint_tokens=64,
                    tags=["census"],
                    replace_tags=True,
                )
            ]
        ],
        "ArtifactService/GetArtifact": [[artifact_pb2.GetArtifactRequest(ref="heads")]],
        "ArtifactService/ListArtifacts": [
            [artifact_pb2.ListArtifactsRequest(kind="ARTIFACT_KIND_HEAD_SET", page_size=1)]
        ],
        "ArtifactService/TagArtifact": [[artifact_pb2.TagArtifactRequest(tag="tagged", ref="heads")]],
        # Of what nobody else names.
        "ArtifactService/DeleteArtifact": [[artifact_pb2.DeleteArtifactRequest(ref="extracted")]],
        "JobService/StartJob": [
            [job_pb2.StartJobRequest(score_heads=SCORES)],
            [job_pb2.StartJobRequest(record_reference=monitoring_pb2.RecordReferenceRequest(name="w", tokens=8))],
        ],
        **{
            f"JobService/{name}Job": [[getattr(job_pb2, f"{name}JobRequest")(id="job-0123456789abcdef")]]
            for name in ("Follow", "Get", "Cancel")
        },
        "JobService/ListJobs": [[job_pb2.ListJobsRequest()]],
        "ModelService/ListModels": [[model_pb2.ListModelsRequest()]],
        "ModelService/Tokenize": [[model_pb2.TokenizeRequest(prompt=prompt)] for prompt in (PROMPT, CHAT, TOKENS)],
        "ModelService/Detokenize": [[model_pb2.DetokenizeRequest(ids=[1, 40, 41], skip_special_tokens=True)]],
        **monitoring(),
        **neurons(),
        "FeatureService/SearchFeatures": [[each] for each in searches()],
    }
    return {f"patchclamp.v1.{method}": calls for method, calls in named.items()}


def start_watch(name: str) -> monitoring_pb2.StartWatchRequest:
    return monitoring_pb2.StartWatchRequest(
        watch="watched", name=name, sampling_rate=1.0, window_tokens=64, buckets=[0.0, 1.0]
    )


def monitoring() -> dict[str, list[Call]]:
    items: list[dict[str, Any]] = [
        {"name": "n", "neurons": {"layer": 1, "neurons": [0, 5]}, "threshold": 0.1},
        {"name": "d", "direction": {"site": "SITE_RESID_POST", "layers": [1], "vector": vector()}},
        {"name": "f", "features": {"site": "SITE_RESID_POST", "layer": 0, "encoder": tensor(2, WIDTH)}},
        {"name": "h", "heads": {"heads": {"heads": {"heads": [{"layer": 1, "head": 0}]}}}},
    ]
    pb = monitoring_pb2
    return {
        "MonitoringService/CreateWatch": [[pb.CreateWatchRequest(items=items, tags=["watched"])]],
        "MonitoringService/StartWatch": [[start_watch("other")]],
        "MonitoringService/ListWatches": [[pb.ListWatchesRequest()]],
        "MonitoringService/GetWatchStatistics": [[pb.GetWatchStatisticsRequest(name="w")]],
        "MonitoringService/RecordReference": [[pb.RecordReferenceRequest(name="w", tokens=8, use=True)]],
        "MonitoringService/WatchActivations": [[pb.WatchActivationsRequest(name="w", max_events=1)]],
        "MonitoringService/StopWatch": [[pb.StopWatchRequest(name="other")]],
    }


def patchings() -> list[Call]:
    pairs = [activation_pb2.PatchPair(clean=PROMPT, corrupt=CHAT, answer=" a", other_answer=" b")]
    columns = [{"name": "last", "positions": {"start": -1, "end": 0}}, {"name": "first", "positions": {"end": 1}}]
    return [
        [
            activation_pb2.PatchActivationsRequest(
                pairs=pairs,
                direction="PATCH_DIRECTION_CORRUPT",
                sites=["SITE_ATTN_Z", "SITE_MLP_OUT"],
                layers=[1],
                layer_window=2,
                positions=columns,
                by_head=True,
                metric=metric,
                seed=3,
            )
        ]
        for metric in ("PATCH_METRIC_LOG_PROBABILITY_DIFFERENCE", "PATCH_METRIC_DIVERGENCE")
    ]


def neurons() -> dict[str, list[Call]]:
    pb = neuron_pb2
    texts = pb.TextSource(
        groups=[{"label": "rain", "prompts": [PROMPT, {"text": "It rained. " * 4}]}], window_tokens=16, max_tokens=48
    )
    listed = pb.NeuronSelection(neurons={"neurons": [{"layer": 0, "neuron": 1}, {"layer": 1, "neuron": 5}]})
    describe = pb.DescribeNeuronsRequest(
        neurons=listed,
        texts=texts,
        contexts=2,
        context_tokens=3,
        descriptions=["rain", "x"],
        causal=True,
        random_neurons=2,
    )
    match = pb.MatchNeuronsRequest(other="other", texts=texts, neurons=listed, any_layer=True)
    facts = [{"prompt": {"text": f"It is {what}"}, "answer": "x"} for what in ("rain", "red")]
    clamp = pb.EvaluateNeuronEditRequest(
        neurons={"neuron_set": "neurons"},
        mode="NEURON_EDIT_MODE_CLAMP",
        value=1.0,
        fractions=[0.5],
        targets=[pb.NeuronTest(name="facts", facts={"facts": facts})],
        sides=[pb.NeuronTest(name="texts", texts={"texts": ["It rained."]})],
        random_sets=1,
    )
    generation = pb.GenerationTest(prompts=[PROMPT], max_tokens=2, words=["rain"])
    mean = pb.EvaluateNeuronEditRequest(
        neurons=listed,
        mode="NEURON_EDIT_MODE_MEAN",
        mean_texts=["It rained."],
        targets=[pb.NeuronTest(name="words", generation=generation)],
        random_sets=1,
        scope=SCOPE,
    )
    words = pb.FindNeuronsRequest(words={"words": ["dog", "cat"]}, layers=[0], top_k=3, value=5.0)
    along = pb.FindNeuronsRequest(vector={"artifact": "vector"}, top_k=2, tags=["found"], replace_tags=True)
    return {
        "NeuronService/DescribeNeurons": [[describe]],
        "NeuronService/MatchNeurons": [[match]],
        "ActivationService/ReadActivations": [
            [
                activation_pb2.ReadActivationsRequest(
                    prompts=[PROMPT, CHAT],
                    program=program_pb2.Program(edits=[edit("SITE_RESID_POST", add={"vector": vector()})]),
                    sites=["SITE_RESID_POST", "SITE_MLP_GATE"],
                    layers=[0],
                    scope={"include": [{"last_k": 2}]},
                    dtype="DATA_TYPE_BFLOAT16",
                )
            ],
            [
                activation_pb2.ReadActivationsRequest(
                    texts=neuron_pb2.TextSource(
                        groups=[neuron_pb2.LabelledTexts(label="a", prompts=[PROMPT])], window_tokens=8, max_tokens=16
                    ),
                    sites=["SITE_ATTN_Z"],
                    reduction="ACTIVATION_REDUCTION_MEAN",
                    store=True,
                    description="d",
                    tags=["rows"],
                    replace_tags=True,
                )
            ],
        ],
        "NeuronService/DecodeNeurons": [
            [pb.DecodeNeuronsRequest(neurons=listed, top_k=3)],
            [pb.DecodeNeuronsRequest(layers=[1], weights=["NEURON_WEIGHTS_DOWN"], top_k=1)],
        ],
        "NeuronService/FindNeurons": [[words], [along]],
        "NeuronService/LocalizeNeurons": [[each] for each in localizations()],
        "NeuronService/EvaluateNeuronEdit": [[clamp], [mean]],
        "NeuronService/CompareNeuronSets": [[pb.CompareNeuronSetsRequest(neuron_sets=["neurons", "neurons"])]],
    }


def searches() -> list[feature_pb2.SearchFeaturesRequest]:
    groups = [{"label": label, "prompts": [{"text": text}]} for label, text in (("a", "It rained."), ("b", "The key"))]
    ways: list[dict[str, Any]] = [
        {"contrast": {"texts": {"groups": groups, "window_tokens": 16}, "target": "a", "contrast": "b"}},
        {"tokens": {"texts": {"groups": groups}, "tokens": ["a", "e"]}, "labels": "labels"},
        {"direction": vector()},
        {"label": "dog", "labels": "labels"},
    ]
    return [feature_pb2.SearchFeaturesRequest(autoencoder="autoencoder", top_k=3, **way) for way in ways]


def localizations() -> list[neuron_pb2.LocalizeNeuronsRequest]:
    pb = neuron_pb2
    groups = [
        {"label": label, "prompts": [{"text": f"{text} {'again ' * i}"} for i in range(4)]}
        for label, text in (("rain", "It rained"), ("key", "The red key"))
    ]
    texts = pb.TextSource(groups=groups, window_tokens=64)
    facts = [{"prompt": {"text": "It is"}, "answer": "x"}]
    methods: dict[str, Any] = {
        "average_precision": {"texts": texts, "target": "rain"},
        "activation_entropy": {"texts": texts, "activity": 0.5},
        "gradient_times_activation": {"facts": facts, "controls": facts},
        "integrated_gradients": {"facts": facts, "max_steps": 16, "completeness": 0.1},
        "welch_t": {"texts": texts, "target": "rain", "contrast": "key", "pooling": "NEURON_POOLING_MAX"},
        "contrast_set": {"texts": texts, "target": "rain", "z": 0.0, "subsets": 1},
    }
    found = [
        pb.LocalizeNeuronsRequest(**{name: method}, top_k=4, random_sets=2, holdout_fraction=0.5)
        for name, method in methods.items()
    ]
    probe = pb.SparseProbeMethod(texts=texts, target="key", ranker="NEURON_RANKER_F", k=[1, 2], by_layer=True)
    return [*found, pb.LocalizeNeuronsRequest(sparse_probe=probe, random_sets=2, layers=[1])]
