"""State dicts of the models of public libraries, in every spelling."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from model_table import ModelCase
from test_real_models import ALL, ON_THE_NEW_API, SELF_NORMED, build, outputs
from torch import Tensor, nn

import torchkiln

pytestmark = [
    pytest.mark.real,
    pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning"),
]

SPELLINGS = pytest.mark.parametrize("spelling", ["plain", "legacy", "torch"])


def assert_near(ours: list[Tensor], theirs: list[Tensor]) -> None:
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@SPELLINGS
# Spectral norms as they are initialized divide by an estimate: their plain values are not of norm 1, and change.
@pytest.mark.filterwarnings("ignore:.*loaded is the projection:torchkiln.TorchkilnWarning")
@pytest.mark.parametrize("case", ALL)
def test_every_spelling_of_a_model_loads_into_another(case: ModelCase, spelling: Any) -> None:
    first, second = build(case), build(case, seed=1)
    state = torchkiln.state_dict(first, spelling=spelling)
    assert repr(torchkiln.load_state_dict(second, state)) == "<All keys matched successfully>"
    if "spectral" not in case.name or spelling != "plain":
        assert_near(outputs(second, case), outputs(first, case))


@SPELLINGS
@pytest.mark.parametrize("case", ON_THE_NEW_API)
def test_a_model_on_our_core_loads_every_spelling_itself(case: ModelCase, spelling: Any) -> None:
    first, second = build(case), build(case, seed=1, core="torchkiln")
    assert not second.load_state_dict(torchkiln.state_dict(first, spelling=spelling)).missing_keys
    assert_near(outputs(second, case), outputs(first, case))


@SPELLINGS
@pytest.mark.parametrize("case", ALL)
def test_plain_and_normed_models_exchange_state_dicts(case: ModelCase, spelling: Any) -> None:
    normed, plain = build(case), build(case, seed=1)
    torchkiln.bake(plain)
    torchkiln.load_state_dict(plain, torchkiln.state_dict(normed, spelling=spelling))
    assert_near(outputs(plain, case), outputs(normed, case))
    assert list(torchkiln.state_dict(normed, spelling="plain")) == list(plain.state_dict())


@pytest.mark.parametrize("spelling", ["torch", "legacy"])
@pytest.mark.parametrize("case", [param for param in SELF_NORMED if param.id != "encodec"])
def test_transformers_loads_what_is_written_without_a_word(
    case: ModelCase, spelling: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model: nn.Module = build(case)
    model.save_pretrained(tmp_path, state_dict=torchkiln.state_dict(model, spelling=spelling))  # type: ignore[operator]
    transformers_logger = __import__("transformers").utils.logging.get_logger("transformers")
    transformers_logger.propagate = True
    try:
        loaded, info = type(model).from_pretrained(tmp_path, output_loading_info=True)  # type: ignore[attr-defined]
    finally:
        transformers_logger.propagate = False
    assert {key: found for key, found in info.items() if found} == {}
    assert [record.getMessage() for record in caplog.records if record.levelno >= 30] == []
    torch.testing.assert_close(outputs(loaded, case), outputs(model, case), rtol=0, atol=0)
