"""The HTTP server inside xllamacpp, with the installed model: prints where it listens, ends with its standard input."""

from __future__ import annotations

import importlib
import sys

from tokenwire.backends._llama_model import find_installed_model


def main() -> None:
    xllamacpp = importlib.import_module("xllamacpp")
    params = xllamacpp.CommonParams()
    params.model.path = str(find_installed_model())
    params.n_ctx = 512
    params.n_parallel = 1
    params.warmup = False
    params.cpuparams.n_threads = 2
    params.port = 0  # the system chooses one, and nobody can take it in between
    server = xllamacpp.Server(params)
    print(server.listening_address, flush=True)  # noqa: T201  # the test reads it
    sys.stdin.read()


main()
