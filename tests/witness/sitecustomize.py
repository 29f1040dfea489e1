"""Puts every call of an engine on record, in each Python process that has this folder in its PYTHONPATH; of the quality
and soak stages, every unit that was worked at.

Wherever a job's process runs and whoever started it, it adds a line to the file ``ENGINE_CALLS`` before the engine
works. With ``ENGINE_CLOCK`` the time of day jumps by up to so many seconds, ahead or back, at every call. So that it
can be killed at work, it is slower by ``ENGINE_SLEEP`` seconds a call, and from its call number ``ENGINE_HOLD_AT`` on
goes no further while the file ``ENGINE_HOLD`` is there. One that has ``ENGINE_DIES`` among its arguments dies at once.
"""

import importlib.abc
import importlib.machinery
import json
import os
import random
import signal
import sys
import time
from contextlib import closing
from hashlib import blake2b
from pathlib import Path

WATCHED = {
    "selfspec.engine.fake.engine": "FakeEngine",
    "selfspec.engine.torch.engine": "TorchEngine",
    "selfspec.stages.quality": "Quality",
    "selfspec.stages.soak": "Soak",
}

made = []
real = time.time_ns


def now():
    return real() // 10**6


def jump():
    off = random.randint(-1, 1) * random.randrange(1 + int(os.environ["ENGINE_CLOCK"])) * 10**9
    time.time_ns = lambda: real() + off
    time.time = lambda: time.time_ns() / 1e9


def note(stage, scope, what, at=None):
    line = {"stage": stage, "scope": scope, "what": what, "pid": os.getpid(), "at": at or now()}
    file = os.open(os.environ["ENGINE_CALLS"], os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.write(file, json.dumps(line).encode() + b"\n")  # one write: lines of several processes do not mix
    os.close(file)
    made.append(what)
    if "ENGINE_CLOCK" in os.environ:
        jump()
    time.sleep(float(os.environ.get("ENGINE_SLEEP", "0")))
    hold = os.environ.get("ENGINE_HOLD")
    while hold and len(made) >= int(os.environ["ENGINE_HOLD_AT"]) and Path(hold).exists():
        time.sleep(0.01)


def watch(kind):
    watch_stage(kind) if hasattr(kind, "units") else watch_engine(kind)


def watch_stage(stage):
    units = stage.units

    def watched(self, engine, journal):
        with closing(units(self, engine, journal)) as those:
            began = now()
            for unit in those:
                if not unit.name.startswith("locust-"):  # one a life, and so one a kill
                    note(self.name, self.plan.id, unit.name, began)
                yield unit
                began = now()

    stage.units = watched


def watch_engine(engine):
    generate, fit = engine.generate, getattr(engine, "fit", None)

    def generating(self, requests, **options):
        asked = blake2b(repr([tuple(request.tokens) for request in requests]).encode(), digest_size=8).hexdigest()
        if "max_batch" in options:  # the fit prompts, for all heads that are fitted on the answers
            note("answers", self.plan.answers_id, asked)
        elif "bench" in self.plan.stages and "selfspec.stages.bench" in sys.modules:  # no gateway
            note("bench", self.plan.id, f"{asked} {'plain' if options.get('plain') else 'configured'}")
        return generate(self, requests, **options)

    def fitting(self, *arguments):
        note("fit", self.plan.head_id, "head")
        return fit(self, *arguments)

    engine.generate = generating
    if fit is not None:
        engine.fit = fitting


class Finder(importlib.abc.MetaPathFinder):
    """Finds the engines' modules as ever, and has their classes watched once they are there."""

    def find_spec(self, name, path, target=None):
        if name not in WATCHED:
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path, target)
        execute = spec.loader.exec_module

        def watched(module):
            execute(module)
            watch(getattr(module, WATCHED[name]))

        spec.loader.exec_module = watched
        return spec


if os.environ.get("ENGINE_DIES") in sys.orig_argv:
    print("about to die", flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
if "ENGINE_CALLS" in os.environ:
    sys.meta_path.insert(0, Finder())
