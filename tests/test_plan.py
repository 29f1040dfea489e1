"""A plan's identity is what changes results; what cannot work is refused, with the reason."""

import re
from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException
from omegaconf import DictConfig

from selfspec import plan, refusal
from selfspec.config import HANDLES
from selfspec.data import download
from selfspec.errors import ConfigError
from selfspec.plan import Plan
from selfspec.run import CONF


@pytest.fixture(autouse=True, scope="module")
def hydra() -> Iterator[None]:
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        yield


def composed(*overrides: str) -> Plan:
    return plan.make(config(*overrides))


@cache
def config(*overrides: str) -> DictConfig:
    return compose("config", ["draft=lsq", *overrides])


@pytest.mark.parametrize(
    "change",
    [
        *("K=5", "exit_layer=11", "seed=1", "stages=[fit]", "gate=maxp", "draft=layerskip", "draft=lsq_lowrank"),
        *("draft.previous=true", "draft.ridge=0.1", "draft.sgd_epochs=1", "exit_layer=1 policy.verify=false"),
        *("model=qwen2_5_0_5b", "model.sha256=null", "hardware=cpu", "hardware.dtype=fp16", "hardware.threads=1"),
        *("workload=fixed_8_16", "workload.chat=false", "workload.ignore_eos=true", "workload.max_prompt_tokens=9"),
        *("workload.sha256=null", "scale=full", "scale.repeats=2", "scale.fit_prompts=10", "scale.warmup=0"),
    ],
)
def test_identity_changes_with_what_changes_results(change: str) -> None:
    assert composed(*change.split()).id != composed().id


@pytest.mark.parametrize("of", [["model"], ["draft", "engine=vllm", "draft=vllm_eagle"]])
def test_identity_is_of_the_commit_that_a_branch_is_at(of: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    key, *more = of
    asked = (f"{key}.source=hf:org/name", "model.sha256=null", *more)
    at: list[Plan] = []
    for commit in ("a" * 40, "b" * 40):
        monkeypatch.setattr(download, "_commit", lambda repo, revision, offline, commit=commit: commit)
        at.append(composed(*asked))
        assert at[-1].hub_sources[f"{key}.source"] == f"hf:org/name@{commit}"
        assert at[-1].settings()[key]["source"] == f"hf:org/name@{commit}"
        assert composed(f"{key}.source=hf:org/name@{commit}", *asked[1:]).id == at[-1].id
    assert at[0].id != at[1].id


@pytest.mark.parametrize(("gate", "change"), [("maxp", "tau=0.5"), ("varH", "tau_v=6"), ("entropy", "tau_h=1")])
def test_identity_changes_with_the_gates_own_threshold(gate: str, change: str) -> None:
    assert composed(f"gate={gate}", change).id != composed(f"gate={gate}").id


@pytest.mark.parametrize(
    "change",
    [
        *("name=other", "output_dir=/elsewhere", "tracking=none", "tracking.experiment=x", "checkpoint.dir=/x"),
        *("checkpoint.resume=never", "hydra.job.name=x", "hydra.sweep.dir=/x", "tau=0.9", "tau_v=1", "tau_h=1"),
        *("workload.name=x", "scale.name=x", "model.name=x", "model.layers=31"),
        *("workload.source=file:/a/copy", "model.source=file:/a/copy", "stages=[bench,fit,fit]"),
    ],
)
def test_identity_does_not_change_with_names_paths_and_tracking(change: str) -> None:
    assert composed(change).id == composed().id


def test_a_new_stage_version_is_a_new_identity(monkeypatch: pytest.MonkeyPatch) -> None:
    before = composed().id, composed().head_id
    monkeypatch.setitem(plan.STAGE_VERSIONS, "fit", 99)
    assert composed().id != before[0] and composed().head_id != before[1]


def test_a_new_fit_version_is_a_new_bench_of_a_fitted_draft(monkeypatch: pytest.MonkeyPatch) -> None:
    before = composed("exit_layer=12", "stages=[bench]").id
    monkeypatch.setitem(plan.STAGE_VERSIONS, "fit", 99)
    assert composed("exit_layer=12", "stages=[bench]").id != before


def test_a_named_head_counts_by_its_content(tmp_path: Path) -> None:
    one, copy, other = (tmp_path / name for name in ("one", "copy", "other"))
    for path, content in ((one, "a"), (copy, "a"), (other, "b")):
        path.write_text(content)
    ids = [composed("exit_layer=12", f"draft.head={path}").id for path in (one, copy, other)]
    assert ids[0] == ids[1] != ids[2] != composed().id


def test_plain_decoding_ignores_how_to_draft() -> None:
    plain = composed("draft=none")
    assert plain.id == composed("draft=none", "gate=varH", "K=9", "exit_layer=3", "policy.verify=false").id
    assert (plain.label, plain.speculative, plain.exact) == ("none", False, True)


def test_unverified_drafts_ignore_gate_and_length() -> None:
    unverified = "policy.verify=false", "exit_layer=12"
    assert composed(*unverified).id == composed(*unverified, "gate=maxp", "K=9").id


@pytest.mark.parametrize(
    ("overrides", "idle"),
    [
        ("gate=none", {"tau", "tau_v", "tau_h", "temperature"}),
        ("gate=maxp", {"tau_v", "tau_h", "temperature"}),
        ("gate=varH", {"tau", "tau_h", "temperature"}),
        ("gate=entropy", {"tau", "tau_v", "temperature"}),
        ("draft=none", {"tau", "tau_v", "tau_h", "K", "exit_layer", "temperature"}),
        ("draft=none gate=varH K=64 exit_layer=1", {"tau", "tau_v", "tau_h", "K", "exit_layer", "temperature"}),
        ("policy.verify=false gate=maxp exit_layer=12", {"tau", "tau_v", "tau_h", "K", "temperature"}),
        ("gate=maxp tau=0.5 exit_layer=1 K=64 seed=4294967295 stages=[fit]", {"tau_v", "tau_h", "temperature"}),
        ("gate=maxp gate.threshold=0.2", {"tau", "tau_v", "tau_h", "temperature"}),
    ],
)
def test_idle_handles(overrides: str, idle: set[str]) -> None:
    assert set(plan.idle_handles(config(*overrides.split()), HANDLES)) == idle


def test_idle_handles_of_the_smallest_model() -> None:
    cfg = config("model.layers=2", "exit_layer=1")
    assert plan.idle_handles(cfg, ["exit_layer"]) == []


@pytest.mark.parametrize(
    ("overrides", "reason"),
    [
        ("engine=fake", "draft=lsq: engine=fake cannot run it; it runs layerskip, none"),
        ("draft.name=nope", "draft.name=nope: is lsq; another is chosen as draft="),
        ("exit_layer=late", "exit_layer=late: must be >= 1, or auto"),
        ("K=many", "K=many: must be from 1 to 64, or auto"),
        ("stages=[bench]", "exit_layer=auto: is chosen by the fit stage, stages=.* lacks it; give a number"),
        ("policy.verify=false", "exit_layer=auto: policy.verify=false decides by the exit alone; must be a number"),
        (
            "draft.head=a.st",
            "exit_layer=auto: draft.head=a.st was fitted for one; must be its number",
        ),
        ("engine=vllm draft=layerskip", "exit_layer=auto: engine=vllm cannot choose one, torch can; give a number"),
        ("exit_layer=30", "exit_layer=30: SmolLM2-135M-Instruct has 30 layers; must be from 1 to 29"),
        ("draft=layerskip exit_layer=99", "exit_layer=99: .* must be from 1 to 29"),
        ("draft=lsq_lowrank draft.rank=null", "draft.rank=None: form=low_rank needs a rank"),
        ("draft.rank=8", "draft.rank=8: form=low_rank needs a rank >= 1, other forms none; form=affine"),
        ("draft=layerskip draft.exit_layer=null", "draft.exit_layer=null: must have a value"),
        ("draft=ngram policy.verify=false", "only layerskip and lsq can do without, draft=ngram cannot"),
        ("draft=hybrid draft.lookup=medusa", "draft.lookup=medusa: allowed are ngram, suffix"),
        ("draft=hybrid draft.learned=ngram", "draft.learned=ngram: allowed are adapter, draft_model, eagle"),
        (
            "policy.temperature=1",
            "policy.temperature: means nothing to policy=longest_prefix; .* policy=rejection has it",
        ),
        ("policy=rejection temperature=0.001", "policy.temperature=0.001: must be 0"),
        ("draft.sample=true", "draft.sample=true: only policy=rejection"),
        ("policy=typical policy.delta=null", "policy.delta=null: must have a value"),
        ("bench.baselines=[vllm]", "bench.baselines=vllm: allowed are hf, hf_prompt_lookup"),
        ("bench=peers engine.max_batch=2", "engine.max_batch=2: bench.baselines decodes one request at a time"),
        (
            "draft=suffix draft.cross_request=true scale.repeats=2",
            "draft.cross_request=true: would look up what it said",
        ),
        ("controller=autotune", "controller=autotune: chooses among raw exits"),
        ("controller=autotune draft=layerskip controller.exits=[30]", "controller.exits=30: .* from 1 to 29"),
        (
            "controller=autotune draft=layerskip controller.exits=[]",
            r"controller.exits=\[\]: controller=autotune needs one",
        ),
        ("gate=bandit gate.arms=[2]", r"gate.arms=\[2.0\]: must each be from 0 to 1"),
        (
            "draft.previous=true policy.verify=false exit_layer=12",
            "draft.previous=true: reads the verified final",
        ),
        *(
            (f"draft=layerskip draft.{o}", "means nothing to draft=layerskip")
            for o in ("ridge=1", "heads=2", "max_match=3")
        ),
        ("gate=varH gate.threshold=null", "gate.threshold=null: must have a value"),
        *((o, f"{o}: must be from 0 to 1") for o in ("tau=1.5", "tau=nan")),
        *((o, f"{o}: must be from 1 to 64") for o in ("K=0", "K=65")),
        *((o, f"{o}: must be >= 1") for o in ("exit_layer=-1", "draft.rank=0")),
        ("tau_v=-1.0", "tau_v=-1.0: must be >= 0"),
        ("seed=-1", "seed=-1: must be"),
        *((f"{key}=0", f"{key}=0: must be >= ") for key in ("scale.prompts", "scale.repeats", "workload.new_tokens")),
        ("stages=[]", r"stages=\[\]: allowed are one or more of fit, bench"),
        ("stages=[bench,dance]", r"stages=\['bench', 'dance'\]: allowed are one or more of fit, bench"),
        ("scale.prompts=???", "scale.prompts: has no value"),
        ("+gate.tau=1", "gate.tau: means nothing to gate=none; it has no settings"),
    ],
)
def test_refused_with_the_reason(overrides: str, reason: str) -> None:
    with pytest.raises((ConfigError, HydraException)) as refused:
        composed(*overrides.split())
    assert re.search(reason, refusal.sentence(refused.value))


def test_layers_are_not_guessed_where_nobody_knows_them() -> None:
    assert composed("model.layers=null", "exit_layer=500").draft.get("exit_layer") == 500


@pytest.mark.parametrize(
    ("change", "head", "answers"),
    [
        *((o, True, True) for o in ("gate=maxp", "K=9", "tau=0.1", "name=x", "hardware=cpu")),
        *((o, False, True) for o in ("exit_layer=11", "draft=lsq_lowrank", "draft.previous=true", "draft.ridge=1")),
        *((o, False, False) for o in ("seed=1", "scale.fit_prompts=10", "scale.fit_new_tokens=9", "model.sha256=null")),
        *((o, False, False) for o in ("hardware.dtype=fp16", "workload.sha256=null")),
        *((o, True, True) for o in ("scale.prompts=1", "workload.prompt_tokens=9", "workload.new_tokens=9")),
        ("workload.max_prompt_tokens=9", True, True),
        ("policy.verify=false", True, True),
    ],
)
def test_who_shares_heads_and_answers(change: str, head: bool, answers: bool) -> None:
    one, other = composed("exit_layer=12"), composed("exit_layer=12", change)
    assert (one.head_id == other.head_id, one.answers_id == other.answers_id) == (head, answers)


@pytest.mark.parametrize(
    ("overrides", "label"),
    [
        ("draft=none gate=maxp", "none"),
        ("gate=varH tau_v=4", "lsqauto varH=4 K=auto"),
        ("draft=lsq_tree exit_layer=1 K=2", "lsq1/8k/w3 K=2"),
        ("draft=lsq gate=varH tau_v=4 exit_layer=12", "lsq12 varH=4 K=4"),
        ("draft=lsq_lowrank exit_layer=6 K=2", "lsq6r128 K=2"),
        ("draft=layerskip policy.verify=false gate=maxp exit_layer=12", "layerskip12 unverified"),
        ("gate=maxp tau=0.30 K=2", "lsqauto maxp=0.3 K=2"),
    ],
)
def test_label(overrides: str, label: str) -> None:
    assert composed(*overrides.split()).label == label


def test_settings_are_plain_values() -> None:
    settings = composed("gate=varH").settings()
    assert settings["gate"] == {"name": "varH", "threshold": 5.0}
    assert settings["stages"] == ["fit", "bench"] and settings["workload"]["name"] == "sharegpt"


def test_a_plan_cannot_be_changed() -> None:
    made = composed()
    with pytest.raises(AttributeError):
        made.seed = 1  # type: ignore[misc]
    assert replace(made, seed=1).id != made.id


def test_k_that_is_not_chosen_is_four() -> None:
    """Where no exit layer is to be chosen, ``auto`` is a number, and the plan the same as with that."""
    assert composed("draft=eagle").id == composed("draft=eagle", "K=4").id != composed("draft=eagle", "K=3").id
    assert composed("exit_layer=12").controller.K == 4 and composed().controller.K == "auto"
    assert composed("draft=layerskip", "controller=autotune").draft.get("exit_layer") == 4, "the first it chooses from"


@pytest.mark.parametrize(
    ("overrides", "ks", "K"),
    [
        ("", [1, 2, 3, 4], 2),
        ("K=3", [3], 3),
        ("controller=cost", [1, 2, 3, 4], 4),
        ("controller=cost K=6", [1, 2, 3, 4, 5, 6], 6),
    ],
)
def test_what_an_open_plan_leaves_to_be_chosen(overrides: str, ks: list[int], K: int) -> None:
    """A K that is given stays, and so does one that a controller changes as it goes."""
    made = composed(*overrides.split())
    assert made.open and [*made.possible_ks] == ks
    settled = made.settled(2, min(2, ks[-1]) if len(ks) > 1 else ks[0])
    assert not settled.open and (settled.draft.get("exit_layer"), settled.controller.K) == (2, K)
    assert settled.head_id == composed("exit_layer=2").head_id != made.head_id
