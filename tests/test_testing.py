"""The laws can fail: for each there is a twin of a working parametrization that breaks it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from torchkiln import Parametrization as Base
from torchkiln import ParametrizationError
from torchkiln.families import Positive, Symmetric
from torchkiln.testing import check
from torchkiln.testing.__main__ import main
from torchkiln.testing._catalogue import rows
from torchkiln.testing._laws import LAWS
from torchkiln.testing._report import Report, Result, matrix


class Twin(Base):
    """Symmetric matrices, done right; each offender below does one thing wrong."""

    event_dim = 2

    def forward(self, X: Tensor) -> Tensor:
        return (X + X.mT) / 2

    def right_inverse(self, A: Tensor) -> Tensor:
        return (A + A.mT) / 2

    def residual(self, A: Tensor) -> Tensor:
        return (A - A.mT).abs().max().double()

    def _from_normal(self, Z: Tensor) -> Tensor:
        return self(Z)


class OtherDtype(Twin):
    def forward(self, X):
        return super().forward(X).half()


class NoMember(Twin):
    def forward(self, X):
        return X


class NoInverse(Twin):
    def right_inverse(self, A):
        return super().right_inverse(A) / 2


class Drifting(Twin):
    """Right to begin with, and off the constraint once its originals have moved far enough."""

    def forward(self, X):
        return torch.where(X[..., :1, :1] > 0.99, super().forward(X), X)


class WrongGradient(Twin):
    def forward(self, X):
        return super().forward(X).detach() + X - X.detach()


class WholeTensor(Twin):
    def forward(self, X):
        return super().forward(X) * (1 + X.sum().sigmoid())


class NotTraceable(Twin):
    def forward(self, X):
        return super().forward(X) if float(X.detach().sum()) < 1e9 else X


class NotMappable(Twin):
    def forward(self, X):
        return super().forward(torch.tensor(X.tolist(), dtype=X.dtype)) + 0 * X


class Unpicklable(Twin):
    def __init__(self):
        super().__init__()
        self.secret = lambda: 0


class Random(Twin):
    def forward(self, X):
        return super().forward(X) + torch.rand(())


class Permissive(Twin):
    """Its repr is harmless, and it makes ``forward`` deaf to what is put in its place."""

    def __call__(self, *originals):
        return type(self).forward(self, *originals)


class Secretive(Twin):
    """An argument that is no attribute is lost to the spec."""

    def __init__(self, factor=1.0):
        super().__init__()
        self.factor = 1.0
        self.hidden = 3.0

    def forward(self, X):
        return super().forward(X) * self.hidden

    def right_inverse(self, A):
        self.hidden = 2.0
        return super().right_inverse(A) / 2


class OffSample(Twin):
    def _from_normal(self, Z):
        return Z


OFFENDERS = [
    (OtherDtype, "shape", "dtype torch.float16, not torch.float64"),
    (NoMember, "membership", "from the constraint"),
    (NoInverse, "inverse", "a value it had computed is off by"),
    (Drifting, "training", "from the constraint"),
    (WrongGradient, "gradient", "the gradient is wrong"),
    (WholeTensor, "batch", "element 0 is off by"),
    (NotTraceable, "compile", ""),
    (NotMappable, "functional", "RuntimeError"),
    (Unpicklable, "copy", "pickle"),
    (Random, "bake", "the baked value is another one"),
    (Permissive, "refusal", "a value of another shape was accepted"),
    (Secretive, "spec", "what its spec builds computes another value"),
    (OffSample, "sample", "the sample is"),
]
EXAMPLE = torch.eye(3, dtype=torch.float64) + torch.arange(9, dtype=torch.float64).view(3, 3) / 10


def test_the_twin_without_a_fault_obeys_every_law() -> None:
    report = check(Twin(), EXAMPLE)
    assert [result.outcome for result in report.results] == ["passed"] * len(LAWS), str(report)


@pytest.mark.parametrize(
    ("offender", "law", "text"), OFFENDERS, ids=lambda value: getattr(value, "__name__", "")
)
def test_a_law_can_fail(offender: type[nn.Module], law: str, text: str) -> None:
    (result,) = check(offender(), EXAMPLE, laws=[law]).results
    assert result.outcome == "failed"
    assert text in result.detail


def test_every_law_has_an_offender() -> None:
    assert {law for _, law, _ in OFFENDERS} == set(LAWS)


class Doubled(nn.Module):
    """A parametrization of the old kind: no base class, no inverse."""

    def forward(self, X: Tensor) -> Tensor:
        return 2 * X


def test_any_module_can_be_checked() -> None:
    report = check(Doubled(), EXAMPLE)
    assert report.ok
    skipped = {result.law: result.detail for result in report.results if result.outcome == "skipped"}
    assert skipped == {
        "membership": "it has no residual()",
        "inverse": "it has no right_inverse()",
        "batch": "it acts on the tensor as a whole",
        "spec": "it has no spec()",
        "sample": "it has no sample()",
    }


def test_what_is_checked_stays_as_it_is() -> None:
    family, example = Symmetric(), EXAMPLE.clone()
    check(family, example)
    assert torch.equal(example, EXAMPLE)
    assert not family.state_dict()


def test_an_unknown_law_is_named() -> None:
    with pytest.raises(ParametrizationError, match="There is no law 'beauty'; there are shape, membership"):
        check(Symmetric(), EXAMPLE, laws=["beauty"])


def test_a_report_reads_as_a_table() -> None:
    report = Report("Mine()", (Result("shape", "passed"), Result("inverse", "failed", "off by 3")))
    assert str(report) == "Mine()\n  shape    passed\n  inverse  failed   off by 3"
    assert not report.ok
    assert report.failed == report.results[1:]


def test_the_matrix_shows_failures_below_the_table() -> None:
    good = Report("Good()", (Result("shape", "passed"), Result("sample", "skipped")))
    bad = Report("Bad()", (Result("shape", "failed", "2 dims"), Result("sample", "passed")))
    assert matrix([good, bad]).splitlines() == [
        "       shape",
        "       | sample",
        "Good() + .",
        "Bad()  X +",
        "",
        "+ holds: 2   . does not apply: 1   X broken: 1",
        "Bad(): shape: 2 dims",
    ]


def test_the_command_prints_families_and_laws(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["Symmetric", "Positive"]) == 0
    said = capsys.readouterr().out
    lines = said.splitlines()
    stairs, table = lines[: len(LAWS)], lines[len(LAWS) :]
    assert [line.split()[-1] for line in stairs] == list(LAWS)
    assert [line.split("(")[0] for line in table[:4]] == ["Positive"] * 3 + ["Symmetric"]
    assert "X broken: 0" in said


def test_the_command_refuses_what_is_no_family(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["Nonsense"])
    assert "no family is called Nonsense" in capsys.readouterr().err


def test_the_matrix_of_the_whole_catalogue_fits_a_terminal() -> None:
    results = tuple(Result(law, "passed") for law in LAWS)
    lines = matrix(Report(row.label, results) for row in rows()).splitlines()
    assert len(lines) == len(LAWS) + len(list(rows())) + 2
    assert max(map(len, lines)) <= 80


def test_rows_are_made_anew_for_each_caller() -> None:
    first, second = next(rows()), next(rows())
    assert first.family is not second.family


def test_the_repr_shows_what_is_not_the_default() -> None:
    assert repr(Positive()) == "Positive()"
    assert repr(Positive("exp")) == "Positive(map='exp')"
