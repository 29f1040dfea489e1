"""The proposer: after each of vLLM's steps, the target's first layers draft what the next step verifies.

One draft step is one token a row, as plain decoding's, through the first layers only. Greedy and sampled requests
are drafted for alike: the draft is the exit's likeliest token, without chance, and vLLM's rejection sampler, given no
draft distribution, takes it for certain. Whatever is drafted, what requests say keeps the target's distribution.
"""

import time
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from selfspec import heads
from selfspec.errors import ConfigError
from selfspec.model.transfer import to_host
from selfspec.speculation.controller.base import Controller
from selfspec.speculation.gate.base import Gate
from selfspec.speculation.head import Head, features, linear
from selfspec.vllm_plugin import hooks, versions
from selfspec.vllm_plugin.layers import FirstLayers, Readout
from selfspec.vllm_plugin.record import Drafted, Record
from selfspec.vllm_plugin.settings import KEY, early, parse
from selfspec.vllm_plugin.slots import Slots


class EarlyExit(hooks.Proposer):
    """vLLM makes one in each worker (``method: custom_class``), gives it the model, and asks it after each step.

    Args:
        vllm_config: vLLM's; our settings are in its ``additional_config``.

    Raises:
        ConfigError: vLLM's version, the settings, or something else that is asked of vLLM will not do.
    """

    def __init__(self, vllm_config: Any) -> None:
        versions.check()
        hooks.attach()
        self.config = vllm_config
        refuse(vllm_config)
        self.most: int = vllm_config.speculative_config.num_speculative_tokens
        ranks = vllm_config.parallel_config.tensor_parallel_size
        self.settings = parse(vllm_config.additional_config.get(KEY), self.most, ranks)
        self.reset()

    def reset(self) -> None:
        """Gate, controller and record as they were before anything was drafted."""
        self.gate: Gate = self.settings.gate.make(self.settings.seed)
        self.controller: Controller = self.settings.controller.make(self.settings.seed)
        self.record = Record()

    def load_model(self, model: nn.Module) -> None:
        """Called when the target has been loaded: takes its first layers, and loads the fitted head.

        Raises:
            ConfigError: the model's family is not known, or has no such layer.
            HeadError: the head's file is missing, corrupt, or of another exit or model.
        """
        ranks = self.config.parallel_config.tensor_parallel_size
        self.layers = FirstLayers(model, self.settings.exit_layer)
        self.tensors, self.previous = self._head()
        self.readout = Readout(model, self.tensors.get("ids"), ranks)
        self._norm: Any = model.model.norm
        self._compile()

    def propose(self, *args: Any, **kwargs: Any) -> list[list[int]]:
        """What vLLM would call if it were not for :func:`hooks.attach`."""
        raise AssertionError("the runner was made before the proposer: this vLLM is not one of those we know")

    @torch.inference_mode()
    def draft(
        self, runner: Any, sampled: Sequence[Sequence[int]], states: Tensor, verified: Any, most: int
    ) -> list[list[int]]:
        """Draft tokens for every row of vLLM's batch; none for one whose prompt is still being read.

        Args:
            runner: vLLM's model runner, its step's tokens taken down.
            sampled: the new tokens of each row.
            states: the target's normed final states of all rows' verified positions, one row after the other.
            verified: vLLM's ``SpecDecodeMetadata`` of the step; ``None`` where nothing was verified.
            most: the most tokens that vLLM will schedule for a row.
        """
        began = time.perf_counter()
        ids = runner.input_batch.req_ids
        counts = [0] * len(ids) if verified is None else verified.num_draft_tokens
        flat = iter(() if verified is None else verified.draft_token_ids.tolist())
        self.record.forget(runner.requests)
        cycles = self.record.judge(ids, sampled, [[*islice(flat, count)] for count in counts], began)
        if cycles:
            self.gate.observe(cycles)
            self.controller.observe(cycles)
        self.gate.begin()

        slots = Slots(runner)
        rows = [row for row, tokens in enumerate(sampled) if tokens]
        asked = {row: self.controller.num_draft_tokens(self.record.history(ids[row]), len(rows)) for row in rows}
        # `k_asked` after the cut: a controller told that it asked for more would take the cut for tokens that fell.
        drafts = {row: Drafted(min(most, k, self._room(runner, slots, row))) for row, k in asked.items()}
        going = [row for row in rows if drafts[row].k_asked > 0]
        if going:
            last = torch.tensor([sampled[row][-1] for row in going])
            # The last token's position: it is sampled and not in the cache, so the draft begins by running it.
            at = torch.tensor([int(runner.input_batch.num_tokens_no_spec[row]) - 1 for row in going])
            self._chains(slots, going, drafts, last, at, self._known(states, sampled, counts, going))
        self.record.drafted({ids[row]: draft for row, draft in drafts.items()}, began, time.perf_counter())
        return [drafts[row].tokens if row in drafts else [] for row in range(len(ids))]

    def _chains(
        self,
        slots: Slots,
        going: list[int],
        drafts: dict[int, Drafted],
        tokens: Tensor,
        positions: Tensor,
        states: Tensor,
    ) -> None:
        """Drafts for rows ``going`` until each has what it was asked for or the gate doubts its next token."""
        device = slots.device
        tokens, positions, furthest = tokens.to(device), positions.to(device), int(positions.max())
        slots.look(torch.tensor(going, device=device))
        while going:
            states = self._estimate(self._run(slots, tokens, positions, furthest), states)
            logits = self.readout(states)
            tokens = self.readout.likeliest(logits)
            listed, signals = to_host(tokens, self.gate.signal(logits))
            self.record.totals.update(steps=1, tokens=len(going))
            stay = list[int]()
            for place, (row, token) in enumerate(zip(going, map(int, listed), strict=True)):
                draft = drafts[row]
                if signals:
                    draft.signals.append(signals[place])
                    if self.gate.stops(signals[place]):
                        continue
                draft.tokens.append(token)
                if len(draft.tokens) < draft.k_asked:
                    stay.append(place)
            if len(stay) < len(going):
                left = torch.tensor(stay, device=device, dtype=torch.int64)
                tokens, positions, states = tokens[left], positions[left], states[left]
                going = [going[place] for place in stay]
                slots.look(torch.tensor(going, device=device, dtype=torch.int64))
            positions = positions + 1
            # A bound kept on the host, too large once rows drop out: asking the device would wait for it.
            furthest += 1

    def _run(self, slots: Slots, tokens: Tensor, positions: Tensor, furthest: int) -> Tensor:
        """One token a row through the first layers, its keys and values where verification will write them."""
        from vllm.forward_context import set_forward_context

        metadata, mapping = slots.step(positions, furthest)
        with set_forward_context(metadata, self.config, num_tokens=len(tokens), slot_mapping=mapping):
            return self.layers(tokens, positions)

    def _estimate(self, hidden: Tensor, previous: Tensor) -> Tensor:
        """Exit states and the previous positions' final states -> estimates of the final ones, all ``[n, D]``."""
        if "bias" not in self.tensors:
            normed: Tensor = self._norm(hidden)
            return normed
        return linear(self.tensors, features(hidden, previous if self.previous else None))

    def _known(
        self, states: Tensor, sampled: Sequence[Sequence[int]], counts: Sequence[int], going: Sequence[int]
    ) -> Tensor:
        """The target's normed final states ``[n, D]`` that gave the last tokens of rows ``going``."""
        if not self.previous:
            return states.new_empty(len(going), 0)
        firsts, first = list[int](), 0
        for count in counts:
            firsts.append(first)
            first += count + 1
        return states[torch.tensor([firsts[row] + len(sampled[row]) - 1 for row in going], device=states.device)]

    def _room(self, runner: Any, slots: Slots, row: int) -> int:
        """How many tokens may be drafted for a row: within its blocks, the model's length and the request's."""
        request = runner.requests[runner.input_batch.req_ids[row]]
        tokens = int(runner.input_batch.num_tokens_no_spec[row])
        asked = request.sampling_params.max_tokens if request.sampling_params else None
        remaining = self.most + 1 if asked is None else asked - len(request.output_token_ids)
        # k tokens are written at tokens - 1 to tokens + k - 2 (the last one is not run); vLLM adds one of its own.
        rooms: tuple[int, ...] = (slots.room(row) - (tokens - 1), runner.max_model_len - tokens, remaining - 1)
        return max(0, min(rooms))

    def _head(self) -> tuple[dict[str, Tensor], bool]:
        """The fitted head's tensors, ready to run, and whether it reads the previous final state."""
        if self.settings.head is None:
            return {}, False
        path = Path(self.settings.head)
        facts = heads.check(path, {"exit_layer": self.settings.exit_layer})
        if facts.get("draft") not in early():
            fitted = f"fitted for draft={facts.get('draft')}"
            raise ConfigError(f"{KEY}.head={path}: {fitted}; inside vLLM run {', '.join(early())}")
        model = self.config.model_config
        head = Head.load(path).to(model.dtype, self.config.device_config.device)
        size = head.tensors["bias"].shape[0] if "bias" in head.tensors else self.layers.size
        if size != self.layers.size:
            raise ConfigError(
                f"{KEY}.head={path}: made for states of {size} numbers; this model's have {self.layers.size}"
            )
        return head.tensors, bool(facts.get("previous"))

    def _compile(self) -> None:
        """Compiles the first layers where vLLM compiles the model, with several rows that stand for any number."""
        from vllm.config import CompilationMode
        from vllm.forward_context import set_forward_context

        compilation = self.config.compilation_config
        if compilation.mode == CompilationMode.NONE:
            return
        self.layers.compile(compilation.inductor_compile_config)
        device = self.config.device_config.device
        # Four: torch compiles sizes 0 and 1 for themselves, and one of them would not stand for all.
        tokens, positions = torch.zeros(4, dtype=torch.int64, device=device), torch.arange(4, device=device)
        for tensor in (tokens, positions):
            torch._dynamo.mark_dynamic(tensor, 0)
        with torch.inference_mode(), set_forward_context(None, self.config, num_tokens=4):
            self.layers(tokens, positions)


def refuse(config: Any) -> None:
    """Refuses what drafting through the target's cache does not go together with.

    Raises:
        ConfigError: naming it.
    """
    parallel = config.parallel_config
    for name in ("pipeline_parallel_size", "decode_context_parallel_size", "prefill_context_parallel_size"):
        if getattr(parallel, name, 1) > 1:
            raise ConfigError(f"{name}={getattr(parallel, name)}: must be 1 for early exit inside vLLM")
    for name, given in (("lora", config.lora_config), ("kv-transfer", config.kv_transfer_config)):
        if given is not None:
            raise ConfigError(f"{name}: early exit inside vLLM does not go together with it")
