"""megatron_taipan: pretraining of Taipan, a hybrid of Mamba-2 blocks and selective attention layers."""

__version__ = "0.2.0"
