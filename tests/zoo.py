"""Tiny random models of every family of decoders, and of the quirks that their folders have; made when a test asks."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

VOCAB = 80
IDS = {"vocab_size": VOCAB, "bos_token_id": 0, "pad_token_id": 0, "eos_token_id": 1}
SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4}
MODERN = SIZES | IDS | {"num_key_value_heads": 2, "max_position_embeddings": 128}
WINDOW = {"sliding_window": 10}
"""Shorter than most prompts of the tests."""
BOTH = {"layer_types": ["sliding_attention", "full_attention"] * 2}
OLD = {**IDS, "n_embd": 32, "n_layer": 4, "n_head": 4, "n_positions": 128}
OPT = {**SIZES, **IDS, "ffn_dim": 48, "word_embed_proj_dim": 32, "max_position_embeddings": 128}
HEADS = {"head_dim": 8}
MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
LATENT = {
    **{"kv_lora_rank": 8, "q_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 8, "v_head_dim": 8},
    **{"n_routed_experts": 4, "moe_intermediate_size": 16, "first_k_dense_replace": 1, "num_key_value_heads": 4},
    **{"num_experts_per_tok": 2, "n_group": 2, "topk_group": 1},
}
SCOUT = {
    **MODERN,
    **{"head_dim": 8, "intermediate_size_mlp": 64, "num_local_experts": 4, "max_position_embeddings": 10485760},
    **{"attention_chunk_size": 96, "floor_scale": 80},  # 8192 both in the real one
}
LLAMA3 = {
    **{"rope_type": "llama3", "rope_theta": 500.0, "factor": 8.0},
    **{"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64},
}
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 2.0, "original_max_position_embeddings": 64}
CONFIGS = {
    **{"Llama4ForCausalLM": "Llama4TextConfig", "GPT2LMHeadModel": "GPT2Config"},
    **{"Gemma3ForCausalLM": "Gemma3TextConfig", "Gemma3nForCausalLM": "Gemma3nTextConfig"},
}


def build(kind: str, settings: dict[str, Any], folder: Path) -> Any:
    """Transformers' model of random weights, biases and norms included, and saved; it seldom repeats itself."""
    import transformers

    torch.manual_seed(0)
    config = getattr(transformers, CONFIGS.get(kind, kind.removesuffix("ForCausalLM") + "Config"))
    model = getattr(transformers, kind)(config(**settings)).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.dim() == 1:
                weight.copy_(float(name.endswith("weight")) + 0.2 * torch.randn(weight.shape))  # norms; biases
            else:
                weight.copy_(2 * torch.randn(weight.shape) / min(weight.shape) ** 0.5)
    transformers.logging.disable_progress_bar()
    model.save_pretrained(folder)
    return model


def without(*keys: str) -> Callable[[Path], None]:
    """A ``config.json`` that lacks these keys."""

    def edit(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({k: v for k, v in config.items() if k not in keys}))

    return edit


def changed(**new: Any) -> Callable[[Path], None]:
    """A ``config.json`` with other values."""

    def edit(folder: Path) -> None:
        (folder / "config.json").write_text(json.dumps(json.loads((folder / "config.json").read_text()) | new))

    return edit


def sharded(folder: Path) -> None:
    """In shards, beside one of an earlier save."""
    from safetensors.torch import load_file, save_file

    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names: dict[str, str] = {}
    for number, name in enumerate(sorted(weights)):
        names[name] = f"model-{number % 3}.safetensors"
    for file in set(names.values()):
        part = {name: weights[name] for name, of in names.items() if of == file}
        save_file(part, folder / file, {"format": "pt"})
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": names}))
    stale = {name: torch.randn_like(tensor) for name, tensor in weights.items()}
    save_file(stale, folder / "model-9.safetensors", {"format": "pt"})


Edit = Callable[[Path], None]
ZOO: dict[str, tuple[str, dict[str, Any]] | tuple[str, dict[str, Any], Edit]] = {
    # ours: fast layers
    "llama": ("LlamaForCausalLM", MODERN),
    "llama tied": ("LlamaForCausalLM", MODERN | {"tie_word_embeddings": True}),
    "llama MHA": ("LlamaForCausalLM", MODERN | {"num_key_value_heads": 4}),
    "llama MQA": ("LlamaForCausalLM", MODERN | {"num_key_value_heads": 1}),
    "llama wide heads": ("LlamaForCausalLM", MODERN | {"head_dim": 16}),
    "llama biased": ("LlamaForCausalLM", MODERN | {"attention_bias": True}),
    "llama MLP biased": ("LlamaForCausalLM", MODERN | {"mlp_bias": True}),
    "llama GELU": ("LlamaForCausalLM", MODERN | {"hidden_act": "gelu"}),
    "llama3 rope": ("LlamaForCausalLM", MODERN | {"rope_parameters": LLAMA3}),
    "llama yarn": ("LlamaForCausalLM", MODERN | {"rope_parameters": YARN}),
    "llama linear rope": (
        "LlamaForCausalLM",
        MODERN | {"rope_parameters": {"rope_type": "linear", "rope_theta": 100.0, "factor": 4.0}},
    ),
    "llama dynamic rope": (
        "LlamaForCausalLM",
        MODERN | {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 100.0, "factor": 4.0}},
    ),
    "llama sharded": ("LlamaForCausalLM", MODERN, sharded),
    "llama tied in its config alone": ("LlamaForCausalLM", MODERN, changed(tie_word_embeddings=True)),
    "llama of defaults": ("LlamaForCausalLM", MODERN, without("rms_norm_eps", "head_dim", "rope_parameters")),
    "mistral": ("MistralForCausalLM", MODERN | {"sliding_window": None}),
    "mistral window": ("MistralForCausalLM", MODERN | WINDOW),
    "mistral default window": ("MistralForCausalLM", MODERN, without("sliding_window")),
    "mistral default heads": (
        "MistralForCausalLM",
        MODERN | {"num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 4},
        without("num_key_value_heads"),
    ),
    "qwen2": ("Qwen2ForCausalLM", MODERN | {"tie_word_embeddings": True}),
    "qwen2 windows": (
        "Qwen2ForCausalLM",
        MODERN | WINDOW | {"use_sliding_window": True, "max_window_layers": 2},
    ),
    "qwen3": ("Qwen3ForCausalLM", MODERN | {"head_dim": 16}),
    # transformers' own forward
    "gemma": ("GemmaForCausalLM", MODERN | HEADS),
    "gemma2": ("Gemma2ForCausalLM", MODERN | HEADS | WINDOW | {"query_pre_attn_scalar": 8}),
    "gemma3": ("Gemma3ForCausalLM", MODERN | HEADS | WINDOW | BOTH | {"query_pre_attn_scalar": 8}),
    "vaultgemma": ("VaultGemmaForCausalLM", MODERN | HEADS | WINDOW),
    "granite": (
        "GraniteForCausalLM",
        MODERN
        | {"logits_scaling": 4.0, "embedding_multiplier": 3.0, "residual_multiplier": 0.5, "attention_multiplier": 0.2},
    ),
    "granite moe": ("GraniteMoeForCausalLM", MODERN | {"num_local_experts": 4, "logits_scaling": 2.0}),
    "cohere": ("CohereForCausalLM", MODERN | {"logit_scale": 0.25}),
    "cohere QK norm": ("CohereForCausalLM", MODERN | {"logit_scale": 2.0, "use_qk_norm": True}),
    "cohere2": ("Cohere2ForCausalLM", MODERN | WINDOW | BOTH | {"logit_scale": 0.25}),
    "phi": ("PhiForCausalLM", MODERN),
    "phi3": ("Phi3ForCausalLM", MODERN | WINDOW),
    "gpt-neox": ("GPTNeoXForCausalLM", SIZES | IDS | {"max_position_embeddings": 128}),
    "gpt-neox in a row": (
        "GPTNeoXForCausalLM",
        SIZES | IDS | {"max_position_embeddings": 128, "use_parallel_residual": False, "rotary_pct": 1.0},
    ),
    "falcon": ("FalconForCausalLM", MODERN | {"alibi": False}),
    "falcon ALiBi": ("FalconForCausalLM", MODERN | {"alibi": True}),
    "falcon many heads": ("FalconForCausalLM", MODERN | {"alibi": False, "multi_query": False, "bias": True}),
    "falcon new": ("FalconForCausalLM", MODERN | {"new_decoder_architecture": True, "num_kv_heads": 2}),
    "bloom": ("BloomForCausalLM", IDS | {"hidden_size": 32, "n_layer": 4, "n_head": 4}),
    "gpt-oss": (
        "GptOssForCausalLM",
        MODERN | HEADS | WINDOW | {"num_local_experts": 4, "num_experts_per_tok": 2},
    ),
    "gpt2": ("GPT2LMHeadModel", OLD),
    "gpt-j": ("GPTJForCausalLM", OLD | {"rotary_dim": 4}),
    "codegen": ("CodeGenForCausalLM", OLD | {"rotary_dim": 4}),
    "gpt-bigcode": ("GPTBigCodeForCausalLM", OLD),
    "gpt-neo": (
        "GPTNeoForCausalLM",
        IDS
        | {"hidden_size": 32, "num_layers": 4, "num_heads": 4, "max_position_embeddings": 128, "window_size": 10}
        | {"attention_types": [[["global", "local"], 2]]},
    ),
    "mpt": ("MptForCausalLM", IDS | {"d_model": 32, "n_heads": 4, "n_layers": 4, "max_seq_len": 128}),
    "opt": ("OPTForCausalLM", OPT),
    "xglm": (
        "XGLMForCausalLM",
        IDS | {"d_model": 32, "num_layers": 4, "attention_heads": 4, "ffn_dim": 48, "max_position_embeddings": 128},
    ),
    "biogpt": ("BioGptForCausalLM", MODERN),
    "persimmon": ("PersimmonForCausalLM", MODERN),
    "stablelm": ("StableLmForCausalLM", MODERN | {"use_qkv_bias": True}),
    "olmo": ("OlmoForCausalLM", MODERN | {"clip_qkv": 2.0}),
    "olmo2": ("Olmo2ForCausalLM", MODERN),
    "olmo3": ("Olmo3ForCausalLM", MODERN | WINDOW),
    "olmoe": ("OlmoeForCausalLM", MODERN | {"num_experts": 4, "num_experts_per_tok": 2}),
    "starcoder2": ("Starcoder2ForCausalLM", MODERN | WINDOW),
    "mixtral": ("MixtralForCausalLM", MODERN | {"num_local_experts": 4}),
    "qwen2 moe": ("Qwen2MoeForCausalLM", MODERN | MOE | {"shared_expert_intermediate_size": 16}),
    "qwen3 moe": ("Qwen3MoeForCausalLM", MODERN | MOE | HEADS),
    "llama4": ("Llama4ForCausalLM", SCOUT | {"attention_chunk_size": 12}),
    "smollm3": ("SmolLM3ForCausalLM", MODERN | {"no_rope_layers": [1, 0, 1, 0]}),
    "glm": ("GlmForCausalLM", MODERN | HEADS),
    "glm4": ("Glm4ForCausalLM", MODERN | HEADS),
    "exaone4": ("Exaone4ForCausalLM", MODERN | WINDOW | BOTH),
    "nemotron": ("NemotronForCausalLM", MODERN),
    "helium": ("HeliumForCausalLM", MODERN | HEADS),
    "arcee": ("ArceeForCausalLM", MODERN),
    "ernie": ("Ernie4_5ForCausalLM", MODERN | HEADS),
    "hunyuan": ("HunYuanDenseV1ForCausalLM", MODERN | HEADS),
    "apertus": ("ApertusForCausalLM", MODERN),
    "bitnet": ("BitNetForCausalLM", MODERN),
    "diffllama": ("DiffLlamaForCausalLM", MODERN),
    "cwm": ("CwmForCausalLM", MODERN | HEADS | WINDOW | BOTH),
    "deepseek-v2": ("DeepseekV2ForCausalLM", MODERN | LATENT),
    "deepseek-v3": ("DeepseekV3ForCausalLM", MODERN | LATENT),
}
DAILY = (
    *("llama tied in its config alone", "mistral window", "qwen2 windows", "llama sharded", "llama yarn", "gemma2"),
    *("gemma3", "granite", "cohere", "phi", "gpt-neox", "falcon ALiBi", "falcon new", "bloom", "gpt-oss", "gpt-neo"),
    *("llama4", "deepseek-v3", "mixtral", "gpt2"),
)
"""One of every kind of difference; the others are run every night."""


def make(name: str, folder: Path) -> Any:
    """A model of the zoo in its folder, edited, as transformers reads it again."""
    from transformers import AutoModelForCausalLM

    kind, settings, *edits = ZOO[name]
    build(kind, settings, folder)
    for edit in edits:
        edit(folder)
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
