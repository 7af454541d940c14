"""The transformers configuration: the whole ModelConfig under one key."""

from typing import Any

from transformers import PretrainedConfig, __version__

from megatron_taipan.model_config import ModelConfig
from megatron_taipan.versions import check_transformers

check_transformers(__version__)  # this file is the first of an export that transformers runs


DERIVED = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "tie_word_embeddings")


class TaipanConfig(PretrainedConfig):
    """Configuration of the transformers classes.

    Args:
        network: the fields of `ModelConfig`, as a nested dictionary; what config.json holds.
        tokens_per_sample: sequence length in training, a note for readers: the architecture has no limit.
        skip_logits: whether training with labels gives the loss alone, see `TaipanForCausalLM.forward`.
    """

    model_type = "taipan"

    def __init__(
        self,
        network: dict[str, Any] | None = None,
        tokens_per_sample: int | None = None,
        skip_logits: bool = False,
        **kwargs: Any,
    ):
        # transformers makes an empty configuration to find defaults; it can be stored but builds no model.
        self.network = ModelConfig.model_validate(network).model_dump(mode="json") if network else None
        self.tokens_per_sample, self.skip_logits = tokens_per_sample, skip_logits
        for name in DERIVED:
            kwargs.pop(name, None)  # the network gives them
        special: dict[str, Any] = dict.fromkeys(
            ("bos_token_id", "eos_token_id", "pad_token_id")
        )  # None, where config.json has none
        super().__init__(**special | kwargs)
        self.tie_word_embeddings = bool(self.network and self.network["tie_embeddings"])

    def model_config(self) -> ModelConfig:
        """The typed network description.

        Raises:
            ValueError: the configuration holds no network.
        """
        if not self.network:
            raise ValueError("TaipanConfig: `network` is empty; pass the fields of ModelConfig (pattern, d_model, ...)")
        return ModelConfig.model_validate(self.network)

    def to_dict(self) -> dict[str, Any]:
        """With the sizes that PEFT and others look for in config.json; what counts is `network`."""
        return super().to_dict() | {name: getattr(self, name) for name in DERIVED}

    # Names that transformers and its tools ask for.

    @property
    def vocab_size(self) -> int | None:
        return self.network["vocab_size"] if self.network else None

    @vocab_size.setter
    def vocab_size(self, size: int) -> None:
        """What `resize_token_embeddings` sets."""
        if self.network is None:
            raise ValueError("TaipanConfig: `network` is empty, so it has no vocabulary to resize")
        self.network["vocab_size"] = size

    @property
    def hidden_size(self) -> int | None:
        return self.network["d_model"] if self.network else None

    @property
    def num_hidden_layers(self) -> int | None:
        return self.model_config().n_layers if self.network else None

    @property
    def num_attention_heads(self) -> int | None:
        return self.network["attention"]["n_heads"] if self.network else None
