"""llama: the same logits as transformers, however the layers, tokens and rows are cut up."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import caches
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.testing import assert_close
from transformers import AutoModelForCausalLM

from selfspec.errors import AssetError, ConfigError
from selfspec.model.cache import KVCache
from selfspec.model.llama import Llama
from selfspec.model.tree import Tree

pytestmark = pytest.mark.usefixtures("inference")

LAYERS, VOCAB, CPU = 3, 50, torch.device("cpu")
BASE = {
    **{"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": LAYERS, "vocab_size": VOCAB},
    **{"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64, "eos_token_id": 2},
}
LLAMA3 = {
    **{"rope_type": "llama3", "rope_theta": 500.0, "factor": 8.0},
    **{"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64},
}
FAMILY: dict[str, tuple[str, dict[str, Any]]] = {
    "llama tied": ("Llama", {"tie_word_embeddings": True}),
    "llama untied": ("Llama", {"tie_word_embeddings": False}),
    "llama MHA": ("Llama", {"num_key_value_heads": 4}),
    "llama MQA": ("Llama", {"num_key_value_heads": 1}),
    "llama biased": ("Llama", {"attention_bias": True}),
    "llama3 rope": ("Llama", {"rope_parameters": LLAMA3}),
    "linear rope": ("Llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 100.0, "factor": 4.0}}),
    "mistral": ("Mistral", {"sliding_window": None, "head_dim": 16}),
    "mistral window": ("Mistral", {"sliding_window": 10}),
    "qwen2 windows": (
        "Qwen2",
        {"sliding_window": 7, "use_sliding_window": True, "max_window_layers": 1, "tie_word_embeddings": False},
    ),
    "qwen2": ("Qwen2", {"tie_word_embeddings": True}),
    "qwen3": ("Qwen3", {"head_dim": 16}),
}
BUSHY = Tree([9, 7, 8, 7, 8, 7], [-1, 0, 0, 1, 1, 2])
TOKENS: list[int] = torch.randint(VOCAB, (24,), generator=torch.Generator().manual_seed(1)).tolist()


def build(name: str, folder: Path) -> tuple[Any, Path]:
    """Transformers' model of random weights, and the folder it is saved in."""
    import transformers

    kind, settings = FAMILY[name]
    model = getattr(transformers, f"{kind}ForCausalLM")(getattr(transformers, f"{kind}Config")(**BASE | settings))
    random = torch.Generator().manual_seed(0)
    for weight in model.parameters():  # norms and biases too: each must have its effect
        spread = 0.3 if weight.dim() == 1 else 2 / weight.shape[1] ** 0.5
        weight.copy_((weight == 1) + spread * torch.randn(weight.shape, generator=random))
    if kind == "Llama" and settings.get("attention_bias"):
        for layer in model.model.layers:
            layer.self_attn.o_proj.bias = None
    transformers.logging.disable_progress_bar()
    model.save_pretrained(folder)
    return model.eval(), folder


def load(folder: Path) -> Llama:
    return Llama.load(folder, CPU, torch.float32)


def full(model: Llama, cache: KVCache, trees: Sequence[Tree], row: int | None = None) -> Tensor:
    """All nodes through all layers: logits."""
    at = cache.place(trees, row=row)
    hidden = model.embed([token for tree in trees for token in tree.tokens], at)
    return model.logits(model.norm(model.run(hidden, cache, at, 0, LAYERS)))


def begin(model: Llama, cache: KVCache, tokens: Sequence[int]) -> int:
    """A row that holds these tokens."""
    row = cache.admit()
    if tokens:
        full(model, cache, [Tree.chain(tokens)], row)
        cache.commit(row, range(len(tokens)))
    return row


def logits(model: Llama, tokens: Sequence[int], *cuts: int) -> Tensor:
    """Of all tokens, run in pieces that end at ``cuts``."""
    cache, out = model.new_cache(len(tokens)), list[Tensor]()
    row = cache.admit()
    for start, stop in zip((0, *cuts), (*cuts, len(tokens)), strict=True):
        out.append(full(model, cache, [Tree.chain(tokens[start:stop])], row))
        cache.commit(row, range(stop - start))
    caches.check(cache, LAYERS)
    return torch.cat(out)


@pytest.fixture(scope="module")
def qwen(tmp_path_factory: pytest.TempPathFactory) -> Llama:
    return load(build("qwen3", tmp_path_factory.mktemp("qwen3"))[1])


@pytest.mark.parametrize("name", FAMILY)
def test_transformers_gives_the_same_logits(name: str, tmp_path: Path) -> None:
    theirs, folder = build(name, tmp_path)
    wanted = theirs(torch.tensor([TOKENS])).logits[0]
    assert wanted.std() > 0.5, "else the tolerance would hide a mistake"
    ours = load(folder)
    for cuts in [(), (1,), (9, 10, 15), tuple(range(1, 24))]:
        assert_close(logits(ours, TOKENS, *cuts), wanted, atol=1e-4, rtol=0)
    assert ours.shape.eos == {2} and (ours.lm_head is ours.embedding) == (theirs.config.tie_word_embeddings or False)
    assert ours.shape.max_positions == 64


def test_settings_as_older_transformers_wrote_them(tmp_path: Path) -> None:
    theirs, folder = build("llama3 rope", tmp_path)
    config = json.loads((folder / "config.json").read_text())
    rope = config.pop("rope_parameters")
    for key in ("head_dim", "tie_word_embeddings"):
        del config[key]
    config |= {"rope_theta": rope.pop("rope_theta"), "rope_scaling": rope, "eos_token_id": [2, 7]}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "generation_config.json").unlink()
    ours = load(folder)
    assert_close(logits(ours, TOKENS), theirs(torch.tensor([TOKENS])).logits[0], atol=1e-4, rtol=0)
    assert ours.shape.eos == {2, 7}


@pytest.mark.parametrize("used", [False, True])
def test_a_window_counts_where_it_is_used(tmp_path: Path, used: bool) -> None:
    """Qwen's files name one, and say that it is not."""
    _, folder = build("qwen2", tmp_path)
    config = json.loads((folder / "config.json").read_text())
    config |= {"sliding_window": 8, "use_sliding_window": used, "max_window_layers": 0}
    del config["layer_types"]
    (folder / "config.json").write_text(json.dumps(config))
    ours = load(folder)
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    assert_close(logits(ours, TOKENS), theirs(torch.tensor([TOKENS])).logits[0], atol=1e-4, rtol=0)
    near, far = (logits(ours, tokens)[-1] for tokens in (TOKENS[-9:], TOKENS[-20:]))
    assert torch.allclose(near, far) is False, "layers hand on what they saw through their windows"


@pytest.mark.parametrize("others", [0, 2], ids=["alone", "in a batch"])
def test_a_window_is_of_positions_and_a_tree_has_fewer_than_slots(tmp_path: Path, others: int) -> None:
    model = load(build("mistral window", tmp_path)[1])
    cache = model.new_cache(40, rows=1 + others)
    trees = [BUSHY, Tree.chain(TOKENS[:3]), Tree([1, 2, 3], [-1, 0, 0])][: 1 + others]
    for row in range(1 + others):
        begin(model, cache, TOKENS[row : 9 + 3 * row])
    got = iter(full(model, cache, trees))
    for row, tree in enumerate(trees):
        for node in range(len(tree)):
            path, at = list[int](), node
            while at >= 0:
                path, at = [tree.tokens[at], *path], tree.parents[at]
            assert_close(next(got), logits(model, TOKENS[row : 9 + 3 * row] + path)[-1], atol=1e-4, rtol=0)


def test_another_dtype_is_the_same_model(qwen: Llama) -> None:
    double = qwen.to(torch.float64)
    assert double.dtype == double.new_cache(1).kv.dtype == torch.float64
    assert_close(logits(double, TOKENS).float(), logits(qwen, TOKENS), atol=1e-4, rtol=0)


def test_a_cache_has_layers_for_a_drafts_own_use(qwen: Llama) -> None:
    assert qwen.new_cache(5, rows=3, extra_layers=2).kv.shape == (LAYERS + 2, 2, 3, 2, 5, 16)


@pytest.mark.parametrize("exit_layer", [0, 1, 2, 3])
@pytest.mark.parametrize("batch", [1, 2])
def test_layers_run_in_two_ranges(qwen: Llama, exit_layer: int, batch: int) -> None:
    trees = [Tree.chain(TOKENS[:9]), BUSHY][-batch:]
    tokens = [token for tree in trees for token in tree.tokens]
    caches = [qwen.new_cache(24, rows=batch) for _ in range(2)]
    for cache in caches:
        for row in range(batch):
            begin(qwen, cache, TOKENS[row : 5 * row + 4])
    whole, cut = caches
    at = whole.place(trees)
    wanted = qwen.run(qwen.embed(tokens), whole, at, 0, LAYERS)
    early = qwen.run(qwen.embed(tokens), cut, at, 0, exit_layer)
    assert torch.equal(qwen.run(early, cut, at, exit_layer, LAYERS), wanted)
    assert torch.equal(whole.kv, cut.kv)


class TestRows:
    """A batch is each row as if alone, whatever its length and however many tokens it adds."""

    LENGTHS = (4, 11, 1, 7)

    @pytest.fixture
    def cache(self, qwen: Llama) -> KVCache:
        cache = qwen.new_cache(24, rows=4)
        for i, length in enumerate(self.LENGTHS):
            assert begin(qwen, cache, TOKENS[i : i + length]) == i
        return cache

    def alone(self, qwen: Llama, row: int, tokens: Sequence[int]) -> Tensor:
        """Logits of ``tokens`` after what the row of that number began with."""
        return logits(qwen, [*TOKENS[row : row + self.LENGTHS[row]], *tokens])[-len(tokens) :]

    @pytest.mark.parametrize("counts", [(1, 1, 1, 1), (3, 3, 3, 3), (1, 4, 2, 1), (5, 1, 1, 3)], ids=str)
    def test_ragged(self, qwen: Llama, cache: KVCache, counts: tuple[int, ...]) -> None:
        new = [TOKENS[20 - count : 20] for count in counts]
        got = full(qwen, cache, [Tree.chain(tokens) for tokens in new])
        wanted = torch.cat([self.alone(qwen, row, tokens) for row, tokens in enumerate(new)])
        assert_close(got, wanted, atol=1e-4, rtol=0)

    def test_the_last_nodes_after_the_first(self, qwen: Llama, cache: KVCache) -> None:
        """As a draft goes: a node of every row at a time, which then meet the next layers together."""
        new = [TOKENS[12 + row : 15 + row] for row in range(4)]
        steps = []
        for step in range(3):
            at = cache.place([Tree.chain(tokens[: step + 1]) for tokens in new], first=step)
            steps.append(qwen.run(qwen.embed([tokens[step] for tokens in new]), cache, at, 0, 2))
        at = cache.place([Tree.chain(tokens) for tokens in new])
        hidden = qwen.run(torch.stack(steps, 1).flatten(0, 1), cache, at, 2, LAYERS)
        wanted = torch.cat([self.alone(qwen, row, tokens) for row, tokens in enumerate(new)])
        assert_close(qwen.logits(qwen.norm(hidden)), wanted, atol=1e-4, rtol=0)

    def test_beside_a_row_that_has_nothing_left_to_run(self, qwen: Llama, cache: KVCache) -> None:
        counts = (1, 3, 1, 2)
        trees = [Tree.chain(TOKENS[12 + row : 12 + row + count]) for row, count in enumerate(counts)]
        at = cache.place(trees, first=0)
        early = qwen.run(qwen.embed([token for tree in trees for token in tree.tokens]), cache, at, 0, LAYERS)
        at = cache.place(trees, first=1)
        again = qwen.run(qwen.embed([token for tree in trees for token in tree.tokens[1:]]), cache, at, 0, LAYERS)
        assert_close(again, early[[2, 3, 6]], atol=1e-4, rtol=1e-4)

    def test_after_one_has_left(self, qwen: Llama, cache: KVCache) -> None:
        cache.evict(1)
        got = full(qwen, cache, [Tree.chain(TOKENS[:2])] * 3)
        wanted = torch.cat([self.alone(qwen, row, TOKENS[:2]) for row in (0, 3, 2)])
        assert_close(got, wanted, atol=1e-4, rtol=0)

    def test_one_that_rides_along_past_the_last_position(self, qwen: Llama) -> None:
        """A row at its end drafts beside one that is not: what it says there is dropped, but it must be let."""
        cache = qwen.new_cache(70, rows=2)
        begin(qwen, cache, (TOKENS * 3)[:63])
        begin(qwen, cache, TOKENS[:5])
        new = [TOKENS[:4], TOKENS[5:9]]
        got = full(qwen, cache, [Tree.chain(tokens) for tokens in new])
        assert_close(got[0], logits(qwen, [*(TOKENS * 3)[:63], new[0][0]])[-1], atol=1e-4, rtol=0)
        assert_close(got[4:], logits(qwen, TOKENS[:9])[-4:], atol=1e-4, rtol=0)


class TestTrees:
    """Every node of a tree is the last token of the path that leads to it."""

    def path(self, tree: Tree, node: int) -> list[int]:
        tokens = list[int]()
        while node >= 0:
            tokens.insert(0, tree.tokens[node])
            node = tree.parents[node]
        return tokens

    @pytest.mark.parametrize("before", [0, 1, 7])
    @pytest.mark.parametrize("others", [0, 2], ids=["alone", "in a batch"])
    def test_all_paths_at_once(self, qwen: Llama, before: int, others: int) -> None:
        cache = qwen.new_cache(24, rows=1 + others)
        trees = [BUSHY, Tree.chain(TOKENS[:3]), Tree([1, 2, 3], [-1, 0, 0])][: 1 + others]
        for row in range(1 + others):
            begin(qwen, cache, TOKENS[row : row + before + 2 * row])
        got = iter(full(qwen, cache, trees))
        for row, tree in enumerate(trees):
            for node in range(len(tree)):
                wanted = logits(qwen, TOKENS[row : row + before + 2 * row] + self.path(tree, node))[-1]
                assert_close(next(got), wanted, atol=1e-4, rtol=0)

    @pytest.mark.parametrize("node", range(6))
    def test_decoding_goes_on_from_the_path_that_stands(self, qwen: Llama, node: int) -> None:
        cache = qwen.new_cache(24, rows=2)
        for row in range(2):
            begin(qwen, cache, TOKENS[row : row + 4])
        full(qwen, cache, [BUSHY, BUSHY])
        path, at = list[int](), node
        while at >= 0:
            path.insert(0, at)
            at = BUSHY.parents[at]
        cache.commit(0, path)
        cache.commit(1, [0])
        caches.check(cache, LAYERS)
        got = full(qwen, cache, [Tree.chain([40, 41]), Tree.chain([42])])
        wanted = logits(qwen, [*TOKENS[:4], *self.path(BUSHY, node), 40, 41])[-2:]
        assert_close(got[:2], wanted, atol=1e-4, rtol=0)
        assert_close(got[2], logits(qwen, [*TOKENS[1:5], BUSHY.tokens[0], 42])[-1], atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "gpt2"}, "architecture 'gpt2' is not of the family"),
        ({"model_type": None}, "architecture None"),
        ({"hidden_act": "gelu"}, "SwiGLU"),
        ({"mlp_bias": True}, "SwiGLU"),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 2.0}}, "rope scaling 'yarn' is not supported"),
    ],
)
def test_what_it_cannot_run_is_refused(tiny_folder: Path, tmp_path: Path, change: Any, message: str) -> None:
    config = json.loads((tiny_folder / "config.json").read_text()) | change
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "model.safetensors").symlink_to(tiny_folder / "model.safetensors")
    with pytest.raises(ConfigError, match=message):
        load(tmp_path)


def test_an_output_bias_is_refused(tmp_path: Path) -> None:
    import transformers

    config = transformers.LlamaConfig(**BASE, attention_bias=True)
    transformers.logging.disable_progress_bar()
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="output bias"):
        load(tmp_path)


def test_an_untied_head_must_be_there(tmp_path: Path) -> None:
    """As where one file of several is missing: the embedding would do, and say nonsense."""
    _, folder = build("llama untied", tmp_path)
    weights = load_file(folder / "model.safetensors")
    del weights["lm_head.weight"]
    save_file(weights, folder / "model.safetensors")
    with pytest.raises(AssetError, match="lm_head"):
        load(folder)


@pytest.mark.parametrize("damage", ["no folder", "no config", "no weights", "cut off", "garbage", "no layer", "no key"])
def test_a_damaged_folder_is_an_asset_error(tiny_folder: Path, tmp_path: Path, damage: str) -> None:
    weights = (tiny_folder / "model.safetensors").read_bytes()
    config = json.loads((tiny_folder / "config.json").read_text())
    match damage:
        case "cut off":
            weights = weights[:-7]
        case "garbage":
            weights = b"\xff" * 4096
        case "no layer":
            config["num_hidden_layers"] += 1
        case "no key":
            config["rms_norm_eps"] = "small"
    (tmp_path / "config.json").write_text("{" if damage == "no config" else json.dumps(config))
    if damage != "no weights":
        (tmp_path / "model.safetensors").write_bytes(weights)
    folder = tmp_path / "none" if damage == "no folder" else tmp_path
    with pytest.raises(AssetError, match=str(folder)) as error:
        load(folder)
    assert "\n" not in str(error.value)


class TestCheckpoint:
    """A folder is what transformers says it is."""

    @pytest.fixture
    def folder(self, tmp_path: Path) -> Path:
        return build("llama untied", tmp_path)[1]

    def check(self, folder: Path) -> Llama:
        theirs, ours = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32), load(folder)
        assert_close(logits(ours, TOKENS), theirs(torch.tensor([TOKENS])).logits[0], atol=1e-4, rtol=0)
        eos = theirs.generation_config.eos_token_id
        assert ours.shape.eos == frozenset([eos] if isinstance(eos, int) else eos or [])
        return ours

    def edit(self, folder: Path, drop: Sequence[str] = (), **new: Any) -> None:
        config = json.loads((folder / "config.json").read_text()) | new
        (folder / "config.json").write_text(json.dumps({k: v for k, v in config.items() if k not in drop}))

    def test_shards_that_the_index_names_and_no_other(self, folder: Path) -> None:
        theirs = AutoModelForCausalLM.from_pretrained(folder)
        theirs.save_pretrained(folder, max_shard_size="20KB")
        (folder / "model.safetensors").unlink()
        shards = sorted(folder.glob("model-*.safetensors"))
        assert len(shards) > 2
        stale = {name: torch.randn_like(tensor) for file in shards for name, tensor in load_file(file).items()}
        save_file(stale, folder / "model-99999-of-99999.safetensors", {"format": "pt"})
        self.check(folder)
        shards[0].unlink()
        with pytest.raises(AssetError, match=shards[0].name):
            load(folder)

    def test_an_index_that_names_what_is_not_there(self, folder: Path) -> None:
        weights = load_file(folder / "model.safetensors")
        (folder / "model.safetensors").rename(folder / "a.safetensors")
        index = folder / "model.safetensors.index.json"
        index.write_text(json.dumps({"weight_map": dict.fromkeys([*weights, "model.extra"], "a.safetensors")}))
        with pytest.raises(AssetError, match=r"a\.safetensors lacks model\.extra"):
            load(folder)
        for text in ("{", "[]", "{}", '{"weight_map": {"a": 1}}', '{"weight_map": {"a": "../a.safetensors"}}'):
            index.write_text(text)
            with pytest.raises(AssetError, match=r"index\.json"):
                load(folder)

    def test_a_head_beside_a_tied_embedding_is_kept_if_it_differs(self, folder: Path) -> None:
        self.edit(folder, tie_word_embeddings=True)
        assert (model := self.check(folder)).lm_head is not model.embedding
        weights = load_file(folder / "model.safetensors")
        weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()
        save_file(weights, folder / "model.safetensors", {"format": "pt"})
        assert (model := self.check(folder)).lm_head is model.embedding

    @pytest.mark.parametrize("drop", [["rms_norm_eps"], ["head_dim"], ["rope_parameters"], ["tie_word_embeddings"]])
    def test_an_absent_key_is_what_its_class_says(self, folder: Path, drop: list[str]) -> None:
        self.edit(folder, drop)
        self.check(folder)

    def test_a_class_has_defaults_of_its_own(self, tmp_path: Path) -> None:
        _, folder = build("mistral", tmp_path)
        self.edit(folder, ["sliding_window"])
        assert load(folder)._window == 4096
        self.edit(folder, ["num_key_value_heads"])
        with pytest.raises(AssetError, match=r"k_proj\.weight is \(32, 32\); by config\.json it must be \(128, 32\)"):
            load(folder)

    @pytest.mark.parametrize(
        ("generation", "eos"), [({"eos_token_id": [5, 6]}, {5, 6}), ({"eos_token_id": 7}, {7}), (None, {2})]
    )
    def test_stop_tokens(self, folder: Path, generation: dict[str, Any] | None, eos: set[int]) -> None:
        path = folder / "generation_config.json"
        path.write_text(json.dumps(generation)) if generation is not None else path.unlink()
        assert self.check(folder).shape.eos == eos

    @pytest.mark.parametrize(
        "change", [{"hidden_size": 64}, {"vocab_size": 51}, {"intermediate_size": 40}, {"num_attention_heads": 8}]
    )
    def test_a_tensor_of_another_shape(self, folder: Path, change: dict[str, Any]) -> None:
        self.edit(folder, **change, head_dim=None)
        with pytest.raises(AssetError, match=r" is \(.*\); by config\.json it must be ") as error:
            load(folder)
        assert "\n" not in str(error.value)
