"""What groups of settings cannot go together, with the reason: said before anything is loaded.

What one option alone can get wrong stands beside it (``Options.check``), what an engine cannot do beside the engine
(``Options.refuse``).
"""

import re
from collections.abc import Callable

from selfspec import config as schema
from selfspec import credentials
from selfspec.axes import DRAFT, DraftOptions
from selfspec.data import assets
from selfspec.errors import ConfigError
from selfspec.options import AUTO
from selfspec.serve.config import RouteName, Serve

REFERENCES: dict[str, Callable[[DraftOptions], DraftOptions]] = {
    "hf": lambda draft: DRAFT.new("none"),
    "hf_prompt_lookup": lambda draft: DRAFT.new("ngram", max_match=draft.get("max_match") or 2, min_match=1),
    "hf_early_exit": lambda draft: DRAFT.new("layerskip", exit_layer=draft.get("exit_layer") or 12),
    "hf_assistant": lambda draft: draft,
}
"""What ``bench.baselines`` may name, and what Hugging Face's ``generate`` is then asked to draft with."""


def check(config: schema.Config) -> None:
    """Refuses a combination that cannot work.

    Raises:
        ConfigError: naming the key, the value and what is allowed.
    """
    config.engine.refuse(config)
    if config.controller.chosen_exits:
        _check_exits(config)
    if isinstance(exit_layer := config.draft.get("exit_layer"), int):
        _check_exit("exit_layer", exit_layer, config)
    if not config.policy.verify:
        _check_unverified(config.draft)
    if config.draft.open:
        _check_open(config)
    _check_backends(config.serve)
    _check_checkpoint(config.checkpoint.dir)
    if (head := config.draft.get("head")) is not None and not config.draft.fitted:
        lacks = "without draft.corpus=true" if config.draft.get("corpus") is False else f"to draft={config.draft.name}"
        raise ConfigError(f"draft.head={head}: means nothing {lacks}, for which nothing is fitted")
    if config.draft.get("sample") and not config.policy.samples:
        raise ConfigError("draft.sample=true: only policy=rejection at a temperature above 0 draws tokens")
    _check_bench(config)
    _check_turns(config)


def _check_unverified(draft: DraftOptions) -> None:
    if not draft.can_go_unverified:
        able = [name for name, option in DRAFT.options.items() if option.can_go_unverified and option.speculates]
        raise ConfigError(f"policy.verify=false: only {' and '.join(able)} can do without, draft={draft.name} cannot")
    if draft.open:
        raise ConfigError(f"exit_layer={AUTO}: policy.verify=false decides by the exit alone; must be a number")
    if draft.get("vocab") is not None:
        raise ConfigError(f"draft.vocab={draft.get('vocab')}: policy.verify=false reads out the whole vocabulary")
    if draft.get("previous"):
        raise ConfigError("draft.previous=true: reads the verified final state, which policy.verify=false never has")


def _check_open(config: schema.Config) -> None:
    """Of a draft whose exit layer is to be chosen."""
    if (head := config.draft.get("head")) is not None:
        raise ConfigError(f"exit_layer={AUTO}: draft.head={head} was fitted for one; must be its number")
    if "fit" not in config.stages:
        raise ConfigError(
            f"exit_layer={AUTO}: is chosen by the fit stage, stages={config.stages} lacks it; give a number"
        )


def _check_backends(serve: Serve) -> None:
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
        if backend.url is not None and not re.fullmatch(credentials.SERVER, backend.url):
            shown = credentials.without(backend.url)
            raise ConfigError(
                f"{key}.url={shown}: must be http(s)://HOST/..., without credentials (see key_env), query or fragment"
            )
        if backend.key_env is not None and not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", backend.key_env):
            raise ConfigError(f"{key}.key_env: must be the name of an environment variable, not a key")
    if serve.router.policy is RouteName.length and serve.router.max_total_tokens is None:
        raise ConfigError("serve.router.max_total_tokens=null: policy=length needs to know when to leave our engine")


def _check_checkpoint(place: str) -> None:
    if not place:
        raise ConfigError(
            "checkpoint.dir: has no value; give one as checkpoint.dir=gs://BUCKET/PREFIX, or in the environment as "
            "SELFSPEC_CHECKPOINT"
        )
    # abfs://CONTAINER@ACCOUNT/... names no user, and sftp://USER@HOST/... no password.
    users = re.match(r"(abfss?|az|adl|wasbs?|hdfs|webhdfs|s?ftp|ssh|smb)://", place)
    if credentials.in_url(place, user=users is None):
        shown = credentials.without(place)
        raise ConfigError(f"checkpoint.dir={shown}: must be without credentials, which belong in the environment")
    if re.match(r"\w+:(?!//)|(gs|gcs|s3|s3a|az|abfs)://(/|$)", place):  # gs:/BUCKET; gs://$BUCKET/PREFIX, and no BUCKET
        raise ConfigError(
            f"checkpoint.dir={place}: names no bucket; must be a folder, or a URL such as gs://BUCKET/PREFIX"
        )


def _check_bench(config: schema.Config) -> None:
    beside = config.controller.adapts and config.bench.fixed_k
    if config.draft.get("cross_request") and (config.scale.repeats > 1 or beside):
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


def _check_turns(config: schema.Config) -> None:
    workload, asked = config.workload, f"workload.turns={config.workload.turns}"
    if workload.turns == 1:
        return
    if not workload.chat or workload.prompt_tokens is not None:
        raise ConfigError(f"{asked}: needs a chat: workload.chat=true and workload.prompt_tokens=null")
    if "bench" not in config.stages:
        raise ConfigError(f"{asked}: only the bench stage asks more than the first; stages={config.stages}")


def _check_exits(config: schema.Config) -> None:
    """Of a controller that chooses among exits."""
    controller, draft = config.controller, config.draft
    if not draft.raw_exits:
        raise ConfigError(f"controller={controller.name}: chooses among raw exits; draft={draft.name} has no others")
    if config.engine.max_batch > 1:
        raise ConfigError(
            f"engine.max_batch={config.engine.max_batch}: controller={controller.name} decodes one request at a time"
        )
    for layer in controller.chosen_exits:
        _check_exit("controller.exits", layer, config)


def _check_exit(key: str, layer: int, config: schema.Config) -> None:
    layers = assets.declared_layers(config.model.source) or config.model.layers
    if layers is not None and not 1 <= layer < layers:
        name = config.model.name
        raise ConfigError(f"{key}={layer}: {name} has {layers} layers; must be from 1 to {layers - 1}")
