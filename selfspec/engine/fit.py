"""Fitting an exit head: ridge regression from the exit state to the final one, and an optional SGD pass.

With X the features (unit-RMS exit state, perhaps the previous final state, a constant) and Y the normed
final state, the head is B = argmin |Y - X B|^2 + lambda |B|^2, that is (X'X + lambda I)^-1 X'Y, lambda in
units of the mean diagonal of X'X. The low-rank form is a fitted scale for each coordinate of the exit state,
which late exits need most, and reduced-rank regression (Izenman 1975) of what that leaves: B V V', V the
leading eigenvectors of B'(X'X + lambda I) B, the best map of that rank under the same loss (Mukherjee and
Zhu 2011).
All in float32 on the CPU, the solution itself in float64.
"""

import time
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from selfspec.config import Draft as DraftConfig
from selfspec.config import HeadForm
from selfspec.engine.head import ExitHead, Head, RawExit, features
from selfspec.engine.llama import Llama

_BATCH = 1024
_SGD_BATCH, _SGD_RATE = 256, 1e-3


@dataclass(frozen=True, slots=True)
class States:
    """Cached states of n token positions, in the model's dtype, each ``[n, D]``.

    Attributes:
        exit: the residual stream after the exit layer.
        previous: the normed final state of the position before.
        final: the normed final state.
    """

    exit: Tensor
    previous: Tensor
    final: Tensor

    def __len__(self) -> int:
        return len(self.exit)


def collect(model: Llama, sequence: tuple[int, ...], answer_start: int, exit_layer: int) -> States:
    """The states of every position that predicts an answer token, from one pass over the sequence.

    Args:
        sequence: prompt (at least two tokens) and answer.
        answer_start: index of the answer's first token.
    """
    assert answer_start >= 2, "the state before the first one asked for must exist"
    cache = model.new_cache(len(sequence))
    hidden = model.run(model.embed(sequence), cache, 0, 0, exit_layer)
    final = model.norm(model.run(hidden, cache, 0, exit_layer, model.shape.layers))
    first, last = answer_start - 1, len(sequence) - 1
    return States(hidden[first:last].clone(), final[first - 1 : last - 1].clone(), final[first:last].clone())


def join(parts: list[States]) -> States:
    """Several sequences' states as one."""
    return States(*(torch.cat([getattr(p, name) for p in parts]) for name in ("exit", "previous", "final")))


def split(parts: list[States]) -> tuple[States, States]:
    """Sequences to fit on, and every fifth held out."""
    return join([part for i, part in enumerate(parts) if i % 5 != 4]), join(parts[4::5])


def fit_head(model: Llama, train: States, heldout: States, draft: DraftConfig, seed: int) -> Head:
    """Fits a head and measures it.

    Returns:
        The head in float32 on the CPU; its facts hold the held-out top-1 agreement with the full model
        (``agreement``), that of the raw exit (``raw_agreement``), and what SGD added (``sgd_gain``).
    """
    begin = time.perf_counter()
    facts: dict[str, Any] = {"previous": draft.previous, "form": draft.form.name if draft.form else None}
    head = Head(ridge(train, draft), facts)
    facts["solve_s"] = round(time.perf_counter() - begin, 3)
    facts["agreement"] = agreement(model, head.to(model.dtype, model.device), heldout)
    facts["raw_agreement"] = agreement(model, RawExit(model), heldout)
    if draft.sgd_epochs:
        closed_form = facts["agreement"]
        head = _sgd(model, head, train, draft.sgd_epochs, seed)
        facts["agreement"] = agreement(model, head.to(model.dtype, model.device), heldout)
        facts["sgd_gain"] = facts["agreement"] - closed_form
    facts["train_tokens"], facts["heldout_tokens"] = len(train), len(heldout)
    facts["parameters"] = sum(t.numel() for t in head.tensors.values())
    return head


def agreement(model: Llama, head: ExitHead, states: States) -> float:
    """Share of positions whose argmax through the exit equals the full model's (top-1)."""
    same = 0
    for i in range(0, len(states), _BATCH):
        part = slice(i, i + _BATCH)
        guess = model.logits(head(states.exit[part], states.previous[part])).argmax(-1)
        same += int((guess == model.logits(states.final[part]).argmax(-1)).sum())
    return same / len(states)


def ridge(states: States, draft: DraftConfig) -> dict[str, Tensor]:
    """The closed-form solution as a head's tensors (see :class:`~selfspec.engine.head.Head`)."""
    gram, cross = _moments(states, draft.previous)
    if draft.form is HeadForm.affine:
        solution = _solve(gram, cross, draft)
        return {"weight": solution[:-1].T.float().contiguous(), "bias": solution[-1].float()}
    assert draft.rank is not None, "checked by the plan"
    size = cross.shape[1]
    scale = cross.diagonal() / gram.diagonal()[:size]
    solution = _solve(gram, cross - gram[:, :size] * scale, draft)
    weight, bias = solution[:-1].T, solution[-1]
    mean = gram[-1, :-1] / gram[-1, -1]
    centred = gram[:-1, :-1] - gram[-1, -1] * torch.outer(mean, mean)
    penalised = centred + _strength(gram, draft) * torch.eye(len(centred), dtype=gram.dtype)
    top = torch.linalg.eigh(weight @ penalised @ weight.T).eigenvectors[:, -draft.rank :]  # [D, r]
    down = top.T @ weight
    bias = bias + weight @ mean - top @ (down @ mean)  # the fit still goes through the means
    tensors = {"scale": scale, "up": top, "down": down, "bias": bias}
    return {name: t.float().contiguous() for name, t in tensors.items()}


def _solve(gram: Tensor, cross: Tensor, draft: DraftConfig) -> Tensor:
    """Ridge regression from moments: ``[P + 1, D]``, the last row the bias."""
    eye = torch.eye(len(gram), dtype=gram.dtype)
    solution: Tensor = torch.linalg.solve(gram + _strength(gram, draft) * eye, cross)
    return solution


def _strength(gram: Tensor, draft: DraftConfig) -> Tensor:
    assert draft.ridge is not None, "checked by the plan"
    return draft.ridge * gram.diagonal().mean()


def _moments(states: States, previous: bool) -> tuple[Tensor, Tensor]:
    """X'X ``[P + 1, P + 1]`` and X'Y ``[P + 1, D]``, summed in float32 blocks, returned in float64."""
    gram: Tensor | float = 0.0
    cross: Tensor | float = 0.0
    for i in range(0, len(states), 8 * _BATCH):
        part = slice(i, i + 8 * _BATCH)
        x = features(states.exit[part].float().cpu(), states.previous[part].float().cpu() if previous else None)
        x = F.pad(x, (0, 1), value=1.0)
        gram = gram + (x.T @ x).double()
        cross = cross + (x.T @ states.final[part].float().cpu()).double()
    assert isinstance(gram, Tensor) and isinstance(cross, Tensor), "at least one state"
    return gram, cross


def _sgd(model: Llama, head: Head, states: States, epochs: int, seed: int) -> Head:
    """Minimises the cross-entropy to the full model's own argmax, from the closed-form solution on."""
    with torch.inference_mode(False), torch.enable_grad():
        tensors = {name: t.clone().requires_grad_() for name, t in head.tensors.items()}
        learned = Head(tensors, head.facts)
        lm_head = model.lm_head.clone()  # a tensor made in inference mode cannot take part in autograd
        order = torch.Generator().manual_seed(seed)
        steps = epochs * -(-len(states) // _SGD_BATCH)
        optimiser = torch.optim.AdamW(tensors.values(), lr=_SGD_RATE, weight_decay=0.0)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, steps)
        for _ in range(epochs):
            for rows in torch.split(torch.randperm(len(states), generator=order), _SGD_BATCH):
                x = features(
                    states.exit[rows].float().cpu(), states.previous[rows].float().cpu() if head.previous else None
                )
                target = F.linear(states.final[rows], lm_head).argmax(-1)
                guess = learned.map(x.clone()).to(lm_head.device, lm_head.dtype)
                loss = F.cross_entropy(F.linear(guess, lm_head).float(), target)
                optimiser.zero_grad()
                loss.backward()  # type: ignore[no-untyped-call]
                optimiser.step()
                schedule.step()
    return Head({name: t.detach() for name, t in tensors.items()}, head.facts)
