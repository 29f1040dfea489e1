"""Composing a sweep's jobs at once gives what Hydra gives for each."""

import pickle
from collections.abc import Iterator

import pytest
from hydra import initialize_config_dir
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf, open_dict

from selfspec.run import CONF
from selfspec.sweep import compose
from selfspec.sweep.compose import Composer

JOBS = [
    [],
    ["seed=3"],
    ["experiment=selfspec_varH", "tau_v=5", "seed=1"],
    ["experiment=selfspec_varH", "seed=2", "tau_v=4", "scale.prompts=7"],
    ["seed=2", "experiment=fastest", "K=3", "tau=0.5"],
    ["stages=[bench,quality]", "gate=maxp", "draft=none", "+hydra.nonsense=1"],
    ["scale=smoke", "gate=maxp", "tau=${temperature}", "temperature=0.3"],
    ["name=swept/${seed}", "exit_layer=3", "draft=layerskip", "controller.K=${exit_layer}"],
    ["+seed.nested=1"],
    ["++K=7"],
]


@pytest.fixture(scope="module")
def loader() -> Iterator[ConfigLoaderImpl]:
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        hydra = GlobalHydra.instance().hydra
        assert hydra is not None and isinstance(hydra.config_loader, ConfigLoaderImpl)
        yield hydra.config_loader


@pytest.fixture(scope="module")
def master(loader: ConfigLoaderImpl) -> DictConfig:
    asked = ["hydra.sweep.subdir='${hydra.job.override_dirname}'", "hydra.job.config.override_dirname.exclude_keys=[K]"]
    master = loader.load_configuration("config", [*asked, "scale=table"], RunMode.MULTIRUN)
    assert master.hydra.sweep.dir, "it knows what time it is, and so do its jobs"
    return master


def whole(config: DictConfig) -> dict[str, object]:
    """All that a config says and resolves to, and what it keeps to."""
    plain = config.copy()
    with open_dict(plain):
        hydra = plain.pop("hydra")
    resolved = OmegaConf.to_container(plain, resolve=True, throw_on_missing=False)
    places = [hydra.sweep.dir, hydra.job.override_dirname]
    return {"yaml": OmegaConf.to_yaml(config), "plain": resolved, "places": places, "flags": config._metadata.flags}


def outcome(loader: ConfigLoaderImpl, master: DictConfig, job: list[str]) -> object:
    try:
        return whole(loader.load_sweep_config(master, job))
    except HydraException as error:
        return str(error), str(error.__cause__)


@pytest.mark.slow
@pytest.mark.parametrize("order", [1, -1])
def test_as_hydra_does(loader: ConfigLoaderImpl, master: DictConfig, order: int) -> None:
    composer = Composer(loader.get_search_path())
    for job in JOBS[::order]:
        assert outcome(composer, master, job) == outcome(loader, master, job), job


@pytest.mark.parametrize("text", ["a b,c=d", "it's", '"', "back\\slash", "its' \\'", "end\\", "[x]", "", "${seed}"])
def test_any_text_as_a_value(text: str) -> None:
    (override,) = OverridesParser.create().parse_overrides([f"hydra.sweep.dir={compose.quoted(text)}"])
    assert override.value() == text


@pytest.mark.parametrize("wrong", ["K=many", "tau=[1]", "sead=1", "gate=nope", "seed=", "seed='", "seed@there=1"])
def test_what_hydra_refuses(loader: ConfigLoaderImpl, master: DictConfig, wrong: str) -> None:
    composer = Composer(loader.get_search_path())
    assert outcome(composer, master, ["seed=1", wrong]) == outcome(loader, master, ["seed=1", wrong])


def test_jobs_of_one_kind_are_composed_once_and_are_apart(
    loader: ConfigLoaderImpl, master: DictConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    composed = list[object]()
    load = ConfigLoaderImpl.load_sweep_config
    monkeypatch.setattr(ConfigLoaderImpl, "load_sweep_config", lambda *args: composed.append(args) or load(*args))
    monkeypatch.setattr(compose, "_MOST", 2)
    composer = Composer(loader.get_search_path())
    common = ["scale=smoke", "draft=layerskip", "exit_layer=3"]
    configs = [composer.load_sweep_config(master, [*common, f"seed={n}", "K=2"]) for n in range(4)]
    with open_dict(configs[0]):
        configs[0].scale.prompts = 1000
        del configs[0]["hydra"]
    again = composer.load_sweep_config(master, [*common, "seed=4", "K=2"])
    assert len(composed) == 1 and again.scale.prompts == 3
    assert [config.seed for config in (*configs, again)] == [0, 1, 2, 3, 4]
    assert len(pickle.dumps(composer)) < len(pickle.dumps(loader)) + 1000, "what is known is not sent along"
    for gate in ("maxp", "none", "varH", "maxp"):
        composer.load_sweep_config(master, [f"gate={gate}"])
    assert len(composed) == 5


@pytest.mark.parametrize(
    ("asked", "given"),
    [
        ("-m draft=ngram,suffix draft.max_match=5 K=3", "-m draft=ngram,suffix draft.max_match=choice(5) K=3"),
        ("draft.source=hf:a/b -m draft=a,b", "draft.source=choice(hf:a/b) -m draft=a,b"),
        ("-m draft=a,b draft.width=1,2 gate.x=1", "-m draft=a,b draft.width=1,2 gate.x=1"),
        *((same, same) for same in ("-m draft=a draft.width=1", "draft=a,b draft.width=1", "-m draft=[ draft.x=1")),
    ],
)
def test_settings_of_what_is_swept_over_are_for_each_job(asked: str, given: str) -> None:
    assert compose.per_job(asked.split()) == given.split()
