"""What settings cannot go together, with the reason: said before anything is loaded.

What vLLM cannot do stands in ``vllm_rules.py``; what one value alone can get wrong, in ``config.py``.
"""

import ast
import re
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

from selfspec import config as schema
from selfspec import vllm_rules
from selfspec.data import assets
from selfspec.errors import ConfigError

_DRAFTS = Path(__file__).parent / "speculation" / "draft"
_HEAD = {"form", "rank", "previous", "ridge", "sgd_epochs", "head"}
_READOUT = {"vocab", "head", "width", "budget", "sample"}
_MEANS: dict[str, set[str]] = {
    "none": set(),
    "served": set(),
    "layerskip": {"exit_layer"} | _READOUT,
    "lsq": {"exit_layer"} | _HEAD | _READOUT,
    "adapter": {"exit_layer", "form", "ridge", "sgd_epochs"} | _READOUT,
    "medusa": {"heads", "init", "ridge", "sgd_epochs"} | _READOUT,
    "eagle": {"alpha"} | _HEAD | _READOUT,
    "draft_model": {"source", "sha256", "sample"},
    "ngram": {"max_match", "min_match"},
    "suffix": {"max_match", "min_match", "cross_request", "corpus", "width", "budget"},
    "hybrid": {"lookup", "learned", "max_match", "min_match", "cross_request", "corpus", "width", "budget"},
}
"""The settings each draft mode has a use for; a hybrid also has those of its learned draft."""
_LOOKUP = ("max_match", "min_match")
_NEEDS: dict[str, tuple[str, ...]] = {
    "layerskip": ("exit_layer",),
    "lsq": ("exit_layer", "form"),
    "adapter": ("exit_layer",),
    "medusa": ("heads", "init"),
    "draft_model": ("source",),
    "ngram": _LOOKUP,
    "suffix": _LOOKUP,
    "hybrid": _LOOKUP,
}
"""Those it cannot do without."""
REFERENCES: dict[str, Callable[[schema.Draft], schema.Draft]] = {
    "hf": lambda draft: schema.Draft("none"),
    "hf_prompt_lookup": lambda draft: schema.Draft("ngram", max_match=draft.max_match or 2, min_match=1),
    "hf_early_exit": lambda draft: schema.Draft("layerskip", exit_layer=draft.exit_layer or 12),
    "hf_assistant": lambda draft: draft,
}
"""What ``bench.baselines`` may name, and what Hugging Face's ``generate`` is then asked to draft with."""


def check(config: schema.Config) -> None:
    """Refuses a combination that cannot work.

    Raises:
        ConfigError: naming the key, the value and what is allowed.
    """
    _check_draft(config)
    _check_engine(config)
    _check_backends(config.serve)
    _check_checkpoint(config.checkpoint.dir)
    _check_policy(config)
    _check_bench(config)
    _check_controller(config)


def _check_draft(config: schema.Config) -> None:
    draft, engine = config.draft, config.engine
    known = sorted(p.stem for p in _DRAFTS.glob("*.py") if p.stem not in ("__init__", "base"))
    runnable = known if engine.drafts is None else engine.drafts
    if engine.drafts is None and draft.name not in _MEANS:
        _check_file(draft.name)
    if draft.name not in runnable:
        raise ConfigError(f"draft={draft.name}: engine={engine.name.name} cannot run it; it runs {', '.join(runnable)}")
    if engine.name is schema.EngineName.vllm:
        vllm_rules.check(config)
        if draft.name not in vllm_rules.EARLY:
            return
    if draft.name == "hybrid":
        _check_hybrid(draft)
    for key in _NEEDS.get(draft.name, ()) + _NEEDS.get(draft.learned or "", ()):
        if getattr(draft, key) is None:
            raise ConfigError(f"draft.{key}=null: draft={draft.learned or draft.name} needs one")
    if draft.exit_layer is not None:
        _check_exit("exit_layer", draft.exit_layer, config)
    if (draft.form is schema.HeadForm.low_rank) != (draft.rank is not None):
        form = draft.form.name if draft.form else None
        raise ConfigError(f"draft.rank={draft.rank}: form=low_rank needs a rank >= 1, other forms none; form={form}")
    if draft.fitted and draft.ridge is None and "ridge" in _MEANS.get(draft.learned or draft.name, set()):
        raise ConfigError("draft.ridge=null: a fitted head needs a number >= 1e-09")
    if "alpha" in _MEANS.get(draft.learned or draft.name, set()):
        _check_eagle(draft)
    if draft.form is schema.HeadForm.block and "lsq" in (draft.name, draft.learned):
        raise ConfigError("draft.form=block: draft=lsq is a linear map; draft=adapter has a block")
    if not config.policy.verify and draft.name not in ("none", "layerskip", "lsq"):
        raise ConfigError(f"policy.verify=false: only layerskip and lsq can do without, draft={draft.name} cannot")
    if not config.policy.verify and draft.vocab is not None:
        raise ConfigError(f"draft.vocab={draft.vocab}: policy.verify=false reads out the whole vocabulary")
    if not config.policy.verify and draft.previous:
        raise ConfigError("draft.previous=true: reads the verified final state, which policy.verify=false never has")
    meant = _MEANS.get(draft.name, _given(draft))  # of a draft that is not in the table, all
    for key in sorted(_given(draft) - _MEANS.get(draft.learned or draft.name, set()) - meant):
        value = getattr(draft, key)
        raise ConfigError(f"draft.{key}={getattr(value, 'name', value)}: means nothing to draft={draft.name}")


def _check_file(name: str) -> None:
    """Refuses a draft whose file is missing or unfinished; read, not imported: that would load torch."""
    path = _DRAFTS / f"{name}.py"
    shown = "/".join(path.parts[-4:])
    if not path.is_file():
        raise ConfigError(f"draft={name}: {shown} is missing")
    try:
        body = ast.parse(path.read_text()).body
    except SyntaxError as error:
        raise ConfigError(f"draft={name}: {shown}, line {error.lineno}: {error.msg}") from error
    if not any(isinstance(node, ast.FunctionDef) and node.name == "make" for node in body):
        raise ConfigError(f"draft={name}: {shown} has no make(draft, model, head)")


def _check_backends(serve: schema.Serve) -> None:
    taken = {"local", "auto", "cache"}  # our engine's, the router's and the cache's
    for at, backend in enumerate(serve.backends):
        key = f"serve.backends[{at}]"
        if backend.name in taken:
            raise ConfigError(f"{key}.name={backend.name}: is taken; must be another than {', '.join(sorted(taken))}")
        taken.add(backend.name)
        if backend.url is None and (backend.model or backend.key_env):
            raise ConfigError(
                f"{key}.url=null: must be a server's http(s)://HOST/v1; our engine has no model, no key_env"
            )
        if backend.url is not None and not re.fullmatch(r"https?://[^@/\s]+(/[^@\s]*)?", backend.url):
            shown = re.sub(r"//[^/\s]*@", "//", backend.url)
            raise ConfigError(f"{key}.url={shown}: must be http(s)://HOST/..., without credentials (see key_env)")
        if backend.key_env is not None and not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", backend.key_env):
            raise ConfigError(f"{key}.key_env: must be the name of an environment variable, not a key")
    if serve.router.policy is schema.RouteName.length and serve.router.max_total_tokens is None:
        raise ConfigError("serve.router.max_total_tokens=null: policy=length needs to know when to leave our engine")


def _check_checkpoint(place: str) -> None:
    if not place:
        raise ConfigError(
            "checkpoint.dir: has no value; give one as checkpoint.dir=gs://BUCKET/PREFIX, or in the environment as "
            "SELFSPEC_CHECKPOINT"
        )
    if re.search(r"://[^/@]*:[^/@]*@", place):
        shown = re.sub(r"//[^/@]*@", "//", place)
        raise ConfigError(f"checkpoint.dir={shown}: must be without credentials, which belong in the environment")
    if re.match(r"\w+:(?!//)|(gs|gcs|s3|s3a|az|abfs)://(/|$)", place):  # gs:/BUCKET; gs://$BUCKET/PREFIX, and no BUCKET
        raise ConfigError(
            f"checkpoint.dir={place}: names no bucket; must be a folder, or a URL such as gs://BUCKET/PREFIX"
        )


def _check_engine(config: schema.Config) -> None:
    engine, served = config.engine, config.engine.name is schema.EngineName.openai
    if engine.weights is not schema.Weights.full and engine.name is not schema.EngineName.torch:
        raise ConfigError(f"engine.weights={engine.weights.name}: means nothing to engine={engine.name.name}")
    vllm_rules.foreign(engine)
    if served and engine.url is None:
        raise ConfigError("engine.url=null: engine=openai needs one, such as http://127.0.0.1:8000")
    if served and (config.draft.name == "served") != (engine.plain_url is not None):
        raise ConfigError(
            f"engine.plain_url={engine.plain_url}: draft=served is compared with a server that drafts nothing, at "
            f"engine.plain_url; draft=none with none; draft={config.draft.name}"
        )
    for key in ("url", "plain_url"):
        value = getattr(engine, key)
        if value is not None and not (served and re.fullmatch(r"https?://[^@/\s]+(/[^@\s]*)?", value)):
            shown = re.sub(r"//[^/\s]*@", "//", value)
            raise ConfigError(f"engine.{key}={shown}: must be http(s)://HOST, no credentials, with engine=openai only")


def _check_eagle(draft: schema.Draft) -> None:
    if (draft.alpha is None) == (draft.form is None):
        raise ConfigError(f"draft.alpha={draft.alpha}: eagle wants either an alpha or a form")
    if draft.alpha is not None and draft.sgd_epochs:
        raise ConfigError(f"draft.sgd_epochs={draft.sgd_epochs}: with draft.alpha nothing is trained")


def _check_hybrid(draft: schema.Draft) -> None:
    lookups = ("ngram", "suffix")
    if draft.lookup not in lookups:
        raise ConfigError(f"draft.lookup={draft.lookup}: allowed are {', '.join(lookups)}")
    learned = sorted(_MEANS.keys() - {"none", "hybrid", *lookups})
    if draft.learned not in learned:
        raise ConfigError(f"draft.learned={draft.learned}: allowed are {', '.join(learned)}")


def _given(draft: schema.Draft) -> set[str]:
    """The settings that are not at their default."""
    blank = schema.Draft(name=draft.name)
    return {key for key, value in asdict(draft).items() if value != getattr(blank, key)}


def check_gate(gate: schema.Gate) -> None:
    """Refuses a gate that lacks its threshold or its arms.

    Raises:
        ConfigError: naming the key.
    """
    if gate.name is schema.GateName.bandit:
        if not gate.arms:
            raise ConfigError(f"gate.arms={gate.arms}: gate=bandit needs one threshold or more")
        if not all(0 <= arm <= 1 for arm in gate.arms):
            raise ConfigError(f"gate.arms={gate.arms}: must each be from 0 to 1")
    elif gate.name is not schema.GateName.none and gate.threshold is None:
        raise ConfigError(f"gate.threshold=null: gate={gate.name.name} needs a number")


def _check_policy(config: schema.Config) -> None:
    policy, name = config.policy, config.policy.name
    needs = {
        schema.PolicyName.conf_threshold: ("threshold",),
        schema.PolicyName.topk_agree: ("k",),
        schema.PolicyName.typical: ("epsilon", "delta"),
    }
    for key in needs.get(name, ()):
        if getattr(policy, key) is None:
            raise ConfigError(f"policy.{key}=null: policy={name.name} needs a number")
    if policy.samples and name is not schema.PolicyName.rejection:
        raise ConfigError(
            f"policy.temperature={policy.temperature:g}: policy={name.name} is greedy; use policy=rejection"
        )
    if config.draft.sample and not policy.samples:
        raise ConfigError("draft.sample=true: only policy=rejection at a temperature above 0 draws tokens")
    if policy.samples and policy.temperature < 0.01:
        raise ConfigError(f"policy.temperature={policy.temperature:g}: must be 0 (greedy) or at least 0.01")
    if config.draft.sample and config.draft.width > 1:
        raise ConfigError(f"draft.sample=true: draws chains; draft.width={config.draft.width} asks for a tree")


def _check_bench(config: schema.Config) -> None:
    adapts = config.controller.name in (schema.ControllerName.adaptive, schema.ControllerName.cost)
    if config.draft.cross_request and (config.scale.repeats > 1 or (adapts and config.bench.fixed_k)):
        raise ConfigError(
            "draft.cross_request=true: would look up what it said to the same prompt before; "
            "use scale.repeats=1 and bench.fixed_k=[]"
        )
    for name in config.bench.baselines:
        if name not in REFERENCES:
            raise ConfigError(f"bench.baselines={name}: allowed are {', '.join(REFERENCES)}")
    if "hf_assistant" in config.bench.baselines and config.draft.name != "draft_model":
        raise ConfigError("bench.baselines=hf_assistant: needs draft=draft_model, whose model it drafts with")
    if config.bench.baselines and config.engine.max_batch > 1:
        raise ConfigError(f"engine.max_batch={config.engine.max_batch}: bench.baselines decodes one request at a time")
    for k in config.bench.fixed_k:
        if not 1 <= k <= 64:
            raise ConfigError(f"bench.fixed_k={k}: must be from 1 to 64")


def check_controller(controller: schema.Controller) -> None:
    """Refuses a controller that lacks a setting it needs.

    Raises:
        ConfigError: naming it.
    """
    needs = {
        schema.ControllerName.adaptive: ("low", "high", "step", "window", "target"),
        schema.ControllerName.cost: ("window",),
        schema.ControllerName.autotune: ("exits",),
    }
    for key in needs.get(controller.name, ()):
        if not getattr(controller, key) and getattr(controller, key) != 0:
            raise ConfigError(
                f"controller.{key}={getattr(controller, key)}: controller={controller.name.name} needs one"
            )


def _check_controller(config: schema.Config) -> None:
    controller, draft = config.controller, config.draft
    check_controller(controller)
    if controller.name is schema.ControllerName.autotune:
        if draft.name != "layerskip" or draft.vocab is not None:
            raise ConfigError(f"controller=autotune: chooses among raw exits; draft={draft.name} has no others")
        if config.engine.max_batch > 1:
            raise ConfigError(
                f"engine.max_batch={config.engine.max_batch}: controller=autotune decodes one request at a time"
            )
        for layer in controller.exits or []:
            _check_exit("controller.exits", layer, config)


def _check_exit(key: str, layer: int, config: schema.Config) -> None:
    layers = assets.declared_layers(config.model.source) or config.model.layers
    if layers is not None and not 1 <= layer < layers:
        name = config.model.name
        raise ConfigError(f"{key}={layer}: {name} has {layers} layers; must be from 1 to {layers - 1}")
