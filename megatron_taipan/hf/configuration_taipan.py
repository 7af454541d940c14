"""The transformers configuration: our ModelConfig, carried whole under one key."""

from typing import Any

from transformers import PretrainedConfig, __version__

from megatron_taipan.config import ModelConfig
from megatron_taipan.versions import check_transformers

check_transformers(__version__)  # this file is the first of an export that transformers runs


class TaipanConfig(PretrainedConfig):
    """Configuration of `TaipanForCausalLM`.

    Args:
        network: the fields of `ModelConfig`, as a nested dictionary; what config.json holds.
        tokens_per_sample: sequence length in training, a note for readers: the architecture has no limit.
    """

    model_type = "taipan"

    def __init__(self, network: dict[str, Any] | None = None, tokens_per_sample: int | None = None, **kwargs: Any):
        # transformers makes an empty configuration to find defaults; it can be stored but builds no model.
        self.network = ModelConfig.model_validate(network).model_dump(mode="json") if network else None
        self.tokens_per_sample = tokens_per_sample
        kwargs.pop("tie_word_embeddings", None)
        super().__init__(**kwargs)
        # Our model shares the weight itself: there is no second parameter that transformers would have to tie.
        self.tie_word_embeddings = False

    def model_config(self) -> ModelConfig:
        """The typed network description.

        Raises:
            ValueError: the configuration holds no network.
        """
        if not self.network:
            raise ValueError("TaipanConfig: `network` is empty; pass the fields of ModelConfig (pattern, d_model, ...)")
        return ModelConfig.model_validate(self.network)

    # Names that transformers and its tools ask for.

    @property
    def vocab_size(self) -> int | None:
        return self.network["vocab_size"] if self.network else None

    @property
    def hidden_size(self) -> int | None:
        return self.network["d_model"] if self.network else None

    @property
    def num_hidden_layers(self) -> int | None:
        return self.model_config().n_layers if self.network else None

    @property
    def num_attention_heads(self) -> int | None:
        return self.network["attention"]["n_heads"] if self.network else None
