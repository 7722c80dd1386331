"""Ask any server that speaks OpenAI's chat for a stream: `python client.py http://127.0.0.1:8000 "Tell me a story."`."""

import asyncio
import os
import sys

from tokenwire.adapters.client import connect
from tokenwire.core import TextDelta


async def main(url: str, prompt: str) -> None:
    async with connect(url, prompt, model="mock", api_key=os.environ.get("OPENAI_API_KEY")) as stream:
        async for event in stream:
            if isinstance(event, TextDelta):
                print(event.text, end="", flush=True)
        print()
        stream.raise_for_error()  # the server's refusal, or a stream that broke off


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
