"""Plan -> engine, imported when it is made; and the references that a bench decodes beside its own plan."""

from dataclasses import replace
from pathlib import Path

from selfspec import config as schema
from selfspec.axes import CONTROLLER, ENGINE, GATE, POLICY
from selfspec.engine.base import Engine, Tokenizer
from selfspec.engine.openai.client import Server
from selfspec.errors import ConfigError
from selfspec.plan import Plan
from selfspec.rules import REFERENCES


def require(plan: Plan, what: type, says: str) -> None:
    """Refuses an engine that cannot do what is asked of it.

    Args:
        says: what the message has between the engine and those that can.

    Raises:
        ConfigError: with those that can.
    """
    if what not in plan.engine.can:
        allowed = ", ".join(name for name, option in ENGINE.options.items() if what in option.can)
        raise ConfigError(f"engine={plan.engine.name}: {says} {allowed}")


def check(plan: Plan) -> None:
    """Refuses, without loading it, an engine or a draft that is not installed here.

    Raises:
        ConfigError: with what is needed.
    """
    plan.engine.check_here()
    plan.draft.check_here()


def make(plan: Plan) -> Engine:
    """The plan's engine; nothing is loaded before it is asked for something."""
    engine: Engine = plan.engine.make(plan)
    return engine


def reference(name: str, plan: Plan) -> Engine:
    """The engine of a reference: Hugging Face's ``generate`` on the plan's model and hardware, with its K.

    It has no gate and no other controller, and is exact; what the plan says of them is the configuration's alone.
    """
    return make(
        replace(
            plan,
            engine=ENGINE.new("hf", max_batch=plan.engine.max_batch),
            draft=REFERENCES[name](plan.draft),
            gate=GATE.new("none"),
            controller=CONTROLLER.new("fixed", K=plan.controller.k),
            policy=plan.policy if plan.exact else POLICY.new("longest_prefix"),
        )
    )


def served(url: str, secret: str | None, tokenizer: Tokenizer) -> Server:
    """A server of ours, as a caller with this API key sees it; ``tokenizer`` reads its text."""
    return Server("url", url, secret, lambda text, stopped: tokenizer.encode_part(text), direct=True)


def weights(plan: Plan) -> Path:
    """The folder of the plan's model on this disk, fetched and converted where that is still to do."""
    from selfspec.model import gguf

    return gguf.model_folder(plan.model)


def drafter(plan: Plan) -> Path | None:
    """The folder of the draft's own model, or of heads that somebody trained; ``None``: it has none."""
    from selfspec.model import gguf

    source, sha256 = plan.draft.get("source"), plan.draft.get("sha256")
    return None if source is None else gguf.model_folder(schema.Model("draft", source, sha256))
