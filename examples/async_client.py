"""Several requests at once, each with a program of its own, and a stream that is left early.

python examples/async_client.py [--address HOST:PORT]
"""

import argparse
import asyncio

from patchclamp import AsyncClient
from patchclamp.programs import ProgramLike, ablate_heads, add

PROMPT = "My day at the office was"
PAIRS = [
    ("I love this place.", "I hate this place."),
    ("What a good day it was.", "What a bad day it was."),
    ("We won, and everybody cheered.", "We lost, and everybody wept."),
    ("The news made her laugh.", "The news made her cry."),
]


async def answer(client: AsyncClient, name: str, program: ProgramLike) -> None:
    """The result comes when the stream has ended; the streams of all requests are filled by the same batches."""
    result = await client.generate(PROMPT, program=program, max_tokens=24).result()
    print(f"{name}:{result.text!r}\n  {result.receipt}")


async def main(address: str) -> None:
    async with AsyncClient(address) as client:
        (model,) = await client.models()
        layer = model.n_layers // 2
        found = await client.extract_vectors(PAIRS, layers=[layer], pooling="mean").result()
        # An id rather than a tag: it needs no name, and can mean nothing else.
        liking = found.artifact.id
        programs: dict[str, ProgramLike] = {
            "unedited": [],
            "liking": add(liking, layers=layer, strength=2.0),
            "disliking": add(liking, layers=layer, strength=-2.0),
            "without two heads": ablate_heads([0, 1], layers=layer, scope="generated"),
        }
        # The first request that fails ends the others: leaving the group cancels their tasks, and so their sequences.
        async with asyncio.TaskGroup() as group:
            for name, program in programs.items():
                group.create_task(answer(client, name, program))

        # Leaving the block cancels the call; the server frees its sequence within a step.
        seen = 0
        async with client.generate("Once upon a time", program=programs["liking"], max_tokens=200) as stream:
            async for chunk in stream:
                print(chunk.text, end="", flush=True)
                seen += len(chunk.tokens)
                if seen >= 10:
                    break
        print(f"\nleft after {seen} tokens")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--address", default="localhost:50051", help="of a server (default: localhost:50051)")
    asyncio.run(main(parser.parse_args().address))
