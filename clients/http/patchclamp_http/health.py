"""GET /health: 200 where the server behind this front takes calls, else 503. /metrics: what this front counts."""

from patchclamp_http.http import Call
from patchclamp_http.upstream import Upstream


class Health:
    def __init__(self, upstream: Upstream) -> None:
        self._upstream = upstream

    async def __call__(self, call: Call) -> None:
        status = await self._upstream.health()
        await call.answer({"status": status}, status=200 if status == "serving" else 503)
