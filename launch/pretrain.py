#!/usr/bin/env python
"""Pretrains a Taipan, by this checkout whichever one is installed: see megatron_taipan/pretrain.py, or --help."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron_taipan.pretrain import program

if __name__ == "__main__":
    program()
