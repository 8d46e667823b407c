"""`longreach serve` with a stand-in for the parts, for tests that send it signals."""

from __future__ import annotations

import logging
import sys
from pathlib import Path

from longreach.cluster import cli_serve, gateway
from longreach.core.errors import LongreachError

sys.path.insert(0, str(Path(__file__).parent))
from fakes import GEOMETRY, FakePrompts, FakeRuntime, make_config


class TestGateway(gateway.Gateway):
    def __init__(self, config, runtime):  # type: ignore[no-untyped-def]
        super().__init__(config, runtime, prompts=FakePrompts(), geometry=GEOMETRY)


def main() -> int:
    logging.basicConfig(level=logging.INFO)
    runtime = FakeRuntime()
    runtime.configure = lambda service: setattr(service, "token_s", float(sys.argv[2]))
    gateway.Gateway = TestGateway  # type: ignore[misc]
    config = make_config(Path(sys.argv[1]), *sys.argv[3:])
    try:
        return cli_serve.run(config, runtime)
    except LongreachError as exc:
        sys.stderr.write(f"{exc.reason}\n")
        return 1


if __name__ == "__main__":
    sys.exit(main())
