"""transformers classes; importing this package registers them, so that exports load without trust_remote_code."""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification

from megatron_taipan.hf.configuration_taipan import TaipanConfig
from megatron_taipan.hf.modeling_taipan import (
    TaipanCache,
    TaipanForCausalLM,
    TaipanForSequenceClassification,
    TaipanModel,
)
from megatron_taipan.hf.network import TaipanPreTrainedModel
from megatron_taipan.ops.dispatch import pick_ops

TaipanPreTrainedModel.find_ops = staticmethod(pick_ops)  # this package's kernels, where they run

AutoConfig.register(TaipanConfig.model_type, TaipanConfig, exist_ok=True)
AutoModel.register(TaipanConfig, TaipanModel, exist_ok=True)
AutoModelForCausalLM.register(TaipanConfig, TaipanForCausalLM, exist_ok=True)
AutoModelForSequenceClassification.register(TaipanConfig, TaipanForSequenceClassification, exist_ok=True)

__all__ = ["TaipanCache", "TaipanConfig", "TaipanForCausalLM", "TaipanForSequenceClassification", "TaipanModel"]
