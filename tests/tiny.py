"""A tiny random Llama in float32, a tiny prompt file, and the overrides of jobs on them."""

import json
import random
from pathlib import Path

WORDS = ["a", "model", "drafts", "tokens", "and", "another", "verifies", "them", "so", "that", "nothing", "is", "lost"]
VOCABULARY = ["<pad>", "<eos>", "<user>", "<model>", "<unk>", *WORDS, *(f"w{i}" for i in range(80 - 5 - len(WORDS)))]
CONFIG = {
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


def model(folder: Path) -> Path:
    """A model folder in the Hugging Face layout: random weights, a word-level tokenizer, a chat template.

    Later layers are smaller than early ones, so that an early exit is right often, but not always.
    """
    import torch
    from safetensors.torch import save_file
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit

    (folder / "config.json").write_text(json.dumps(CONFIG))
    chance = torch.Generator().manual_seed(0)

    def matrix(rows: int, columns: int, scale: float) -> torch.Tensor:
        return torch.randn(rows, columns, generator=chance) * scale / columns**0.5

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
            weights[f"{prefix}{name}.weight"] = 1 + 0.1 * torch.randn(32, generator=chance)
    save_file(weights, folder / "model.safetensors")

    tokenizer = Tokenizer(WordLevel({word: i for i, word in enumerate(VOCABULARY)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    tokenizer.save(str(folder / "tokenizer.json"))
    template = "{% for m in messages %}<user> {{ m['content'] }} {% endfor %}<model>"
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<eos>", "chat_template": template}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


def prompts(path: Path) -> Path:
    """600 short conversations in ShareGPT's form."""
    rng = random.Random(0)
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


def torch_job(model: Path, prompts: Path) -> list[str]:
    """On the tiny model, in float32; nothing tracked."""
    return [
        *("model.name=tiny", f"model.source=file:{model}", "model.sha256=null", "model.layers=6"),
        *(f"workload.source=file:{prompts}", "workload.sha256=null", "workload.new_tokens=12"),
        *("draft=lsq", "scale=smoke", "hardware=cpu_fp32", "exit_layer=3", "tracking=none"),
    ]


def fake_job(prompts: Path) -> list[str]:
    """Without a model; nothing tracked."""
    return [
        *("engine=fake", "draft=layerskip", "exit_layer=3", "model.name=tiny", "model.layers=6", "model.sha256=null"),
        *(f"model.source=file:{prompts}", f"workload.source=file:{prompts}", "workload.sha256=null"),
        *("workload.new_tokens=12", "scale=smoke", "tracking=none"),
    ]
