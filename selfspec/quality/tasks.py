"""lm-eval's tasks: its own definitions, on documents from its hub or from a file of ours.

What a task asks and how it is judged is always lm-eval's. Where a file is configured, a definition that includes
lm-eval's own is laid over it, in the way lm-eval has tasks derived; it names the file, and no other split.
"""

import contextlib
import importlib.metadata
import importlib.util
import io
import json
import logging
import math
import re
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from selfspec.data import assets
from selfspec.engine.base import Scores
from selfspec.errors import AssetError, ConfigError, one_line
from selfspec.quality.config import Quality

SEED = 1234
"""lm-eval's own."""
EXTRA = "pip install 'selfspec[quality]'"

_DERIVED = """\
include: {definition}
task: {task}
custom_dataset: !function selfspec.quality.tasks.documents
dataset_kwargs: {{path: {path}}}
training_split: null
validation_split: validation
test_split: null
fewshot_split: null
"""


def check(quality: Quality) -> None:
    """Refuses tasks that cannot run here.

    Raises:
        ConfigError: lm-eval is not installed, or does not have a task that a file is configured for.
    """
    if quality.tasks and importlib.util.find_spec("lm_eval") is None:
        raise ConfigError(f"quality.tasks={quality.tasks}: needs lm-eval; {EXTRA}, or use quality.tasks=[]")
    for task in quality.tasks:
        if task in quality.data:
            _definition(task)


def fetch(quality: Quality) -> None:
    """Has the configured files on this disk.

    Raises:
        AssetError: one cannot be had.
    """
    for task in quality.tasks:
        if task in quality.data:
            assets.fetch(quality.data[task].source, quality.data[task].sha256)


def evaluate(engine: Scores, quality: Quality, task: str, plain: bool) -> dict[str, Any]:
    """One task through an engine, plainly or as it is configured.

    Returns:
        Its metrics with their standard errors by name, as lm-eval computes them; how many documents; of which split.

    Raises:
        ConfigError: lm-eval has no such task.
        AssetError: its documents cannot be had.
    """
    import lm_eval

    from selfspec.quality.lm import EngineLM

    with _quietly():
        data = quality.data.get(task)
        made = _load(task, None if data is None else assets.fetch(data.source, data.sha256))
        if made.get_config("num_fewshot") is None:
            made.set_config(key="num_fewshot", value=0)
        made.set_fewshot_seed(seed=SEED)
        found = lm_eval.evaluate(EngineLM(engine, plain), {"tasks": {task: made}}, quality.limit, log_samples=False)
    # "acc,none" and "acc_stderr,none": the filter's name comes last
    named = {name.split(",")[0]: value for name, value in found["results"][task].items() if "," in name}
    metrics = {name: float(value) for name, value in named.items() if isinstance(value, (int, float))}
    return {
        # Of one document there is no standard error; a metric that is no number fails the job.
        "metrics": {name: x for name, x in metrics.items() if math.isfinite(x) or not name.endswith("_stderr")},
        "documents": found["n-samples"][task]["effective"],
        "split": "test" if made.has_test_docs() else "validation",
        "version": found["versions"][task],
        "lm_eval": importlib.metadata.version("lm_eval"),
    }


def documents(path: str, **kwargs: Any) -> Any:
    """A task's data set from an Arrow file, for lm-eval: its validation split."""
    from datasets import Dataset, DatasetDict

    # In memory: what a task makes of its documents would be cached beside the file.
    return DatasetDict({"validation": Dataset.from_file(path, in_memory=True)})


@cache
def _load(task: str, path: Path | None) -> Any:
    """A task of lm-eval's, on its documents in a file where there is one. Kept: reading them takes seconds."""
    from lm_eval.tasks import TaskManager

    if path is None:
        try:
            return TaskManager().load([task])["tasks"][task]
        except KeyError as error:
            raise ConfigError(f"quality.tasks={task}: lm-eval has no such task, or it is a group of them") from error
        except OSError as error:
            raise AssetError(f"quality.tasks={task}: its documents cannot be had: {one_line(error)}") from error
    places = {"definition": json.dumps(str(_definition(task))), "path": json.dumps(str(path))}  # YAML quotes alike
    with TemporaryDirectory() as folder:
        derived = Path(folder) / f"{task}.yaml"
        derived.write_text(_DERIVED.format(task=task, **places))
        return TaskManager(include_defaults=False).load([str(derived)])["tasks"][task]


def _definition(task: str) -> Path:
    """lm-eval's own file; looked for by name, as reading all of its thousands takes seconds."""
    spec = importlib.util.find_spec("lm_eval")
    assert spec is not None and spec.origin is not None, "checked"
    named = re.fullmatch(r"\w[\w.-]*", task)  # it becomes a file's name, and a line of YAML
    found = sorted((Path(spec.origin).parent / "tasks").rglob(f"{task}.yaml")) if named else []
    if not found:
        raise ConfigError(f"quality.data.{task}: lm-eval has no task of this name")
    return found[0]


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    """Without lm-eval's advice, and without its bars where nobody watches."""
    log = logging.getLogger("lm_eval")
    level, watched = log.level, sys.stderr.isatty()
    log.setLevel(logging.ERROR)
    try:
        with contextlib.nullcontext() if watched else contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        log.setLevel(level)
