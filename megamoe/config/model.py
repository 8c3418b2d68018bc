"""Typed configuration of the model: a preset. `run.py` has the command line, `recipe.py` the DeepSpeed JSON.

Every knob has one owner. The preset owns the shape, the DeepSpeed JSON owns precision, ZeRO, batch sizes, clipping,
optimizer and schedule, the command line owns paths and the length of the run. All problems are collected and raised
at once, as sentences that name the value, the limit and the remedy.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from megamoe.config.model_checks import MAX_EXPERTS, MAX_LAYERS, MAX_SIZE, RULES, rotated_dimensions
from megamoe.utils.errors import SoundFields, UserError, broken_rules, shown, unknown_key
from megamoe.utils.json_files import read_json

PRESET_DIR = Path(__file__).parent / "presets"


class JsonModel(BaseModel):
    """Settings of a JSON file: a number in quotes is none, and 1e4 is a whole number."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", strict=True, allow_inf_nan=False, use_attribute_docstrings=True
    )

    @field_validator("*", mode="before")
    @classmethod
    def _read(cls, value: Any) -> Any:
        return _whole(value)


def _whole(value: Any) -> Any:
    return int(value) if isinstance(value, float) and value.is_integer() else value


Size = Annotated[int, Field(gt=0, le=MAX_SIZE)]
BiasRule = Literal["sign", "proportional", "quantile"]


class ModelConfig(JsonModel):
    """Shape of the decoder. Field names are Hugging Face's where it has one."""

    # --- embedding, head and blocks ---
    vocab_size: Size
    """Rows of the embedding and of the head. Token ids must be below it."""
    hidden_size: Size
    """Width of the residual stream."""
    num_hidden_layers: int = Field(gt=0, le=MAX_LAYERS)
    """Decoder blocks."""
    max_position_embeddings: int = Field(gt=1, le=2**32)
    """Longest sequence the model is trained on, and the default sequence length of a run."""
    rms_norm_eps: float = Field(default=1e-5, gt=0)
    """Added to the mean square in every RMSNorm."""
    tie_word_embeddings: bool = True
    """The embedding is the head too."""
    num_nextn_predict_layers: int = Field(default=0, ge=0, le=1)
    """1 trains a further block to predict the token after the next (multi-token prediction, as in DeepSeek-V3)."""
    mtp_loss_coef: float = Field(default=0.3, gt=0)
    """Weight of that block's loss."""
    output_z_loss_coef: float = Field(default=0.0, ge=0)
    """Weight of the mean squared logarithm of the head's softmax denominator."""
    initializer_range: float = Field(default=0.02, gt=0)
    """Standard deviation of the initial weights."""

    # --- attention ---
    num_attention_heads: Size
    """Query heads."""
    num_key_value_heads: Size
    """Key/value heads; each serves num_attention_heads / num_key_value_heads query heads."""
    head_dim: int = Field(ge=4, le=MAX_SIZE, multiple_of=2)
    """Size of a head's query and key; even, since RoPE turns pairs."""
    num_latent_tokens: int = Field(default=0, ge=0, le=MAX_SIZE)
    """Learned, unrotated key/value positions before every sequence, per layer."""
    qk_norm: Literal["head", "full"] | None = None
    """RMSNorm of queries and keys before RoPE: of each head, or over all heads together."""
    attention_bias: bool = False
    """Biases of the query, key and value projections."""
    attention_out_bias: bool = False
    """Bias of attention's output projection."""
    sliding_window: Size | None = None
    """Positions that a query of a sliding layer sees, its own included."""
    layer_types: list[Literal["full_attention", "sliding_attention"]] | None = None
    """Which layers slide, one entry per layer; by default all of them where sliding_window is given."""
    kv_lora_rank: Size | None = None
    """Given, attention is DeepSeek's multi-head latent attention, and this the width of its compressed keys, values."""
    q_lora_rank: Size | None = None
    """Width of compressed queries in latent attention; without it they are not compressed."""
    qk_nope_head_dim: Size | None = None
    """Part of a head's query and key that is not rotated, in latent attention."""
    qk_rope_head_dim: Size | None = None
    """Part that is rotated; the key's is shared by all heads."""
    v_head_dim: Size | None = None
    """Size of a head's value in latent attention."""
    document_attention: bool = False
    """In training, a token sees its own document alone, whose positions begin at 0."""

    # --- positions ---
    rope_theta: float = Field(default=10_000.0, gt=1)
    """Base of the rotary frequencies."""
    rope_interleaved: bool = False
    """Rotate neighbouring pairs (GPT-J) instead of halves (GPT-NeoX, Llama)."""
    rope_scaling: dict[str, Any] | None = None
    """Hugging Face's form: {"rope_type": "linear" | "dynamic" | "yarn" | "llama3", "factor": ..., ...}."""
    partial_rotary_factor: float = Field(default=1.0, gt=0, le=1)
    """Share of a head's dimensions, the first ones, that is rotated."""

    # --- dense layers and experts ---
    intermediate_size: Size
    """Width inside a dense layer, and inside an expert unless moe_intermediate_size is given."""
    moe_intermediate_size: Size | None = None
    """Width inside an expert."""
    hidden_act: Literal["silu", "gelu", "gelu_pytorch_tanh", "relu"] = "silu"
    """Activation inside an expert or a dense layer."""
    gated_mlp: bool = False
    """Three matrices for each: the activation of a gate multiplies what goes in (SwiGLU, GEGLU, ...)."""
    first_k_dense_replace: int = Field(default=0, ge=0, le=MAX_LAYERS)
    """The first so many blocks are dense: one MLP in place of experts."""
    mlp_only_layers: list[int] = []
    """Further dense blocks, by index from 0."""
    num_local_experts: int = Field(gt=0, le=MAX_EXPERTS)
    """Experts per layer (all of them, over all ranks; the name is Mixtral's)."""
    num_experts_per_tok: int = Field(gt=0)
    """Experts that each token is sent to (top-k)."""
    n_shared_experts: int = Field(default=0, ge=0, le=MAX_SIZE)
    """Experts that every token passes, as one MLP of that many times an expert's width."""
    shared_expert_gate: bool = False
    """A sigmoid of the token multiplies what the shared experts give."""
    expert_dropout: float = Field(default=0.0, ge=0, lt=1)
    """Dropout on a routed expert's output."""

    # --- router ---
    router_score: Literal["softmax", "sigmoid"] = "softmax"
    """How logits become scores."""
    norm_topk_prob: bool = True
    """The weights of a token's experts are divided by their sum."""
    routed_scaling_factor: float = Field(default=1.0, gt=0)
    """What the weights are multiplied by after that."""
    n_group: Size = 1
    """Groups of experts, neighbours together."""
    topk_group: Size = 1
    """Groups that a token may choose from: those whose best two experts have the largest sum."""
    router_jitter_noise: float = Field(default=0.0, ge=0, lt=1)
    """Training only: the router's input is multiplied by a uniform draw from 1 - noise to 1 + noise."""

    # --- balance ---
    router_bias: bool = True
    """Select by score + bias, and let the bias follow the load (loss-free balancing)."""
    router_bias_rule: BiasRule = "sign"
    """What moves the bias: the running load ("sign", "proportional"), or the margins of a step ("quantile")."""
    router_bias_rate: float = Field(default=1e-3, ge=0)
    """Step of the balancing bias, in units of the score; 0 leaves it where it is. "quantile" reads no other value."""
    router_load_decay: float = Field(default=0.9, ge=0, lt=1)
    """Decay of the running mean of the expert loads."""
    router_aux_loss_coef: float = Field(default=0.0, ge=0)
    """Weight of the auxiliary balance loss of each layer."""
    router_aux_loss_type: Literal["sequence", "global_batch", "micro_batch"] = "sequence"
    """Whose load that loss takes: each sequence's, the running mean over all ranks, or the micro-batch's of a rank."""
    router_z_loss_coef: float = Field(default=0.0, ge=0)
    """Weight of the mean squared logarithm of the router's softmax denominator, of each layer."""

    @property
    def expert_size(self) -> int:
        """Width inside an expert."""
        return self.moe_intermediate_size or self.intermediate_size

    @property
    def expert_size_field(self) -> str:
        """The field that gives it."""
        return "moe_intermediate_size" if self.moe_intermediate_size else "intermediate_size"

    @property
    def shared_size(self) -> int:
        """Width inside the shared experts; 0 without them."""
        return self.n_shared_experts * self.expert_size

    @property
    def counts_margins(self) -> bool:
        """Whether the routers count the margins of their experts for the balancing bias."""
        moves = self.router_bias and self.router_bias_rate > 0 and self.num_experts_per_tok < self.num_local_experts
        return moves and self.router_bias_rule == "quantile"

    @property
    def value_dim(self) -> int:
        """Size of a head's value."""
        return self.v_head_dim or self.head_dim

    @property
    def rotary_dim(self) -> int:
        """Dimensions of a head that are rotated."""
        return self.qk_rope_head_dim or rotated_dimensions(self.head_dim, self.partial_rotary_factor)

    def is_dense(self, block: int) -> bool:
        """Whether a block, counted from 0, has one MLP in place of experts."""
        return block < self.first_k_dense_replace or block in self.mlp_only_layers

    @property
    def leading_dense_blocks(self) -> int:
        """How many of the first blocks are dense."""
        blocks = range(self.num_hidden_layers)
        return next((block for block in blocks if not self.is_dense(block)), self.num_hidden_layers)

    @property
    def sparse_blocks(self) -> list[int]:
        """The blocks with experts; that of multi-token prediction has the number after the last."""
        blocks = [block for block in range(self.num_hidden_layers) if not self.is_dense(block)]
        return blocks + [self.num_hidden_layers] * self.num_nextn_predict_layers

    def window(self, block: int) -> int | None:
        """Positions that a query of a block sees; None for all before it."""
        slides = self.layer_types is None or self.layer_types[block] == "sliding_attention"
        return self.sliding_window if slides else None

    def __hash__(self) -> int:
        return hash(self.model_dump_json())  # lists and dictionaries have none

    @model_validator(mode="after")
    def _check(self) -> ModelConfig:
        if problems := broken_rules(RULES, self):
            raise UserError(*problems)
        return self


def preset_names() -> list[str]:
    """Names of the presets that ship with megamoe."""
    return sorted(path.stem for path in PRESET_DIR.glob("*.json"))


def load_preset(name: str) -> ModelConfig:
    """Load a shipped preset by name, or one of the user's by the path of its JSON file. Raises UserError."""
    path = Path(name) if name.endswith(".json") else PRESET_DIR / f"{name}.json"
    if not path.exists():
        raise UserError(
            f"preset {name!r} does not exist; use one of {', '.join(preset_names())}, or the path of a .json file or a "
            "Hugging Face directory."
        )
    return validate(ModelConfig, read_json(path), str(path))


def validate(model: type[Any], values: Any, where: str) -> Any:
    """Build a pydantic `model` from `values`; every problem becomes one sentence of a single UserError."""
    if not isinstance(values, dict):
        raise UserError(f"{where}: is {shown(values)} where an object of settings is needed; change it.")
    try:
        return model(**values)
    except UserError as error:
        raise UserError(*(f"{where}: {problem}" for problem in error.problems)) from None
    except ValidationError as error:
        problems = sentences(error.errors(), where, list(model.model_fields))
        if model is ModelConfig:
            wrong = {detail["loc"][0] for detail in error.errors()}
            defaults = {name: field.default for name, field in model.model_fields.items() if not field.is_required()}
            sound = {name: _whole(value) for name, value in {**defaults, **values}.items() if name not in wrong}
            problems += [f"{where}: {problem}" for problem in broken_rules(RULES, SoundFields(**sound))]
        raise UserError(*problems) from None


def sentences(details: list[Any], where: str, known: list[str]) -> list[str]:
    """What pydantic has found, one sentence for each problem.

    Args:
        details: the `errors()` of a ValidationError.
        where: the values are from.
        known: names of values.
    """
    return [_sentence(detail, where, known) for detail in details]


def _sentence(detail: Any, where: str, known: list[str]) -> str:
    key = ".".join(str(part) for part in detail["loc"])
    if detail["type"] == "extra_forbidden":
        return unknown_key(where, key, known)
    if detail["type"] == "missing":
        choice = ' as "linear", for DeepSpeed\'s own default is "log"' if key == "warmup_type" else ""
        return f'{where}: "{key}" is missing; add it{choice}.'
    if detail["type"] == "value_error":
        return f"{where}: {key}: {detail['msg'].removeprefix('Value error, ')}"
    value, rule = detail["input"], detail["msg"].removeprefix("Input ")
    why = ""
    if value == "auto":
        why = ", which only Hugging Face's Trainer fills in"
    elif isinstance(value, str) and detail["type"] in ("float_type", "int_type", "bool_type"):
        why = ", a text in quotes"
    return f'{where}: "{key}" is {shown(value)}{why}, but it {rule}; change it.'
