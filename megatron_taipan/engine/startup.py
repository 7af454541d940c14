"""DeepSpeed, imported late and prepared for the device."""

import logging
import os
import warnings

import torch


def import_deepspeed(device: torch.device):
    """The deepspeed module, prepared for this device and silenced.

    It is imported here and not at the top because it reads DS_ACCELERATOR while it loads, and because it takes
    seconds that a typo in the configuration should not cost.
    """
    os.environ.setdefault("DS_ACCELERATOR", device.type)
    # DeepSpeed calls what torch 2.13 will rename; nothing a user can act on
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", category=DeprecationWarning)
    import deepspeed
    import deepspeed.ops
    from deepspeed.utils import logger

    logger.setLevel(logging.ERROR)
    if device.type == "cpu":
        # Compiled on first use, for two minutes; a killed build leaves a lock on which every later run
        # hangs. Only DeepSpeed's inference uses it.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed
