"""No keyword is dropped in silence: what a function does not know is refused, and help() shows what it knows."""

import inspect
from typing import Any, get_args, get_type_hints

import pytest
from public_calls import arguments_of, awaited, builders, client_methods, made

import patchclamp
from patchclamp import AsyncClient, Client
from patchclamp.programs import ablate_heads, add, generated, when
from patchclamp.sparsity import exact_zero, fovea

CLIENTS = {"sync": Client, "async": AsyncClient}
METHODS = client_methods(Client)
BUILDERS = builders()


@pytest.fixture
async def clients() -> dict[str, Any]:
    return {name: kind() for name, kind in CLIENTS.items()}


def test_both_clients_have_the_same_calls() -> None:
    assert client_methods(AsyncClient) == METHODS
    assert len(METHODS) >= 30


@pytest.mark.parametrize("kind", CLIENTS)
@pytest.mark.parametrize("method", METHODS)
async def test_every_call_of_both_clients_refuses_an_unknown_keyword(
    clients: dict[str, Any], method: str, kind: str
) -> None:
    with pytest.raises(TypeError, match="unexpected keyword argument 'no_such_option'"):
        await awaited(getattr(clients[kind], method)(**arguments_of(method), no_such_option=1))


@pytest.mark.parametrize("name", BUILDERS)
def test_every_builder_refuses_an_unknown_keyword(name: str) -> None:
    with pytest.raises(TypeError, match="unexpected keyword argument 'no_such_option'"):
        BUILDERS[name](**arguments_of(name), no_such_option=1)


@pytest.mark.parametrize("name", BUILDERS)
def test_every_builder_accepts_what_it_requires(name: str) -> None:
    assert made(BUILDERS[name](**arguments_of(name))) is not None


@pytest.mark.parametrize(
    ("misspelt", "meant"),
    [("max_token", "max_tokens"), ("temperture", "temperature"), ("timeot", "timeout"), ("programs", "program")],
)
async def test_a_misspelt_option_of_a_call_names_the_one_that_was_meant(
    clients: dict[str, Any], misspelt: str, meant: str
) -> None:
    for client in clients.values():
        with pytest.raises(TypeError, match=rf"generate\(\) .* {misspelt!r}; did you mean {meant!r}\?"):
            client.generate("hi", **{misspelt: 2})


@pytest.mark.parametrize(
    ("build", "meant"),
    [
        (lambda: add("v", layers=1, strenght=0.001), "strength"),
        (lambda: add("v", layers=1, scopes=generated()), "scope"),
        (lambda: fovea(keep_ration=0.5), "keep_ratio"),
        (lambda: Client().start_watch("w", phase=["prompt"]), "phases"),
        (lambda: Client().extract_vectors([("a", "b")], pooled="mean"), "pooling"),
        (lambda: Client().put_artifact(b"", tag="v"), "tags"),
    ],
)
def test_a_misspelt_option_of_a_builder_names_the_one_that_was_meant(build: Any, meant: str) -> None:
    with pytest.raises(TypeError, match=f"did you mean {meant!r}"):
        build()


@pytest.mark.parametrize(
    "build",
    [
        lambda: add("v", layers=1, when=when("v", layer=0, above=1.0)),
        lambda: ablate_heads([1], layers=1, site="attn_z"),
        lambda: exact_zero(keep_ratio=0.5),
        lambda: Client().generate("hi", n=3, response_format={"type": "json_object"}),
    ],
)
def test_an_option_of_another_call_or_library_is_refused_with_the_accepted_ones(build: Any) -> None:
    with pytest.raises(TypeError, match=r"unexpected keyword argument .*; accepted: \w"):
        build()


def test_help_shows_every_option_with_its_default() -> None:
    parameters = inspect.signature(Client.generate).parameters
    assert (parameters["temperature"].default, parameters["max_tokens"].default) == (0.0, None)
    assert parameters["max_tokens"].annotation == int | None
    assert "options" not in parameters
    assert inspect.signature(add).parameters["site"].default == "resid_post"


def functions_with_options() -> dict[str, Any]:
    """Those that pass **options on, wrapped so that help() shows them."""
    functions = {name: getattr(Client, name) for name in METHODS} | BUILDERS
    return {name: each for name, each in functions.items() if hasattr(each, "__wrapped__")}


@pytest.mark.parametrize("name", functions_with_options())
def test_type_checkers_and_help_are_told_the_same_options(name: str) -> None:
    function = functions_with_options()[name]
    own = inspect.signature(function, follow_wrapped=False).parameters
    written = inspect.signature(function.__wrapped__).parameters
    [declared] = get_args(written["options"].annotation)
    shown = {p.name: p.annotation for p in own.values() if p.name not in written}
    assert shown == get_type_hints(declared)


@pytest.mark.parametrize("method", METHODS)
def test_the_async_client_takes_the_same_arguments(method: str) -> None:
    sync, asynchronous = (inspect.signature(getattr(kind, method)) for kind in CLIENTS.values())
    assert sync.parameters == asynchronous.parameters


def test_no_option_type_is_missing_from_the_package() -> None:
    used = {
        get_args(inspect.signature(each.__wrapped__).parameters["options"].annotation)[0].__name__
        for each in functions_with_options().values()
    }
    assert used <= set(patchclamp.__all__)


@pytest.mark.parametrize("method", METHODS)
def test_every_call_of_both_clients_is_described_by_one_text(method: str) -> None:
    assert len(Client.__dict__[method].__doc__) > 5
    assert AsyncClient.__dict__[method].__doc__ == Client.__dict__[method].__doc__
