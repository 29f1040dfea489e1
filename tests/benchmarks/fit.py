"""The closed-form fit given cached states, and its agreement by exit layer.

    python tests/benchmarks/fit.py [--tokens 50000] [--layers 12 20 24 28] [--prompts 160]

The solution is timed on random states of the size asked for (its time does not depend on the values); the
agreement is measured on the model's own answers, every fifth prompt held out, for each exit layer: raw exit,
least squares, with the previous position's final state, with SGD on top, and in the low-rank form.
"""

import argparse
import time
from dataclasses import replace

import torch
from hydra import compose, initialize_config_dir

from selfspec import plan
from selfspec.config import HeadForm
from selfspec.engine import fit
from selfspec.engine.fit import States
from selfspec.engine.torch_engine import TorchEngine
from selfspec.run import CONF
from selfspec.stages import fit as stage


def main() -> None:
    """Prints both."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=50_000)
    parser.add_argument("--layers", type=int, nargs="*", default=[12, 20, 24, 28])
    parser.add_argument("--prompts", type=int, default=160, help="160 is scale=standard, 900 scale=full")
    parser.add_argument("--output-dir", default="outputs", help="whose fit data is reused")
    options = parser.parse_args()

    overrides = ["draft=lsq", f"output_dir={options.output_dir}", f"scale.fit_prompts={options.prompts}"]
    with initialize_config_dir(str(CONF), version_base="1.3"):
        settings = plan.make(compose("config", overrides))
    draft, engine = settings.draft, TorchEngine(settings)
    size = engine.model.shape.hidden

    states = States(*(torch.randn(options.tokens, size).to(engine.dtype) for _ in range(3)))
    for previous in (False, True):
        begin = time.perf_counter()
        fit.ridge(states, replace(draft, previous=previous))
        took = time.perf_counter() - begin
        print(f"{options.tokens} tokens, previous={previous}: solved in {took:.2f} s")

    forms = {
        "lsq": draft,
        "lsq + previous": replace(draft, previous=True),
        "lsq + 2 epochs of SGD": replace(draft, sgd_epochs=2),
        "low rank 128": replace(draft, form=HeadForm.low_rank, rank=128),
    }
    pairs = stage.answered(lambda: engine, settings)
    print("exit layer, tokens fitted on, held out, raw, " + ", ".join(forms))
    for layer in options.layers:
        with torch.inference_mode():
            parts = [fit.collect(engine.model, (*p, *a), len(p), layer) for p, a in pairs]
            train, heldout = fit.split(parts)
            heads = [fit.fit_head(engine.model, train, heldout, form, 0) for form in forms.values()]
        found = [heads[0].facts["raw_agreement"], *(head.facts["agreement"] for head in heads)]
        print(", ".join([str(layer), str(len(train)), str(len(heldout)), *(f"{value:.3f}" for value in found)]))


if __name__ == "__main__":
    main()
