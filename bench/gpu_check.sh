#!/usr/bin/env bash
# Builds, checks and times everything that needs a GPU, in under 8 minutes; ends with one JSON file and a short table.
#   bench/gpu_check.sh [--steps build,kernels,time,load,e2e,llama] [--device cuda|cpu] [--out FILE]
#   bench/gpu_check.sh --fetch-wheels 3.12    on a machine with a network, for that Python: 46 MB into build/wheels
# Needs this checkout, torch with CUDA (2.11 or later, with numpy and Triton), nvcc, and the few packages of build/wheels, carried
# or installed. The package itself need not be installed, and nothing is downloaded.
# LLAMA_CPP_BIN=folder of llama-bench puts llama.cpp's figures beside ours. --device cpu tries the script itself.
cd "$(dirname "$0")/.." || exit 1
PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" exec "${PYTHON:-python3}" -m bench.gpu_check "$@"
