#!/usr/bin/env bash
# Builds, checks and times everything that needs a GPU, in under 8 minutes; ends with one JSON file and a short table.
#   bench/gpu_check.sh [--steps build,kernels,time,e2e,llama] [--device cuda|cpu] [--out FILE]
# Needs this checkout, torch with CUDA, and nvcc; the checks of the kernels also want pytest. Nothing is downloaded.
# LLAMA_CPP_BIN=folder of llama-bench puts llama.cpp's figures beside ours. --device cpu tries the script itself.
cd "$(dirname "$0")/.." || exit 1
PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" exec "${PYTHON:-python3}" -m bench.gpu_check "$@"
