"""The layers, one direction: prequant -> prequant.passes -> prequant.runtime, read from the sources of each.

Imports inside functions and under TYPE_CHECKING count as well: they are the usual ways for a cycle to creep in.
"""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = {"runtime": "prequant.runtime", "passes": "prequant.passes", "prequant": "prequant"}
MODELS_AND_DATA = ("transformers", "datasets", "accelerate", "tokenizers", "huggingface_hub")
FORBIDDEN = {
    "runtime": (*MODELS_AND_DATA, "torch.fx", "torch.export", "networkx", "typer"),
    "passes": (*MODELS_AND_DATA, "typer"),
}
MAY_USE = {
    "runtime": ("prequant.runtime",),
    "passes": ("prequant.passes", "prequant.runtime"),
}


def imports(source: str, package: str) -> Iterator[tuple[int, str]]:
    """The line and the full dotted name of everything that a module of `package` imports, names in modules included."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            yield from ((node.lineno, f"{module}.{alias.name}") for alias in node.names)


def is_under(name: str, parents: tuple[str, ...]) -> bool:
    """Whether the dotted name is one of `parents` or inside one."""
    return any(name == parent or name.startswith(f"{parent}.") for parent in parents)


def violations(layer: str, source: str, package: str) -> list[str]:
    """What a module of `layer` imports and must not."""
    return [
        f"line {line}: {name}"
        for line, name in imports(source, package)
        if is_under(name, FORBIDDEN[layer]) or (is_under(name, ("prequant",)) and not is_under(name, MAY_USE[layer]))
    ]


@pytest.mark.parametrize("layer", MAY_USE)
def test_no_module_imports_a_layer_above_its_own(layer: str) -> None:
    files = sorted((ROOT / layer).rglob("*.py"))
    assert files, f"no modules found in {ROOT / layer}"
    found = []
    for path in files:
        package = ".".join([PACKAGES[layer], *path.relative_to(ROOT / layer).parent.parts])
        found += [f"{path.relative_to(ROOT)}, {what}" for what in violations(layer, path.read_text(), package)]
    assert not found, "\n".join(["imports against the direction of the layers:", *found])


@pytest.mark.parametrize("folder", PACKAGES)
def test_layers_are_imported_by_their_installed_names(folder: str) -> None:
    """`import passes` would work from the checkout's root and nowhere else."""
    found = [
        f"{path.relative_to(ROOT)}, line {line}: {name}"
        for path in sorted((ROOT / folder).rglob("*.py"))
        for line, name in imports(path.read_text(), PACKAGES[folder])
        if is_under(name, ("passes", "runtime"))
    ]
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    ("layer", "source"),
    [
        ("runtime", "import prequant.passes"),
        ("runtime", "from prequant import passes"),
        ("runtime", "from prequant.passes.pipeline import Pipeline"),
        ("runtime", "from ..passes import Pipeline"),
        ("runtime", "from .. import trace"),
        ("runtime", "import prequant"),
        ("runtime", "from torch import fx"),
        ("runtime", "import torch.fx.passes"),
        ("runtime", "def f():\n    import transformers"),
        ("passes", "import prequant.trace"),
        ("passes", "from prequant import trace"),
        ("passes", "from ..cli import app"),
        ("passes", "from transformers import AutoModel"),
        ("passes", "if TYPE_CHECKING:\n    from datasets import Dataset"),
    ],
)
def test_an_upward_import_is_seen(layer: str, source: str) -> None:
    assert violations(layer, source, PACKAGES[layer])


@pytest.mark.parametrize(
    ("layer", "source"),
    [
        ("runtime", "import torch\nfrom torch import nn\nfrom prequant.runtime.formats import WeightFormat"),
        ("runtime", "from . import ops\nfrom .formats import WeightFormat"),
        ("passes", "import torch.fx\nfrom prequant.runtime import ops\nfrom prequant import runtime"),
        ("passes", "from ..runtime import ops\nfrom .program import Program"),
    ],
)
def test_a_downward_import_is_allowed(layer: str, source: str) -> None:
    assert not violations(layer, source, PACKAGES[layer])
