"""docs/coming-from.md names everything that the other libraries export, and leads to families that exist."""

from __future__ import annotations

import importlib
import re
import warnings
from pathlib import Path

import pytest

from torchkiln import families

PAGE = (Path(__file__).resolve().parent.parent / "docs" / "coming-from.md").read_text()
ROWS = re.findall(r"^\| (`[^|]*) \| ([^|]*) \|", PAGE, re.M)
LEFT = {name for left, _ in ROWS for name in re.findall(r"`([\w.]+)`", left)}
# keras.constraints has these and their older spellings; keras itself is not installed for one list of names.
KERAS = {"Constraint", "MaxNorm", "MinMaxNorm", "NonNeg", "UnitNorm"}
# Constraints on the discrete, or made of others: nothing to train there.
NO_WEIGHTS = {
    *("boolean", "dependent", "dependent_property", "independent", "integer_interval", "multinomial"),
    *(
        "nonnegative_integer",
        "one_hot",
        "positive_integer",
        "real",
        "real_vector",
        "Constraint",
        "is_dependent",
    ),
    *("MixtureSameFamilyConstraint", "mixture_same_family"),
}


def exported(module: str) -> set[str]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        return set(importlib.import_module(module).__all__)


@pytest.mark.parametrize(
    ("library", "left_out"),
    [
        ("geotorch", set()),
        ("torch.distributions.transforms", set()),
        ("torch.distributions.constraints", NO_WEIGHTS),
    ],
)
def test_every_exported_name_is_there(library: str, left_out: set[str]) -> None:
    assert exported(library) - left_out <= LEFT


def test_the_names_of_keras_are_there() -> None:
    assert KERAS <= LEFT


def test_what_they_lead_to_exists() -> None:
    named = {name for _, right in ROWS for name in re.findall(r"`([A-Z]\w+)[(`]", right)}
    assert named - {"Parametrization", "None"} <= set(families.__all__)
    assert len(named) > 25
