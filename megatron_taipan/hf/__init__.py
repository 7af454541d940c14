"""transformers classes; importing this package registers them, so that exports load without trust_remote_code."""

from transformers import AutoConfig, AutoModelForCausalLM

from megatron_taipan.hf.configuration_taipan import TaipanConfig
from megatron_taipan.hf.modeling_taipan import TaipanCache, TaipanForCausalLM

AutoConfig.register(TaipanConfig.model_type, TaipanConfig, exist_ok=True)
AutoModelForCausalLM.register(TaipanConfig, TaipanForCausalLM, exist_ok=True)

__all__ = ["TaipanCache", "TaipanConfig", "TaipanForCausalLM"]
