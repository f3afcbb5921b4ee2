"""Random valid programs for hypothesis, made of the parts of programs.py."""

from typing import Any

from hypothesis import strategies as st
from programs import EDIT_KINDS, READOUTS, SCOPES, VECTOR_KINDS, Shapes, condition, edit, readout_kind, sites_of

from patchclamp_server.interventions.program import Comparison, Edit, Gate, Program, Readout


@st.composite
def programs(draw: st.DrawFn, shapes: Shapes) -> Program:
    """Random valid programs: up to four edits, up to two readouts."""
    edits = tuple(_random_edit(draw, shapes, number) for number in range(draw(st.integers(0, 4))))
    readouts = tuple(_random_readout(draw, shapes, number) for number in range(draw(st.integers(0, 2))))
    return Program(edits, readouts)


def _random_layers(draw: st.DrawFn, shapes: Shapes) -> dict[str, Any]:
    if draw(st.booleans()):
        return {"all_layers": True}
    layers = st.lists(st.integers(0, shapes.n_layers - 1), min_size=1, max_size=2, unique=True)
    return {"layers": tuple(draw(layers))}


def _random_edit(draw: st.DrawFn, shapes: Shapes, number: int) -> Edit:
    kind = draw(st.sampled_from(EDIT_KINDS))
    site = draw(st.sampled_from(sites_of(kind, shapes)))
    options = _random_layers(draw, shapes)
    first = min(options.get("layers", (0,)))
    earlier = [(s, layer) for layer in range(first + 1) for s in shapes.sites if (layer, s.order) < (first, site.order)]
    if earlier and draw(st.integers(0, 2)) == 0:
        where, layer = draw(st.sampled_from(earlier))
        examined = condition(
            where,
            layer,
            shapes,
            str(draw(st.integers(0, 3))),
            draw(st.sampled_from((0.0, 0.05, -0.1))),
            cosine=draw(st.booleans()),
            comparison=draw(st.sampled_from(Comparison)),
            scope=draw(st.sampled_from(SCOPES)),
        )
        options["gate"] = Gate(examined, latched=draw(st.booleans()))
    return edit(
        kind,
        site,
        shapes,
        str(draw(st.integers(0, 3))),
        name=f"edit {number}",
        strength=draw(st.sampled_from((1.0, 0.0, 0.5, -0.3, 1.2))),
        scope=draw(st.sampled_from(SCOPES)),
        preserve_norm=kind in VECTOR_KINDS and draw(st.booleans()),
        **options,
    )


def _random_readout(draw: st.DrawFn, shapes: Shapes, number: int) -> Readout:
    name, site = draw(st.sampled_from([(name, site) for name, site in READOUTS if site in shapes.sites]))
    layers = _random_layers(draw, shapes)
    return Readout(
        readout_kind(name, site, shapes), site, f"readout {number}", scope=draw(st.sampled_from(SCOPES)), **layers
    )
