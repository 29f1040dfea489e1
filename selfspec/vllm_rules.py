"""What of a plan vLLM cannot do, with the reason; said before anything is loaded, and without vLLM."""

from dataclasses import asdict

from selfspec import config as schema
from selfspec.config import ControllerName, Device, EngineName, GateName
from selfspec.errors import ConfigError

_TRAINED = {"source": "the model that drafts, or a checkpoint of heads"}
_NEEDS: dict[str, dict[str, str]] = {
    "none": {},
    "ngram": {"max_match": "a number", "min_match": "a number"},
    "suffix": {"max_match": "a number"},
    "draft_model": _TRAINED,
    "medusa": _TRAINED,
    "eagle": _TRAINED,
}
"""The drafts that vLLM itself has, and the settings they cannot do without."""
_MAY = {"suffix": {"cross_request"}, "draft_model": {"sha256"}, "medusa": {"sha256"}, "eagle": {"sha256"}}
"""Those they can be given besides."""
EARLY = ("layerskip", "lsq")
"""The drafts that our plugin runs inside vLLM."""
HOTTEST = 2.0
"""The highest temperature that vLLM accepts."""
OWN = ("kv_gib", "quantization", "tensor_parallel", "eager")
"""The settings of an engine that are vLLM's alone."""


def foreign(engine: schema.Engine) -> None:
    """Refuses vLLM's settings of another engine.

    Raises:
        ConfigError: with the setting.
    """
    for key in OWN:
        if engine.name is not EngineName.vllm and getattr(engine, key) is not None:
            raise ConfigError(f"engine.{key}={getattr(engine, key)}: means nothing to engine={engine.name.name}")


def check(config: schema.Config) -> None:
    """Refuses what ``engine=vllm`` cannot do.

    Raises:
        ConfigError: with the setting, and what can be used in its place.
    """
    if config.policy.relaxed:
        said = f"policy={config.policy.name.name}" if config.policy.verify else "policy.verify=false"
        raise ConfigError(f"{said}: engine=vllm verifies what it drafts, and decodes exactly")
    if config.policy.temperature > HOTTEST:
        raise ConfigError(f"policy.temperature={config.policy.temperature:g}: engine=vllm draws at up to {HOTTEST:g}")
    if config.engine.kv_gib is None:
        raise ConfigError("engine.kv_gib=null: engine=vllm needs to know how much room keys and values have")
    if config.hardware.device is Device.mps:
        raise ConfigError("hardware.device=mps: engine=vllm runs on auto, cpu, cuda")
    if config.draft.name in EARLY:
        _check_early(config)
    elif config.draft.name != "none":
        _check_own(config)


def chain(draft: schema.Draft) -> None:
    """Refuses an early exit that drafts anything but a chain of likeliest tokens.

    Raises:
        ConfigError: naming the key.
    """
    for key, value in (("width", 1), ("budget", None), ("sample", False)):
        if getattr(draft, key) != value:
            raise ConfigError(f"draft.{key}={getattr(draft, key)}: inside vLLM a draft is a chain of likeliest tokens")


def learning(gate: schema.Gate, controller: schema.Controller, ranks: int) -> None:
    """Refuses an early exit whose gate or controller could not learn inside vLLM.

    Args:
        ranks: among how many devices layers are shared.

    Raises:
        ConfigError: naming them.
    """
    if controller.name is ControllerName.autotune:
        raise ConfigError("controller=autotune: inside vLLM one exit serves all; allowed are fixed, adaptive, cost")
    if ranks > 1 and (gate.name is GateName.bandit or controller.name is ControllerName.cost):
        raise ConfigError(
            f"gate={gate.name.name}, controller={controller.name.name}: learns from times, which ranks measure "
            f"differently, and so cannot run with tensor_parallel_size={ranks}"
        )


def _check_own(config: schema.Config) -> None:
    """Of drafts that are vLLM's."""
    draft, gate, controller = config.draft, config.gate, config.controller
    name, blank = draft.name, schema.Draft(name=draft.name)
    known = {"name", *_NEEDS[name], *_MAY.get(name, ())}
    for key, value in asdict(draft).items():
        anyway = (name, key, value) == ("suffix", "min_match", 1)  # it believes a match of one token
        if value != getattr(blank, key) and key not in known and not anyway:
            hint = f"; see draft=vllm_{name}" if name in ("suffix", "medusa", "eagle") else ""
            raise ConfigError(
                f"draft.{key}={getattr(value, 'name', value)}: means nothing to vLLM's draft={name}{hint}"
            )
    for key, what in _NEEDS[name].items():
        if getattr(draft, key) is None:
            raise ConfigError(f"draft.{key}=null: vLLM's draft={name} needs {what}")
    if gate.name is not GateName.none:
        raise ConfigError(f"gate={gate.name.name}: vLLM's draft={name} asks no gate; {' and '.join(EARLY)} do")
    if controller.name is not ControllerName.fixed:
        asked = f"controller={controller.name.name}"
        raise ConfigError(f"{asked}: vLLM's draft={name} has one K, use fixed; {' and '.join(EARLY)} have others")


def _check_early(config: schema.Config) -> None:
    """Of drafts that our plugin runs."""
    controller = config.controller
    chain(config.draft)
    learning(config.gate, controller, config.engine.tensor_parallel or 1)
    if controller.name is not ControllerName.fixed and config.bench.fixed_k:
        raise ConfigError(
            f"bench.fixed_k={config.bench.fixed_k}: vLLM is started with one controller; use bench.fixed_k=[]"
        )
