"""The vllm engine: vLLM (>= 0.32) in this process, measured as our own engine is.

Plain decoding and the configuration are two vLLMs over the same weights in one process, so that they can be decoded
in turn. What vLLM does not have (a tokenizer without text in between, heads, how close two tokens are) a torch engine
of the plan does, which loads the weights again only where it is asked for that.
"""

import os
import sys
import warnings
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from selfspec.engine import factory
from selfspec.engine.base import Fits, Limits, Opens, Scores, Tie, TieJudge, Usage
from selfspec.engine.torch.engine import TorchEngine
from selfspec.engine.vllm import args as vllm_args
from selfspec.engine.vllm import session as vllm_session
from selfspec.engine.vllm.session import VLLMSession
from selfspec.errors import ConfigError, one_line
from selfspec.model.checkpoint import json_object
from selfspec.plan import Plan
from selfspec.serve.config import Order
from selfspec.types import Completion, Request, Score
from selfspec.vllm_plugin import versions

_ROWS = 64
"""Requests at once that vLLM is ready for: those of the fit stage."""
_LOGIT = 16.0
"""The size of a logit that comes into question as the largest."""
_IN_PROCESS = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # it would pin this process's threads for good, torch's too
}


_STARTED: dict[str, Any] = {}
"""The vLLMs of this process, by what was asked of them. One that is let go takes down what all of them share."""


class Judge(TieJudge):
    """Compares by the same weights in float32, whoever runs them.

    Weights that vLLM alone can read here (quantised, or too many for one device) are compared in the dtype they are run
    in; two units in the last place of a logit of common size are then rounding.
    """

    def __init__(self, engine: "VLLMEngine", float32: TieJudge) -> None:
        self._engine, self._float32 = engine, float32

    def compare(self, context: Sequence[int], a: int, b: int) -> Tie:
        """See :meth:`TieJudge.compare <selfspec.engine.base.TieJudge.compare>`."""
        if not self._by_vllm_alone:
            return self._float32.compare(context, a, b)
        dtype = self._engine.weights.dtype
        one, other = self._engine.score(context, [[a], [b]], plain=True)
        rounding = 0.0 if dtype is torch.float32 else 2 * torch.finfo(dtype).eps * _LOGIT
        return Tie(abs(one.logprobs[0] - other.logprobs[0]), rounding)

    @property
    def _by_vllm_alone(self) -> bool:
        engine, folder = self._engine.plan.engine, self._engine.weights.folder
        config = json_object(folder / "config.json")
        alone = engine.get("quantization") or engine.get("tensor_parallel", 1) > 1
        return bool(alone or config.get("quantization_config"))


class VLLMEngine(Opens, Fits, Scores):
    """See the module's docstring."""

    def __init__(self, plan: Plan) -> None:
        """Raises ``ConfigError`` where there is no vLLM, one that is too old, or one that cannot be imported."""
        versions.check_engine()
        versions.check_torchvision()
        self.plan, self._ours = plan, TorchEngine(plan)
        self.weights, self.tokenizer = self._ours.weights, self._ours.tokenizer
        self.ties = Judge(self, self._ours.ties)
        self._head_path: Path | None = None

    @cached_property
    def _plain_core(self) -> Any:
        return self._start({})

    @cached_property
    def _core(self) -> Any:
        """The configuration's; plain decoding's where nothing is drafted."""
        if not self.plan.draft.speculates:
            return self._plain_core
        return self._start(vllm_args.speculation(self.plan, factory.drafter(self.plan), self._head_path))

    def _start(self, more: Mapping[str, Any]) -> Any:
        """A vLLM, or the one of this process that was started so, as if it were new.

        Raises:
            ConfigError: it refuses, in its own words.
        """
        asked = self.arguments(more)
        if (known := _STARTED.get(repr(asked))) is not None:
            vllm_session.Drafting(known).reset()
            return known
        from vllm.v1.engine.llm_engine import LLMEngine

        from selfspec.vllm_plugin.mend import mend

        set_threads = torch.set_num_threads
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # advice to those who develop it
                _mend_llvmlite()
                started = _STARTED.setdefault(repr(asked), LLMEngine.from_engine_args(asked))
            mend()  # the sampler that it has loaded: before that, its module cannot be imported
            return started
        except (ValueError, TypeError, NotImplementedError, ImportError, RuntimeError) as error:
            raise ConfigError(f"engine=vllm: {self.plan.model.name}: {one_line(error)}") from error
        finally:
            torch.set_num_threads = set_threads  # it takes this away, as it may bind threads; the next job wants others

    def arguments(self, more: Mapping[str, Any]) -> Any:
        """``vllm.EngineArgs`` of plain decoding, and ``more``.

        Raises:
            ConfigError: this vLLM is for another device.
        """
        os.environ.update(_IN_PROCESS)
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            from vllm import EngineArgs
            from vllm.platforms import current_platform
        if current_platform.device_type != self.weights.device.type:
            raise ConfigError(
                f"hardware.device={self.plan.hardware.device.name}: this vLLM is built for "
                f"{current_platform.device_type}, and here that is {self.weights.device.type}"
            )
        asked = {
            **vllm_args.arguments(self.plan, self.weights.folder),
            "dtype": str(self.weights.dtype).removeprefix("torch."),
            "max_num_seqs": max(_ROWS, self.plan.engine.max_batch, self.plan.serve.max_batch),
            "gpu_memory_utilization": 0.01,  # two start beside each other; kv_gib alone says what is taken
            "max_model_len": -1,  # as long as the room for keys and values allows
            "enable_prefix_caching": False,  # a prompt that is decoded again is read again, as by our own engine
            "language_model_only": True,  # no room is set aside for images
            "skip_tokenizer_init": True,
            "generation_config": "vllm",  # a request says all; the model's own temperature stays out
            "disable_log_stats": True,
            "use_tqdm_on_load": False,
            **more,
        }
        return EngineArgs(**asked)

    @property
    def _positions(self) -> int:
        return int(self._plain_core.model_config.max_model_len)

    @cached_property
    def _stops(self) -> frozenset[int]:
        """The end-of-sequence tokens that the model's two configs name."""
        config = self._plain_core.model_config
        given = [getattr(config.hf_text_config, "eos_token_id", None)]
        given.append(config.try_get_generation_config().get("eos_token_id"))
        return frozenset(token for eos in given for token in ([eos] if isinstance(eos, int) else eos or []))

    def describe(self) -> Mapping[str, object]:
        """Device, dtype, threads, torch, vLLM."""
        return {**self._ours.describe(), "engine": "vllm", "vllm": versions.installed(), "kernels": "vllm"}

    def generate(
        self, requests: Sequence[Request], *, plain: bool = False, k: int | None = None, max_batch: int | None = None
    ) -> list[Completion]:
        """Decodes requests as the plan says; see :meth:`Engine.generate <selfspec.engine.base.Engine.generate>`."""
        assert k is None, "checked by the plan: vLLM is started with one K"
        for request in requests:
            self._room(len(request.tokens) + request.max_new_tokens)
        return self._session(plain, max_batch or self.plan.engine.max_batch, self._positions).run(requests)

    def open(self, rows: int, positions: int, order: Order) -> VLLMSession:
        """See :meth:`Opens.open <selfspec.engine.base.Opens.open>`; vLLM has its own order."""
        if positions > self._positions:
            raise ConfigError(f"serve.max_model_len={positions}: {self.plan.model.name} has {self._positions}")
        return self._session(False, rows, positions)

    def _session(self, plain: bool, rows: int, positions: int) -> VLLMSession:
        core = self._plain_core if plain else self._core
        return VLLMSession(core, rows, positions, self._stops, 0 if plain else self._most)

    @property
    def _most(self) -> int:
        return self.plan.controller.max_k if self.plan.speculative else 0

    def score(
        self, context: Sequence[int], continuations: Sequence[Sequence[int]], *, plain: bool = False
    ) -> list[Score]:
        """See :meth:`Scores.score <selfspec.engine.base.Scores.score>`; vLLM reads each in one pass either way."""
        self._room(len(context) + max(map(len, continuations)) + 1)  # vLLM always says a token after what it has read
        return vllm_session.score(self._plain_core if plain else self._core, context, continuations)

    def limits(self) -> Limits:
        """See :meth:`Scores.limits <selfspec.engine.base.Scores.limits>`; fewer, for the token that vLLM says."""
        return Limits(self._positions - 2, int(self._plain_core.model_config.get_vocab_size()))

    def usage(self) -> Usage:
        """See :meth:`Weights.usage <selfspec.engine.torch.weights.Weights.usage>`."""
        return self.weights.usage()

    def fit(self, pairs: Sequence[tuple[Sequence[int], Sequence[int]]], path: Path, facts: Mapping[str, Any]) -> None:
        """As the torch engine, by the same weights."""
        self._ours.fit(pairs, path, facts)

    def use_head(self, path: Path) -> None:
        """An early exit is read out through this fitted head; vLLM is told when it starts."""
        self._head_path = path

    def _room(self, positions: int) -> int:
        if positions > self._positions:
            room = f"engine.kv_gib={self.plan.engine.get('kv_gib')} and the model have room for {self._positions}"
            raise ConfigError(f"workload: prompt and new tokens come to {positions} positions; {room}")
        return positions


def _mend_llvmlite() -> None:
    """Lets a vLLM start after one that drafted n-grams, which loads llvmlite.

    As it starts, vLLM 0.32 looks for ``kernel`` among the attributes of every object of every module, and one of
    llvmlite's has, in the place of attributes, a function of a library.
    """
    library = getattr(sys.modules.get("llvmlite.binding.ffi"), "lib", None)
    if library is not None:
        library._fntab["__dict__"] = {}
