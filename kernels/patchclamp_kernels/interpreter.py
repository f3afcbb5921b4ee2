"""This aligns Triton 3.6's interpreter with its compiler where they differ."""

from typing import Any


def allow_bounds_at_run_time() -> None:
    """Lets `range` take bounds that are known at run time.

    The interpreter keeps a scalar as an array of one element and asks for int() of it, which numpy refuses since 2.4. A
    `while` loop works there, but the compiler overlaps the loads of `for` loops alone.
    """
    from triton.runtime import interpreter

    patch = interpreter._patch_lang_tensor

    def patch_and_index(tensor: Any, scope: Any) -> None:
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    interpreter._patch_lang_tensor = patch_and_index
