"""What the framework costs a job: seconds from process start to the first engine work, less model load.

    python tests/benchmarks/overhead.py [--rounds 5] [override ...]

Each round is a process of its own running `python -m selfspec.run` up to the first token asked of the engine:
imports, composition, checks, journal, tracker (an MLflow store that exists), tokenizer and prompts are all in it.
Fit data is taken from a first round that runs to its end.
"""

import argparse
import subprocess
import sys
import tempfile
from statistics import median

CHILD = """
import os, sys, time, psutil
from selfspec.run import main

begin, loading = psutil.Process().create_time(), 0.0

def watch():
    from selfspec.model.llama import Llama
    from selfspec.engine.torch.engine import TorchEngine
    load = Llama.load.__func__

    def timed(*args):
        global loading
        start = time.time()
        model = load(*args)
        loading = time.time() - start
        return model

    def first(engine, *args, **options):
        engine.model
        print(time.time() - begin - loading, loading, flush=True)
        os._exit(0)

    Llama.load, TorchEngine.generate = classmethod(timed), first

from selfspec.engine import factory
make = factory.make
factory.make = lambda plan: (watch(), make(plan))[1]
main()
"""


def main() -> None:
    """Prints the median and the range."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("overrides", nargs="*")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        overrides = ["scale=smoke", f"output_dir={folder}", *options.overrides]
        subprocess.run([sys.executable, "-m", "selfspec.run", *overrides], check=True, stdout=subprocess.DEVNULL)
        spent = []
        for round in range(options.rounds):
            argv = [sys.executable, "-c", CHILD, *overrides, f"K={round + 5}"]  # a plan that is not in the journal
            said = subprocess.run(argv, check=True, capture_output=True, text=True).stdout.split()
            spent.append((float(said[-2]), float(said[-1])))
    overhead, loading = zip(*spent, strict=True)
    print(f"overhead: {median(overhead):.2f} s [{min(overhead):.2f}, {max(overhead):.2f}]")
    print(f"model load, not in it: {median(loading):.2f} s")


if __name__ == "__main__":
    main()
