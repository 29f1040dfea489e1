"""Plan -> engine, imported when it is made; and the references that a bench decodes beside its own plan."""

import importlib
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

from selfspec import config as schema
from selfspec.config import EngineName
from selfspec.engine.base import Engine
from selfspec.engine.openai.client import Server
from selfspec.errors import ConfigError
from selfspec.plan import Plan
from selfspec.rules import REFERENCES

ENGINES = {
    EngineName.torch: "selfspec.engine.torch.engine:TorchEngine",
    EngineName.fake: "selfspec.engine.fake.engine:FakeEngine",
    EngineName.hf: "selfspec.engine.hf:HFEngine",
    EngineName.openai: "selfspec.engine.openai.engine:OpenAIEngine",
    EngineName.vllm: "selfspec.engine.vllm.engine:VLLMEngine",
}


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
    module, name = ENGINES[plan.engine.name].split(":")
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


def served(url: str, secret: str | None, engine: Engine) -> Server:
    """A server of ours with the engine's model, as a caller with this API key sees it.

    The engine's tokenizer reads its text.
    """
    return Server("url", url, secret, lambda text, stopped: engine.encode(text, chat=False), direct=True)


def weights(plan: Plan) -> Path:
    """The folder of the plan's model on this disk, fetched and converted where that is still to do."""
    from selfspec.model import gguf

    return gguf.model_folder(plan.model)


def drafter(plan: Plan) -> Path | None:
    """The folder of the draft's own model, or of heads that somebody trained; ``None``: it has none."""
    from selfspec.model import gguf

    draft = plan.draft
    return None if draft.source is None else gguf.model_folder(schema.Model("draft", draft.source, draft.sha256))
