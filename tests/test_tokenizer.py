"""Tokens and text as transformers has them: prompts' special tokens, an answer's text in context, tokens' bytes."""

import json
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from selfspec.config import Model
from selfspec.engine.base import RequestOutput
from selfspec.engine.tokenizer import ModelTokenizer
from selfspec.errors import ConfigError
from selfspec.serve.answer import Answer, request
from selfspec.serve.backend import Call, Chunk
from selfspec.serve.errors import Invalid
from selfspec.serve.reply import Chat
from selfspec.serve.reply import Completion as TextReply
from selfspec.types import Completion, Logprob, Request

TEXTS = ["The capital of France is Paris.", "Once upon a time there was a little cat.", "grüße 😀 to you, 世界"] * 20
SPECIAL = ["<unk>", "<s>", "</s>"]
TEMPLATE = "{% for m in messages %}<s>[INST] {{ m['content'] }} [/INST]{% endfor %}"
REFUSES = "{{ raise_exception('A system message is required') }}"


def sentencepiece() -> Tokenizer:
    """As Llama 2's: spaces belong to the word that follows, unknown characters are bytes, a text begins with <s>."""
    made = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    made.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="first", split=True)
    strip = decoders.Strip(" ", 1, 0)
    made.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), strip])
    names = SPECIAL + [f"<0x{i:02X}>" for i in range(256)]
    made.train_from_iterator(
        TEXTS[:2] * 50, trainers.BpeTrainer(vocab_size=400, special_tokens=names, show_progress=False)
    )
    # Bytes are no special tokens: decoding would leave them out.
    saved = json.loads(made.to_str())
    saved["added_tokens"] = [token for token in saved["added_tokens"] if token["content"] in SPECIAL]
    made = Tokenizer.from_str(json.dumps(saved))
    made.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return made


def byte_level() -> Tokenizer:
    """As GPT-2's, and those of most others."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    made.train_from_iterator(
        TEXTS[:2],
        trainers.BpeTrainer(vocab_size=300, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False),
    )
    return made


def words() -> Tokenizer:
    """Whole words, with spaces between them."""
    names = [*SPECIAL, *sorted({word for text in TEXTS for word in text.split()})]
    made = Tokenizer(models.WordLevel({name: i for i, name in enumerate(names)}, unk_token="<unk>"))
    made.add_special_tokens(SPECIAL)
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return made


KINDS = {"sentencepiece": sentencepiece, "byte level": byte_level, "words": words}


def saved(make: Any, folder: Path, template: str = TEMPLATE) -> tuple[ModelTokenizer, Any]:
    """Ours, and transformers'."""
    from transformers import PreTrainedTokenizerFast

    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    theirs = PreTrainedTokenizerFast(tokenizer_object=make(), **names)
    theirs.chat_template = template
    theirs.save_pretrained(folder)
    return ModelTokenizer(Model("tiny", f"file:{folder}"), lambda: folder), theirs


@pytest.fixture(params=KINDS)
def pair(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[ModelTokenizer, Any]:
    return saved(KINDS[request.param], tmp_path)


def answered(
    tokenizer: ModelTokenizer, call: Call, prompt: Sequence[int], tokens: Sequence[int], at: int
) -> list[Chunk]:
    """An answer of these tokens, ``at`` of them a step; every token's alternatives are itself and three others."""
    answer = Answer(tokenizer, call, Request(tuple(prompt), 50))
    chunks = []
    for first in range(0, len(tokens), at):
        new = tuple(tokens[first : first + at])
        logprobs = tuple(Logprob(-0.5, tuple((other, -1.0 - other) for other in (token, 0, 1, 2))) for token in new)
        chunks.append(answer.take(RequestOutput(0, new, None, logprobs)))
    return [*chunks, answer.last(Completion(tuple(tokens), (), 0.1, 0.2, "length"))]


class TestText:
    """An answer's text is what transformers' decoding of prompt and answer adds to that of the prompt."""

    @pytest.mark.parametrize("at", [1, 3, 50])
    @pytest.mark.parametrize("text", sorted(set(TEXTS)))
    def test_of_a_completion(self, pair: tuple[ModelTokenizer, Any], text: str, at: int) -> None:
        ours, theirs = pair
        tokens = theirs(text)["input_ids"]
        for cut in range(1, len(tokens)):
            before = theirs.decode(tokens[:cut], skip_special_tokens=True)
            if before.endswith("\N{REPLACEMENT CHARACTER}"):
                continue
            whole = theirs.decode(tokens, skip_special_tokens=True)
            chunks = answered(ours, Call("c", "m", prompt="p"), tokens[:cut], tokens[cut:], at)
            assert before + "".join(chunk.text for chunk in chunks) == whole

    def test_of_a_chat_stands_alone(self, pair: tuple[ModelTokenizer, Any]) -> None:
        ours, theirs = pair
        tokens = ours.encode_part(TEXTS[0])
        messages = ({"role": "user", "content": "Once"},)
        chunks = answered(ours, Call("c", "m", messages=messages), ours.encode_chat(messages), tokens, 1)
        assert "".join(chunk.text for chunk in chunks) == theirs.decode(tokens)

    def test_after_llama2s_prompt_begins_with_a_space(self, tmp_path: Path) -> None:
        ours, _ = saved(sentencepiece, tmp_path)
        chunks = answered(
            ours, Call("c", "m", prompt="Once"), ours.encode("Once", chat=False), ours.encode_part("upon"), 1
        )
        assert "".join(chunk.text for chunk in chunks) == " upon"


class TestLogprobs:
    """Every token is itself: its bytes, its place in the text, and an entry for every alternative."""

    @pytest.fixture
    def prompt(self, pair: tuple[ModelTokenizer, Any]) -> list[int]:
        return pair[0].encode("Once", chat=False)

    @pytest.mark.parametrize("text", sorted(set(TEXTS)))
    def test_bytes_and_offsets(self, pair: tuple[ModelTokenizer, Any], prompt: list[int], text: str) -> None:
        ours, _ = pair
        tokens = ours.encode_part(text)
        call = Call("c", "m", prompt="p", logprobs=4)
        chunks = answered(ours, call, prompt, tokens, 1)
        said = "".join(chunk.text for chunk in chunks)
        found = [each for chunk in chunks for each in chunk.logprobs or ()]
        assert len(found) == len(tokens)
        if 0 not in tokens:  # else the unknown have no text, and a name
            assert b"".join(each.utf8 or b"" for each in found).decode() == said
        data = said.encode()
        for each in found:
            assert each.offset is not None and each.utf8 is not None and 0 <= each.offset <= len(said)
            if not each.token.startswith("bytes:") and 0 not in tokens:
                assert said[each.offset :].startswith(each.token) and each.utf8 == each.token.encode()
            assert each.utf8 in data or 0 in tokens
        body = TextReply(call, False).whole([*chunks[:-1], chunks[-1]])["choices"][0]
        assert all(
            len(top) == len({token, 0, 1, 2})
            for top, token in zip(body["logprobs"]["top_logprobs"], tokens, strict=True)
        )
        assert body["logprobs"]["text_offset"] == [each.offset for each in found]

    @pytest.mark.parametrize("kind", ["sentencepiece", "byte level"])
    def test_of_an_emoji(self, kind: str, tmp_path: Path) -> None:
        ours, _ = saved(KINDS[kind], tmp_path)
        tokens = ours.encode_part("a😀")[-4:]
        call = Call("c", "m", messages=({"role": "user", "content": "Once"},), logprobs=4)
        chunks = answered(ours, call, ours.encode("Once", chat=False), tokens, 2)
        content = Chat(call, False).whole(chunks)["choices"][0]["logprobs"]["content"]
        assert [each["bytes"] for each in content] == [[byte] for byte in "😀".encode()]
        assert [each["token"] for each in content] == ["bytes:\\xf0", "bytes:\\x9f", "bytes:\\x98", "bytes:\\x80"]
        assert "".join(chunk.text for chunk in chunks) == "😀"
        assert [len({top["token"] for top in each["top_logprobs"]}) for each in content] == [4] * 4

    def test_alternatives_that_read_alike_are_told_apart(self, tmp_path: Path) -> None:
        ours, _ = saved(sentencepiece, tmp_path)
        space, names = ours.encode_part("a b")[-1:], [ours.piece(token) for token in range(400)]
        letter = next(token for token in range(259, 400) if len(names[token]) == 1 and names[token] != b" ")
        byte = names.index(names[letter])
        assert byte < 259
        said = names[letter].decode()
        answer = Answer(ours, Call("c", "m", prompt="p", logprobs=2), Request(tuple(space), 5))
        logprob = Logprob(-0.5, ((byte, -0.5), (letter, -0.6)))
        (found,) = answer.take(RequestOutput(0, (byte,), None, (logprob,))).logprobs or ()
        assert [top.token for top in found.top] == [said, f"token_id:{letter}"]
        assert [top.utf8 for top in found.top] == [names[letter]] * 2


class TestPrompt:
    """Special tokens around a prompt are the tokenizer's, and none are within a part."""

    @pytest.mark.parametrize("text", sorted(set(TEXTS)))
    def test_is_transformers_own(self, pair: tuple[ModelTokenizer, Any], text: str) -> None:
        ours, theirs = pair
        assert ours.encode(text, chat=False) == theirs(text)["input_ids"]
        assert ours.encode_part(text) == theirs(text, add_special_tokens=False)["input_ids"]

    def test_begins_with_bos_where_the_tokenizer_puts_it(self, tmp_path: Path) -> None:
        ours, _ = saved(sentencepiece, tmp_path)
        assert ours.encode("a", chat=False)[0] == 1 != ours.encode_part("a")[0]
        assert ours.encode("a", chat=True).count(1) == 1

    def test_a_template_that_refuses_is_one_line(self, tmp_path: Path) -> None:
        ours, _ = saved(words, tmp_path, REFUSES)
        with pytest.raises(
            ConfigError, match=r"^workload\.chat=true: the chat template of tiny refuses a prompt: A system message"
        ):
            ours.encode("a", chat=True)

    @pytest.mark.parametrize("template", ["{{ messages[0]['content'] + 1 }}", "{{ 1 // 0 }}", "{{ messages.a.b }}"])
    def test_a_template_that_breaks_is_one_line(self, tmp_path: Path, template: str) -> None:
        ours, _ = saved(words, tmp_path, template)
        with pytest.raises(ConfigError, match="refuses a prompt"):
            ours.encode("a", chat=True)

    def test_a_tokenizer_that_has_more_tokens_than_the_model(self, tmp_path: Path) -> None:
        ours, _ = saved(words, tmp_path)
        engine: Any = SimpleNamespace(tokenizer=ours, limits=lambda: SimpleNamespace(vocab=4))
        with pytest.raises(Invalid, match="prompt: token ids are from 0 to 3"):
            request(engine, Call("c", "m", prompt=TEXTS[0]), None)  # type: ignore[arg-type]
