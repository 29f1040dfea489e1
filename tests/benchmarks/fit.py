"""How well fitted drafts foretell the model: held-out agreement by drafted position.

    python tests/benchmarks/fit.py [--prompts 160] [--output-dir outputs]

Every draft below is fitted by the fit stage on the model's own answers, every fifth of them held out. The agreement
at position j is the share of held-out positions where the draft's likeliest token is the model's, among those
where it was right before: 1 + a1 + a1 a2 + ... is a chain's tokens per cycle. Heads that exist are not fitted again.
"""

import argparse

from hydra import compose, initialize_config_dir

from selfspec import fitting, plan
from selfspec.engine import factory
from selfspec.run import CONF

DRAFTS = (
    *(f"draft=lsq exit_layer={layer}" for layer in (12, 20, 24, 28)),
    *(f"draft=lsq exit_layer={layer} draft.previous=true" for layer in (12, 24)),
    *(f"draft=lsq exit_layer={layer} draft.previous=true draft.sgd_epochs=2" for layer in (12, 20)),
    "draft=lsq_lowrank exit_layer=12",
    "draft=lsq exit_layer=12 draft.vocab=8192",
    "draft=adapter exit_layer=4",
    "draft=medusa",
    "draft=medusa draft.sgd_epochs=0",
    "draft=eagle",
    "draft=eagle draft.sgd_epochs=0",
    "draft=eagle_block",
    "draft=suffix",
)


def main() -> None:
    """Prints one line a draft."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=160, help="160 is scale=standard, 900 scale=full")
    parser.add_argument("--output-dir", default="outputs", help="whose answers and heads are reused")
    options = parser.parse_args()
    common = [f"output_dir={options.output_dir}", f"scale.fit_prompts={options.prompts}", "tracking=none"]
    print("draft, parameters, closed form s, raw agreement, agreement by position")
    with initialize_config_dir(str(CONF), version_base="1.3"):
        for draft in DRAFTS:
            made = plan.make(compose("config", [*common, *draft.split()]))
            facts = fitting.ready(lambda made=made: factory.make(made), made)
            agreement = " ".join(f"{share:.3f}" for share in facts["agreement_by_position"])
            known = [facts.get(name, "-") for name in ("parameters", "solve_s", "raw_agreement")]
            print(", ".join([draft, *map(str, known), agreement]), flush=True)


if __name__ == "__main__":
    main()
