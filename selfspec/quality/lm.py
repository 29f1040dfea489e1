"""An engine as a language model of lm-eval's, so that its tasks run through our decoder as it is configured."""

from collections.abc import Sequence
from itertools import groupby
from typing import Any

from lm_eval import utils
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import normalize_gen_kwargs, postprocess_generated_text

from selfspec.engine.base import Scores
from selfspec.quality.generation import sampling
from selfspec.types import Request

Tokens = Sequence[int]


class EngineLM(TemplateLM):  # type: ignore[misc]  # lm-eval has no types
    """Scores and generates with an engine, plainly or as its plan says; tokenises as lm-eval's own ``hf`` does."""

    def __init__(self, engine: Scores, plain: bool) -> None:
        super().__init__()
        self.engine, self.plain = engine, plain
        self.prefix, self.positions = engine.tokenizer.prefix(), engine.limits().positions

    @property
    def eot_token_id(self) -> int:
        """What stands before a text without a context."""
        return self.prefix.token

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Text -> token ids; special tokens as the model's tokenizer has them, unless told."""
        begins = self.prefix.always if add_special_tokens is None else add_special_tokens
        return [self.prefix.token] * begins + self.engine.tokenizer.encode_part(string)

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, Tokens, Tokens]], **kwargs: Any
    ) -> list[tuple[float, bool]]:
        """(texts, context, continuation) -> (log-likelihood, whether greedy); choices of one context read it once."""
        pairs = [(tuple(self._fitting(context, len(tokens))), tokens) for _, context, tokens in requests]
        found = []
        for context, group in groupby(pairs, key=lambda pair: pair[0]):
            scores = self.engine.score(context, [tokens for _, tokens in group], plain=self.plain)
            found += [(sum(score.logprobs), score.greedy) for score in scores]
        return found

    def loglikelihood_rolling(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[float]:
        """Of whole texts, in windows of the model's length that do not overlap."""
        found = []
        for (text,) in (request.args for request in requests):
            windows = utils.get_rolling_token_windows(
                self.tok_encode(text), self.prefix.token, self.positions, context_len=1
            )
            parts = [(None, *utils.make_disjoint_window(window)) for window in windows]
            found.append(sum(logprob for logprob, _ in self._loglikelihood_tokens(parts)))
        return found

    def generate_until(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[str]:
        """Decodes to the end, or as many tokens as the task allows, and cuts at its stop sequences."""
        asked, stops = [], []
        for context, settings in (request.args for request in requests):
            wanted = normalize_gen_kwargs(settings)
            tokens = self._fitting(self.tok_encode(context), wanted["max_gen_toks"] + 1)
            asked.append(Request(tuple(tokens), wanted["max_gen_toks"], sampling=sampling(wanted)))
            stops.append(wanted["until"])
        done = self.engine.generate(asked, plain=self.plain)
        texts = [self.engine.tokenizer.decode(completion.tokens) for completion in done]
        return [postprocess_generated_text(text, stop, None) for text, stop in zip(texts, stops, strict=True)]

    def _fitting(self, context: Tokens, room: int) -> Tokens:
        """The end of a context that leaves so much room; of a continuation, the last token is not read."""
        return context[-max(self.positions + 1 - room, 1) :]
