"""What a GPU says of selfspec, in a few minutes: ``python infra/gpu/check.py``.

``--device cpu --shapes tiny`` tries it anywhere.
Each section prints its table, goes on after a failure, and adds to ``check.json``. The machine needs torch,
transformers and what ``selfspec.run tracking=none`` imports, but no network: weights of the shapes are random. The
section ``speculation`` runs the job itself, on the model and prompts that ``--model`` and ``--prompts`` name.
"""

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

REPO = Path(__file__).parents[2]
sys.path[:0] = [str(REPO), str(REPO / "launchers")]

from selfspec.engine.torch.session import Scheduler  # noqa: E402
from selfspec.model.llama import Llama  # noqa: E402
from selfspec.model.tree import Tree  # noqa: E402
from selfspec.speculation.controller.base import Controller  # noqa: E402
from selfspec.speculation.decode import Speculation, Target  # noqa: E402
from selfspec.speculation.draft.base import Draft  # noqa: E402
from selfspec.speculation.gate.base import Gate  # noqa: E402
from selfspec.speculation.policy.longest_prefix import LongestPrefix  # noqa: E402
from selfspec.speculation.sampling import likeliest  # noqa: E402
from selfspec.types import Request  # noqa: E402

SHAPES = {
    "tiny": dict(hidden_size=64, intermediate_size=128, num_hidden_layers=4, num_attention_heads=4, vocab_size=512),
    "135M": dict(
        hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9, vocab_size=49152
    ),
    "1B": dict(
        hidden_size=2048, intermediate_size=8192, num_hidden_layers=16, num_attention_heads=32, vocab_size=128256
    ),
    "8B": dict(
        hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32, vocab_size=128256
    ),
}
"""Of SmolLM2-135M, Llama-3.2-1B and Llama-3.1-8B."""
KV_HEADS = {"tiny": 2, "135M": 3, "1B": 8, "8B": 8}
BUCKETS = ((1, 1), (1, 8), (1, 16), (8, 1), (8, 8))
"""Rows, and new tokens in each, of a pass."""
JOBS = "draft=suffix K=8;draft=lsq exit_layer=12 K=4;draft=eagle K=4;draft=none bench.baselines=[hf]"
CONTEXT = 256
"""Verified tokens before it."""


class Check:
    """The sections; each is a method that prints a table and returns its figures."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.device = args, torch.device(args.device)
        self.cuda = self.device.type == "cuda"
        self.dtype = torch.bfloat16 if self.cuda else torch.float32
        # Torch's operators one by one, as a graph, and our own kernels as a graph.
        self.ways = ("eager", "graph", *(["fused"] if self.cuda and find_spec("triton") else []))
        self.read = math.nan  # bytes a second, once `card` has measured it

    def card(self) -> dict[str, Any]:
        """What is there, and how fast its memory is read."""
        x = torch.randn(2**30 if self.cuda else 2**24, device=self.device, dtype=self.dtype)
        y = torch.empty_like(x)
        size = x.numel() * x.element_size()
        copied, self.read = (
            amount / self.ms(call, 10) * 1e3 for amount, call in ((2 * size, lambda: y.copy_(x)), (size, x.sum))
        )
        name = torch.cuda.get_device_name() if self.cuda else "CPU"
        facts = {"device": name, "torch": torch.__version__, "copy_gb_s": copied / 1e9, "read_gb_s": self.read / 1e9}
        if self.cuda:
            print(subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True).stdout.strip())
        print(
            "  ".join(
                f"{key} {value:.0f}" if isinstance(value, float) else f"{key} {value}" for key, value in facts.items()
            )
        )
        return facts

    def lossless(self) -> dict[str, Any]:
        """The identity of every draft on the tiny model, with graphs and without, on this device."""
        command = [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "-W",
            "ignore",
            "-p",
            "no:cacheprovider",
            *self.args.tests.split(),
        ]
        env = {**os.environ, "SELFSPEC_TEST_DEVICE": self.args.device, "PYTHONPATH": os.pathsep.join(sys.path)}
        done = subprocess.run(command, cwd=REPO, env=env, capture_output=True, text=True)
        print(done.stdout[-3000:], done.stderr[-1000:])
        return {"tests": self.args.tests, "exit": done.returncode, "summary": done.stdout.strip().splitlines()[-1:]}

    def passes(self) -> dict[str, Any]:
        """Whole passes of random weights, eager and as graphs, against the time that reading the weights takes."""
        found = {}
        for shape in self.args.shapes.split(","):
            with self.model(shape) as (model, _):
                floor = weights(model) / self.read * 1e3
                for rows, nodes in BUCKETS:
                    times = {"floor": floor}
                    for name in self.ways:
                        model.graphs, model.fused = name != "eager", name == "fused"
                        cache = model.new_cache(512, rows, lasts=True)
                        cache.kv.normal_()
                        cache.lengths[:] = [CONTEXT] * rows
                        trees = [Tree([3] * nodes, [-1] + [0] * (nodes - 1))] * rows

                        def step(model: Llama = model, cache: Any = cache, trees: Any = trees) -> None:
                            at = cache.place(trees)
                            hidden = model.embed([token for tree in trees for token in tree.tokens], at)
                            states = model.norm(model.run(hidden, cache, at, 0, model.shape.layers))
                            likeliest(model.logits(states))

                        times[name] = self.wall(step, 20)
                        if model.graphs and self.cuda:
                            (made,) = model._graphs[cache]._passes.values()
                            times[f"{name} replayed"] = self.ms(made.replay, 20)
                    found[f"{shape} {rows}x{nodes}"] = times
                    print(
                        f"{shape} rows {rows} nodes {nodes}: " + ", ".join(f"{k} {v:.3f} ms" for k, v in times.items()),
                        flush=True,
                    )
        return found

    def decoding(self) -> dict[str, Any]:
        """Plain decoding of random weights by the engine, with graphs and without, and by transformers' generate."""
        found = {}
        for shape in self.args.shapes.split(","):
            with self.model(shape) as (model, tensors):
                prompt = tuple(
                    torch.randint(5, model.shape.vocab, (32,), generator=torch.Generator().manual_seed(0)).tolist()
                )
                request, times = Request(prompt, self.args.new, ignore_eos=True), {}
                target = Target(model, model.shape.layers, model.norm)
                plain, said = Speculation(target, Draft(model), Gate(), Controller(0), LongestPrefix()), {}
                for name in self.ways:
                    model.graphs, model.fused = name != "eager", name == "fused"
                    cache = model.new_cache(512, 1, lasts=True)

                    def decode(
                        cache: Any = cache, name: str = name, plain: Speculation = plain, request: Request = request
                    ) -> None:
                        cache.clear()
                        (done,) = Scheduler(plain, cache).run([request])
                        said[name] = done.tokens  # noqa: B023

                    times[name] = self.wall(decode, 3) / self.args.new
                lm = transformers_model(model, tensors)
                ids = torch.tensor([prompt], device=self.device)
                ask = dict(max_new_tokens=self.args.new, min_new_tokens=self.args.new, do_sample=False, pad_token_id=0)

                def generate(lm: Any = lm, ids: Any = ids, ask: Any = ask) -> None:
                    said["transformers"] = lm.generate(ids, **ask)[0, ids.shape[1] :].tolist()  # noqa: B023

                times["transformers"] = self.wall(generate, 1) / self.args.new
                same = sum(a == b for a, b in zip(said[self.ways[-1]], said["transformers"], strict=True))
                floor = weights(model) / self.read * 1e3
                found[shape] = {**times, "floor": floor, "same_tokens": same, "of": self.args.new}
                print(
                    f"{shape}: "
                    + ", ".join(f"{k} {v:.3f} ms ({1e3 / v:.0f} tok/s)" for k, v in times.items())
                    + f"; floor {floor:.3f} ms, {self.ways[-1]} at {floor / times[self.ways[-1]]:.0%},"
                    f" {times['transformers'] / times[self.ways[-1]]:.1f}x transformers,"
                    f" {same}/{self.args.new} tokens the same (in bf16 random weights part at ties)",
                    flush=True,
                )
                del lm
        return found

    def profile(self) -> dict[str, Any]:
        """Kernels of a replayed pass of one token, by total time."""
        from torch.profiler import ProfilerActivity, profile

        found = {}
        for shape in self.args.shapes.split(","):
            with self.model(shape) as (model, _):
                model.graphs, model.fused = True, self.ways[-1] == "fused"
                cache = model.new_cache(512, 1, lasts=True)
                cache.lengths[:] = [CONTEXT]

                def step(model: Llama = model, cache: Any = cache) -> None:
                    at = cache.place([Tree.chain([3])])
                    hidden = model.run(model.embed([3], at), cache, at, 0, model.shape.layers)
                    likeliest(model.logits(model.norm(hidden)))

                for _ in range(3):
                    step()
                kinds = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if self.cuda else [])]
                with profile(activities=kinds) as profiled:
                    for _ in range(10):
                        step()
                by = "self_device_time_total" if self.cuda else "self_cpu_time_total"
                events = sorted(profiled.key_averages(), key=lambda e: -getattr(e, by))[:16]
                found[shape] = [(e.key[:90], e.count // 10, getattr(e, by) / 10) for e in events]
                print(f"{shape}: microseconds of a pass by kernel")
                print("\n".join(f"  {us:9.1f}  {count:4}  {key}" for key, count, us in found[shape]), flush=True)
        return found

    def speculation(self) -> dict[str, Any]:
        """The job itself, on a real model: plain decoding against each draft, lossless or not, with its interval."""
        if not self.args.model:
            return {"skipped": "--model names none"}
        found = {}
        common = [
            *(f"model.source=file:{self.args.model}", "model.sha256=null", "tracking=none", f"scale={self.args.scale}"),
            *(
                f"workload.source=file:{self.args.prompts}",
                "workload.sha256=null",
                f"hardware.device={self.args.device}",
            ),
            *("workload.new_tokens=128", f"output_dir={self.args.out}/job"),
        ]
        for overrides in self.args.jobs.split(";"):
            began = time.time()
            command = [sys.executable, "-m", "selfspec.run", *common, *overrides.split()]
            env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "SELFSPEC_OFFLINE": "1"}
            done = subprocess.run(command, cwd=REPO, env=env, capture_output=True, text=True)
            print(f"$ {overrides}  [{time.time() - began:.0f} s, exit {done.returncode}]")
            print(done.stdout[-2500:], done.stderr[-1500:], flush=True)
            found[overrides] = {"exit": done.returncode, "table": done.stdout}
        return found

    @contextmanager
    def model(self, shape: str) -> Iterator[tuple[Llama, dict[str, torch.Tensor]]]:
        """Random weights of a shape, and what they are called."""
        tensors = random_weights(config(shape), self.device, self.dtype)
        yield Llama(config(shape), tensors), tensors
        tensors.clear()
        if self.cuda:
            torch.cuda.empty_cache()

    def ms(self, call: Callable[[], object], times: int) -> float:
        """Median time of a call on the device, in milliseconds."""
        for _ in range(3):
            call()
        if not self.cuda:
            return self.wall(call, times)
        marks = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(times)]
        for begin, end in marks:
            begin.record()
            call()
            end.record()
        torch.cuda.synchronize()
        return statistics.median(begin.elapsed_time(end) for begin, end in marks)

    def wall(self, call: Callable[[], object], times: int) -> float:
        """Median time of a call that waits for its result, in milliseconds; the first call is not counted."""
        taken = []
        for _ in range(times + 1):
            began = time.perf_counter()
            call()
            taken.append(1e3 * (time.perf_counter() - began))
        return statistics.median(taken[1:])


def config(shape: str) -> dict[str, Any]:
    """A Llama's configuration."""
    return {
        **SHAPES[shape], "model_type": "llama", "num_key_value_heads": KV_HEADS[shape], "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-5, "rope_theta": 5e5, "tie_word_embeddings": shape != "8B", "eos_token_id": None,
    }  # fmt: skip


def random_weights(config: dict[str, Any], device: torch.device, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """By Hugging Face's names, scaled so that states keep their size."""
    hidden, inter, heads = config["hidden_size"], config["intermediate_size"], config["num_attention_heads"]
    size = hidden // heads
    keys = config["num_key_value_heads"] * size

    def matrix(rows: int, columns: int) -> torch.Tensor:
        return torch.randn(rows, columns, device=device, dtype=dtype).mul_(columns**-0.5)

    named = {"model.embed_tokens": (config["vocab_size"], hidden)}
    if not config["tie_word_embeddings"]:
        named["lm_head"] = (config["vocab_size"], hidden)
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}."
        named |= {
            f"{prefix}self_attn.{name}": rows
            for name, rows in (
                ("q_proj", (hidden, hidden)),
                ("k_proj", (keys, hidden)),
                ("v_proj", (keys, hidden)),
                ("o_proj", (hidden, hidden)),
            )
        }
        named |= {
            f"{prefix}mlp.{name}": rows
            for name, rows in (
                ("gate_proj", (inter, hidden)),
                ("up_proj", (inter, hidden)),
                ("down_proj", (hidden, inter)),
            )
        }
    tensors = {f"{name}.weight": matrix(*rows) for name, rows in named.items()}
    norms = [
        "model.norm",
        *(
            f"model.layers.{i}.{n}"
            for i in range(config["num_hidden_layers"])
            for n in ("input_layernorm", "post_attention_layernorm")
        ),
    ]
    return tensors | {f"{name}.weight": torch.ones(hidden, device=device, dtype=dtype) for name in norms}


def transformers_model(model: Llama, tensors: dict[str, torch.Tensor]) -> Any:
    """The same weights in transformers' layers."""
    from transformers import LlamaConfig, LlamaForCausalLM

    s = model.shape
    shape = next(
        name
        for name in SHAPES
        if SHAPES[name]["hidden_size"] == s.hidden and SHAPES[name]["num_hidden_layers"] == s.layers
    )
    settings = {key: value for key, value in config(shape).items() if key != "model_type"}
    with torch.device("meta"):
        lm = LlamaForCausalLM(LlamaConfig(**settings, attn_implementation="sdpa"))
    lm = lm.to_empty(device=model.device).to(model.dtype).eval()
    tied = {} if "lm_head.weight" in tensors else {"lm_head.weight": tensors["model.embed_tokens.weight"]}
    lm.load_state_dict(tensors | tied)
    with model.device:  # its buffers are in no state dict
        lm.model.rotary_emb = type(lm.model.rotary_emb)(lm.config)
    return lm


def weights(model: Llama) -> int:
    """Bytes that a pass must read."""
    matrices = [getattr(layer, name) for layer in model.layers for name in ("qkv", "out", "gate_up", "down")]
    return sum(matrix.numel() * matrix.element_size() for matrix in [*matrices, model.lm_head])


def main() -> None:
    """Runs the sections asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--shapes", default="135M,1B,8B")
    parser.add_argument("--sections", default="card,lossless,passes,decoding,profile,speculation")
    parser.add_argument("--new", type=int, default=128, help="tokens that decoding generates")
    parser.add_argument("--tests", default="tests/test_lossless.py -m fast", help="what `lossless` asks pytest for")
    parser.add_argument("--model", default="", help="a model folder or .gguf file for `speculation`")
    parser.add_argument("--prompts", default="", help="its prompt file")
    parser.add_argument("--scale", default="smoke")
    parser.add_argument("--jobs", default=JOBS, help="their overrides, separated by ;")
    parser.add_argument("--out", default=".", help="the folder of check.json")
    args = parser.parse_args()
    check, found = Check(args), dict[str, Any]()
    with torch.inference_mode():
        for name in args.sections.split(","):
            print(f"== {name}", flush=True)
            began = time.time()
            try:
                found[name] = getattr(check, name)()
            except Exception:
                traceback.print_exc()
                found[name] = {"failed": traceback.format_exc(limit=2)}
            print(f"[{name}: {time.time() - began:.0f} s]", flush=True)
            Path(args.out, "check.json").write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
