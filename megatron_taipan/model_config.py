"""What describes a network: sizes, pattern and options of its layers. A run's other options are in config.py."""

from pydantic import field_validator, model_validator

from megatron_taipan.gate_config import GateConfig
from megatron_taipan.layer_kinds.registry import kind_of, kinds_of
from megatron_taipan.pattern import parse_pattern
from megatron_taipan.section import Section, option


class MambaConfig(Section):
    """Mamba-2 blocks (`M`); arXiv 2405.21060."""

    d_state: int = option(128, "size of the SSM state per channel", ge=1)
    headdim: int = option(64, "channels per SSM head", ge=1)
    expand: int = option(2, "d_inner = expand * d_model", ge=1)
    n_groups: int = option(1, "groups that share one B and C", ge=1)
    d_conv: int = option(4, "width of the causal convolution", ge=2)
    chunk_size: int = option(256, "tokens per chunk of the SSD scan; changes speed, not results", ge=1)
    conv_bias: bool = option(True, "whether the convolution has a bias")
    a_init: tuple[float, float] = option((1.0, 16.0), "range of -A at initialisation, uniform")
    dt_init: tuple[float, float] = option((1e-3, 0.1), "range of dt at initialisation, log-uniform")
    dt_init_floor: float = option(1e-4, "least dt at initialisation", gt=0)

    @field_validator("a_init", "dt_init")
    @classmethod
    def _logarithm_exists(cls, limits: tuple[float, float]) -> tuple[float, float]:
        """Values drawn from the range are stored as logarithms: NaN below 0, from the first step on."""
        if not 0 < limits[0] <= limits[1]:
            raise ValueError(f"{list(limits)} must be [low, high] with 0 < low <= high")
        return limits


class AttentionConfig(Section):
    """Attention of every kind (`S`, `W`, `A`)."""

    n_heads: int = option(12, "query heads", ge=1)
    n_kv_heads: int | None = option(None, "key and value heads; null means n_heads", ge=1)
    head_dim: int | None = option(None, "size of a head; null means d_model / n_heads", ge=1)
    window: int = option(2048, "tokens that a query of S or W sees, itself included", ge=1)
    rope_theta: float = option(500_000.0, "base of the rotary embedding (A only)", gt=0)


class ModelConfig(Section):
    """What the network computes."""

    pattern: str = option(..., 'one letter a layer: M, S, W, A; repeats as in "(M*6 S)*3"; "|" cuts pipeline stages')
    vocab_size: int = option(..., "number of token ids", ge=1)
    d_model: int = option(..., "width of the residual stream", ge=1)
    d_ff: int = option(..., "width of the SwiGLU of attention layers", ge=1)
    tie_embeddings: bool = option(True, "the head shares the embedding's weight")
    norm_eps: float = option(1e-5, "epsilon of every RMSNorm", gt=0)
    residual_fp32: bool = option(True, "keep the residual stream in float32 under bf16 or fp16")
    init_std: float = option(0.02, "standard deviation of embedding and attention weights at initialisation", gt=0)
    mup_base_width: int | None = option(
        None,
        "width that init_std and optim.lr are meant for; at another d_model initial values and learning rates of"
        " matrices follow the width, as in muP (see docs/optimizer.md); null: they do not",
        ge=1,
    )
    mamba: MambaConfig = option(MambaConfig(), "Mamba-2 blocks")
    attention: AttentionConfig = option(AttentionConfig(), "attention layers")
    gate: GateConfig = option(GateConfig(), "the gate of selective attention")

    @field_validator("pattern")
    @classmethod
    def _pattern_parses(cls, text: str) -> str:
        parse_pattern(text)
        return text

    @model_validator(mode="after")
    def _sizes_fit(self) -> "ModelConfig":
        for kind in kinds_of(self.letters):
            kind.check(self)
        return self

    @property
    def letters(self) -> str:
        """One letter a layer."""
        return parse_pattern(self.pattern).letters

    @property
    def gated_layers(self) -> list[int]:
        """Indices of the layers that have a gate."""
        return [index for index, letter in enumerate(self.letters) if kind_of(letter).gated]

    @property
    def cuts(self) -> tuple[int, ...]:
        """Layer indices before which a new pipeline stage starts."""
        return parse_pattern(self.pattern).cuts

    @property
    def n_layers(self) -> int:
        return len(self.letters)

    @property
    def times_as_wide(self) -> float:
        """d_model by mup_base_width; 1 without one."""
        return self.d_model / (self.mup_base_width or self.d_model)

    @property
    def d_inner(self) -> int:
        return self.mamba.expand * self.d_model

    @property
    def mamba_heads(self) -> int:
        return self.d_inner // self.mamba.headdim

    @property
    def n_kv_heads(self) -> int:
        return self.attention.n_kv_heads or self.attention.n_heads

    @property
    def head_dim(self) -> int:
        return self.attention.head_dim or self.d_model // self.attention.n_heads
