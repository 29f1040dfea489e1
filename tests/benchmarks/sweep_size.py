"""What a job of a sweep costs the process that launches it, as sweeps grow.

    python tests/benchmarks/sweep_size.py [--jobs 10,100,1000] [override ...]

Jobs are the smallest there are: the fake engine, three prompts of twelve tokens, a seed of its own for each. A sweep
is a process of its own that runs its jobs one after another. Milliseconds are of CPU time, divided by the number of
jobs: *checks* before the first job, *running* all of them, the *report* after the last. Memory is what was resident
at the end of each, and the most that ever was.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))
import tiny


def sweep(overrides: list[str]) -> None:
    """The command line, which says what time and memory it has used before and after what is done for all jobs."""
    from selfspec.run import main
    from selfspec.sweep.callback import Sweep

    moments = []

    def moment() -> None:
        resident = int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
        most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        moments.append({"s": sum(os.times()[:4]), "resident": resident, "most": most})

    def timed(name: str) -> None:
        method = getattr(Sweep, name)

        def between(*args: Any, **options: Any) -> None:
            moment()
            method(*args, **options)
            moment()

        setattr(Sweep, name, between)

    timed("on_multirun_start")
    timed("on_multirun_end")
    sys.argv = ["selfspec.run", "-m", *overrides]
    main()
    print(json.dumps(moments))


def measured(jobs: int, overrides: list[str]) -> str:
    """A sweep's row of the table."""
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        job = [*tiny.fake_job(tiny.prompts(folder / "prompts.json")), f"output_dir={folder / 'outputs'}"]
        argv = [sys.executable, __file__, "--inside", *job, f"seed=range({jobs})", *overrides]
        env = os.environ | {"SELFSPEC_CACHE": str(folder / "cache")}
        done = subprocess.run(argv, stdout=subprocess.PIPE, check=True, text=True, env=env)
    start, checked, ran, ended = json.loads(done.stdout.splitlines()[-1])
    parts = [1e3 * (b["s"] - a["s"]) / jobs for a, b in ((start, checked), (checked, ran), (ran, ended))]
    memory = [each / 2**20 for each in (checked["resident"], ran["resident"], ended["resident"], ended["most"])]
    return f"| {jobs} | {' | '.join(f'{ms:.0f}' for ms in parts)} | {' | '.join(f'{mib:.0f}' for mib in memory)} |"


def main() -> None:
    if sys.argv[1:2] == ["--inside"]:
        sweep(sys.argv[2:])
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", default="10,100,1000")
    parser.add_argument("overrides", nargs="*")
    arguments = parser.parse_args()
    print("| jobs | checks, ms a job | running | report | checked, MiB | run | reported | most |")
    print("| ---: " * 8 + "|")
    for jobs in map(int, arguments.jobs.split(",")):
        print(measured(jobs, arguments.overrides), flush=True)


if __name__ == "__main__":
    main()
