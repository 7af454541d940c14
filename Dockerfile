# The README's steps for a machine with GPUs, on NVIDIA's CUDA image (the compiler is needed for the kernels).
#
#   docker build --tag megatron-taipan .
#   docker run --rm -it --gpus all --ipc=host \
#       --volume "$PWD/data:/taipan/data" --volume "$PWD/runs:/taipan/runs" megatron-taipan
#
# CUDA must be of the same major release as the CUDA that torch was built with (`torch.version.cuda`).
ARG CUDA=13.0.2
FROM nvidia/cuda:${CUDA}-devel-ubuntu24.04

# Python 3.12 is Ubuntu's; python3-dev because Triton and DeepSpeed compile against it while a run goes on.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends build-essential git make python3 python3-dev python3-venv \
    && rm -rf /var/lib/apt/lists/*
ENV PIP_NO_CACHE_DIR=1 DEBIAN_FRONTEND=noninteractive

WORKDIR /taipan
# A build sees no GPU, so launch/install.sh would choose the CPU build of torch. It keeps a torch of the pinned release
# that is there already: the index's own build, which is CUDA's. A layer of its own, since it rarely changes.
COPY constraints.txt ./
RUN python3 -m venv .venv && .venv/bin/python -m pip install --constraint constraints.txt torch

COPY . .
RUN make venv
ENV PATH=/taipan/.venv/bin:$PATH

# The kernels of other projects compile against that torch: wheels of theirs are taken where they exist, else this takes
# an hour or more and several GB for each of MAX_JOBS compilers.
ARG MAX_JOBS=8
# hadolint ignore=DL3013
RUN pip install wheel && pip install --no-build-isolation '.[gpu]'

CMD ["bash"]
