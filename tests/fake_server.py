"""Run serve() with the fake engine: python tests/fake_server.py TOKENIZER_DIRECTORY [setting=json ...].

Prints the port.
"""

from __future__ import annotations

import json
import logging
import sys
from pathlib import Path

from server_fixture import TOKENS_PER_IMAGE, FakeEngine, make_encoder

from megatron_share4v.config.serve import ServeConfig
from megatron_share4v.errors import exit_on_user_error
from megatron_share4v.logging import configure
from megatron_share4v.serve.engine_thread import ServedModel
from megatron_share4v.serve.server import serve


def main() -> None:
    directory, *settings = sys.argv[1:]
    given = {name: json.loads(value) for name, _, value in (setting.partition("=") for setting in settings)}
    step_s, breaks_after = given.pop("step_s", 0.0), given.pop("breaks_after", None)
    configure(rank=0, level=logging.INFO)
    encoder = make_encoder(Path(directory))
    engine = FakeEngine(encoder, step_s=step_s)

    def answer(engine: FakeEngine, request) -> str:
        if breaks_after is not None and len(engine.requests) >= breaks_after:
            engine.broken = RuntimeError("a rank has died")
        return "word " * 400

    engine.answer = answer
    with exit_on_user_error():
        serve(
            ServeConfig(**given), lambda: ServedModel(engine=engine, encoder=encoder, tokens_per_image=TOKENS_PER_IMAGE)
        )


if __name__ == "__main__":
    main()
