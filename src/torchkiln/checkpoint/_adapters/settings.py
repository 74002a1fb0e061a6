"""What ``adapter_config.json`` says, taken as data: the type of an adapter, its numbers, and their exceptions.

Nothing in it is run. Patterns are regular expressions, as in PEFT; those that could take very long are refused. A
setting that is not known here and is switched on changes the arithmetic in a way that cannot be followed: it is
refused by its name.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

from torchkiln._core.errors import CheckpointError
from torchkiln.checkpoint._bytes import InputFile

__all__ = ["FILE", "Settings", "read_settings"]

FILE = "adapter_config.json"
_LARGEST = 16 << 20
_MOST_REPEATS = 6

# They describe training, where the adapter is put, or where it came from; merging does not depend on them.
_OF_NO_EFFECT = frozenset(
    {
        "auto_mapping",
        "base_model_name_or_path",
        "beta1",
        "beta2",
        "bias",
        "corda_config",
        "d_initial",
        "decompose_both",
        "decompose_factor",
        "deltaT",
        "ephemeral_gpu_offload",
        "eva_config",
        "exclude_modules",
        "inference_mode",
        "init_ia3_weights",
        "init_logits_std",
        "init_lora_weights",
        "init_r",
        "init_vector_bank_bound",
        "init_weights",
        "layers_pattern",
        "layers_to_transform",
        "lora_ga_config",
        "mask_type",
        "megatron_core",
        "modules_to_save",
        "n_frequency_pattern",
        "orth_reg_weight",
        "peft_type",
        "peft_version",
        "qalora_group_size",
        "random_seed",
        "rank_dropout_scale",
        "revision",
        "runtime_config",
        "target_modules",
        "target_r",
        "task_type",
        "tfinal",
        "tinit",
        "total_step",
    }
)
# Of these initializations the first step changes the base itself, and the folder does not hold that change.
_CHANGING_THE_BASE = ("corda", "lora_ga", "loftq", "olora", "pissa")


class Settings:
    """The settings of one adapter.

    Args:
        path: Where they were read, for messages.
        values: What was read.
    """

    def __init__(self, path: Path, values: Mapping[str, Any]) -> None:
        self.path, self._values = path, values

    @property
    def kind(self) -> str:
        """The type, as PEFT spells it: ``"LORA"``."""
        kind = self._values.get("peft_type")
        if not isinstance(kind, str):
            raise CheckpointError(f'{self.path}: has no "peft_type". Is this the folder of a PEFT adapter?')
        return kind.upper()

    def says(self, name: str) -> Any:
        """Return a setting as it was read, None where it is missing."""
        return self._values.get(name)

    def flag(self, name: str) -> bool:
        """Return a setting that is true or false; false where it is missing."""
        value = self._values.get(name)
        if value not in (None, True, False):
            raise self._wrong(name, "true or false", value)
        return bool(value)

    def number(
        self, name: str, default: float | None = None, *, module: str = "", pattern: str = ""
    ) -> float:
        """Return a number, for one module where there are exceptions by pattern.

        Args:
            name: The setting.
            default: What it is where it is missing; None where it must be there.
            module: Which module.
            pattern: The setting that maps patterns of module names to exceptions.

        Raises:
            CheckpointError: It is no number.
        """
        value = self._values.get(name)
        value = self._exception(pattern, module, value) if pattern else value
        value = default if value is None else value
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise self._wrong(name, "a number", value)
        return value

    def names(self, name: str) -> list[str]:
        """Return a list of names; empty where it is missing."""
        value = self._values.get(name)
        if value is None:
            return []
        if not isinstance(value, list) or not all(isinstance(one, str) for one in value):
            raise self._wrong(name, "a list of names", value)
        return value

    def check_known(self, known: Iterable[str]) -> None:
        """Raise unless every setting that is switched on is known here.

        Args:
            known: Those that the type's rule reads.

        Raises:
            CheckpointError: Names the first other one.
        """
        self._check_initialization()
        fine = _OF_NO_EFFECT.union(known)
        for name, value in self._values.items():
            if value and name not in fine and "dropout" not in name:
                raise CheckpointError(
                    f"{self.path}: {name} is set to {value!r:.80}, and how that changes a {self.kind} adapter is not "
                    "known here.\nMerge it with PEFT."
                )

    def _check_initialization(self) -> None:
        value = self._values.get("init_lora_weights")
        if isinstance(value, str) and value.startswith(_CHANGING_THE_BASE):
            raise CheckpointError(
                f"{self.path}: init_lora_weights is {value!r}: training began by changing the base, and the folder "
                "does not hold that change.\nConvert it with PEFT first (save_pretrained with "
                "path_initial_model_for_weight_conversion)."
            )

    def _exception(self, name: str, module: str, value: Any) -> Any:
        patterns = self._values.get(name) or {}
        if not isinstance(patterns, dict):
            raise self._wrong(name, "a mapping from patterns to numbers", patterns)
        return next((own for pattern, own in patterns.items() if self.matches(pattern, module)), value)

    def matches(self, pattern: str, module: str) -> bool:
        """Tell whether a pattern fits the end of a module's name, from the start of one of its parts.

        Raises:
            CheckpointError: It is no regular expression, or one that may take very long.
        """
        if module == pattern or module.endswith(f".{pattern}"):
            return True
        repeats = len(re.findall(r"[*+{]", pattern))
        if repeats > _MOST_REPEATS or re.search(r"\)[*+{]", pattern):
            raise CheckpointError(f"{self.path}: the pattern {pattern!r:.80} is too complex to be tried.")
        try:
            return re.fullmatch(rf"(?:.*\.)?(?:{pattern})", module) is not None
        except re.error as error:
            raise CheckpointError(f"{self.path}: {pattern!r:.80} is no pattern: {error}.") from None

    def _wrong(self, name: str, expected: str, value: Any) -> CheckpointError:
        return CheckpointError(f"{self.path}: {name}: expected {expected}, got {value!r:.80}.")


def read_settings(folder: Path) -> Settings:
    """Read the settings of the adapter in a folder.

    Raises:
        CheckpointError: They are missing, or are not settings.
    """
    path = folder / FILE
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: expected the folder of a PEFT adapter, got {_got(folder)}.")
    if not path.exists():
        raise CheckpointError(
            f"{folder}: has no {FILE}: not the folder of a PEFT adapter. Name the folder that holds it."
        )
    with closing(InputFile(path)) as file:
        text = file.read(0, min(file.size, _LARGEST))
    try:
        values = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: is no JSON: {error}.") from error
    if not isinstance(values, dict):
        raise CheckpointError(f"{path}: expected settings by name, got a {type(values).__name__}.")
    return Settings(path, values)


def _got(path: Path) -> str:
    return "a file" if path.exists() else "nothing there"
