"""Shared by all tests: a tiny random Llama in float32, a tiny prompt file, and a cache of their own."""

import json
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
if workers := int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "0")):  # each computes on its share of the cores
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // workers)))

WORDS = ["a", "model", "drafts", "tokens", "and", "another", "verifies", "them", "so", "that", "nothing", "is", "lost"]
VOCABULARY = ["<pad>", "<eos>", "<user>", "<model>", "<unk>", *WORDS, *(f"w{i}" for i in range(80 - 5 - len(WORDS)))]
TINY = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "vocab_size": len(VOCABULARY),
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "hidden_act": "silu",
    "tie_word_embeddings": True,
    "eos_token_id": 1,
    "bos_token_id": None,
}


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder in the Hugging Face layout: random weights, a word-level tokenizer, a chat template.

    Later layers are smaller than early ones, so that an early exit is right often, but not always.
    """
    import torch
    from safetensors.torch import save_file
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit

    folder = tmp_path_factory.mktemp("tiny")
    (folder / "config.json").write_text(json.dumps(TINY))
    random = torch.Generator().manual_seed(0)

    def matrix(rows: int, columns: int, scale: float) -> torch.Tensor:
        return torch.randn(rows, columns, generator=random) * scale / columns**0.5

    weights = {"model.embed_tokens.weight": matrix(len(VOCABULARY), 32, 6.0), "model.norm.weight": torch.ones(32)}
    for layer in range(6):
        scale, prefix = 2.0 / (layer + 1), f"model.layers.{layer}."
        for name, rows, columns in (
            ("self_attn.q_proj", 32, 32),
            ("self_attn.k_proj", 16, 32),
            ("self_attn.v_proj", 16, 32),
            ("self_attn.o_proj", 32, 32),
            ("mlp.gate_proj", 64, 32),
            ("mlp.up_proj", 64, 32),
            ("mlp.down_proj", 32, 64),
        ):
            weights[f"{prefix}{name}.weight"] = matrix(rows, columns, scale)
        for name in ("input_layernorm", "post_attention_layernorm"):
            weights[f"{prefix}{name}.weight"] = 1 + 0.1 * torch.randn(32, generator=random)
    save_file(weights, folder / "model.safetensors")

    tokenizer = Tokenizer(WordLevel({word: i for i, word in enumerate(VOCABULARY)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    tokenizer.save(str(folder / "tokenizer.json"))
    template = "{% for m in messages %}<user> {{ m['content'] }} {% endfor %}<model>"
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<eos>", "chat_template": template}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


@pytest.fixture(scope="session")
def prompts_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """600 short conversations in ShareGPT's form."""
    import random

    rng = random.Random(0)
    path = tmp_path_factory.mktemp("prompts") / "prompts.json"
    texts = (" ".join(rng.choices(WORDS, k=rng.randint(4, 16))) + f" w{i % 50}" for i in range(600))
    turns = [[("human", text), ("gpt", " ".join(reversed(text.split())))] for text in texts]
    path.write_text(
        json.dumps(
            [
                {"id": f"c{i}_0", "conversations": [{"from": who, "value": said} for who, said in both]}
                for i, both in enumerate(turns)
            ]
        )
    )
    return path


@pytest.fixture
def overrides(tmp_path: Path, tiny_folder: Path, prompts_file: Path) -> list[str]:
    """Command-line overrides: the tiny model and prompts, float32, results in ``tmp_path``, nothing tracked."""
    return [
        *("model.name=tiny", f"model.source=file:{tiny_folder}", "model.sha256=null", "model.layers=6"),
        *(f"workload.source=file:{prompts_file}", "workload.sha256=null", "workload.new_tokens=12"),
        *("scale=smoke", "hardware=cpu_fp32", "exit_layer=3", "tracking=none", f"output_dir={tmp_path / 'outputs'}"),
    ]


@pytest.fixture
def fake(tmp_path: Path, prompts_file: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Overrides for a job without a model or a tracker, with all it may write below ``tmp_path``."""
    monkeypatch.setenv("SELFSPEC_CACHE", str(prompts_file.with_name("cache")))
    return [
        *("engine=fake", "draft=layerskip", "exit_layer=3", "model.name=tiny", "model.layers=6", "model.sha256=null"),
        *(f"model.source=file:{prompts_file}", f"workload.source=file:{prompts_file}", "workload.sha256=null"),
        *("workload.new_tokens=12", "scale=smoke", "tracking=none", f"output_dir={tmp_path / 'outputs'}"),
    ]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """``python -m selfspec.run ...`` in this process: exit code, stdout, stderr."""
    from hydra.core.global_hydra import GlobalHydra

    from selfspec.run import main

    def call(*argv: str) -> tuple[int, str, str]:
        GlobalHydra.instance().clear()
        monkeypatch.delenv("HYDRA_FULL_ERROR", raising=False)
        monkeypatch.setattr(sys, "argv", ["selfspec.run", *argv])
        capsys.readouterr()
        try:
            main()
            code = 0
        except SystemExit as left:
            code = int(left.code or 0)
        return code, *capsys.readouterr()

    return call


@pytest.fixture(scope="module")
def uri(tmp_path_factory: pytest.TempPathFactory) -> str:
    """One MLflow store for a module: making one costs seconds."""
    return f"sqlite:///{tmp_path_factory.mktemp('mlflow')}/mlflow.db"


@pytest.fixture(scope="module")
def inference() -> Iterator[None]:
    """No gradients, and one thread: tiny products are slower on two."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with torch.inference_mode():
        yield
    torch.set_num_threads(threads)
