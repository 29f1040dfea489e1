"""The layer rule: imports point down only, and ``--help`` or a config error never waits for torch."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

REPO = Path(__file__).parents[1]
LAYERS: dict[str, int] = {
    **dict.fromkeys(("selfspec", "types", "errors", "config"), 0),
    **dict.fromkeys(("plan", "metrics", "tracking", "checkpoint", "assets"), 1),
    **dict.fromkeys(("provenance", "workload", "heads", "interrupt", "progress", "rules", "vllm_rules"), 1),
    **dict.fromkeys(("engine", "vllm_plugin"), 2),
    **dict.fromkeys(("soak", "quality", "stages", "results", "plots", "report"), 3),
    **dict.fromkeys(("job", "sweep", "compose", "refusal", "serve"), 4),
    **dict.fromkeys(("serve.client", "serve.backend", "serve.errors"), 3),
    **dict.fromkeys(("run", "serve.__main__"), 5),
}
TORCHLESS_ENGINE = (
    "selfspec.engine",
    "selfspec.engine.base",
    "selfspec.engine.factory",
    "selfspec.engine.fake",
    "selfspec.engine.fake_session",
)
"""What stages and job import of the engine, and what tests run without a model."""
TORCH_MAY = ("selfspec.engine.", "selfspec.vllm_plugin.")
FRONT_DOORS = ("selfspec.run", "selfspec.serve.__main__")
# `run` is what a Slurm job calls, and where the configs lie; no launcher runs it.
LAUNCHERS_MAY = tuple(
    f"selfspec.{name}"
    for name in ("plan", "compose", "checkpoint", "errors", "config", "results", "provenance", "interrupt", "run")
)


def name_of(path: Path) -> str:
    """``selfspec/engine/base.py`` -> ``selfspec.engine.base``."""
    return ".".join(path.relative_to(REPO).with_suffix("").parts).removesuffix(".__init__")


MODULES = {
    name_of(path): path for folder in ("selfspec", "launchers") for path in sorted((REPO / folder).rglob("*.py"))
}


def unguarded(node: ast.AST) -> Iterator[ast.AST]:
    """All nodes, those within functions too, less what only a type checker sees."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
            continue
        yield child
        yield from unguarded(child)


def imports(module: str, source: str) -> Iterator[str]:
    """The dotted names a module imports, and those it uses of hydra."""
    package = module if MODULES.get(module, REPO).name == "__init__.py" else module.rpartition(".")[0]
    for node in unguarded(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = ".".join([*package.split(".")[: len(package.split(".")) - node.level + 1]]) if node.level else ""
            origin = ".".join(filter(None, (base, node.module)))
            yield from (f"{origin}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Attribute) and ast.unparse(node) == "hydra.main":
            yield "hydra.main"


def layer(name: str) -> int:
    """Of a module of selfspec's; one that is in no layer yet is a mistake."""
    part = name.removeprefix("selfspec.")
    found = LAYERS.get(part, LAYERS.get(part.split(".")[0]))
    assert found is not None, f"{name}: give it a layer"
    return found


def violations(module: str, source: str) -> list[str]:
    """What a module's imports break, in words."""
    found = []
    for target in imports(module, source):
        top = target.split(".")[0]
        if target == "hydra.main" and module not in FRONT_DOORS:
            found.append(f"{module} uses {target}; only {' and '.join(FRONT_DOORS)} may")
        if top == "torch" and (not module.startswith(TORCH_MAY) or module in TORCHLESS_ENGINE):
            found.append(f"{module} imports torch")
        if top != "selfspec" or target == "selfspec.__version__":
            continue
        owner = target if target in MODULES else target.rpartition(".")[0]
        if not module.startswith("selfspec"):
            found += [f"{module} imports {owner}"] * (owner not in LAUNCHERS_MAY)
        elif layer(owner) > layer(module):
            found.append(f"{module} ({layer(module)}) imports {owner} ({layer(owner)})")
        elif module.startswith("selfspec.stages") and owner.startswith("selfspec.engine"):
            found += [f"{module} imports {owner}"] * (owner not in ("selfspec.engine.base", "selfspec.engine.factory"))
    return found


@pytest.mark.parametrize("module", MODULES)
def test_imports_point_down(module: str) -> None:
    assert violations(module, MODULES[module].read_text()) == []


@pytest.mark.parametrize(
    ("module", "source", "says"),
    [
        ("selfspec.plan", "import torch", "imports torch"),
        ("selfspec.metrics", "def f():\n    from torch.nn import Linear", "imports torch"),
        ("selfspec.engine.fake", "import torch", "imports torch"),
        ("selfspec.stages.bench", "import torch.nn.functional as F", "imports torch"),
        ("selfspec.types", "from selfspec.plan import Plan", r"\(0\) imports selfspec.plan \(1\)"),
        ("selfspec.tracking", "def f():\n    import selfspec.report", "imports selfspec.report"),
        ("selfspec.engine.llama", "from ..stages import bench", "imports selfspec.stages.bench"),
        ("selfspec.engine", "from .. import job", "imports selfspec.job"),
        ("selfspec.stages.fit", "from selfspec.engine import fit", "imports selfspec.engine.fit"),
        ("selfspec.report", "try:\n    from selfspec import sweep\nexcept ImportError: pass", "imports selfspec.sweep"),
        ("selfspec.job", "from hydra import main", "only selfspec.run"),
        ("selfspec.serve.backend", "from selfspec.serve import app", r"\(3\) imports selfspec.serve.app \(4\)"),
        ("selfspec.stages.soak", "from selfspec.serve import app", "imports selfspec.serve.app"),
        ("selfspec.serve.app", "import torch", "imports torch"),
        ("selfspec.sweep", "import hydra\n@hydra.main()\ndef f(): ...", "only selfspec.run"),
        ("launchers.hydra_plugins.sky", "from selfspec import job", "imports selfspec.job"),
    ],
)
def test_a_planted_violation_is_seen(module: str, source: str, says: str) -> None:
    with pytest.raises(AssertionError, match=says):
        assert not violations(module, source), violations(module, source)


def test_a_module_without_a_layer_is_seen() -> None:
    with pytest.raises(AssertionError, match="give it a layer"):
        violations("selfspec.novelty", "from selfspec import plan")


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("selfspec.report", "if TYPE_CHECKING:\n    import torch\n    from selfspec import job"),
        ("selfspec.run", "def f():\n    from selfspec import job"),
        ("selfspec.stages.bench", "from selfspec.engine.base import Engine"),
        ("selfspec.engine.head", "import torch\nfrom . import llama"),
        ("launchers.hydra_plugins.sky", "from selfspec.plan import Plan"),
    ],
)
def test_what_the_rule_allows(module: str, source: str) -> None:
    assert violations(module, source) == []
