"""Plan -> engine, imported when it is made; and the references that a bench decodes beside its own plan."""

import importlib
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

from selfspec import config as schema
from selfspec.config import EngineName
from selfspec.engine.base import Engine, Fits, Opens, Probes, Scores, Tokenizer
from selfspec.engine.openai.client import Server
from selfspec.errors import ConfigError
from selfspec.plan import Plan
from selfspec.rules import REFERENCES


class Kind(NamedTuple):
    """An engine before it is imported.

    Attributes:
        where: its class.
        can: what it can do besides decoding; the class has these among its bases.
        model: whether it reads the plan's model.
    """

    where: str
    can: tuple[type, ...]
    model: bool = True


KINDS = {
    EngineName.torch: Kind("selfspec.engine.torch.engine:TorchEngine", (Opens, Fits, Scores, Probes)),
    EngineName.hf: Kind("selfspec.engine.hf:HFEngine", (Scores, Probes)),
    EngineName.fake: Kind("selfspec.engine.fake.engine:FakeEngine", (Opens, Scores, Probes), model=False),
    EngineName.openai: Kind("selfspec.engine.openai.engine:OpenAIEngine", ()),
    EngineName.vllm: Kind("selfspec.engine.vllm.engine:VLLMEngine", (Opens, Fits, Scores)),
}


def kind(plan: Plan) -> Kind:
    """What is known of the plan's engine without importing it."""
    return KINDS[plan.engine.name]


def require(plan: Plan, what: type, says: str) -> None:
    """Refuses an engine that cannot do what is asked of it.

    Args:
        says: what the message has between the engine and those that can.

    Raises:
        ConfigError: with those that can.
    """
    if what not in kind(plan).can:
        allowed = ", ".join(name.name for name, one in KINDS.items() if what in one.can)
        raise ConfigError(f"engine={plan.engine.name.name}: {says} {allowed}")


def check(plan: Plan) -> None:
    """Refuses, without loading it, an engine that is not installed here.

    Raises:
        ConfigError: with what is needed.
    """
    if plan.engine.name is EngineName.vllm:
        from selfspec.vllm_plugin import versions

        versions.check_engine()
        if plan.draft.name == "suffix" and find_spec("arctic_inference") is None:
            raise ConfigError(
                "draft=suffix: vLLM's needs arctic-inference; pip install arctic-inference (it is built on the spot)"
            )


def make(plan: Plan) -> Engine:
    """The plan's engine; nothing is loaded before it is asked for something."""
    module, name = kind(plan).where.split(":")
    engine: Engine = getattr(importlib.import_module(module), name)(plan)
    return engine


def reference(name: str, plan: Plan) -> Engine:
    """The engine of a reference: Hugging Face's ``generate`` on the plan's model and hardware, with its K.

    It has no gate and no other controller, and is exact; what the plan says of them is the configuration's alone.
    """
    return make(
        replace(
            plan,
            engine=schema.Engine(EngineName.hf, max_batch=plan.engine.max_batch),
            draft=REFERENCES[name](plan.draft),
            gate=schema.Gate(),
            controller=schema.Controller(K=plan.controller.K),
            policy=plan.policy if plan.exact else schema.Policy(),
        )
    )


def served(url: str, secret: str | None, tokenizer: Tokenizer) -> Server:
    """A server of ours, as a caller with this API key sees it; ``tokenizer`` reads its text."""
    return Server("url", url, secret, lambda text, stopped: tokenizer.encode(text, chat=False), direct=True)


def weights(plan: Plan) -> Path:
    """The folder of the plan's model on this disk, fetched and converted where that is still to do."""
    from selfspec.model import gguf

    return gguf.model_folder(plan.model)


def drafter(plan: Plan) -> Path | None:
    """The folder of the draft's own model, or of heads that somebody trained; ``None``: it has none."""
    from selfspec.model import gguf

    draft = plan.draft
    return None if draft.source is None else gguf.model_folder(schema.Model("draft", draft.source, draft.sha256))
