"""Programs for tests: every kind of edit at every site it may have, and mixed programs.

Everything is deterministic: numbers come from generators seeded by name, so a failure repeats by its test id.
"""

import math
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from tiny_models import VOCAB, tiny_model
from torch import Tensor

from patchclamp_server.interventions.kinds.affine import Affine
from patchclamp_server.interventions.kinds.patch import Patch, SourceRows
from patchclamp_server.interventions.kinds.rotate_in_plane import RotateInPlane
from patchclamp_server.interventions.program import (
    AbortCondition,
    ActivationReadout,
    AddVector,
    CapProjection,
    Comparison,
    Condition,
    Edit,
    EditKind,
    Gate,
    HeadEdit,
    HeadReadout,
    LogitLensReadout,
    LowRank,
    NeuronEdit,
    NeuronOp,
    NeuronReadout,
    Phase,
    PositionRange,
    Program,
    ProjectionReadout,
    ProjectOut,
    Readout,
    ReadoutKind,
    ReplaceVector,
    RotateTowards,
    Scope,
    SetProjection,
    TokenSelector,
    TopNeuronsReadout,
    Vector,
)
from patchclamp_server.model.sites import NEURON_SITES, PUBLIC_SITES, Site

UNGATED = ("gpt2", "opt", "gpt_neox")


@dataclass(frozen=True)
class Shapes:
    """What a program must know of a model."""

    family: str
    n_layers: int
    n_heads: int
    head_dim: int
    d_ff: int
    sites: dict[Site, int]


@cache
def shapes(family: str) -> Shapes:
    config = tiny_model(family).config
    d_model, n_heads = config.hidden_size, config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or d_model // n_heads
    d_ff = next(getattr(config, name) for name in ("intermediate_size", "n_inner", "ffn_dim") if hasattr(config, name))
    sites = dict.fromkeys(PUBLIC_SITES, d_model) | {Site.ATTN_Z: n_heads * head_dim} | dict.fromkeys(NEURON_SITES, d_ff)
    if family == "gpt_neox":
        del sites[Site.RESID_MID]
    if family in UNGATED:
        del sites[Site.MLP_GATE]
    return Shapes(family, config.num_hidden_layers, n_heads, head_dim, d_ff, sites)


def numbers(seed: str, *shape: int) -> Tensor:
    """Standard normal numbers that depend on the seed alone."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(zlib.crc32(seed.encode())))


def prompt(seed: str, length: int) -> tuple[int, ...]:
    generator = torch.Generator().manual_seed(zlib.crc32(seed.encode()))
    return tuple(torch.randint(3, VOCAB, (length,), generator=generator).tolist())


def _vector(seed: str, width: int, **options: Any) -> Vector:
    return Vector(values=numbers(seed, width), **options)


def source_rows(seed: str, width: int, length: int = 12, layers: int = 3) -> SourceRows:
    """Rows of a text that lacks one at position 4."""
    positions = torch.tensor([p for p in range(length) if p != 4])
    rows = {layer: numbers(f"{seed} source {layer}", len(positions), width) for layer in range(layers)}
    return SourceRows(positions, length, rows)


# Of prompts of some lengths two of these are one token, and of others some are generated or not there.
POSITION_MAP = ((3, 0), (7, 7), (-1, -1), (-3, 5), (0, 2), (14, 9), (21, 1), (-16, 6))


# Kind of edit -> its message, for a seed, a width and the shapes.
_VECTOR_KINDS: dict[str, Callable[[str, int], EditKind]] = {
    "add": lambda seed, width: AddVector(_vector(seed, width)),
    "project_out": lambda seed, width: ProjectOut(_vector(seed, width)),
    "cap_projection": lambda seed, width: CapProjection(_vector(seed, width), min=-0.4, max=0.3),
    "set_projection": lambda seed, width: SetProjection(_vector(seed, width), target=2.5),
    "replace": lambda seed, width: ReplaceVector(_vector(seed, width)),
    "rotate_towards": lambda seed, width: RotateTowards(_vector(seed, width), radians=0.6),
    "rotate_in_plane": lambda seed, width: RotateInPlane(
        1.3, plane=numbers(seed + "P", 2, width), centre=0.1 * numbers(seed + "c", width)
    ),
    "low_rank": lambda seed, width: LowRank(
        rotation=numbers(seed + "R", 3, width) / math.sqrt(width),
        weight=numbers(seed + "W", 3, width) / math.sqrt(width),
        bias=numbers(seed + "b", 3),
    ),
    "affine": lambda seed, width: Affine(
        matrix=numbers(seed + "A", width, width) / math.sqrt(width), bias=0.1 * numbers(seed + "b", width)
    ),
    "affine_low_rank": lambda seed, width: Affine(
        left=numbers(seed + "U", width, 3) / math.sqrt(width), right=numbers(seed + "V", width, 3)
    ),
    "patch": lambda seed, width: Patch(source=source_rows(seed, width), positions=POSITION_MAP),
    "patch_units": lambda seed, width: Patch(
        source=source_rows(seed, width), units=(width - 2, *range(0, width // 2, 3)), source_layer=2
    ),
    "patch_subspace": lambda seed, width: Patch(
        source=source_rows(seed, width),
        positions=POSITION_MAP,
        rotation=torch.linalg.qr(numbers(seed + "S", width, 3))[0].T.contiguous(),
    ),
}


def _neurons(op: NeuronOp, seed: str, shapes: Shapes) -> NeuronEdit:
    order = numbers(seed, shapes.d_ff).argsort().tolist()
    neurons = tuple(order[:17])
    if op is NeuronOp.CLAMP:
        return NeuronEdit(neurons=neurons, op=op, min=-0.05, max=0.1)
    values = numbers(seed + "values", 17).tolist() if op is not NeuronOp.ADD else [0.7]
    return NeuronEdit(neurons=neurons, op=op, values=tuple(values))


_OTHER_KINDS: dict[str, Callable[[str, Shapes], EditKind]] = {
    "neurons_set": lambda seed, shapes: _neurons(NeuronOp.SET, seed, shapes),
    "neurons_scale": lambda seed, shapes: _neurons(NeuronOp.SCALE, seed, shapes),
    "neurons_add": lambda seed, shapes: _neurons(NeuronOp.ADD, seed, shapes),
    "neurons_clamp": lambda seed, shapes: _neurons(NeuronOp.CLAMP, seed, shapes),
    "heads_scale": lambda seed, shapes: HeadEdit(heads=(shapes.n_heads - 1, 0), scale=-0.5),
    "heads_uniform": lambda seed, shapes: HeadEdit(heads=(2, 0), uniform=True),
    "heads_mean": lambda seed, shapes: HeadEdit(heads=(1, 3), mean=numbers(seed, 2, shapes.head_dim)),
}
VECTOR_KINDS = tuple(_VECTOR_KINDS)
EDIT_KINDS = (*_VECTOR_KINDS, *_OTHER_KINDS)


def sites_of(kind: str, shapes: Shapes) -> tuple[Site, ...]:
    if kind.startswith("neurons"):
        return tuple(site for site in NEURON_SITES if site in shapes.sites)
    if kind.startswith("heads"):
        return (Site.ATTN_Z,)
    return tuple(shapes.sites)


def edit(kind: str, site: Site, shapes: Shapes, seed: str = "", **options: Any) -> Edit:
    """An edit of a kind at a site; `options` are fields of Edit. Default: at layer 1, strength 1, every token."""
    seed = f"{shapes.family} {kind} {site.value} {seed}"
    if kind in _VECTOR_KINDS:
        message = _VECTOR_KINDS[kind](seed, shapes.sites[site])
    else:
        message = _OTHER_KINDS[kind](seed, shapes)
    if not options.get("all_layers"):
        options.setdefault("layers", (1,))
    return Edit(kind=message, site=site, **{"name": kind, **options})


def condition(
    site: Site, layer: int, shapes: Shapes, seed: str = "", threshold: float = 0.0, **options: Any
) -> Condition:
    vector = _vector(f"{shapes.family} condition {seed}", shapes.sites[site])
    comparison = options.pop("comparison", Comparison.ABOVE)
    return Condition(site, layer, vector, comparison, threshold, **options)


def scope(*include: TokenSelector, exclude: tuple[TokenSelector, ...] = ()) -> Scope:
    return Scope(include=include, exclude=exclude)


PROMPT = scope(TokenSelector(phase=Phase.PROMPT))
GENERATED = scope(TokenSelector(phase=Phase.GENERATED))
# A scope of each form; None of them contradicts itself.
SCOPES: tuple[Scope, ...] = (
    Scope(),
    PROMPT,
    GENERATED,
    scope(TokenSelector(last_k=3)),
    scope(TokenSelector(positions=PositionRange(4, 15))),
    scope(TokenSelector(positions=PositionRange(-6, -1)), TokenSelector(phase=Phase.GENERATED)),
    scope(TokenSelector(token_ids=tuple(range(0, VOCAB, 2)))),
    scope(exclude=(TokenSelector(positions=PositionRange(0, 1)),)),
    scope(
        TokenSelector(phase=Phase.PROMPT, positions=PositionRange(3, None)),
        exclude=(TokenSelector(token_ids=tuple(range(0, VOCAB, 3))), TokenSelector(last_k=1)),
    ),
)


def one_of_each_kind(shapes: Shapes) -> dict[str, Program]:
    """A program for each kind of edit; site, layers, strength, scope and norm preservation vary with the family."""
    programs = {}
    turn = zlib.crc32(shapes.family.encode()) % 97
    for number, kind in enumerate(EDIT_KINDS):
        sites = sites_of(kind, shapes)
        options: dict[str, Any] = {
            "strength": (1.0, 0.6, -0.4, 1.3)[(turn + number) % 4],
            "scope": SCOPES[(turn + number) % len(SCOPES)],
            "preserve_norm": kind in VECTOR_KINDS and (turn + number) % 3 == 0,
        }
        options |= ({"all_layers": True}, {"layers": (2, 0)}, {"layers": (1,)})[(turn + number) % 3]
        programs[kind] = Program((edit(kind, sites[(turn + number) % len(sites)], shapes, **options),))
    return programs


def mixed(shapes: Shapes) -> dict[str, Program]:
    """Programs in which several parts of the language meet."""
    per_layer = Vector(values=numbers(f"{shapes.family} rows", 2, shapes.sites[Site.RESID_POST]))
    steer = Edit(AddVector(per_layer), Site.RESID_POST, name="two rows", layers=(2, 0), strength=0.5)
    onto = Vector(values=numbers(f"{shapes.family} onto", shapes.sites[Site.MLP_OUT]))
    early = condition(Site.RESID_POST, 0, shapes, "early")
    return {
        "many edits": Program(
            (
                edit("add", Site.RESID_PRE, shapes, "a", name="a", layers=(0, 2), strength=0.5),
                edit("rotate_towards", Site.RESID_PRE, shapes, "b", name="b", layers=(0, 1)),
                edit("neurons_clamp", Site.MLP_POST, shapes, "c", name="c", all_layers=True),
                edit("heads_scale", Site.ATTN_Z, shapes, "d", name="d", all_layers=True, scope=PROMPT),
                edit("low_rank", Site.MLP_OUT, shapes, "e", name="e", layers=(1,), scope=GENERATED),
                Edit(RotateTowards(onto, radians=3.0), Site.MLP_OUT, "onto the vector", layers=(2,), strength=0.5),
                steer,
            )
        ),
        "one site, order matters": Program(
            tuple(
                edit(kind, Site.RESID_POST, shapes, name=kind, layers=(0, 1), preserve_norm=kind == "add")
                for kind in ("add", "project_out", "set_projection", "cap_projection", "add")[:4]
            )
        ),
        "border of two blocks": Program(
            (
                edit("add", Site.RESID_POST, shapes, "post", name="post", layers=(0,)),
                edit("set_projection", Site.RESID_PRE, shapes, "pre", name="pre", layers=(1,)),
            ),
            readouts=(
                Readout(LogitLensReadout(4), Site.RESID_POST, "after block 0", layers=(0,)),
                Readout(LogitLensReadout(4), Site.RESID_PRE, "before block 1", layers=(1,)),
            ),
        ),
        "edits that could run as one": Program(
            (
                edit("add", Site.RESID_MID if Site.RESID_MID in shapes.sites else Site.MLP_OUT, shapes, "a", name="a"),
                edit("add", Site.RESID_POST, shapes, "b", name="b", layers=(1, 2), strength=0.5),
                edit("add", Site.RESID_POST, shapes, "c", name="c", layers=(1,), gate=Gate(early)),
                edit("add", Site.RESID_POST, shapes, "d", name="d", layers=(2, 1), scope=SCOPES[4], preserve_norm=True),
                edit("neurons_set", Site.MLP_POST, shapes, "e", name="e", strength=0.5),
                edit("neurons_scale", Site.MLP_POST, shapes, "e", name="f", layers=(0, 1)),
                Edit(NeuronEdit((0, 1), op=NeuronOp.SET, values=(1.0, -1.0)), Site.MLP_POST, "g", layers=(1,)),
                Edit(NeuronEdit((2, 3), op=NeuronOp.ADD, values=(1.5,)), Site.MLP_POST, "h", layers=(1,), scope=PROMPT),
                edit("heads_scale", Site.ATTN_Z, shapes, name="i"),
                edit("heads_mean", Site.ATTN_Z, shapes, name="j"),
            )
        ),
        "gate per token": Program(
            (edit("add", Site.MLP_OUT, shapes, name="gated", layers=(1, 2), gate=Gate(early), scope=SCOPES[7]),)
        ),
        "gate latched": Program(
            (
                edit(
                    "replace",
                    Site.ATTN_OUT,
                    shapes,
                    name="latched",
                    layers=(1, 2),
                    strength=0.7,
                    gate=Gate(
                        condition(Site.MLP_POST, 0, shapes, "late", threshold=1.5, scope=SCOPES[7]), latched=True
                    ),
                ),
                edit("neurons_add", Site.MLP_POST, shapes, name="always", layers=(0,)),
            )
        ),
        "gate latched, and nothing else": Program(
            (
                edit(
                    "add",
                    Site.RESID_POST,
                    shapes,
                    name="latched",
                    layers=(0, 1),
                    gate=Gate(condition(Site.RESID_PRE, 0, shapes, "first", threshold=0.8), latched=True),
                ),
            )
        ),
        "gate by cosine, of an edited site": Program(
            (
                edit("add", Site.RESID_POST, shapes, name="first", layers=(0,), scope=SCOPES[6]),
                edit(
                    "heads_mean",
                    Site.ATTN_Z,
                    shapes,
                    name="second",
                    layers=(1, 2),
                    gate=Gate(
                        condition(Site.RESID_POST, 0, shapes, "cosine", 0.02, cosine=True, comparison=Comparison.BELOW)
                    ),
                ),
            )
        ),
        "everything is read": Program(
            (edit("add", Site.RESID_POST, shapes, layers=(1,), strength=0.8),),
            readouts=tuple(
                Readout(
                    readout_kind(name, site, shapes), site, f"{name} at {site.value}", all_layers=True, scope=SCOPES[5]
                )
                for name, site in READOUTS
                if site in shapes.sites
            ),
        ),
    }


def abort(shapes: Shapes, threshold: float, scope: Scope = GENERATED) -> Program:
    examined = condition(Site.RESID_POST, shapes.n_layers - 1, shapes, "abort", threshold, scope=scope)
    return Program(
        (edit("add", Site.RESID_PRE, shapes, strength=0.3),), abort_when=(AbortCondition("too much", examined),)
    )


READOUTS = (
    *(("projection", site) for site in PUBLIC_SITES),
    *(("activations", site) for site in PUBLIC_SITES),
    *(("some activations", site) for site in PUBLIC_SITES),
    *(("neurons", site) for site in NEURON_SITES),
    *(("top_neurons", site) for site in NEURON_SITES),
    ("logit_lens", Site.RESID_PRE),
    ("logit_lens", Site.RESID_MID),
    ("logit_lens", Site.RESID_POST),
    ("logit_lens", Site.ATTN_OUT),
    ("logit_lens", Site.MLP_OUT),
    *(("lens of tokens", site) for site in (Site.RESID_PRE, Site.RESID_POST, Site.ATTN_OUT, Site.MLP_OUT)),
    ("lens of neurons", Site.MLP_POST),
    ("lens of neurons and tokens", Site.MLP_POST),
    ("heads", Site.ATTN_Z),
    ("all heads", Site.ATTN_Z),
)


def readout_kind(name: str, site: Site, shapes: Shapes) -> ReadoutKind:
    if name == "activations":
        return ActivationReadout()
    if name == "some activations":
        return ActivationReadout(units=(shapes.sites[site] - 1, 0, 5))
    if name == "neurons":
        return NeuronReadout(neurons=(shapes.d_ff - 1, 0, 5))
    if name == "top_neurons":
        return TopNeuronsReadout(k=4)
    if name == "heads":
        return HeadReadout(heads=(3, 1))
    if name == "all heads":
        return HeadReadout()
    if name == "logit_lens":
        return LogitLensReadout(k=3)
    if name == "lens of tokens":
        return LogitLensReadout(token_ids=(7, 30, 4))
    if name == "lens of neurons":
        return LogitLensReadout(k=2, neurons=(shapes.d_ff - 1, 0, 5))
    if name == "lens of neurons and tokens":
        return LogitLensReadout(token_ids=(12, 3), neurons=(6, shapes.d_ff - 2))
    width = shapes.sites[site]
    return ProjectionReadout((_vector(f"{site} 0", width), _vector(f"{site} 1", width, unit=True)))
