"""Sets of prompts: what is asked of each, that they are never mixed, and what a job says of each."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from plans import planned, run_job
from tiny import fake_job

from selfspec import metrics
from selfspec.data import fields, parts
from selfspec.data.formats import Malformed
from selfspec.engine.tokenizer import ModelTokenizer
from selfspec.engine.torch.weights import Weights
from selfspec.errors import ConfigError
from selfspec.report import plots, tables

FIRST_THREE = {
    "mtbench_writing": "4dfcd36801b6275b0d8e58a334094c24748a0323e41737aa8699f3506424f1db",
    "mtbench_roleplay": "1dc1906d4fce47212d91d55519125509634f8ab86f139e6276b5daaa3a501638",
    "mtbench_reasoning": "7733d4a2580e66b46d659f9e6c24874c906c966e06db8f19552af6a619eaa78e",
    "mtbench_math": "703f841c3fd37f6b3b0a7f1701f301f76eab312b78cc48d03064210e06bccb55",
    "mtbench_coding": "969134a8b30b20d2e4e9fbf7efbfc46fd863862424c754adb2839d99b938b5ab",
    "mtbench_extraction": "4f5d9bf2377e243c91139e6d8ceedcaa84268d36bbacb566403d98faf8393eae",
    "mtbench_stem": "47458a0548796fe204ae194dd9ac0a0b624273053d8e16f8e1d2c462b6a36ed3",
    "mtbench_humanities": "8aec548b3d0ed28d2c85d98c4c6292d900adc53edc95ad621612b25cf09240e4",
    "gsm8k": "4630cc89d25f2080e5978efe19a5cdf32cce28253c961f7706068ffbcb57b387",
    "humaneval": "102014b207d8762898b4b01893c208d6ec291e91f30e6bc31f54f292ede2ec18",
    "mbpp": "0c617199b31081613eb852948081d61437d95fef4efa4cca3ebc195dc84190c0",
    "math500": "16d721f5be51f22520c466d9a74bc75517f2a18cd555f3d90fe42c9c00388c96",
    "nq_open": "fb8fa5f83e789cee4c0983ded1b5e4595d414b3e8e727a34c804b5a1bc9480a3",
    "squad": "bf258c8a09aa83a4533fa814de7e948f152a2cd299fca72d881c17526f0e6adc",
    "qasper": "1fcfda3a437d7e9aa6923cc92dd61513404f8cb7f135eecbf4fb7b7027849b94",
}
"""Of the real sets: sha256 of the ids and tokens of the first three prompts, seed 0, as SmolLM2 is asked them."""


@pytest.mark.parametrize(
    ("record", "template", "asked"),
    [
        ({"doc": {"question": "Why?\n"}}, "{doc.question}", "Why?"),
        ({"n": 3, "tests": ["a", ["b", "c"]]}, "{n}: {tests}", "3: a\nb\nc"),
        ({"text": "{n} {", "n": 1}, "In {text} {n} {}", "In {n} { 1 {}"),
        ({"prompt": "as it is"}, None, "as it is"),
    ],
)
def test_a_template_says_what_is_asked(record: Any, template: str | None, asked: str) -> None:
    assert fields.exchange(record, template).prompt == asked


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{doc.question}", "has no doc.question"),
        ("{text.more}", "has no text.more"),
        ("{given}", "given: must be a text, a number or a list of them"),
    ],
)
def test_a_field_that_is_missing_or_no_text_is_refused(template: str, reason: str) -> None:
    with pytest.raises(Malformed, match=f"^{reason}$"):
        fields.exchange({"text": "so", "given": {"a": "b"}}, template)


@pytest.fixture
def asked(tmp_path: Path) -> Callable[..., list[str]]:
    """A job without a model on two sets, of five and of two prompts."""
    rows = [{"kind": kind, "asked": {"text": f"{kind} {n} is what"}} for n in range(5) for kind in ("a", "b", "c")]
    source = tmp_path / "sets.jsonl"
    source.write_text("\n".join(map(json.dumps, rows)))
    base = tmp_path / "prompts.json"
    base.write_text(json.dumps([{"id": f"c{n}", "prompt": f"words {n} and more"} for n in range(300)]))

    given = f"source: 'file:{source}', prompt: '{{asked.text}}'"
    (tmp_path / "workload").mkdir()
    (tmp_path / "workload" / "sets.yaml").write_text(
        f"defaults: [sharegpt, _self_]\nname: sets\nparts:\n"
        f"  one: {{{given}, where: {{kind: [a, c]}}, prompts: 10}}\n"
        f"  two: {{{given}, where: {{kind: b}}, prompts: 2}}\n"
    )

    def ask(*overrides: str, workload: str = "sets") -> list[str]:
        named = [f"hydra.searchpath=[file://{tmp_path}]", f"workload={workload}", f"checkpoint.dir={tmp_path / 'kept'}"]
        return [*named, *fake_job(base), "scale.prompts=3", *overrides]

    return ask


def test_each_set_has_its_own_prompts_and_units(asked: Callable[..., list[str]]) -> None:
    made = planned(*asked())
    chosen = parts.select(made.workload, made.scale.prompts, made.seed, lambda text: [*text.encode()])
    assert [prompt.id.split("/")[0] for prompt in chosen] == ["one"] * 3 + ["two"] * 2, "two has no more"
    assert {bytes(prompt.tokens).decode()[0] for prompt in chosen[:3]} <= {"a", "c"}
    assert parts.chunks(made.workload, 3, 2) == [slice(0, 2), slice(2, 3), slice(3, 5)], "no unit is of two sets"


def test_the_table_and_the_heat_map_have_each_set(asked: Callable[..., list[str]], tmp_path: Path) -> None:
    result = run_job(planned(*asked()), tmp_path / "run")
    measured = result["measurements"]
    assert [measured[f"bench/part/{name}/prompts"] for name in ("one", "two")] == [3, 2]
    medians = [measured[f"bench/part/{name}/speedup"] for name in ("one", "two")]
    assert measured["bench/speedup_macro"] == pytest.approx(sum(medians) / 2)
    assert (
        measured["bench/speedup_macro_low"] <= measured["bench/speedup_macro"] <= measured["bench/speedup_macro_high"]
    )
    assert "fewer than 3 prompts, as there are no more: two (2)" in result["notes"]
    lines = [line for line in tables.text([result]).splitlines() if "| one" in line or "| two" in line]
    assert len(lines) == 2 and f"{medians[0]:.2f}x [" in lines[0]
    assert "2 sets of 3 prompts x 12 tokens (sets)" in tables.text([result])
    assert (tmp_path / "run" / "parts.png").read_bytes() == plots.parts([result])
    assert plots.parts([{**result, "measurements": {}}]) is None


def test_a_set_is_part_of_what_a_plan_is(asked: Callable[..., list[str]]) -> None:
    one = planned(*asked())
    none = planned(*asked(workload="sharegpt"))
    assert len({one.id, none.id, planned(*asked("workload.parts.two.prompts=1")).id}) == 3
    assert one.answers_id == none.answers_id, "heads are fitted on the source's"


def test_more_prompts_than_a_set_has_are_refused(asked: Callable[..., list[str]]) -> None:
    made = planned(*asked("workload.parts.two.prompts=9", "scale.prompts=9"))
    with pytest.raises(ConfigError, match=r"^workload\.parts\.two\.prompts=9: must be at most 5, the distinct prompts"):
        parts.select(made.workload, 9, 0, lambda text: [*text.encode()])
    with pytest.raises(ConfigError, match=r"^workload\.parts\.two\.prompts=0: must be >= 1$"):
        planned(*asked("workload.parts.two.prompts=0"))


def test_each_set_counts_for_the_same() -> None:
    """Three prompts of 1x and one of 3x: 2x, where the median over all is 1x."""

    def unit(seconds: float, prompt: str) -> dict[str, Any]:
        both = ({"tokens": [1, 2, 3], "ttft_s": 1.0, "total_s": 1.0 + s, "finish": "length"} for s in (seconds, 3.0))
        configured, plain = ([one | {"cycles": {name: [] for name in metrics.Cycle.__slots__}}] for one in both)
        counted = {"peak_memory_mb": 1.0, "cpu_utilisation": 1.0, "device_utilisation": None, "against": {}}
        return {"prompts": [prompt], "plain": plain, "configured": configured, "verdicts": [], **counted}

    one, two = [unit(3.0, f"one/{n}") for n in range(3)], [unit(1.0, "two/0")]
    found = metrics.by_part({"one": one, "two": two}, 0)
    assert (found["part/one/speedup"], found["part/two/speedup"], found["speedup_macro"]) == (1, 3, 2)
    assert metrics.summarise([*one, *two], 0)["speedup"] == 1
    assert metrics.by_part({}, 0) == {}


@pytest.mark.real
def test_the_real_sets_are_what_they_were() -> None:
    made = planned("workload=suite")
    weights = Weights(made)
    encode = ModelTokenizer(made.model, lambda: weights.folder).encode
    found: dict[str, list[Any]] = {}
    for prompt in parts.select(made.workload, 3, 0, lambda text: encode(text, True)):
        found.setdefault(parts.name_of(prompt.id), []).append([prompt.id, prompt.tokens])
    assert {
        name: hashlib.sha256(json.dumps(three).encode()).hexdigest() for name, three in found.items()
    } == FIRST_THREE
