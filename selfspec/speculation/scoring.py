"""How likely the model finds given text, and what every exit layer would have drafted for it.

Text is scored under whatever decides in a configuration: the whole model, or a truncated one and its exit head.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from selfspec.errors import StageError
from selfspec.model.base import Model
from selfspec.model.cache import KVCache
from selfspec.model.tree import Tree
from selfspec.speculation import sampling
from selfspec.speculation.decode import Target
from selfspec.speculation.draft.layerskip import EarlyExit
from selfspec.speculation.gate.entropy import entropy
from selfspec.speculation.gate.maxp import max_prob
from selfspec.speculation.gate.varH import var_entropy
from selfspec.speculation.head import RawExit
from selfspec.speculation.readout import Readout
from selfspec.types import Score, Signals

EXITS = 7
"""Exit layers that are looked at where none are named: about so many, evenly spaced."""


def score(
    target: Target, context: Sequence[int], continuations: Sequence[Sequence[int]], step: int | None = None
) -> list[Score]:
    """Each continuation after the same context, which is read once.

    Args:
        context: at least one token.
        continuations: each of at least one token.
        step: as many tokens in a pass, as verification has them; ``None``: all in one.
    """
    cache = target.model.new_cache(len(context) + max(map(len, continuations)))
    row = cache.admit()
    last = _prefill(target, context, cache, row)[-1:]
    scores = []
    for tokens in continuations:
        cache.truncate(row, len(context))
        width = step or len(tokens)
        passes = [tokens[at : min(at + width, len(tokens) - 1)] for at in range(0, len(tokens) - 1, width)]
        states = torch.cat([last, *(_prefill(target, part, cache, row) for part in passes)])
        scores.append(_judge(target.model.logits(states), tokens))
    return scores


def _prefill(target: Target, tokens: Sequence[int], cache: KVCache, row: int) -> Tensor:
    """The target's normed final states ``[N, D]`` of tokens that follow what the row holds, and are held from now."""
    at = cache.place([Tree.chain(tokens)], row=row)
    states = target.run(target.model.embed(tokens, at), cache, at, 0)
    cache.commit(row, range(len(tokens)))
    return states


def _judge(logits: Tensor, tokens: Sequence[int]) -> Score:
    """Logits ``[N, vocab]``, each row of the token that comes next.

    Raises:
        StageError: a token's log-probability is NaN: so is its row.
    """
    wanted = torch.tensor(tokens, device=logits.device)[:, None]
    logprobs = logits.float().log_softmax(-1).gather(1, wanted)[:, 0]
    if bool(logprobs.isnan().any()):
        raise StageError(sampling.NOT_FINITE)
    greedy = bool((logits.max(-1, keepdim=True).indices == wanted).all())
    return Score(tuple(logprobs.tolist()), greedy)


def exits(layers: int, also: int | None) -> list[int]:
    """About :data:`EXITS` exit layers of a model, and the draft's own."""
    step = max(1, layers // EXITS)
    return sorted({*range(step, layers, step), *([also] if also else [])})


def probe(
    model: Model,
    prompt: Sequence[int],
    answer: Sequence[int],
    exits: Sequence[int],
    fitted: EarlyExit | None,
    name: str,
) -> list[Signals]:
    """What every exit would draft after each token of the answer but the last, from one pass over all of it.

    So this is the first draft token of a cycle: a draft that reads the state before it reads the target's own.

    Args:
        answer: of at least two tokens, the first of which nothing drafts (it comes with the prompt's pass).
        exits: the layers that the model's own norm and head read.
        fitted: a draft whose head is looked at too, at its own layer, as ``name``.
    """
    tokens = [*prompt, *answer]
    cache = model.new_cache(len(tokens), extra_layers=fitted.layers if fitted else 0)
    at = cache.place([Tree.chain(tokens)], row=cache.admit())
    hidden, states, done = model.embed(tokens, at), dict[int, Tensor](), 0
    for layer in sorted({*exits, *([fitted.exit_layer] if fitted else [])}):
        hidden = states[layer] = model.run(hidden, cache, at, done, layer)
        done = layer
    drafted = slice(len(prompt), len(tokens) - 1)
    emitted = torch.tensor(answer[1:], device=hidden.device)
    raw, whole = RawExit(model), Readout(model)
    found = [
        _signals(layer, "raw", whole, raw(states[layer][drafted], states[layer][drafted]), emitted) for layer in exits
    ]
    if fitted is not None:
        final = model.norm(model.run(hidden, cache, at, done, model.shape.layers))
        before = torch.cat((final[:1], final[:-1]))  # nothing is before the first token, and nothing drafts there
        estimates = fitted.estimate(states[fitted.exit_layer], before, cache, at)
        found.append(_signals(fitted.exit_layer, name, fitted.readout, estimates[drafted], emitted))
    return found


def _signals(layer: int, head: str, readout: Readout, states: Tensor, emitted: Tensor) -> Signals:
    logits = readout(states)
    largest, entropies, variances = (tuple(f(logits).tolist()) for f in (max_prob, entropy, var_entropy))
    accepted = readout.likeliest(logits)[:, 0] == emitted
    return Signals(layer, head, largest, entropies, variances, tuple(accepted.tolist()))
