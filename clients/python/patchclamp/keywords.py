"""What help() shows of a call: all keywords that it passes on, none of which is dropped.

A function with ``**options: Unpack[SomeOptions]`` names the builder that reads them; SomeOptions tells type checkers
what the builder's own keywords are, and a test holds both equal.
"""

import functools
import inspect
from collections.abc import Callable, Collection, Mapping
from difflib import get_close_matches
from inspect import Parameter, Signature
from typing import Any, TypeVar, cast

FunctionT = TypeVar("FunctionT", bound=Callable[..., Any])


def takes_options_of(builder: Callable[..., object]) -> Callable[[FunctionT], FunctionT]:
    """Shows the keywords of `builder`, with types and defaults, as the function's own.

    The function raises TypeError, with the nearest name it knows, for any other keyword.
    """

    def decorate(function: FunctionT) -> FunctionT:
        signature = _joined(inspect.signature(function), inspect.signature(builder))
        accepted = [name for name in signature.parameters if name != "self"]

        if inspect.iscoroutinefunction(function):

            @functools.wraps(function)
            async def checked(*args: Any, **keywords: Any) -> Any:
                _refuse_unknown(function.__name__, keywords, accepted)
                return await function(*args, **keywords)
        else:

            @functools.wraps(function)
            def checked(*args: Any, **keywords: Any) -> Any:
                _refuse_unknown(function.__name__, keywords, accepted)
                return function(*args, **keywords)

        checked.__signature__ = signature  # type: ignore[attr-defined]
        return cast(FunctionT, checked)

    return decorate


def _joined(own: Signature, builder: Signature) -> Signature:
    """Returns `own` with the keywords of `builder` in place of **options."""
    parameters = list(own.parameters.values())
    positional = [p for p in parameters if p.kind in (Parameter.POSITIONAL_ONLY, Parameter.POSITIONAL_OR_KEYWORD)]
    keywords = [p for p in parameters if p.kind is Parameter.KEYWORD_ONLY]
    passed_on = [
        p for p in builder.parameters.values() if p.kind is Parameter.KEYWORD_ONLY and p.name not in own.parameters
    ]
    return own.replace(parameters=[*positional, *passed_on, *keywords])


def _refuse_unknown(function: str, keywords: Mapping[str, Any], accepted: Collection[str]) -> None:
    for name in keywords:
        if name not in accepted:
            near = get_close_matches(name, accepted, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"accepted: {', '.join(accepted)}"
            raise TypeError(f"{function}() got an unexpected keyword argument {name!r}; {hint}")
