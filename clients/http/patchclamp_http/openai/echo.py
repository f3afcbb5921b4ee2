"""The prompt as it is repeated before a completion (`echo`)."""

from patchclamp.v1 import model_pb2
from patchclamp_http.openai.requests import Asked
from patchclamp_http.upstream import Options, Upstream, answer


async def echoes(upstream: Upstream, asked: Asked, options: Options) -> list[str]:
    """Returns what comes before each choice: its prompt, or nothing. Raises PatchclampError."""
    if not asked.echo:
        return [""] * (len(asked.requests) * asked.samples)
    texts: list[str] = []
    for request in asked.requests:
        text = request.prompt.text
        if request.prompt.WhichOneof("form") == "tokens":
            back = model_pb2.DetokenizeRequest(model=request.model, ids=request.prompt.tokens.ids)
            text = (await answer(upstream.stubs.models.Detokenize(back, **options.arguments()))).text
        texts += [text] * asked.samples
    return texts
