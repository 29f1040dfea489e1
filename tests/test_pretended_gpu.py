"""The identity of ``test_lossless.py`` on a pretended GPU, and what a cycle costs there in waits and copies."""

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from pretended import CUDA, PretendedGPU, problem
from test_lossless import BATCHES, DRAFTS, POSITIONS, Bench, unruly
from torch import Tensor

from selfspec.model.cache import KVCache
from selfspec.model.llama import Llama
from selfspec.model.tree import Tree
from selfspec.speculation.decode import Speculation
from selfspec.speculation.draft.eagle import Eagle
from selfspec.speculation.gate.base import Gate
from selfspec.speculation.head import Head
from selfspec.speculation.policy.base import Choice, Policy, Verdict
from selfspec.speculation.policy.longest_prefix import LongestPrefix
from selfspec.speculation.sequence import Seq

pytestmark = [
    pytest.mark.slow,
    pytest.mark.usefixtures("inference"),
    pytest.mark.skipif(bool(problem()), reason=f"no pretended GPU: {problem()}"),
]


class Pretended(Bench):
    """A bench on the pretended GPU; what tokens are to be, and how far gates go, a bench on the CPU says."""

    def __init__(self, cpu: Bench) -> None:
        self.cpu, self.folder, self.shape = cpu, cpu.folder, cpu.shape
        self.model = Llama.load(cpu.folder, CUDA, torch.float32)
        self.model.shape = cpu.model.shape
        # Short ones: every operator goes through Python. One joins the batch when another leaves it.
        self.requests = [replace(request, max_new_tokens=6 + i) for i, request in enumerate(cpu.requests[:4])]
        self.plain, self.threshold = cpu.plain, cpu.threshold  # type: ignore[method-assign]

    def head(self, name: str) -> Head:
        """Fitted here, unless that takes gradients."""
        if DRAFTS[name].get("sgd_epochs", 0):
            return self.cpu.head(name).to(torch.float32, CUDA)
        return super().head(name)


@pytest.fixture(scope="module")
def gpu(inference: None) -> Iterator[PretendedGPU]:
    with PretendedGPU() as made:
        yield made


@pytest.fixture(scope="module")
def bench(gpu: PretendedGPU, tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Pretended:
    return Pretended(Bench(unruly(tiny_folder, tmp_path_factory.mktemp("unruly"), POSITIONS)))


class TestThePretendedGPU:
    """It refuses what a real one refuses, and logs what a real one would wait for."""

    def test_operands_on_two_devices(self, gpu: PretendedGPU) -> None:
        here, there = torch.ones(3), torch.ones(3, device="cuda")
        for wrong in (
            lambda: here + there,
            lambda: torch.cat((here, there)),
            lambda: here[torch.tensor([0], device="cuda")],
            lambda: there.index_copy_(0, torch.tensor([1]), there[:1]),
        ):
            with pytest.raises(RuntimeError, match="on the same device"):
                wrong()
        with pytest.raises(TypeError, match="numpy"):
            there.numpy()
        assert (there + torch.tensor(2.0)).tolist() == [3, 3, 3], "numbers may be anywhere"

    @pytest.mark.parametrize(
        ("do", "wanted"),
        [
            (lambda x: x + 1, []),
            (lambda x: x.view(-1)[1:], []),
            (lambda x: x.tolist(), ["wait"]),
            (lambda x: x[0, 0].item(), ["wait"]),
            (lambda x: x.cpu(), ["wait"]),
            (lambda x: bool(x.any()), ["wait"]),
            (lambda x: x[x > 0], ["wait"]),
            (lambda x: x.nonzero(), ["wait"]),
            (lambda x: x[[1, 0]], ["copy", "wait"]),
            (lambda x: x.new_tensor([1.0]), ["copy", "wait"]),
            (lambda x: torch.ones(2).to(x.device, non_blocking=True), ["copy", "wait"]),
            (lambda x: torch.tensor([1], pin_memory=True).to(x.device, non_blocking=True), ["copy"]),
            (lambda x: torch.cuda.synchronize(), ["wait"]),
        ],
    )
    def test_waits_and_copies(self, gpu: PretendedGPU, do: Callable[[Any], object], wanted: list[str]) -> None:
        x = torch.ones(2, 2, device="cuda")
        gpu.log.clear()
        do(x)
        assert [event.kind for event in gpu.log] == wanted
        assert all(event.line.startswith("tests/test_pretended_gpu.py:") for event in gpu.log)


def tier(gate_name: str, rows: int) -> list[pytest.MarkDecorator]:
    """When a case is run, with every draft: daily or nightly."""
    return [] if (gate_name, rows) == ("none", 3) else [pytest.mark.nightly]


@pytest.mark.parametrize(
    ("name", "gate_name", "rows"),
    [
        pytest.param(name, gate_name, rows, marks=tier(gate_name, rows))
        for name, gate_name, rows in itertools.product(DRAFTS, ("none", "varH"), BATCHES)
    ],
)
def test_tokens_are_those_of_plain_decoding(bench: Pretended, name: str, gate_name: str, rows: int) -> None:
    runs = bench.decode(bench.requests, bench.draft(name), bench.gate(name, gate_name), 3, rows)
    for request, got in zip(bench.requests, runs, strict=True):
        assert (got.tokens, got.finish) == (bench.plain(request).tokens, bench.plain(request).finish)


class Cost(NamedTuple):
    """Of a cycle: passes of the target and the draft, and what there was of each kind of event."""

    passes: int
    waits: int
    copies: int


def costs(
    bench: Pretended,
    gpu: PretendedGPU,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    gate: Gate,
    k: int,
    rows: int,
    policy: Policy | None = None,
) -> list[Cost]:
    """Of every cycle of all requests."""
    draft = bench.draft(name)  # here: fitting decodes, too
    found, passes, real = list[Cost](), 0, Speculation.step

    def counted(method: Callable[..., object]) -> Callable[..., object]:
        def called(*args: object) -> object:
            nonlocal passes
            passes += 1
            return method(*args)

        return called

    def step(self: Speculation, batch: Sequence[Seq], cache: KVCache) -> None:
        nonlocal passes
        passes = 0
        gpu.log.clear()
        real(self, batch, cache)
        kinds = [event.kind for event in gpu.log]
        found.append(Cost(passes, kinds.count("wait"), kinds.count("copy")))

    monkeypatch.setattr(Llama, "run", counted(Llama.run))
    monkeypatch.setattr(Speculation, "step", step)
    if isinstance(draft, Eagle):
        monkeypatch.setattr(draft, "go_on", counted(draft.go_on))
    bench.decode(bench.requests, draft, gate, k, rows, policy)
    return found


def cheap(cost: Cost) -> bool:
    """For every pass, one wait, for its tokens, and two copies: tokens, and where they go."""
    return cost.waits <= cost.passes and cost.copies <= 2 * cost.passes


CYCLES = [("none", "none", 0), ("ngram", "none", 3), ("suffix", "none", 3), ("lsq", "varH", 4), ("eagle", "none", 4)]


@pytest.mark.parametrize("rows", BATCHES)
@pytest.mark.parametrize(("name", "gate_name", "k"), CYCLES)
def test_a_pass_has_one_wait_and_two_copies(
    bench: Pretended, gpu: PretendedGPU, monkeypatch: pytest.MonkeyPatch, name: str, gate_name: str, k: int, rows: int
) -> None:
    found = costs(bench, gpu, monkeypatch, name, bench.gate(name, gate_name), k, rows)
    assert all(map(cheap, found))
    # An early exit also runs the token it proposes last; a lookup has no passes of its own.
    drafting = {"lsq": k + 1, "eagle": k}.get(name, 0)
    assert max(cost.passes for cost in found) == drafting + 1


def test_one_more_wait_is_found(bench: Pretended, gpu: PretendedGPU, monkeypatch: pytest.MonkeyPatch) -> None:
    class Curious(LongestPrefix):
        def __call__(self, trees: Sequence[Tree], logits: Tensor, choices: Sequence[Choice]) -> list[Verdict]:
            assert logits.isfinite().all()
            return super().__call__(trees, logits, choices)

    found = costs(bench, gpu, monkeypatch, "none", bench.gate("none", "none"), 0, 1, Curious())
    assert found and not any(map(cheap, found))
