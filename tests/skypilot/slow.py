"""``python -m selfspec.run`` on a fake engine that takes its time, so that a job can lose its machine half-way.

Each request takes ``$SLOW_S`` seconds; and after the first unit, none is answered while the file ``$HOLD`` is there.
"""

import os
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

from selfspec.engine.fake.engine import FakeEngine
from selfspec.run import main

HELD = 4  # the warm-up and one unit, each once plainly and once as configured
generate, answered = FakeEngine.generate, list[None]()


def slowly(*args: Any, **options: Any) -> Any:
    while len(answered) > HELD and Path(os.environ.get("HOLD", "/dev/null/nothing")).exists():
        time.sleep(0.05)
    time.sleep(float(os.environ.get("SLOW_S", "0")))
    answered.append(None)
    return generate(*args, **options)


if __name__ == "__main__":
    FakeEngine.generate = slowly  # type: ignore[method-assign]
    main()
