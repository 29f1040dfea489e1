"""The gateway over a model with Llama 2's kind of tokenizer says what transformers decodes, streamed and not."""

import json
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from plans import planned
from serving import serving
from test_tokenizer import saved, sentencepiece

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("inference")]
PROMPTS = ["The capital of France is", "Once upon", "hello 😀", " two  spaces", "x"]
NEW = 12


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama of random weights that says words more often than bytes, and some of both."""
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("llama2")
    _, tokenizer = saved(sentencepiece, folder)
    torch.manual_seed(4)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4}
    ids = {"vocab_size": len(tokenizer), "bos_token_id": 1, "eos_token_id": 2}
    model = LlamaForCausalLM(LlamaConfig(**sizes, **ids, num_key_value_heads=2, initializer_range=0.25)).eval()
    for token, name in enumerate(tokenizer.convert_ids_to_tokens(range(len(tokenizer)))):
        if not (name.startswith("▁") and len(name) > 3):
            model.lm_head.weight.data[token] *= 0.3
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def theirs(folder: Path) -> tuple[Any, Any]:
    """Transformers' model and tokenizer."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval(), tokenizer


@pytest.fixture(scope="module")
def url(folder: Path) -> Iterator[str]:
    made = planned(
        *("model.name=tiny", f"model.source=file:{folder}", "model.sha256=null", "model.layers=4", "tracking=none"),
        *("hardware=cpu_fp32", "hardware.threads=1", "draft=ngram", "serve.max_model_len=128"),
    )
    with serving(made) as server:
        yield server.url


def ask(url: str, path: str, **body: Any) -> list[dict[str, Any]]:
    """The answer, or its events."""
    body = {"model": "tiny", "max_tokens": NEW, "temperature": 0, "logprobs": True, **body}
    if path == "completions":
        body["logprobs"] = 2
    told = urllib.request.Request(f"{url}/v1/{path}", json.dumps(body).encode(), {"content-type": "application/json"})
    with urllib.request.urlopen(told) as response:
        text = response.read().decode()
    if not body.get("stream"):
        return [json.loads(text)]
    return [json.loads(line[6:]) for line in text.splitlines() if line.startswith("data: {")]


def generated(theirs: tuple[Any, Any], ids: list[int]) -> tuple[list[int], list[float]]:
    """Its greedy tokens, and how likely each is."""
    model, _ = theirs
    out = model.generate(torch.tensor([ids]), max_new_tokens=NEW, do_sample=False, pad_token_id=0)[0]
    logprobs = model(out[None]).logits[0].log_softmax(-1)
    new = out[len(ids) :].tolist()
    return new, [float(logprobs[len(ids) - 1 + i, token]) for i, token in enumerate(new)]


@pytest.mark.parametrize("prompt", PROMPTS)
@pytest.mark.parametrize("stream", [False, True])
def test_a_completion(url: str, theirs: tuple[Any, Any], prompt: str, stream: bool) -> None:
    _, tokenizer = theirs
    ids = tokenizer(prompt)["input_ids"]
    new, logprobs = generated(theirs, ids)
    assert len(set(new)) > 2, "else a mistake could hide"
    before, whole = (tokenizer.decode(tokens, skip_special_tokens=True) for tokens in (ids, ids + new))
    events = ask(url, "completions", prompt=prompt, stream=stream)
    choices = [choice for event in events for choice in event["choices"]]
    assert before + "".join(choice["text"] for choice in choices) == whole
    told = [choice["logprobs"] for choice in choices if choice.get("logprobs")]
    assert [each for one in told for each in one["token_logprobs"]] == pytest.approx(logprobs, abs=1e-4)
    offsets = [offset for one in told for offset in one["text_offset"]]
    assert offsets == sorted(offsets) and len(offsets) == len(new)
    assert all(len(each) == 2 for one in told for each in one["top_logprobs"])


@pytest.mark.parametrize("prompt", PROMPTS)
@pytest.mark.parametrize("stream", [False, True])
def test_a_chat(url: str, theirs: tuple[Any, Any], prompt: str, stream: bool) -> None:
    _, tokenizer = theirs
    messages = [{"role": "user", "content": prompt}]
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    new, logprobs = generated(theirs, ids)
    events = ask(url, "chat/completions", messages=messages, stream=stream)
    choices = [choice for event in events for choice in event["choices"]]
    part = "delta" if stream else "message"
    said = "".join(choice[part].get("content") or "" for choice in choices)
    assert said == tokenizer.decode(new, skip_special_tokens=True)
    told = [each for choice in choices if choice.get("logprobs") for each in choice["logprobs"]["content"]]
    assert [each["logprob"] for each in told] == pytest.approx(logprobs, abs=1e-4)
    assert b"".join(bytes(each["bytes"]) for each in told).decode(errors="replace").removeprefix(" ") == said
