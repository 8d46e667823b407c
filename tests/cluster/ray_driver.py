"""A gateway-like process for the Ray tests: starts the runtime, prints what it sees, waits."""

from __future__ import annotations

import json
import sys
import time

from fake_parts import FAKES

from longreach.cluster.ray_runtime import RayRuntime
from longreach.core.config import Config


def main() -> None:
    state_dir, epoch = sys.argv[1], int(sys.argv[2])
    runtime = RayRuntime(Config.model_validate(json.loads(sys.argv[3])), state_dir, FAKES)
    runtime.start(epoch)
    sys.stdout.write(json.dumps(runtime.stats()) + "\n")
    sys.stdout.flush()
    time.sleep(120)


if __name__ == "__main__":
    main()
