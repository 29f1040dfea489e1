"""Every file of ``conf/`` composes into a plan, says what it is meant to say, and is explained in ``--help``."""

from collections.abc import Iterator
from functools import cache
from typing import Any

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from omegaconf import DictConfig, OmegaConf

from selfspec import config, plan
from selfspec.axes import AXES
from selfspec.config import GROUPS, HANDLES
from selfspec.options import Axis
from selfspec.plan import Plan
from selfspec.run import CONF

OPTIONS = sorted(
    (folder.name, file.stem) for folder in CONF.iterdir() if folder.is_dir() for file in folder.glob("*.yaml")
)
COMPANIONS = {
    ("engine", "fake"): ["draft=layerskip", "exit_layer=3"],
    ("engine", "hf"): ["draft=none"],
    ("engine", "openai"): ["draft=none", "engine.url=http://127.0.0.1:8000"],
    ("draft", "served"): [
        "engine=openai",
        "engine.url=http://127.0.0.1:8000",
        "engine.plain_url=http://127.0.0.1:8001",
    ],
    ("engine", "vllm"): ["draft=none"],
    ("draft", "vllm_suffix"): ["engine=vllm"],
    ("draft", "vllm_medusa"): ["engine=vllm", "draft.source=hf:someone/heads"],
    ("draft", "vllm_eagle"): ["engine=vllm", "draft.source=hf:someone/head"],
    ("controller", "autotune"): ["draft=layerskip"],
    ("checkpoint", "gcs"): ["checkpoint.dir=gs://bucket/prefix"],
    ("hardware", "h100_spot"): ["checkpoint.dir=gs://bucket/prefix"],
    ("experiment", "h100"): ["checkpoint.dir=gs://bucket/prefix"],
}
"""What an option needs beside the defaults."""
PROMPTS = {"baseline_sanity": (8, 16), "baseline": (32, 128), "skip12": (32, 128), "skip12_lsq": (32, 128)}
SWEEPS: dict[str, tuple[str, str, str, list[float]]] = {
    "selfspec_maxp": ("lsq", "maxp", "tau", [0.30, 0.35, 0.40]),
    "selfspec_varH": ("lsq", "varH", "tau_v", [4, 5, 6]),
}


@pytest.fixture(autouse=True, scope="module")
def hydra() -> Iterator[None]:
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        yield


@cache
def composed(*overrides: str) -> Plan:
    return plan.make(compose("config", list(overrides)))


def asked(group: str, option: str) -> list[str]:
    """An option, with what it needs beside it."""
    return [f"{group}={option}", *COMPANIONS.get((group, option), [])]


def sweep_of(experiment: str) -> dict[str, list[str]]:
    """What an experiment sweeps."""
    hydra: DictConfig = compose("config", asked("experiment", experiment), return_hydra_config=True).hydra
    params = hydra.sweeper.get("params") or {}
    assert (hydra.mode is not None and hydra.mode.name == "MULTIRUN") == bool(params)
    return {key: str(values).split(",") for key, values in params.items()}


def numbers(values: list[str]) -> list[float]:
    return [float(value) for value in values]


@pytest.mark.parametrize(("group", "option"), OPTIONS)
def test_every_file_composes_into_a_plan(group: str, option: str) -> None:
    made = composed(*asked(group, option))
    if group == "experiment":
        assert made.name == option, "its results go to a folder of its own name"
    elif group not in ("draft", "model"):  # two files may say how one draft is made; a model's name is a proper one
        assert getattr(getattr(made, group).name, "name", getattr(made, group).name) == option


@pytest.mark.slow
@pytest.mark.parametrize("experiment", [option for group, option in OPTIONS if group == "experiment"])
def test_every_job_of_an_experiments_sweep_is_a_plan_of_its_own(experiment: str) -> None:
    jobs = [f"{key}={value}" for key, values in sweep_of(experiment).items() for value in values]
    assert len({composed(*asked("experiment", experiment), job).id for job in jobs}) == len(jobs)


@pytest.mark.parametrize(("experiment", "lengths"), PROMPTS.items())
def test_fixed_prompts_and_answers(experiment: str, lengths: tuple[int, int]) -> None:
    workload = composed(f"experiment={experiment}").workload
    assert (workload.prompt_tokens, workload.new_tokens) == lengths
    assert workload.ignore_eos and not workload.chat, "so long, whatever the model says"


@pytest.mark.parametrize(
    ("experiment", "draft"), [("skip12", "layerskip"), ("skip12_lsq", "lsq"), ("baseline", "none")]
)
def test_layer_skipping_is_not_verified(experiment: str, draft: str) -> None:
    made = composed(f"experiment={experiment}")
    exit_layer = None if draft == "none" else 12
    assert (made.draft.name, made.draft.get("exit_layer"), made.policy.verify) == (draft, exit_layer, draft == "none")


@pytest.mark.parametrize("experiment", SWEEPS)
def test_threshold_sweeps(experiment: str) -> None:
    draft, gate, handle, values = SWEEPS[experiment]
    made = composed(f"experiment={experiment}", f"{handle}={values[0]}")
    assert (made.draft.name, made.gate.name, made.gate.get("threshold")) == (draft, gate, values[0])
    assert made.exact and numbers(sweep_of(experiment)[handle]) == values


def test_exits_and_lengths_swept() -> None:
    exits, lengths = (numbers(sweep_of(f"{name}_sweep")[key]) for name, key in (("exit", "exit_layer"), ("k", "K")))
    assert len(set(exits)) == len(exits) == 3
    assert {1, 2, 3, 4} < set(lengths) and len(set(lengths)) == len(lengths)


@pytest.mark.parametrize("hardware", [option for group, option in OPTIONS if group == "hardware"])
def test_hardware_says_hardware(hardware: str) -> None:
    """All that is compared stays the same; a machine that is taken away needs another checkpoint."""
    plain, made = composed("hardware=cpu").settings(), composed(*asked("hardware", hardware)).settings()
    differ = {group for group in made if made[group] != plain[group]} - {"hardware"}
    assert differ == ({"checkpoint"} if hardware == "h100_spot" else set())


def test_the_h100_one_liner_launches_the_model_that_was_chosen() -> None:
    argv = [*asked("hardware", "h100_spot"), "gate=varH", "tau_v=4"]
    choices = compose("config", argv, return_hydra_config=True).hydra.runtime.choices
    assert (choices["hydra/launcher"], choices["checkpoint"]) == ("skypilot_h100_spot", "gcs")
    assert composed(*argv).model == composed().model != composed(*argv, "model=qwen2_5_0_5b").model
    assert composed(*argv).tracking.uri is None, "no file of this machine's"


def test_the_h100_experiment_is_launched_there() -> None:
    argv = asked("experiment", "h100")
    hydra = compose("config", argv, return_hydra_config=True).hydra
    assert hydra.runtime.choices["hydra/launcher"] == "skypilot_h100_spot"
    assert composed(*argv).hardware == composed(*asked("hardware", "h100_spot")).hardware
    assert composed(*argv).model != composed().model
    there = [*argv, "exit_layer=24", "hydra/launcher=basic", "hydra.mode=RUN"]  # as a job composes it again
    assert compose("config", there, return_hydra_config=True).hydra.runtime.choices["hydra/launcher"] == "basic"


@pytest.mark.parametrize("axis", AXES.values(), ids=AXES)
def test_every_option_has_a_file_with_its_schema_and_every_file_an_option(axis: Axis[Any]) -> None:
    files = {path.stem: OmegaConf.load(path) for path in (CONF / axis.group).glob("*.yaml")}
    begins = {name: list(file.defaults) for name, file in files.items()}
    assert {defaults[1] for defaults in begins.values()} == {"_self_"}
    assert {defaults[0].removesuffix("_schema") for defaults in begins.values()} == set(axis.options) <= set(files)


def test_what_the_schema_allows_has_a_file() -> None:
    assert {name.name for name in config.TrackerName} == {option for other, option in OPTIONS if other == "tracking"}


def test_help_explains_every_group_and_handle() -> None:
    said = (CONF / "hydra" / "help" / "selfspec.yaml").read_text()
    explained = {line.split()[0] for line in said.splitlines() if line.startswith("    ") and line.strip()}
    assert {*GROUPS, "experiment", *HANDLES} <= explained
    assert {folder.name for folder in CONF.iterdir() if folder.is_dir()} == {*GROUPS, "experiment", "hydra"}


def test_handles_stand_at_the_root() -> None:
    values = OmegaConf.load(CONF / "config.yaml")
    assert set(values) - {"defaults", "name", "output_dir", "hydra"} == set(HANDLES)
