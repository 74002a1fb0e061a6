"""A spec, as JSON, and the tensors of a file compute what the family computed, without the model's code."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from cases import CASES, Case
from torchkiln import Parametrization, ParametrizationError, families
from torchkiln.families import from_spec
from torchkiln.parametrize import register_parametrization
from torchkiln.testing import check


def through_a_file(family: Parametrization, X: Tensor) -> tuple[Tensor, Tensor]:
    """Register, move, and compute the value from the state dict and the JSON spec alone; return both values."""
    holder = nn.Module()
    holder.weight = nn.Parameter(X)
    register_parametrization(holder, "weight", family)
    with torch.no_grad():
        for original in holder.parameters():
            original.add_(torch.linspace(-0.1, 0.1, original.numel()).view(original.shape))
    state = {
        key.removeprefix("parametrizations.weight."): value for key, value in holder.state_dict().items()
    }
    originals = [state[key] for key in sorted(state) if key.startswith("original")]
    buffers = {key.removeprefix("0."): value for key, value in state.items() if key.startswith("0.")}
    again = from_spec(json.loads(json.dumps(family.spec())), buffers=buffers)
    return again(*originals), holder.weight.detach()


NESTED = [
    families.Chain([families.Stiefel(), families.Masked(torch.tensor([True, False]))]),
    families.Product([families.Orthogonal("cayley"), families.PLU(), None], [2, 2, 1]),
    families.Product(
        [families.Chain([families.LowRank(1), families.Scaled(2.0)]), families.Masked(torch.ones(2))], [3, 2]
    ),
    families.Chain([families.Chain([families.FixedRank(1), families.FrobeniusNorm()]), families.Scaled(2.0)]),
    families.Product(
        [families.Product([families.Simplex(), None], [1, 1], dim=-1), families.Kronecker(1, 1)], [2, 3]
    ),
]


@pytest.mark.parametrize("family", NESTED, ids=repr)
def test_nested_families_with_buffers_and_notes(family: Parametrization) -> None:
    value, expected = through_a_file(family, torch.randn(5, 2))
    assert torch.equal(value, expected)


COMPLEX = [
    families.Unitary("cayley"),
    families.Stiefel(),
    families.LowRank(1),
    families.Hermitian(),
    families.PositiveDefinite(),
    families.FixedRankSemidefinite(1),
    families.UnitCircle(),
    families.Butterfly(),
]


@pytest.mark.parametrize("family", COMPLEX, ids=repr)
def test_complex_families(family: Parametrization) -> None:
    value, expected = through_a_file(family, torch.randn(2, 2, dtype=torch.complex64))
    assert value.is_complex()
    assert torch.equal(value, expected)


@pytest.mark.parametrize(
    "case", [case for case in CASES if case.kind in ("complex", "bfloat16")], ids=lambda case: case.id
)
@pytest.mark.slow
def test_the_law_of_specs_holds_in_every_dtype(case: Case) -> None:
    report = check(case.row.family, case.example, laws=["spec"])
    assert report.ok, str(report)


def test_a_spec_is_small_and_stable() -> None:
    family = families.Chain([families.Interval(0.0, 2.0), families.Masked(torch.ones(3))])
    assert family.spec() == {
        "name": "Chain",
        "version": 1,
        "arguments": {
            "families": [
                {
                    "name": "Interval",
                    "version": 1,
                    "arguments": {"lower": 0.0, "upper": 2.0, "map": "sigmoid"},
                },
                {"name": "Masked", "version": 1, "arguments": {"mask": None}},
            ]
        },
    }


def test_what_a_right_inverse_noted_is_in_the_spec() -> None:
    family = families.Product([families.Kronecker(1, 1), None], [1, 1])
    family.right_inverse(torch.ones(2, 1))
    assert family.spec()["state"] == {"counts": [2, 1]}


class Doubled(Parametrization):
    def forward(self, X: Tensor) -> Tensor:
        return 2 * X


def test_a_class_of_ones_own_is_passed_by_name() -> None:
    spec = families.Chain([Doubled()]).spec()
    assert torch.equal(from_spec(spec, also={"Doubled": Doubled})(torch.ones(2)), torch.full((2,), 2.0))


GOOD = families.Scaled(2.0).spec()
REFUSED: list[tuple[Any, dict[str, Any], str]] = [
    ({"name": "Scaled"}, {}, "A spec has the keys arguments, name, version. Got {'name': 'Scaled'}"),
    ({**GOOD, "version": 2}, {}, "Scaled: this spec has version 2, and 1 is the one known here"),
    ({**GOOD, "name": "os.system"}, {}, "'os.system' is no family of the catalogue"),
    ({**GOOD, "name": "from_spec"}, {}, "'from_spec' is no family of the catalogue"),
    ({**GOOD, "arguments": {"factor": 2.0}}, {}, "Scaled does not take these arguments"),
    ({**GOOD, "state": {"counts": [1]}}, {}, "Scaled notes no 'counts'"),
    (GOOD, {"base": torch.zeros(1)}, "Scaled has no buffer 'base'"),
    (families.LowRank(1).spec(), {"middle.base": torch.zeros(1)}, "LowRank has no buffer 'middle.base'"),
]


@pytest.mark.parametrize(("spec", "buffers", "text"), REFUSED, ids=[text[:40] for *_, text in REFUSED])
def test_a_spec_that_cannot_be_built_is_refused(spec: Any, buffers: dict[str, Any], text: str) -> None:
    with pytest.raises(ParametrizationError) as caught:
        from_spec(spec, buffers=buffers)
    assert text in str(caught.value)


def test_functions_have_no_spec() -> None:
    with pytest.raises(
        ParametrizationError, match=r"Custom\(function=...\) has no JSON spec: got a builtin_function"
    ):
        families.Custom(torch.sinh, torch.asinh).spec()
