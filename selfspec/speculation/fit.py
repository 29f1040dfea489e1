"""What fitting a draft is made of: traces of the model's own answers, ridge regression, SGD, and agreement.

With X the features (states of unit RMS, a constant) and Y the normed final state to be predicted, the map is
B = argmin |Y - X B|^2 + lambda |B|^2, that is (X'X + lambda I)^-1 X'Y, lambda in units of the mean diagonal
of X'X. The low-rank form is a fitted scale for each of the first coordinates, which late exits need most, and
reduced-rank regression (Izenman 1975) of what that leaves: B V V', V the leading eigenvectors of
B'(X'X + lambda I) B, the best map of that rank under the same loss (Mukherjee and Zhu 2011).
All in float32 on the CPU, the solution itself in float64.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar

from selfspec.lazy import F, torch
from selfspec.model.base import Model
from selfspec.model.tree import Tree

if TYPE_CHECKING:
    from torch import Tensor

    from selfspec.speculation.readout import Readout

AHEAD = 5
"""How many positions ahead agreement is measured, unless a draft looks less far."""

T = TypeVar("T")

_CALIBRATED, _HOTTEST, _HALVINGS = 2048, 8.0, 12
"""Tokens that a temperature is fitted on, its bounds, and steps of bisection."""
_BLOCK = 4096
_SGD_BATCH, _SGD_RATE = 256, 1e-3


@dataclass(frozen=True, slots=True)
class Trace:
    """One pass of the model over a prompt and its own answer, n tokens in all; states in the model's dtype.

    Attributes:
        tokens: int64 ``[n]``.
        final: ``[n, D]``, the normed final states: the one at i gives token i + 1.
        exit: ``[n, D]``, the residual stream after the exit layer; ``None`` where the draft has none.
        first: the first position that predicts a token of the answer (>= 1); the last one is n - 2.
    """

    tokens: Tensor
    final: Tensor
    exit: Tensor | None
    first: int

    @property
    def at(self) -> Tensor:
        """int64 ``[m]``, the positions that predict the answer's m tokens."""
        return torch.arange(self.first, len(self.tokens) - 1)

    def answer(self) -> Trace:
        """Its end alone, from the position before those on: all that is read of a position by itself."""
        start = self.first - 1
        exit = None if self.exit is None else self.exit[start:].clone()
        return Trace(self.tokens[start:], self.final[start:], exit, 1)


def trace(model: Model, prompt: Sequence[int], answer: Sequence[int], exit_layer: int | None) -> Trace:
    """The states of one (prompt, answer) pair; the prompt has at least two tokens."""
    seen = traces(model, prompt, answer, [exit_layer or 0])[exit_layer or 0]
    return seen if exit_layer else replace(seen, exit=None)


def traces(model: Model, prompt: Sequence[int], answer: Sequence[int], exits: Sequence[int]) -> dict[int, Trace]:
    """The same after each of some exit layers, in order, from one pass: they share their tokens and final states."""
    assert len(prompt) >= 2, "the state before the first one asked for must exist"
    tokens, cpu = [*prompt, *answer], torch.device("cpu")
    cache = model.new_cache(len(tokens))
    at = cache.place([Tree.chain(tokens)], row=cache.admit())
    hidden, left = model.embed(tokens, at), 0
    seen: dict[int, Tensor] = {}
    for layer in exits:
        hidden, left = model.run(hidden, cache, at, left, layer), layer
        seen[layer] = hidden.to(cpu)
    final = model.norm(model.run(hidden, cache, at, left, model.shape.layers)).to(cpu)
    said = torch.tensor(tokens)
    return {layer: Trace(said, final, exit, len(prompt) - 1) for layer, exit in seen.items()}


def unread(prompt: Sequence[int], answer: Sequence[int]) -> Trace:
    """The tokens of a pair and no states, for what is fitted to tokens alone."""
    tokens = torch.tensor([*prompt, *answer])
    return Trace(tokens, torch.empty(len(tokens), 0), None, len(prompt) - 1)


def split(sequences: Sequence[T]) -> tuple[list[T], list[T]]:
    """Sequences to fit on, and every fifth held out."""
    return [one for i, one in enumerate(sequences) if i % 5 != 4], list(sequences[4::5])


def vocabulary(model: Model, traces: Sequence[Trace], size: int | None) -> dict[str, Tensor]:
    """The draft's vocabulary as a head's tensor ``ids``, int64 ``[V]``; nothing where it has the model's.

    The most frequent tokens of the answers; among those as frequent, the lowest ids (early merges of a BPE).
    """
    if size is None:
        return {}
    counts = torch.bincount(torch.cat([trace.tokens[trace.at + 1] for trace in traces]), minlength=model.shape.vocab)
    # `clone`: a slice would keep the order of the whole vocabulary in memory.
    return {"ids": counts.sort(descending=True, stable=True).indices[:size].clone()}


Guess: TypeAlias = "Callable[[Trace, Tensor, int, Tensor], tuple[Tensor, Tensor]]"
"""One step of a draft on m starts at once: (trace, int64 ``[m]`` positions of the last token drafted, step >= 0,
states ``[m, D]`` of the step before) -> (the tokens drafted next ``[m]``, states to carry on with)."""


def agreement(traces: Sequence[Trace], guess: Guess, ahead: int = AHEAD) -> list[float]:
    """For each drafted position, the share that is the model's own token among those whose earlier ones all were.

    So 1 + a_1 + a_1 a_2 + ... is the tokens a cycle of a chain emits. A draft starts with the normed final
    state that gave the verified token, at every position of the answers.
    """
    right, asked = [0] * ahead, [0] * ahead
    for trace in traces:
        at = trace.at
        states = trace.final[at - 1]
        for step in range(ahead):
            inside = at < len(trace.tokens) - 1
            at, states = at[inside], states[inside]
            if not len(at):
                break
            tokens, states = guess(trace, at, step, states)
            hit = tokens.cpu() == trace.tokens[at + 1]
            asked[step] += len(at)
            right[step] += int(hit.sum())
            at, states = at[hit] + 1, states[hit]
    return [r / a for r, a in zip(right, asked, strict=True) if a]


def facts(
    train: Sequence[Trace], heldout: Sequence[Trace], tensors: dict[str, Tensor], agreement: list[float]
) -> dict[str, Any]:
    """What every fitted head says of itself: its size, its data, and its held-out agreement by drafted position."""
    return {
        "agreement": agreement[0],
        "agreement_by_position": agreement,
        "train_tokens": sum(len(trace.at) for trace in train),
        "heldout_tokens": sum(len(trace.at) for trace in heldout),
        "parameters": sum(t.numel() for t in tensors.values() if t.is_floating_point()),
    }


def temperature(readout: Readout, parts: Iterable[tuple[Tensor, Tensor]]) -> dict[str, float]:
    """The fact ``temperature``: what logits are to be divided by so that their probabilities come true.

    It minimises the negative log-likelihood of tokens (Guo et al., 1706.04599), which is convex in its inverse.

    Args:
        parts: estimated states ``[m, D]``, and the tokens ``[m]`` that they should give.
    """
    logits, found = [], []
    for states, tokens in parts:
        wanted = readout.indices(tokens).to(states.device)
        known = wanted >= 0
        logits.append(readout(states[known]).float())
        found.append(wanted[known])
        if sum(map(len, found)) >= _CALIBRATED:
            break
    x, wanted = torch.cat(logits), torch.cat(found)[:, None]
    low, high = 1 / _HOTTEST, _HOTTEST
    for _ in range(_HALVINGS if len(wanted) else 0):
        middle = (low * high) ** 0.5
        p = (x / middle).softmax(-1)
        # The derivative by 1/T: what logits of the right tokens lack to the mean under the distribution.
        too_cold = bool(((p * x).sum(-1, keepdim=True) - x.gather(1, wanted)).sum() > 0)
        low, high = (middle, high) if too_cold else (low, middle)
    return {"temperature": round((low * high) ** 0.5, 3)}


def refine(
    tensors: dict[str, Tensor],
    measure: Callable[[dict[str, Tensor]], list[float]],
    descend: Callable[[dict[str, Tensor]], dict[str, Tensor]] | None,
) -> tuple[dict[str, Tensor], list[float], dict[str, float]]:
    """A closed-form solution, trained further by ``descend`` where there is one.

    Returns:
        The tensors, their held-out agreement by drafted position, and, where they were trained, what that added
        to the first of those (``sgd_gain``).
    """
    closed_form = measure(tensors)
    if descend is None:
        return tensors, closed_form, {}
    trained = descend(tensors)
    by_position = measure(trained)
    return trained, by_position, {"sgd_gain": by_position[0] - closed_form[0]}


def ridge(parts: Iterable[tuple[Tensor, Tensor]], strength: float, rank: int | None = None) -> dict[str, Tensor]:
    """The solution from parts of X ``[n, P]`` and Y ``[n, D]``, for :func:`~selfspec.speculation.head.linear`.

    Args:
        strength: lambda, in units of the mean diagonal of X'X.
        rank: of the low-rank form; ``None``: the affine one.
    """
    gram, cross = _moments(parts)
    penalty = strength * gram.diagonal().mean()
    if rank is None:
        solution = _solve(gram, cross, penalty)
        return {"weight": solution[:-1].T.float().contiguous(), "bias": solution[-1].float()}
    size = cross.shape[1]
    # The first D features are the exit state: feature i and output i are the same coordinate.
    scale = cross.diagonal() / gram.diagonal()[:size]
    solution = _solve(gram, cross - gram[:, :size] * scale, penalty)
    weight, bias = solution[:-1].T, solution[-1]
    # The last feature is the constant: its row of the moments holds the sums, and its own entry the count.
    mean = gram[-1, :-1] / gram[-1, -1]
    centred = gram[:-1, :-1] - gram[-1, -1] * torch.outer(mean, mean)
    penalised = centred + penalty * torch.eye(len(centred), dtype=gram.dtype)
    top = torch.linalg.eigh(weight @ penalised @ weight.T).eigenvectors[:, -rank:]  # [D, r]
    down = top.T @ weight
    bias = bias + weight @ mean - top @ (down @ mean)  # the fit still goes through the means
    tensors = {"scale": scale, "up": top, "down": down, "bias": bias}
    return {name: t.float().contiguous() for name, t in tensors.items()}


def _solve(gram: Tensor, cross: Tensor, penalty: Tensor) -> Tensor:
    """Ridge regression from moments: ``[P + 1, D]``, the last row the bias."""
    eye = torch.eye(len(gram), dtype=gram.dtype)
    solution: Tensor = torch.linalg.solve(gram + penalty * eye, cross)
    return solution


def _moments(parts: Iterable[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """X'X ``[P + 1, P + 1]`` and X'Y ``[P + 1, D]``, blocks in float32, their sum in float64."""
    gram: Tensor | float = 0.0
    cross: Tensor | float = 0.0
    for block in _blocks(parts):
        x = F.pad(torch.cat([x for x, _ in block]).float(), (0, 1), value=1.0)
        # float32 is exact enough within a block; over all blocks it would lose what one more of them adds.
        gram = gram + (x.T @ x).double()
        cross = cross + (x.T @ torch.cat([y for _, y in block]).float()).double()
    assert isinstance(gram, torch.Tensor) and isinstance(cross, torch.Tensor), "at least one part"
    return gram, cross


def _blocks(parts: Iterable[tuple[Tensor, Tensor]]) -> Iterator[list[tuple[Tensor, Tensor]]]:
    """As many parts at a time as make a block: adding up in float64 costs more than the products of a few rows."""
    block: list[tuple[Tensor, Tensor]] = []
    rows = 0
    for part in parts:
        block.append(part)
        rows += len(part[0])
        if rows >= _BLOCK:
            yield block
            block, rows = [], 0
    if block:
        yield block


def descend(
    tensors: dict[str, Tensor],
    frozen: Sequence[Tensor],
    loss: Callable[..., Tensor],
    examples: int,
    epochs: int,
    seed: int,
    rate: float = _SGD_RATE,
    batch: int = _SGD_BATCH,
) -> dict[str, Tensor]:
    """Minimises a loss by AdamW with a cosine schedule, from ``tensors`` on.

    Args:
        frozen: what else the loss needs; ``loss(tensors, rows, *frozen)`` is the mean loss of the examples
            that int64 ``rows`` names.
    """
    with torch.inference_mode(False), torch.enable_grad():
        learned = {name: t.clone().requires_grad_() for name, t in tensors.items()}
        frozen = [t.clone() for t in frozen]  # a tensor made in inference mode cannot take part in autograd
        order = torch.Generator().manual_seed(seed)
        optimiser = torch.optim.AdamW(learned.values(), lr=rate, weight_decay=0.0)
        steps = epochs * -(-examples // batch)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, steps)
        for _ in range(epochs):
            for rows in torch.split(torch.randperm(examples, generator=order), batch):
                optimiser.zero_grad()
                loss(learned, rows, *frozen).backward()  # type: ignore[no-untyped-call]
                optimiser.step()
                schedule.step()
    return {name: t.detach() for name, t in learned.items()}


def cross_entropy(state: Tensor, weight: Tensor, wanted: Tensor) -> Tensor:
    """Mean over estimated states ``[n, D]``, read out through ``weight`` ``[V, D]``; nothing for those that want -1."""
    logits = F.linear(state.to(weight.dtype), weight).float()
    return F.cross_entropy(logits, wanted, ignore_index=-1, reduction="sum") / len(wanted)
