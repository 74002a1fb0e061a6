"""Rules that a reader of one file cannot see broken: layers, exported names, lazy imports, sizes, names.

Each rule is a function from a source text or a module to a list of complaints. It is run over the real tree,
where the list must be empty; its twin runs it over a small offender, where it must not be.
"""

from __future__ import annotations

import ast
import importlib
import json
import os
import pkgutil
import subprocess
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import TypeVar

import pytest
import torch.nn.utils.parametrizations
import torch.nn.utils.parametrize

import torchkiln

ROOT = Path(__file__).resolve().parent.parent
SRC = ROOT / "src" / "torchkiln"
SOURCES = sorted(SRC.rglob("*.py"))
EVERY_FILE = SOURCES + [
    path for folder in ("tests", "examples", "benchmarks") for path in sorted((ROOT / folder).rglob("*.py"))
]

every_source = pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.relative_to(SRC).as_posix())
every_file = pytest.mark.parametrize("path", EVERY_FILE, ids=lambda path: path.relative_to(ROOT).as_posix())


# --- layers ---------------------------------------------------------------------------------------

# From the bottom up. A unit is the first part of a module's path inside the package; it may import itself and
# the units of lower rows. A new unit must be given its row. Rows above __init__ use the package as users do.
LAYERS = [
    {"_core"},
    {"families"},
    {"parametrize"},
    {"parametrizations"},
    {"_install", "models"},
    {"recipes"},
    {"checkpoint", "distributed", "interop"},
    {"__init__"},
    {"report", "testing"},
    {"_cli"},
]
# The demo is one of the commands; it has a file of its own because people read it.
PART_OF = {"demo": "_cli", "__main__": "_cli"}
RANK = {unit: rank for rank, layer in enumerate(LAYERS) for unit in layer}


def unit_of(path: Path) -> str:
    name = path.relative_to(SRC).parts[0].removesuffix(".py")
    return PART_OF.get(name, name)


def imported_modules(source: str) -> Iterator[str]:
    """Every imported name with its dots; ``from a import b`` gives ``a.b``, which may be a module or not."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{'.' * node.level}{node.module or ''}.{alias.name}" for alias in node.names)


def wrong_imports(unit: str, source: str) -> list[str]:
    if unit not in RANK:
        return [f"{unit} has no row in LAYERS"]
    inside = [name for name in imported_modules(source) if name.split(".")[0] in ("torchkiln", "")]
    units = {name: [*name.split("."), "__init__"][1] for name in inside}
    units = {name: PART_OF.get(other, other) for name, other in units.items()}
    # A name that is no unit, as in `from torchkiln import bake`, comes from the package itself.
    ranks = {name: RANK.get(other, RANK["__init__"]) for name, other in units.items() if other != unit}
    return [f"{unit} imports {name}" for name, rank in ranks.items() if rank >= RANK[unit]]


@every_source
def test_imports_run_one_way(path: Path) -> None:
    assert wrong_imports(unit_of(path), path.read_text()) == []


@pytest.mark.parametrize(
    ("unit", "source"),
    [
        ("_core", "from torchkiln.parametrize import cached"),
        ("models", "import torchkiln.checkpoint.bake"),
        ("checkpoint", "from torchkiln import bake"),
        ("checkpoint", "def f():\n    from torchkiln import interop"),
        ("parametrize", "import torchkiln"),
        ("parametrize", "from .models import bake"),
        ("brand_new", "import torch"),
    ],
)
def test_imports_run_one_way_can_fail(unit: str, source: str) -> None:
    assert len(wrong_imports(unit, source)) == 1


@pytest.mark.parametrize(
    "source", ["from torchkiln._core.errors import InverseError", "from torchkiln import models"]
)
def test_imports_downwards_pass(source: str) -> None:
    assert wrong_imports("models", source) == []


# --- our own implementation -----------------------------------------------------------------------

TORCHS_OWN = ("torch.nn.utils.parametrize", "torch.nn.utils.parametrizations")


def borrowed(source: str) -> list[str]:
    """Every place that reaches torch's own implementation: an import, an attribute, a name in a string."""
    nodes = list(ast.walk(ast.parse(source)))
    reached = list(imported_modules(source))
    reached += [ast.unparse(node) for node in nodes if isinstance(node, ast.Attribute)]
    reached += [
        node.value for node in nodes if isinstance(node, ast.Constant) and isinstance(node.value, str)
    ]
    return sorted({name for name in reached if name.startswith(TORCHS_OWN)})


@every_source
def test_torchs_implementation_is_not_used(path: Path) -> None:
    assert path.relative_to(SRC).as_posix() in MAY_NAME_TORCHS or borrowed(path.read_text()) == []


# The files that put ours in torch's place or name torch's module; none of them calls torch's functions.
MAY_NAME_TORCHS = {"_core/chain.py", "_core/inject.py", "_install.py"}


@pytest.mark.parametrize(
    "source",
    [
        "from torch.nn.utils.parametrize import is_parametrized",
        "from torch.nn.utils import parametrizations",
        "import torch.nn.utils.parametrize as P",
        "import torch\nx = torch.nn.utils.parametrizations.orthogonal",
        "import importlib\nimportlib.import_module('torch.nn.utils.parametrize')",
        "import sys\nsys.modules['torch.nn.utils.parametrizations'].orthogonal",
    ],
)
def test_torchs_implementation_is_not_used_can_fail(source: str) -> None:
    assert borrowed(source) != []


# --- exported names -------------------------------------------------------------------------------

# What each public module exports. A change here is a change of the public interface.
PUBLIC: dict[str, list[str]] = {
    "torchkiln": [
        "CheckpointError",
        "InverseError",
        "NothingToFoldError",
        "OutputExistsError",
        "Parametrization",
        "ParametrizationError",
        "Report",
        "Stack",
        "TorchkilnError",
        "TorchkilnWarning",
        "bake",
        "baked",
        "checkpoint",
        "distributed",
        "evaluate_together",
        "families",
        "functional_call",
        "install",
        "installed",
        "load_state_dict",
        "parametrizations",
        "parametrize",
        "restore",
        "stack",
        "state_dict",
        "summary",
        "uninstall",
    ],
    "torchkiln.checkpoint": [
        "Adapter",
        "Checked",
        "FileReport",
        "Folded",
        "Inspection",
        "Module",
        "Note",
        "Parametrized",
        "Part",
        "Verification",
        "bake",
        "convert",
        "inspect",
        "load",
        "load_weights",
        "save",
        "verify",
    ],
    "torchkiln.demo": ["DemoReport", "run_demo"],
    "torchkiln.distributed": [],
    "torchkiln.families": [
        "PLU",
        "AlmostOrthogonal",
        "Banded",
        "BlockCirculant",
        "BlockDiagonal",
        "Butterfly",
        "Centered",
        "Chain",
        "Circulant",
        "Clamped",
        "ConvSpectralNorm",
        "Correlation",
        "Custom",
        "Diagonal",
        "DiagonalPlusLowRank",
        "DoublyStochastic",
        "EqualizedRate",
        "FixedRank",
        "FixedRankSemidefinite",
        "FrobeniusNorm",
        "GraphLaplacian",
        "Grassmann",
        "GreaterThan",
        "Hankel",
        "Hermitian",
        "HurwitzStable",
        "Interval",
        "Invertible",
        "Kronecker",
        "L1Ball",
        "L2Ball",
        "LInfBall",
        "LessThan",
        "LowRank",
        "Masked",
        "MaxNorm",
        "Monarch",
        "OperatorNormBound",
        "Ordered",
        "Orthogonal",
        "OrthogonalProjection",
        "Positive",
        "PositiveDefinite",
        "PositiveOrdered",
        "PositiveSemidefinite",
        "Product",
        "Scaled",
        "SchurStable",
        "SigmaReparam",
        "Simplex",
        "SkewHermitian",
        "SkewSymmetric",
        "SparseSimplex",
        "SpecialLinear",
        "SpecialOrthogonal",
        "SpectralNorm",
        "Sphere",
        "Stiefel",
        "Symmetric",
        "Toeplitz",
        "TraceFree",
        "Triangular",
        "UnitCircle",
        "UnitNorm",
        "Unitary",
        "WeightNorm",
        "WeightStandardization",
        "ZeroSum",
        "from_spec",
    ],
    "torchkiln.models": [
        "Report",
        "Row",
        "bake",
        "baked",
        "functional_call",
        "load_state_dict",
        "restore",
        "state_dict",
        "summary",
    ],
    "torchkiln.parametrizations": ["orthogonal", "spectral_norm", "weight_norm"],
    "torchkiln.parametrize": [
        "ParametrizationList",
        "cached",
        "is_parametrized",
        "register_parametrization",
        "remove_parametrizations",
        "transfer_parametrizations_and_params",
        "type_before_parametrizations",
    ],
    "torchkiln.testing": ["Report", "Result", "check"],
}


def public_modules() -> list[str]:
    """Every module whose path has no underscore, found on disk."""
    found = [module.name for module in pkgutil.walk_packages(torchkiln.__path__, "torchkiln.")]
    return ["torchkiln", *sorted(name for name in found if "._" not in name)]


def _rank(name: str) -> tuple[bool, str]:
    """Names in capitals first, as ruff sorts them."""
    return not name.isupper(), name


def wrong_exports(module: object, expected: list[str]) -> list[str]:
    """Compare ``__all__`` with the table, and find what has a public name here and is left out."""
    exported = getattr(module, "__all__", [])
    defined = [
        name
        for name, value in vars(module).items()
        if getattr(value, "__module__", None) == getattr(module, "__name__", "")
        and not (name.startswith("_") or isinstance(value, TypeVar))
    ]
    complaints = [f"unexpected: {name}" for name in exported if name not in expected]
    complaints += [f"missing: {name}" for name in expected if name not in exported]
    complaints += [f"not there: {name}" for name in exported if not hasattr(module, name)]
    complaints += [f"public but not exported: {name}" for name in defined if name not in exported]
    return complaints + (["not sorted"] if list(exported) != sorted(exported, key=_rank) else [])


def test_the_table_of_exports_names_every_public_module() -> None:
    assert public_modules() == list(PUBLIC)


@pytest.mark.parametrize("name", PUBLIC)
def test_exported_names(name: str) -> None:
    assert wrong_exports(importlib.import_module(name), PUBLIC[name]) == []


@pytest.mark.parametrize(
    "torchs", [torch.nn.utils.parametrize, torch.nn.utils.parametrizations], ids=lambda m: m.__name__
)
def test_the_drop_in_exports_exactly_torchs_names(torchs: object) -> None:
    ours = importlib.import_module(torchs.__name__.replace("torch.nn.utils", "torchkiln"))
    assert set(ours.__all__) == set(torchs.__all__)


@pytest.mark.parametrize(
    ("exported", "complaint"),
    [
        (["bake", "new", "restore"], "unexpected: new"),
        (["restore"], "missing: bake"),
        (["restore", "bake"], "not sorted"),
        (["bake", "gone", "restore"], "not there: gone"),
        (["bake"], "public but not exported: restore"),
    ],
)
def test_exported_names_can_fail(exported: list[str], complaint: str) -> None:
    module = types.ModuleType("offender")
    exec("def bake(): ...\ndef restore(): ...\nnew = 1", vars(module))
    module.__all__ = exported
    assert complaint in wrong_exports(module, ["bake", "restore"])


# --- lazy imports ---------------------------------------------------------------------------------

# Run in a fresh interpreter: what does `import PACKAGE` add to `import torch`?
PROBE = """
import contextlib, io, json, os, sys, torch

before = {name.partition(".")[0] for name in sys.modules} | set(sys.stdlib_module_names)
reads, said = [], io.StringIO()
getitem = os._Environ.__getitem__
os._Environ.__getitem__ = lambda self, key: reads.append(key) or getitem(self, key)
with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
    __import__(sys.argv[1])
os._Environ.__getitem__ = getitem
after = {name.partition(".")[0] for name in sys.modules}
found = {"modules": sorted(after - before - {sys.argv[1]}), "environment": reads, "said": said.getvalue()}
print(json.dumps(found))
"""
NOTHING = {"modules": [], "environment": [], "said": ""}


def import_effects(package: str, *, path: Path) -> dict[str, object]:
    search = os.pathsep.join([str(path), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": search}
    command = [sys.executable, "-c", PROBE, package]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


def test_import_loads_torch_alone(tmp_path: Path) -> None:
    assert import_effects("torchkiln", path=tmp_path) == NOTHING


def test_import_loads_torch_alone_can_fail(tmp_path: Path) -> None:
    lines = ["import os, safetensors", "os.environ.get('HOME')", "print('hello')"]
    (tmp_path / "offender.py").write_text("\n".join(lines))
    found = import_effects("offender", path=tmp_path)
    assert found == {"modules": ["safetensors"], "environment": ["HOME"], "said": "hello\n"}


# --- sizes and names ------------------------------------------------------------------------------

MAX_FILE, MAX_BODY = 500, 50
FORBIDDEN = {"util", "helper", "common", "misc"}
Function = ast.FunctionDef | ast.AsyncFunctionDef


def body_lines(function: Function) -> int:
    """Lines from the first statement to the last, without the docstring."""
    body = function.body[1:] if ast.get_docstring(function) is not None else function.body
    return (body[-1].end_lineno or 0) - body[0].lineno + 1 if body else 0


def too_long(source: str) -> list[str]:
    functions = [node for node in ast.walk(ast.parse(source)) if isinstance(node, Function)]
    long = [
        f"{node.name} has a body of {body_lines(node)} lines"
        for node in functions
        if body_lines(node) > MAX_BODY
    ]
    lines = len(source.splitlines())
    return long + ([f"{lines} lines"] if lines > MAX_FILE else [])


def badly_named(name: str) -> bool:
    return name.removesuffix(".py").strip("_").removesuffix("s") in FORBIDDEN


def badly_written(source: str) -> list[str]:
    """A file begins with a docstring that states its idea, and is ASCII throughout."""
    complaints = [] if source.isascii() else ["not ASCII"]
    return complaints + ([] if not source or ast.get_docstring(ast.parse(source)) else ["no docstring"])


@every_file
def test_files_and_functions_are_short(path: Path) -> None:
    assert too_long(path.read_text()) == []


@pytest.mark.parametrize("source", ["\n" * 501, "def f():\n" + "    x = 1\n" * 51])
def test_files_and_functions_are_short_can_fail(source: str) -> None:
    assert len(too_long(source)) == 1


def test_a_docstring_is_not_counted() -> None:
    assert too_long('def f():\n    """' + "\n" * 60 + '"""\n' + "    x = 1\n" * 50) == []


@every_file
def test_names_say_what_a_file_holds(path: Path) -> None:
    assert not [part for part in path.relative_to(ROOT).parts if badly_named(part)]


@pytest.mark.parametrize("name", ["utils.py", "_utils.py", "helpers", "common.py", "_helper.py"])
def test_names_say_what_a_file_holds_can_fail(name: str) -> None:
    assert badly_named(name)


@every_file
def test_files_state_their_idea_in_ascii(path: Path) -> None:
    assert badly_written(path.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize("source", ['"""Fine."""\nx = "\u00e9"', "x = 1"])
def test_files_state_their_idea_in_ascii_can_fail(source: str) -> None:
    assert len(badly_written(source)) == 1
