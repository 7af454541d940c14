"""Where tests of kernels run: on a GPU, or on a CPU in Triton's interpreter, where the environment asks for that."""

import os

import pytest

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
interpreted_only = pytest.mark.skipif(not INTERPRETED, reason="TRITON_INTERPRET is not 1")
DEVICES = [pytest.param("cuda", marks=pytest.mark.gpu), pytest.param("cpu", marks=interpreted_only)]
