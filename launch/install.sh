#!/usr/bin/env bash
# launch/install.sh PYTHON VENV: makes or updates the virtual environment from constraints.txt, torch first.
#
# Torch first, because which build is right depends on the machine: CUDA's where an NVIDIA GPU answers, else the CPU
# build, which is gigabytes smaller. Everything that depends on torch then finds it installed.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python=$1 venv=$2

say() { printf '== %s\n' "$*"; }
fail() { printf 'error: %s\n' "$*" >&2; exit 2; }

command -v "$python" >/dev/null || fail "$python is not installed; Python 3.10 or newer is needed (make PYTHON=...)"
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' ||
    fail "$("$python" --version) is too old; Python 3.10 or newer is needed: make PYTHON=/path/to/python3.12"

# One that is there is brought up to date, not made again: what its owner built into it (flash-attn, apex) took an hour,
# and a run may be using it.
version='import sys; print(sys.version)'
if [ "$("$venv/bin/python" -c "$version" 2>/dev/null)" == "$("$python" -c "$version")" ]; then
    say "virtual environment $venv, brought up to date"
else
    say "virtual environment $venv ($("$python" --version))"
    "$python" -m venv --clear "$venv" ||
        fail "$python cannot make virtual environments (Debian and Ubuntu: apt install python3-venv)"
fi
pip() { "$venv/bin/python" -m pip --disable-pip-version-check "$@"; }

torch=$(sed -n 's/^torch==\([0-9.]*\).*/\1/p' constraints.txt)
[ -n "$torch" ] || fail "constraints.txt pins no torch"
have=$(pip show torch 2>/dev/null | sed -n 's/^Version: //p') || true # not there
if [[ $(nvidia-smi --list-gpus 2>/dev/null) == *GPU* ]]; then
    say "torch $torch with CUDA: $(nvidia-smi --query-gpu=name --format=csv,noheader | sort | uniq -c | xargs)"
    [[ $have != *+cpu ]] || pip uninstall --quiet --yes torch # it would satisfy the same pin
    pip install --quiet --constraint constraints.txt "torch==$torch"
elif [ "${have%%+*}" == "$torch" ]; then
    say "torch $have stays" # a CUDA build too: this may be a cluster's login node
else
    say "torch $torch for the CPU (nvidia-smi finds no GPU)"
    # PyTorch's own index has CPU builds. Where it cannot be reached the configured index decides: a second is lost.
    pip install --quiet --quiet --no-deps --retries 0 --timeout 5 --index-url https://download.pytorch.org/whl/cpu \
        "torch==$torch+cpu" 2>/dev/null ||
        pip install --quiet --constraint constraints.txt "torch==$torch"
fi

say "megatron_taipan and what it needs"
if [ -w . ]; then
    pip install --quiet --constraint constraints.txt --editable '.[dev]'
else # a checkout that belongs to others: setuptools would write into it
    copy=$(mktemp -d)
    trap 'rm -rf "$copy"' EXIT
    cp -r megatron_taipan data_prep launch checkpoints setup.py pyproject.toml README.md LICENSE "$copy"
    chmod -R u+w "$copy"
    pip install --quiet --constraint constraints.txt "$copy[dev]"
fi
# The tests' independent reader of .bin/.idx files; without its dependencies, which we do not need.
pip install --quiet --no-deps --constraint constraints.txt megatron-core
"$venv/bin/python" -c 'import torch; print(f"== torch {torch.__version__}, CUDA {torch.cuda.is_available()}")'
