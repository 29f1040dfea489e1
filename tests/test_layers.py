"""The layer rule: imports point down only, in no circle, and ``--help`` or a config error never waits for torch.

Every import counts: those within functions and those that only a type checker sees, too.
"""

import ast
from collections.abc import Iterator, Mapping
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

REPO = Path(__file__).parents[1]
TIERS: tuple[tuple[str, ...], ...] = (
    ("credentials", "errors", "lazy", "types"),
    ("options",),
    (
        "axes",
        "data.config",
        "heads",
        "interrupt",
        "metrics",
        "outbound",
        "progress",
        "quality.config",
        "serve.config",
        "soak.config",
    ),
    ("config",),
    ("costs", "files", "provenance", "refusal", "sense", "sweep.compose"),
    ("data",),
    ("checkpoint", "rules", "sweep_context", "tracking"),
    ("plan",),
    ("model", "report"),
    ("speculation",),
    ("vllm_plugin",),
    ("engine",),
    ("fitting", "quality"),
    ("export", "serve", "soak"),
    ("stages",),
    ("job",),
    ("sweep",),
    ("run",),
    ("serve.__main__",),
)
"""From the ground up. A package's modules import each other, and what is on lower tiers; no neighbour on their own."""
TORCH_MAY = tuple(
    f"selfspec.{name}"
    for name in (
        *("lazy", "model.", "speculation.", "vllm_plugin."),
        *("engine.torch.", "engine.hf.", "engine.vllm.", "engine.openai."),
    )
)
TORCHLESS = ("bandit", "controller", "sequence")
"""Of ``speculation``: what the fake engine runs, too."""
STAGES_MAY = ("selfspec.engine.base", "selfspec.engine.factory")
"""Of the engine: a stage knows its protocol, and who makes one."""
FRONT_DOORS = ("selfspec.run", "selfspec.serve.__main__")
LAUNCHERS_MAY = tuple(  # `run` is what a Slurm job calls, and where the configs lie; no launcher runs it
    f"selfspec.{name}"
    for name in (
        *("plan", "checkpoint", "errors", "config", "files", "report.results", "provenance", "interrupt"),
        *("run", "sweep.compose", "sweep_context"),
    )
)
LARGEST_ROOM = 0.15
"""The most of the package's lines that lie in one folder, its subfolders not counted."""


def name_of(path: Path) -> str:
    """``selfspec/engine/base.py`` -> ``selfspec.engine.base``."""
    return ".".join(path.relative_to(REPO).with_suffix("").parts).removesuffix(".__init__")


PATHS = {name_of(path): path for folder in ("selfspec", "launchers") for path in sorted((REPO / folder).rglob("*.py"))}
SOURCES = {name: path.read_text() for name, path in PATHS.items()}
PACKAGES = {name for name, path in PATHS.items() if path.name == "__init__.py"}


@cache
def imports(module: str, source: str) -> tuple[str, ...]:
    """The dotted names a module imports, and those it uses of hydra."""
    return tuple(_imports(module, source))


def _imports(module: str, source: str) -> Iterator[str]:
    package = module if module in PACKAGES else module.rpartition(".")[0]
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(package.split(".")[: len(package.split(".")) - node.level + 1]) if node.level else ""
            origin = ".".join(filter(None, (base, node.module)))
            yield from (f"{origin}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Attribute) and ast.unparse(node) == "hydra.main":
            yield "hydra.main"


def place(module: str) -> tuple[int, str] | None:
    """The tier of a module of selfspec's, and the entry of :data:`TIERS` that puts it there."""
    part = module.removeprefix("selfspec.")
    entries = {name: tier for tier, names in enumerate(TIERS) for name in names}
    while part not in entries and "." in part:
        part = part.rpartition(".")[0]
    return (entries[part], part) if part in entries else None


def broken(module: str, source: str, known: Mapping[str, str]) -> Iterator[str]:
    """What one module's imports break, in words."""
    torchless = (
        not module.startswith(TORCH_MAY) or module.removeprefix("selfspec.speculation.").split(".")[0] in TORCHLESS
    )
    for target in imports(module, source):
        top = target.split(".")[0]
        if target == "hydra.main" and module not in FRONT_DOORS:
            yield f"{module} uses hydra.main; only {' and '.join(FRONT_DOORS)} may"
        if top == "torch" and torchless:
            yield f"{module} imports torch"
        owner = target if target in known else target.rpartition(".")[0]
        if top != "selfspec" or owner == "selfspec":
            continue
        if not module.startswith("selfspec"):
            if owner not in LAUNCHERS_MAY:
                yield f"{module} imports {owner}"
            continue
        ours, theirs = place(module), place(owner)
        if ours and theirs and ours[1] != theirs[1] and theirs[0] >= ours[0]:
            yield f"{module} ({ours[1]}) imports {owner} ({theirs[1]}), which is not below it"
        elif module.startswith("selfspec.stages") and theirs and theirs[1] == "engine" and owner not in STAGES_MAY:
            yield f"{module} imports {owner}; stages know {' and '.join(STAGES_MAY)}"


def circles(known: Mapping[str, str]) -> Iterator[str]:
    """A circle of imports, if there is one."""
    graph = {
        module: {t if t in known else t.rpartition(".")[0] for t in imports(module, source)} & known.keys() - {module}
        for module, source in known.items()
    }
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        yield f"a circle: {' -> '.join(reversed(error.args[1]))}"


def rooms(lines: Mapping[str, int]) -> Iterator[str]:
    """Folders that hold more than their share; ``lines`` of each file, by its path."""
    held: dict[str, int] = {}
    for path, count in lines.items():
        folder = path.rpartition("/")[0]
        held[folder] = held.get(folder, 0) + count
    for folder, count in held.items():
        if count > LARGEST_ROOM * sum(held.values()):
            yield f"{folder}/ holds {count / sum(held.values()):.0%} of the code; at most {LARGEST_ROOM:.0%}"


def violations(known: Mapping[str, str], lines: Mapping[str, int]) -> list[str]:
    """All there are, of all modules."""
    homeless = [f"{name}: give it a tier" for name in known if name.startswith("selfspec.") and place(name) is None]
    found = [words for module, source in known.items() for words in broken(module, source, known)]
    return [*homeless, *found, *circles(known), *rooms(lines)]


def sizes() -> dict[str, int]:
    """Lines of every source file, compiled ones too."""
    files = [path for path in (REPO / "selfspec").rglob("*") if path.suffix in (".py", ".cpp", ".cu", ".h")]
    return {path.relative_to(REPO).as_posix(): path.read_text().count("\n") for path in files}


def test_imports_point_down_in_no_circle_and_no_room_is_too_large() -> None:
    assert violations(SOURCES, sizes()) == []


@pytest.mark.parametrize(
    ("module", "source", "says"),
    [
        ("selfspec.plan", "import torch", "selfspec.plan imports torch"),
        ("selfspec.metrics", "def f():\n    from torch.nn import Linear", "imports torch"),
        ("selfspec.engine.fake.engine", "import torch", "imports torch"),
        ("selfspec.speculation.controller.cost", "import torch", "imports torch"),
        ("selfspec.serve.app", "import torch", "imports torch"),
        ("selfspec.report.tables", "if TYPE_CHECKING:\n    import torch", "imports torch"),
        ("selfspec.types", "from selfspec.plan import Plan", r"\(types\) imports selfspec.plan \(plan\), which is not"),
        ("selfspec.types", "from selfspec import errors", r"imports selfspec.errors \(errors\), which is not below it"),
        ("selfspec.tracking.base", "def f():\n    import selfspec.report.tables", "imports selfspec.report.tables"),
        ("selfspec.model.llama", "from ..speculation import gate", "imports selfspec.speculation.gate"),
        ("selfspec.model.llama", "if TYPE_CHECKING:\n    from selfspec import job", "imports selfspec.job"),
        ("selfspec.engine", "from .. import job", "imports selfspec.job"),
        ("selfspec.stages.fit", "from selfspec.engine.torch import engine", "stages know selfspec.engine.base"),
        ("selfspec.stages.soak", "from selfspec.serve import __main__", r"\(serve.__main__\), which is not below it"),
        ("selfspec.vllm_plugin.mend", "from selfspec.engine import base", "imports selfspec.engine.base"),
        ("selfspec.job", "from hydra import main", "only selfspec.run"),
        ("selfspec.sweep.callback", "import hydra\n@hydra.main()\ndef f(): ...", "only selfspec.run"),
        ("launchers.hydra_plugins.sky", "from selfspec import job", "imports selfspec.job"),
        ("selfspec.model.tree", "def f():\n    from selfspec.model import cache", r"a circle: .*selfspec\.model\.tree"),
        ("selfspec.novelty", "from selfspec import plan", "selfspec.novelty: give it a tier"),
    ],
)
def test_a_planted_violation_is_listed(module: str, source: str, says: str) -> None:
    with pytest.raises(AssertionError, match=says):
        assert not violations({**SOURCES, module: source}, sizes())


def test_a_room_that_grows_too_large_is_listed() -> None:
    with pytest.raises(AssertionError, match=r"selfspec/engine/ holds \d+% of the code"):
        assert not violations(SOURCES, {**sizes(), "selfspec/engine/new.py": 10_000})


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("selfspec.run", "def f():\n    from selfspec import job"),
        ("selfspec.stages.bench", "from selfspec.engine.base import Engine"),
        ("selfspec.speculation.head", "import torch\nfrom selfspec.model import llama"),
        ("launchers.hydra_plugins.sky", "from selfspec.plan import Plan"),
    ],
)
def test_what_the_rule_allows(module: str, source: str) -> None:
    assert violations({**SOURCES, module: source}, sizes()) == []
