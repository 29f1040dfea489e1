"""Every family: greedy tokens are those of transformers' ``generate`` in float32, however they are drafted."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import zoo

from selfspec.axes import DRAFT
from selfspec.engine.torch.session import Scheduler
from selfspec.errors import ConfigError
from selfspec.model import hf
from selfspec.model.base import Layers, Model
from selfspec.speculation import fit
from selfspec.speculation.controller.base import Controller
from selfspec.speculation.decode import Speculation, Target
from selfspec.speculation.draft.base import Draft
from selfspec.speculation.gate.base import Gate
from selfspec.speculation.head import HeadForm
from selfspec.speculation.policy.longest_prefix import LongestPrefix
from selfspec.types import Request

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("inference")]

NEW, EXIT = 16, 2
LENGTHS = (1, 5, 14, 31)


def prompts() -> list[tuple[int, ...]]:
    """The longest repeats itself, so that there is something to look up."""
    random = torch.Generator().manual_seed(2)
    made = [torch.randint(2, zoo.VOCAB, (n,), generator=random).tolist() for n in LENGTHS]
    made[-1][20:30] = made[-1][:10]
    return [tuple(prompt) for prompt in made]


PROMPTS = prompts()


def decode(model: Model, draft: Draft, rows: int) -> list[tuple[int, ...]]:
    """All prompts, ``rows`` at once."""
    cache = model.new_cache(max(LENGTHS) + NEW + draft.nodes(4), rows=rows)
    target = Target(model, model.shape.layers, model.norm)
    speculation = Speculation(target, draft, Gate(), Controller(0 if type(draft) is Draft else 4), LongestPrefix())
    done = Scheduler(speculation, cache).run([Request(prompt, NEW, ignore_eos=True) for prompt in PROMPTS])
    return [completion.tokens for completion in done]


def drafts(model: Model, answers: list[tuple[int, ...]]) -> Iterator[tuple[str, Draft]]:
    """None, an early exit read by the model's own head and by a fitted one, and a lookup."""
    yield "plain", Draft(model)
    yield "layerskip", DRAFT.new("layerskip", exit_layer=EXIT).make(model, None)
    yield "ngram", DRAFT.new("ngram", max_match=4, min_match=1).make(model, None)
    lsq = DRAFT.new("lsq", exit_layer=EXIT, form=HeadForm.affine, ridge=1e-3)
    traces = [fit.trace(model, *pair, EXIT) for pair in zip(PROMPTS[1:], answers[1:], strict=True)]
    with torch.inference_mode(False):
        head = lsq.fit(model, traces, traces, 0)
    yield "lsq", lsq.make(model, head)


@pytest.mark.parametrize(
    "name", [name if name in zoo.DAILY else pytest.param(name, marks=pytest.mark.nightly) for name in zoo.ZOO]
)
def test_tokens_are_those_of_generate(name: str, tmp_path: Path) -> None:
    theirs = zoo.make(name, tmp_path)
    eos, theirs.generation_config.eos_token_id = theirs.generation_config.eos_token_id, None
    wanted = []
    for prompt in PROMPTS:
        ids = torch.tensor([prompt])
        out = theirs.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW, do_sample=False)
        wanted.append(tuple(out[0, len(prompt) :].tolist()))
    assert len({token for answer in wanted for token in answer}) > 4, "else a mistake could hide"
    model = hf.load(tmp_path, torch.device("cpu"), torch.float32, Layers.auto)
    assert model.shape.eos == {eos}
    for label, draft in drafts(model, wanted):
        assert decode(model, draft, 1) == wanted, label
        if getattr(model, "batches", True):
            assert decode(model, draft, 3) == wanted, f"{label}, a batch"
        else:
            with pytest.raises(ConfigError, match=r"^engine\.max_batch: .* must be 1$"):
                decode(model, draft, 3)


@pytest.mark.nightly
def test_there_are_sixty() -> None:
    assert len(zoo.ZOO) >= 60 and set(zoo.DAILY) <= set(zoo.ZOO)
