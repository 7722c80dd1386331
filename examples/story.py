"""The smallest backend: a generator of text."""

from collections.abc import Iterator


def generate(prompt: str) -> Iterator[str]:
    for word in f"Once upon a time somebody said: {prompt}".split():
        yield word + " "
