"""engine=vllm before there is a vLLM: what is refused, what vLLM is asked for, and what its records come to."""

import json
import re
from collections.abc import Callable, Iterator
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException

from selfspec import job, plan, refusal
from selfspec.engine import factory
from selfspec.engine.vllm import args as vllm_args
from selfspec.engine.vllm import cycles as vllm_cycles
from selfspec.errors import ConfigError
from selfspec.plan import Plan
from selfspec.run import CONF
from selfspec.speculation.draft import vllm_suffix
from selfspec.stages.quality import Quality
from selfspec.vllm_plugin import settings, versions

Make = Callable[..., Plan]
FOLDER = Path("/models/target")


@pytest.fixture(autouse=True)
def hydra() -> Iterator[None]:
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        yield


def made(*overrides: str) -> Plan:
    return plan.make(compose("config", ["engine=vllm", *overrides]))


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (
            ["draft=hybrid"],
            "draft=hybrid: engine=vllm cannot run it; it runs draft_model, layerskip, l",
        ),
        (["draft=suffix"], "draft=suffix: engine=vllm cannot run it; .* vllm_suffix"),
        (["draft=medusa"], "draft=medusa: engine=vllm cannot run it; .* vllm_medusa"),
        (["draft=ngram", "draft.max_match=null"], "draft.max_match=null: must have a value"),
        (
            ["draft=draft_model", "draft.source=null"],
            "draft.source=null: must have a value",
        ),
        (["draft=vllm_eagle"], "draft.source=null: draft=vllm_eagle needs a checkpoint of heads"),
        (["draft=ngram", "gate=varH"], "gate=varH: vLLM's draft=ngram asks no gate; layerskip and lsq do"),
        (["draft=ngram", "controller=cost"], "controller=cost: vLLM's draft=ngram has one K, use fixed; layerskip"),
        (["draft=ngram", "policy=typical"], "policy=typical: engine=vllm verifies what it drafts, and decodes exactly"),
        (["draft=layerskip", "exit_layer=12", "policy.verify=false"], "policy.verify=false: engine=vllm verifies"),
        (["draft=layerskip", "exit_layer=12", "draft.width=2"], "draft.width=2: inside vLLM a draft is a chain"),
        (
            ["draft=layerskip", "exit_layer=12", "controller=adaptive"],
            r"bench.fixed_k=\[1, 2, 4, 8\]: vLLM is started with one controller",
        ),
        (["draft=layerskip", "controller=autotune"], "controller=autotune: inside vLLM one exit serves all"),
        (
            ["draft=layerskip", "exit_layer=12", "gate=bandit", "engine.tensor_parallel=2"],
            "gate=bandit, controller=fixed: learns from times, .* tensor_parallel_size=2",
        ),
        (
            ["draft=ngram", "policy=rejection", "temperature=3"],
            "policy.temperature=3: engine=vllm draws at up to 2",
        ),
        (["draft=layerskip", "exit_layer=30"], "exit_layer=30: SmolLM2-135M-Instruct has 30 layers"),
        (["draft=none", "hardware.device=mps"], "hardware.device=mps: engine=vllm runs on auto, cpu, cuda"),
        (["draft=none", "engine.weights=int8"], "engine.weights: means nothing to engine=vllm; .* engine=torch has it"),
        (["draft=none", "engine.kv_gib=null"], "engine.kv_gib=null: must have a value"),
        (["draft=none", "engine.kv_gib=0"], "engine.kv_gib=0.0: must be >= 0.01"),
        (["draft=none", "engine.tensor_parallel=0"], "engine.tensor_parallel=0: must be >= 1"),
        (["engine=torch", "engine.kv_gib=2"], "engine.kv_gib: means nothing to engine=torch; .* engine=vllm has it"),
        (["engine=torch", "engine.eager=false"], "engine.eager: means nothing to engine=torch"),
        (
            ["engine=torch", "draft=vllm_medusa", "draft.source=hf:a/b"],
            "draft=vllm_medusa: engine=torch cannot run it",
        ),
    ],
)
def test_what_cannot_work_is_refused_in_a_line(overrides: list[str], says: str) -> None:
    with pytest.raises((ConfigError, HydraException)) as refused:
        made(*overrides)
    said = refusal.sentence(refused.value)
    assert re.search(says, said) and "\n" not in said


def test_gates_have_nothing_to_look_at() -> None:
    asked = made("draft=ngram", "stages=[quality]", "quality.prompts=4", "quality.gate_prompts=4")
    with pytest.raises(ConfigError, match="shows no states"):
        Quality(asked).check()


def test_the_room_is_part_of_the_plan() -> None:
    ids = {made("draft=ngram", *more).id for more in ([], ["engine.kv_gib=2"], ["engine.eager=true"], ["K=5"])}
    assert len(ids) == 4 and made("draft=ngram").label == "ngram K=4 by vllm"


class TestArguments:
    """The same for an engine in this process and for ``vllm serve``."""

    def test_of_plain_decoding(self) -> None:
        asked = made("draft=none", "hardware=cpu_fp32", "engine.quantization=awq", "engine.kv_gib=0.5", "seed=7")
        assert vllm_args.arguments(asked, FOLDER) == {
            **{"model": str(FOLDER), "dtype": "float32", "seed": 7, "quantization": "awq"},
            **{"tensor_parallel_size": 1, "kv_cache_memory_bytes": 2**29, "enforce_eager": False},
        }
        assert vllm_args.speculation(asked) == {}

    @pytest.mark.parametrize(
        ("overrides", "config"),
        [
            (["draft=ngram"], {"method": "ngram", "prompt_lookup_max": 8, "prompt_lookup_min": 1}),
            (
                ["draft=vllm_suffix"],
                {
                    **{"method": "suffix", "suffix_decoding_max_tree_depth": 24},
                    "suffix_decoding_max_cached_requests": 0,
                },
            ),
            (
                ["draft=vllm_suffix", "draft.cross_request=true", "scale.repeats=1"],
                {"method": "suffix", "suffix_decoding_max_tree_depth": 24},
            ),
            (["draft=draft_model"], {"method": "draft_model", "model": "DRAFTER"}),
            (["draft=vllm_medusa", "draft.source=hf:a/b"], {"method": "medusa", "model": "DRAFTER"}),
            (["draft=vllm_eagle", "draft.source=hf:a/b"], {"method": "eagle", "model": "DRAFTER"}),
        ],
    )
    def test_of_a_draft(self, overrides: list[str], config: dict[str, object], tmp_path: Path) -> None:
        (tmp_path / "config.json").write_text(json.dumps({"architectures": ["LlamaForCausalLM"]}))
        drafter = tmp_path if "model" in config else None
        given = vllm_args.speculation(made(*overrides, "K=3"), drafter)
        if drafter:
            config = config | {"model": str(drafter)}
        assert given.pop("per_request_spec_decode_metrics") == "detailed"
        assert given == {"speculative_config": {"num_speculative_tokens": 3, **config}}

    @pytest.mark.parametrize(
        "config", [{"architectures": ["LlamaForCausalLMEagle3"]}, {"speculators_model_type": "eagle3"}]
    )
    def test_of_the_third_eagle(self, config: dict[str, object], tmp_path: Path) -> None:
        (tmp_path / "config.json").write_text(json.dumps(config))
        asked = made("draft=vllm_eagle", "draft.source=hf:a/b")
        assert vllm_args.speculation(asked, tmp_path)["speculative_config"]["method"] == "eagle3"

    def test_of_an_early_exit_are_the_plugins(self) -> None:
        asked = made("draft=layerskip", "exit_layer=12", "gate=maxp", "K=3")
        given = vllm_args.speculation(asked)
        assert given.pop("per_request_spec_decode_metrics") == "detailed"
        assert given == settings.arguments(asked)

    def test_on_a_command_line(self) -> None:
        asked = {"dtype": "float32", "enforce_eager": True, "seed": 0, "speculative_config": {"method": "ngram"}}
        flags = ["--dtype", "float32", "--enforce-eager", "--seed", "0", "--speculative-config", '{"method": "ngram"}']
        assert vllm_args.flags(asked) == flags
        assert vllm_args.flags({"enforce_eager": False}) == []


class TestCyclesOfAnAnswer:
    """Over HTTP: what vLLM says of its drafts, and the pieces that the tokens came in."""

    @staticmethod
    def of(drafted: list[int], accepted: list[int], pieces: list[int], most: int) -> list[tuple[int, ...]]:
        metrics = {"num_spec_tokens": 3, "per_step_drafted": drafted, "per_step_accepted": accepted}
        cycles = vllm_cycles.of_answer(metrics, pieces, most, 1.2)
        assert sum(c.new_tokens for c in cycles) == sum(pieces) - 1
        assert sum(c.verify_ms for c in cycles) == pytest.approx(1200)
        return [(c.k_asked, c.proposed, c.accepted, c.new_tokens) for c in cycles]

    def test_steps_without_a_draft_are_cycles_too(self) -> None:
        found = self.of([3, 2], [2, 1], [1, 1, 3, 1, 2, 1], 20)
        assert found == [(3, 0, 0, 1), (3, 3, 2, 3), (3, 0, 0, 1), (3, 2, 1, 2), (3, 0, 0, 1)]

    def test_what_lies_beyond_the_end_is_not_proposed(self) -> None:
        assert self.of([3], [3], [1, 1, 2], 4) == [(2, 0, 0, 1), (1, 1, 1, 2)]

    def test_a_stop_cuts_the_last_draft(self) -> None:
        assert self.of([3, 3], [1, 3], [1, 2, 2], 20) == [(3, 3, 1, 2), (3, 3, 3, 2)]

    def test_pieces_that_a_busy_server_joined(self) -> None:
        found = self.of([3, 3, 3], [2, 0, 1], [1, 4, 2], 20)
        assert [sum(column) for column in zip(*found, strict=True)] == [9, 9, 3, 6]

    def test_a_first_piece_that_a_busy_server_joined(self) -> None:
        assert self.of([3, 3], [1, 0], [3, 1], 20) == [(3, 3, 1, 2), (3, 3, 0, 1)]
        assert self.of([3], [2], [4], 20) == [(3, 3, 2, 3)]

    def test_an_answer_of_one_token_has_none(self) -> None:
        assert vllm_cycles.of_answer({"num_spec_tokens": 3}, [1], 1, 0.0) == ()

    def test_no_draft_at_all(self) -> None:
        assert self.of([], [], [1, 1, 1], 3) == [(1, 0, 0, 1), (0, 0, 0, 1)]


class TestVersions:
    """One sentence that names what is needed."""

    @pytest.mark.parametrize("version", ["0.32.0", "0.32.0+cpu", "0.33.1", "1.0", "0.32.0rc1"])
    def test_that_will_do(self, version: str) -> None:
        versions.check_engine(version)

    @pytest.mark.parametrize("version", ["0.31.9", "0.9.2", "0.3"])
    def test_that_are_too_old(self, version: str) -> None:
        with pytest.raises(ConfigError, match=rf"needs vLLM 0.32 or later, and {version} is installed; pip install"):
            versions.check_engine(version)

    def test_none(
        self, monkeypatch: pytest.MonkeyPatch, run: Callable[..., tuple[int, str, str]], tmp_path: Path
    ) -> None:
        def missing(name: str) -> str:
            raise PackageNotFoundError(name)

        monkeypatch.setattr(versions, "version", missing)
        with pytest.raises(ConfigError, match="and none is installed"):
            job.check(made("draft=none"))
        code, _, said = run("engine=vllm", "draft=none", f"output_dir={tmp_path / 'out'}")
        assert code == 2 and said.count("\n") == 1 and "pip install 'selfspec[vllm]'" in said
        assert not (tmp_path / "out").exists()

    def test_suffix_decoding_is_a_package_of_its_own(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(versions, "installed", lambda: "0.32.0")
        monkeypatch.setattr(vllm_suffix, "find_spec", lambda name: None)
        with pytest.raises(ConfigError, match="draft=vllm_suffix: needs arctic-inference"):
            factory.check(made("draft=vllm_suffix"))


def test_the_drafts_own_model(tiny_folder: Path) -> None:
    assert factory.drafter(made("draft=ngram")) is None
    asked = made("draft=draft_model", f"draft.source=file:{tiny_folder}", "draft.sha256=null")
    assert factory.drafter(asked) == tiny_folder
