"""An op module tells the tools how its kernels are compiled ahead of time, and what may be tuned."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from patchclamp_kernels.configs import Config


@dataclass(frozen=True)
class CompileCase:
    """One variant of a kernel that is in use. `signature` gives types by argument name ("*bf16", "i32", …; constexpr
    arguments are absent) and `constexprs` the values of the constexpr ones; blocks of `config` that the kernel takes
    need not be repeated.

    Pointers and the integers named in `divisible` are multiples of 16, except what the kernel does not specialise.
    `vector_bytes` is the widest global load that the compiler must reach, 0 where the kernel only gathers scalars.
    `options` are what the launch passes to the compiler besides warps and stages.
    """

    name: str
    kernel: Any
    signature: dict[str, str]
    constexprs: dict[str, Any]
    config: Config
    divisible: tuple[str, ...] = ()
    vector_bytes: int = 16
    options: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class TuningCase:
    """`run` launches the op once on prepared tensors with a configuration; `bucket` is what the wrapper looks up."""

    op: str
    bucket: str
    candidates: tuple[Config, ...]
    run: Callable[[Config], object]
