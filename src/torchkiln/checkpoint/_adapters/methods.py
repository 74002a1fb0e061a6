"""The types of adapters: the tensors each has, the settings it reads, and its rule; and those that cannot be merged."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from torchkiln._core.errors import CheckpointError
from torchkiln.checkpoint._adapters import lora, patterns, products, rotations, shared
from torchkiln.checkpoint._adapters.edits import Edit
from torchkiln.checkpoint._adapters.settings import Settings
from torchkiln.checkpoint._adapters.target import Target

__all__ = ["METHODS", "Method", "method_of"]


@dataclass(frozen=True)
class Method:
    """One type of adapter.

    Attributes:
        parts: The names of its tensors.
        settings: The settings that its rule reads.
        rule: Gives the changes to one module.
    """

    parts: tuple[str, ...]
    settings: tuple[str, ...]
    rule: Callable[[Target], list[Edit]]


# The rows of an embedding that were trained; any LoRA may have them too.
_TOKENS = ("token_adapter", "trainable_tokens_delta")


def _lora(target: Target) -> list[Edit]:
    part = next((part for part in target.parts if part.startswith(_TOKENS)), None)
    if part is None:
        return lora.lora(target)
    own = {name for name in target.parts if name.startswith("lora")}
    return [*products.tokens(target, part), *(lora.lora(target) if own else [])]


METHODS = {
    "LORA": Method(
        (
            "lora_A",
            "lora_B",
            "lora_embedding_A",
            "lora_embedding_B",
            "lora_magnitude_vector",
            *_TOKENS,
        ),
        (
            "r",
            "lora_alpha",
            "rank_pattern",
            "alpha_pattern",
            "use_rslora",
            "use_dora",
            "lora_bias",
            "fan_in_fan_out",
            "target_parameters",
            "trainable_token_indices",
        ),
        _lora,
    ),
    "ADALORA": Method(
        ("lora_A", "lora_B", "lora_E"),
        ("r", "lora_alpha", "init_r", "rank_pattern", "fan_in_fan_out"),
        lora.adalora,
    ),
    "BOFT": Method(
        ("boft_R", "boft_s"),
        ("boft_block_size", "boft_block_num", "boft_n_butterfly_factor"),
        rotations.boft,
    ),
    "C3A": Method(("c3a_kernel",), ("block_size", "block_size_pattern"), patterns.c3a),
    "DELORA": Method(
        ("delora_A", "delora_B", "delora_lambda", "delora_w_norm"),
        ("r", "delora_lambda", "rank_pattern", "lambda_pattern"),
        shared.delora,
    ),
    "FOURIERFT": Method(
        ("fourierft_spectrum",),
        ("n_frequency", "scaling", "random_loc_seed", "fan_in_fan_out"),
        patterns.fourierft,
    ),
    "HIRA": Method(
        ("hira_A", "hira_B", "hira_embedding_A", "hira_embedding_B"),
        ("r", "rank_pattern", "fan_in_fan_out"),
        lora.hira,
    ),
    "HRA": Method(("hra_u",), ("r", "apply_GS", "rank_pattern"), rotations.hra),
    "IA3": Method(("ia3_l",), ("feedforward_modules", "fan_in_fan_out"), products.ia3),
    "LN_TUNING": Method(("ln_tuning_layers",), (), products.layer_norm),
    "LOHA": Method(
        ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "hada_t1", "hada_t2"),
        ("r", "alpha", "rank_pattern", "alpha_pattern", "use_effective_conv2d"),
        products.loha,
    ),
    "LOKR": Method(
        ("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2"),
        ("r", "alpha", "rank_pattern", "alpha_pattern", "use_effective_conv2d"),
        products.lokr,
    ),
    "MISS": Method(("miss_block",), ("r", "mini_r"), patterns.miss),
    "OFT": Method(
        ("oft_R", "oft_embedding_R"),
        (
            "r",
            "oft_block_size",
            "coft",
            "eps",
            "block_share",
            "use_cayley_neumann",
            "num_cayley_neumann_terms",
            "fan_in_fan_out",
        ),
        rotations.oft,
    ),
    "RANDLORA": Method(
        ("randlora_A", "randlora_B", "randlora_lambda", "randlora_gamma"),
        ("r", "randlora_alpha", "fan_in_fan_out", "save_projection", "projection_prng_key"),
        shared.randlora,
    ),
    "ROAD": Method(("road_theta", "road_alpha"), ("variant", "group_size"), rotations.road),
    "SHIRA": Method(("shira_weight", "shira_indices"), ("r",), patterns.shira),
    "TRAINABLE_TOKENS": Method(
        _TOKENS, ("token_indices",), partial(products.tokens, part="trainable_tokens_delta")
    ),
    "VBLORA": Method(
        ("vblora_logits_A", "vblora_logits_B", "vblora_vector_bank"),
        ("r", "topk", "num_vectors", "vector_length", "fan_in_fan_out"),
        shared.vblora,
    ),
    "VERA": Method(
        ("vera_A", "vera_B", "vera_lambda_b", "vera_lambda_d"),
        ("r", "fan_in_fan_out", "save_projection", "projection_prng_key"),
        shared.vera,
    ),
}

# They add inputs, or modules that run beside the model: no weight of the base stands for them.
_NOT_WEIGHTS = frozenset(
    {
        "ADAPTION_PROMPT",
        "CARTRIDGE",
        "CPT",
        "MULTITASK_PROMPT_TUNING",
        "POLY",
        "PREFIX_TUNING",
        "PROMPT_TUNING",
        "P_TUNING",
        "XLORA",
    }
)


def method_of(settings: Settings) -> Method:
    """Return the type of an adapter.

    Raises:
        CheckpointError: It cannot be merged, or is not known here.
    """
    kind = settings.kind
    if kind in _NOT_WEIGHTS:
        raise CheckpointError(
            f"{settings.path}: {kind} adds to what the model reads or does, not to its weights: it cannot be merged."
        )
    if kind not in METHODS:
        raise CheckpointError(
            f"{settings.path}: the peft_type {kind!r:.40} is not known here. Known are {', '.join(METHODS)}.\n"
            "Merge it with PEFT."
        )
    method = METHODS[kind]
    settings.check_known(method.settings)
    return method
