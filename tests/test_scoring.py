"""Scoring and probing: log-likelihoods are the model's, and what an exit is said to draft is what decoding drafts."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from plans import planned
from tiny import WORDS

from selfspec.engine.torch.engine import TorchEngine
from selfspec.errors import ConfigError
from selfspec.model.tree import Tree
from selfspec.speculation import scoring
from selfspec.types import Request, Score

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("inference")]

Maker = Callable[..., TorchEngine]


@pytest.fixture(scope="module")
def theirs(tiny_folder: Path) -> Any:
    """The same model by transformers."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(tiny_folder).eval()


def texts(*lengths: int, seed: int = 3) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(5, 80, (n,), generator=generator).tolist() for n in lengths]


def expected(theirs: Any, context: list[int], tokens: list[int]) -> Score:
    logits = theirs(torch.tensor([context + tokens])).logits[0, len(context) - 1 : -1].log_softmax(-1)
    wanted = torch.tensor(tokens)
    return Score(tuple(logits.gather(1, wanted[:, None])[:, 0].tolist()), bool((logits.argmax(-1) == wanted).all()))


@pytest.mark.parametrize("more", ["draft=none", "draft=layerskip K=3", "draft=ngram K=1", "engine=hf draft=none"])
@pytest.mark.parametrize("plain", [True, False])
def test_log_likelihoods_are_the_models(engine: Maker, theirs: Any, more: str, plain: bool) -> None:
    context, *others = texts(9, 1, 12, 4)
    made = engine(*more.split())
    greedy = list(made.generate([Request(tuple(context), 6, ignore_eos=True)], plain=True)[0].tokens)
    others.append(greedy)
    for tokens, score in zip(others, made.score(context, others, plain=plain), strict=True):
        wanted = expected(theirs, context, tokens)
        assert score.logprobs == pytest.approx(wanted.logprobs, abs=2e-5) and score.greedy == wanted.greedy
    assert score.greedy and len(score.logprobs) == 6


def test_a_continuation_knows_nothing_of_the_one_before(engine: Maker) -> None:
    made, (context, long, short) = engine("draft=layerskip"), texts(5, 20, 3)
    alone = [made.score(context, [tokens])[0] for tokens in (long, short)]
    for order in ([0, 1], [1, 0], [0, 0]):
        both = made.score(context, [(long, short)[i] for i in order])
        assert [s.logprobs for s in both] == [pytest.approx(alone[i].logprobs, abs=1e-6) for i in order]


def test_unverified_text_is_scored_by_the_exit(engine: Maker) -> None:
    made, (context, tokens) = engine("draft=layerskip", "exit_layer=2", "policy.verify=false"), texts(6, 5)
    (score,), (whole,) = made.score(context, [tokens]), made.score(context, [tokens], plain=True)
    model = made.model
    cache = model.new_cache(11)
    at = cache.place([Tree.chain(context + tokens)], row=cache.admit())
    hidden = model.run(model.embed(context + tokens, at), cache, at, 0, 2)
    logits = model.logits(model.norm(hidden))[5:10].log_softmax(-1)
    wanted = logits.gather(1, torch.tensor(tokens)[:, None])[:, 0].tolist()
    assert score.logprobs == pytest.approx(wanted, abs=1e-5)
    assert score.logprobs != pytest.approx(whole.logprobs, abs=1e-2)


def test_too_long_a_text(engine: Maker) -> None:
    made, (context, tokens) = engine("draft=none"), texts(500, 14)
    assert len(made.score(context, [tokens[:13]])[0].logprobs) == 13, "the last token is not read"
    with pytest.raises(ConfigError, match="513 positions; the model has 512"):
        made.score(context, [tokens])


def fitted(made: TorchEngine, path: Path) -> TorchEngine:
    prompts = [tuple(tokens) for tokens in texts(*[6] * 20, seed=4)]
    answers = made.generate([Request(prompt, 16) for prompt in prompts], plain=True, max_batch=20)
    made.fit([(p, a.tokens) for p, a in zip(prompts, answers, strict=True)], path, {"model": "tiny"})
    made.use_head(path)
    return made


@pytest.mark.parametrize(
    ("draft", "head"),
    [
        ("draft=layerskip", "raw"),
        ("draft=lsq draft.ridge=0.1", "lsq"),
        ("draft=lsq draft.ridge=0.1 draft.previous=true draft.vocab=40", "lsq"),
        ("draft=adapter draft.sgd_epochs=1 draft.exit_layer=3 draft.vocab=null", "adapter"),
    ],
)
@pytest.mark.parametrize(
    ("gate", "signal"),
    [("maxp tau=0", "max_prob"), ("entropy tau_h=99", "entropy"), ("varH tau_v=99", "var_entropy")],
)
def test_what_is_probed_is_what_decoding_drafts(
    engine: Maker, tmp_path: Path, draft: str, head: str, gate: str, signal: str
) -> None:
    made = engine(*draft.split(), f"gate={gate.split()[0]}", gate.split()[1], "K=1", "exit_layer=3")
    if head != "raw":
        fitted(made, tmp_path / "head")
    stands = set()
    for prompt in texts(7, 8, 9, 10):
        (done,) = made.generate([Request(tuple(prompt), 40, ignore_eos=True)])
        (probed,) = [one for one in made.probe(prompt, done.tokens) if (one.layer, one.head) == (3, head)]
        at = 0  # the token drafted next, from the second on
        for cycle in done.cycles:
            if cycle.proposed:
                assert cycle.accepted == probed.accepted[at]
                assert cycle.signals[0] == pytest.approx(getattr(probed, signal)[at], abs=1e-4)
                stands.add(cycle.accepted)
            at += cycle.new_tokens
        assert len(probed.accepted) == 39 == at
    assert stands == {0, 1}


def test_a_hybrids_learned_draft_is_probed(engine: Maker, tmp_path: Path) -> None:
    draft = "draft=hybrid draft.learned=lsq draft.exit_layer=3 draft.form=affine draft.ridge=0.1 draft.alpha=null"
    made, (prompt, answer) = engine(*draft.split()), texts(6, 9)
    fitted(made, tmp_path / "head")
    assert [(one.layer, one.head) for one in made.probe(prompt, answer, [2])] == [(2, "raw"), (3, "lsq")]


def test_which_exits_are_probed(engine: Maker) -> None:
    made, (prompt, answer) = engine("draft=layerskip", "exit_layer=3"), texts(6, 9)
    assert [(one.layer, one.head) for one in made.probe(prompt, answer)] == [(n, "raw") for n in range(1, 6)]
    assert [one.layer for one in made.probe(prompt, answer, [5, 2])] == [5, 2]
    with pytest.raises(ConfigError, match=r"quality.exits=6: the model has 6 layers; must be 1 to 5"):
        made.probe(prompt, answer, [2, 6])


@pytest.mark.parametrize(
    ("layers", "also", "wanted"),
    [
        (30, 12, [4, 8, 12, 16, 20, 24, 28]),
        (30, 10, [4, 8, 10, 12, 16, 20, 24, 28]),
        (6, 3, [1, 2, 3, 4, 5]),
        (2, None, [1]),
    ],
)
def test_exits_are_evenly_spaced(layers: int, also: int | None, wanted: list[int]) -> None:
    assert scoring.exits(layers, also) == wanted


def test_the_last_exit_before_the_end_agrees_most(engine: Maker) -> None:
    made = engine("draft=layerskip")
    (prompt,) = texts(8)
    (done,) = made.generate([Request(tuple(prompt), 60, ignore_eos=True)], plain=True)
    shares = [sum(one.accepted) / len(one.accepted) for one in made.probe(prompt, done.tokens)]
    assert shares[-1] == max(shares) > shares[0]


def test_limits(engine: Maker) -> None:
    made = engine("draft=none")
    assert made.limits() == (512, 80) and made.tokenizer.prefix() == (1, False)


# ---------------------------------------------------------------------------- lm-eval


def instances(kind: str, arguments: list[tuple[Any, ...]]) -> list[Any]:
    from lm_eval.api.instance import Instance

    return [Instance(kind, {}, pair, i) for i, pair in enumerate(arguments)]


@pytest.fixture
def both(engine: Maker, theirs: Any, tiny_folder: Path) -> tuple[Any, Any]:
    """Our language model of lm-eval's, configured and verified; and its own of the same weights."""
    from lm_eval.models.huggingface import HFLM
    from transformers import PreTrainedTokenizerFast

    from selfspec.quality.lm import EngineLM

    tokenizer = PreTrainedTokenizerFast.from_pretrained(tiny_folder)
    tokenizer.pad_token_id = 0
    return EngineLM(engine("draft=layerskip"), plain=False), HFLM(theirs, tokenizer=tokenizer, batch_size=1)


def words(count: int, seed: int) -> str:
    generator = torch.Generator().manual_seed(seed)
    return " ".join(WORDS[i] for i in torch.randint(len(WORDS), (count,), generator=generator).tolist())


@pytest.mark.filterwarnings("ignore")  # of theirs
def test_we_answer_lm_eval_as_its_own_hf_model_does(both: tuple[Any, Any]) -> None:
    ours, hf = both
    pairs = [(words(4 + i // 4, i // 4), " " + words(1 + i % 5, 100 + i)) for i in range(46)]
    pairs += [("", words(3, 7)), ("a model ", "drafts"), (words(505, 8), " " + words(12, 9)), (words(3, 1), " a")]
    asked = instances("loglikelihood", pairs)
    mine, hfs = ours.loglikelihood(asked, disable_tqdm=True), hf.loglikelihood(asked, disable_tqdm=True)
    assert [m[0] for m in mine] == pytest.approx([h[0] for h in hfs], abs=1e-4)
    assert [m[1] for m in mine] == [h[1] for h in hfs]

    long = instances("loglikelihood_rolling", [(words(n, n),) for n in (1, 30, 512, 700)])
    assert ours.loglikelihood_rolling(long) == pytest.approx(
        hf.loglikelihood_rolling(long, disable_tqdm=True), abs=1e-2
    )

    settings = {"until": ["w4"], "max_gen_toks": 24, "do_sample": False}
    texts = instances("generate_until", [(words(5, i), settings) for i in range(6)])
    said = ours.generate_until(texts)
    assert said == hf.generate_until(texts, disable_tqdm=True) and any("w" in text for text in said)


@pytest.mark.real
@pytest.mark.filterwarnings("ignore")
def test_log_likelihoods_of_the_real_model_are_lm_evals() -> None:
    """Fifty choices of ARC-easy, in float32, verified in passes of K + 1 tokens after the first exit layers."""
    from lm_eval.models.huggingface import HFLM
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from selfspec.data import assets
    from selfspec.quality import tasks
    from selfspec.quality.lm import EngineLM

    made = TorchEngine(planned("draft=layerskip", "hardware=cpu_fp32"))
    data = made.plan.quality.data["arc_easy"]
    task = tasks._load("arc_easy", assets.fetch(data.source, data.sha256))
    task.set_config(key="num_fewshot", value=0)
    task.set_fewshot_seed(1234)
    task.build_all_requests(limit=40, rank=0, world_size=1)
    asked = sorted(task.instances, key=lambda one: len(one.args[0]))[:50]
    hf = HFLM(
        AutoModelForCausalLM.from_pretrained(made.weights.folder, dtype=torch.float32),
        tokenizer=AutoTokenizer.from_pretrained(made.weights.folder),
        batch_size=1,
    )
    theirs = hf.loglikelihood(asked, disable_tqdm=True)
    for plain in (True, False):
        ours = EngineLM(made, plain).loglikelihood(asked, disable_tqdm=True)
        assert [o[0] for o in ours] == pytest.approx([t[0] for t in theirs], rel=1e-5, abs=1e-3)
        assert [o[1] for o in ours] == [t[1] for t in theirs]
