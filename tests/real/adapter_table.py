"""Every type of adapter that torchkiln merges, as PEFT builds it: on a net of small layers, and on small models."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

__all__ = ["CASES", "MODELS", "Case", "ModelCase", "Net"]


class Net(nn.Module):
    """One layer of each kind that adapters are made for; only the linear ones run."""

    def __init__(self) -> None:
        super().__init__()
        self.emb = nn.Embedding(11, 8)
        self.norm = nn.LayerNorm(8)
        self.lin = nn.Linear(8, 12)
        self.square = nn.Linear(12, 12)
        self.head = nn.Linear(12, 3)
        self.conv = nn.Conv2d(4, 6, 3)
        self.one = nn.Conv2d(4, 6, 1)
        self.flat = nn.Conv1d(4, 6, 3)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.head(self.square(self.lin(self.norm(self.emb(x)))))
        return result


@dataclass(frozen=True)
class Case:
    """A PEFT configuration by the name of its class."""

    name: str
    config: str
    options: dict[str, Any] = field(default_factory=dict)


LINEAR = ["lin", "square"]
CONVOLUTIONS = ["lin", "conv", "one", "flat"]
EVERY = ["emb", *CONVOLUTIONS, "square"]


def lora(name: str, **options: Any) -> Case:
    return Case(name, "LoraConfig", {"r": 2, "lora_alpha": 5, **options})


def oft(name: str, **options: Any) -> Case:
    return Case(name, "OFTConfig", {"r": 0, "oft_block_size": 4, "target_modules": LINEAR, **options})


CASES = [
    lora("lora", target_modules=EVERY),
    lora(
        "lora that saves a module and every bias",
        target_modules=["lin"],
        modules_to_save=["head"],
        bias="all",
    ),
    lora("lora with a bias of its own", target_modules=LINEAR, lora_bias=True),
    lora("lora with its layers' biases", target_modules=LINEAR, bias="lora_only"),
    lora("rslora", target_modules=["lin", "conv"], use_rslora=True),
    lora(
        "ranks and alphas by pattern",
        target_modules=EVERY,
        rank_pattern={"lin": 3, "^conv": 4},
        alpha_pattern={"square": 7, "(one|flat)": 1},
    ),
    lora("dora", target_modules=EVERY, use_dora=True),
    lora("dora on rslora", target_modules=LINEAR, use_dora=True, use_rslora=True),
    lora("lora with tokens", target_modules=["lin"], trainable_token_indices={"emb": [1, 3]}),
    lora("lora on tokens' own layer", target_modules=["emb"]),
    lora("lora on a parameter", target_modules=[], target_parameters=["lin.weight"]),
    Case(
        "adalora",
        "AdaLoraConfig",
        {
            "target_modules": ["lin", "square", "conv"],
            "init_r": 3,
            "target_r": 2,
            "total_step": 9,
            "lora_alpha": 4,
        },
    ),
    Case(
        "loha",
        "LoHaConfig",
        {
            "r": 2,
            "alpha": 3,
            "target_modules": CONVOLUTIONS,
            "use_effective_conv2d": True,
            "init_weights": False,
        },
    ),
    Case("loha, flat", "LoHaConfig", {"r": 2, "target_modules": CONVOLUTIONS, "init_weights": False}),
    Case(
        "lokr",
        "LoKrConfig",
        {"r": 2, "alpha": 3, "target_modules": CONVOLUTIONS, "decompose_both": True, "init_weights": False},
    ),
    Case("lokr, flat", "LoKrConfig", {"r": 1, "target_modules": CONVOLUTIONS, "init_weights": False}),
    Case(
        "lokr with a core",
        "LoKrConfig",
        {
            "r": 1,
            "target_modules": ["conv"],
            "use_effective_conv2d": True,
            "decompose_both": True,
            "decompose_factor": 2,
            "init_weights": False,
        },
    ),
    Case(
        "ia3",
        "IA3Config",
        {"target_modules": ["lin", "square", "conv", "head"], "feedforward_modules": ["square"]},
    ),
    Case("ia3 on inputs", "IA3Config", {"target_modules": ["conv"], "feedforward_modules": ["conv"]}),
    oft("oft", target_modules=["emb", "lin", "conv"]),
    oft("oft with one block", block_share=True),
    oft("oft, exact", use_cayley_neumann=False),
    oft("oft, three terms", num_cayley_neumann_terms=3),
    oft("oft, two terms", num_cayley_neumann_terms=2),
    oft("oft, constrained", coft=True, eps=0.1),
    Case("boft", "BOFTConfig", {"boft_block_size": 4, "target_modules": LINEAR}),
    Case("vera", "VeraConfig", {"r": 3, "target_modules": [*LINEAR, "head"], "save_projection": True}),
    Case(
        "vera from its seed",
        "VeraConfig",
        {"r": 3, "target_modules": [*LINEAR, "head"], "save_projection": False},
    ),
    Case("hra", "HRAConfig", {"r": 2, "target_modules": ["lin", "conv"]}),
    Case("hra, orthogonal", "HRAConfig", {"r": 2, "target_modules": ["lin", "conv"], "apply_GS": True}),
    Case("fourierft", "FourierFTConfig", {"n_frequency": 10, "target_modules": LINEAR, "scaling": 20.0}),
    Case("ln_tuning", "LNTuningConfig", {"target_modules": ["norm"]}),
    Case("tokens", "TrainableTokensConfig", {"target_modules": ["emb"], "token_indices": [1, 3]}),
    Case("miss", "MissConfig", {"r": 3, "target_modules": ["lin"]}),
    Case("miss, bat", "MissConfig", {"r": 2, "target_modules": LINEAR, "init_weights": "bat"}),
    Case(
        "miss, mini", "MissConfig", {"r": 2, "mini_r": 4, "target_modules": ["lin"], "init_weights": "mini"}
    ),
    Case("c3a", "C3AConfig", {"block_size": 4, "target_modules": LINEAR}),
    Case("delora", "DeloraConfig", {"r": 2, "target_modules": LINEAR}),
    Case("hira", "HiraConfig", {"r": 2, "target_modules": ["emb", "lin", "conv"]}),
    Case("road_1", "RoadConfig", {"group_size": 4, "target_modules": LINEAR}),
    Case("road_2", "RoadConfig", {"group_size": 4, "variant": "road_2", "target_modules": LINEAR}),
    Case("road_4", "RoadConfig", {"group_size": 4, "variant": "road_4", "target_modules": LINEAR}),
    Case("shira", "ShiraConfig", {"r": 1, "target_modules": LINEAR}),
    Case(
        "vblora",
        "VBLoRAConfig",
        {"r": 2, "num_vectors": 6, "vector_length": 4, "topk": 2, "target_modules": LINEAR},
    ),
    Case(
        "randlora", "RandLoraConfig", {"r": 2, "target_modules": [*LINEAR, "head"], "save_projection": True}
    ),
]


@dataclass(frozen=True)
class ModelCase:
    """A small model of transformers with random weights, and an adapter for it."""

    name: str
    build: Callable[[], Any]
    config: str
    options: dict[str, Any]


def _llama() -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    size = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4}
    return LlamaForCausalLM(
        LlamaConfig(vocab_size=32, num_key_value_heads=2, max_position_embeddings=16, **size)
    )


def _gpt2() -> Any:
    from transformers import GPT2Config, GPT2LMHeadModel

    return GPT2LMHeadModel(GPT2Config(vocab_size=32, n_embd=16, n_layer=2, n_head=2, n_positions=16))


def _t5() -> Any:
    from transformers import T5Config, T5ForConditionalGeneration

    return T5ForConditionalGeneration(
        T5Config(vocab_size=32, d_model=16, d_kv=4, d_ff=24, num_layers=2, num_heads=4)
    )


def _bert() -> Any:
    from transformers import BertConfig, BertForSequenceClassification

    size = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4}
    return BertForSequenceClassification(BertConfig(vocab_size=32, max_position_embeddings=16, **size))


_ATTENTION = {"target_modules": ["q_proj", "v_proj"]}

MODELS = [
    ModelCase("llama, lora", _llama, "LoraConfig", {"r": 4, "target_modules": "all-linear"}),
    ModelCase("llama, dora", _llama, "LoraConfig", {"r": 4, "use_dora": True, **_ATTENTION}),
    ModelCase(
        "llama, embeddings", _llama, "LoraConfig", {"r": 4, "target_modules": ["embed_tokens", "lm_head"]}
    ),
    ModelCase(
        "llama, ia3",
        _llama,
        "IA3Config",
        {"target_modules": ["k_proj", "down_proj"], "feedforward_modules": ["down_proj"]},
    ),
    ModelCase("llama, oft", _llama, "OFTConfig", {"r": 0, "oft_block_size": 8, **_ATTENTION}),
    ModelCase("gpt2, lora", _gpt2, "LoraConfig", {"r": 4, "target_modules": ["c_attn", "c_proj", "c_fc"]}),
    ModelCase(
        "gpt2, dora", _gpt2, "LoraConfig", {"r": 4, "use_dora": True, "target_modules": ["c_attn", "c_proj"]}
    ),
    ModelCase(
        "gpt2, ia3",
        _gpt2,
        "IA3Config",
        {"target_modules": ["c_attn", "c_proj"], "feedforward_modules": ["c_proj"]},
    ),
    ModelCase("gpt2, vera", _gpt2, "VeraConfig", {"r": 4, "target_modules": ["c_attn"]}),
    ModelCase("t5, lora", _t5, "LoraConfig", {"r": 4, "target_modules": ["q", "v"]}),
    ModelCase(
        "t5, lora on its tied embedding", _t5, "LoraConfig", {"r": 4, "target_modules": ["shared", "q"]}
    ),
    ModelCase(
        "bert, lora and a head",
        _bert,
        "LoraConfig",
        {"r": 4, "target_modules": ["query", "value"], "task_type": "SEQ_CLS"},
    ),
    ModelCase(
        "bert, loha", _bert, "LoHaConfig", {"r": 4, "target_modules": ["query"], "init_weights": False}
    ),
]
