#!/usr/bin/env bash
# Everything worth knowing on a machine with one GPU, without network, in at most 9 minutes:
#   environment, the tests marked `gpu`, GPU losses against the CPU's, speed of a 1B-shaped model.
# Results go to benchmarks/results/. A folder .gpu/ beside the checkout may hold what the machine lacks: wheels, and
# *.tar.xz archives of site-packages folders (torch must be there already).
#   usage: tools/gpu_check.sh [--device cpu]     (cpu tries the script itself)
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
out=${OUT:-benchmarks/results}
stamp=$(date -u +%Y-%m-%d)
mkdir -p "$out"

if [ -d .gpu ]; then
  site=$(mktemp -d)
  trap 'rm -rf "$site"' EXIT
  for archive in .gpu/*.tar.xz; do [ -e "$archive" ] && tar xJf "$archive" -C "$site"; done
  wheels=(.gpu/*.whl)
  [ -e "${wheels[0]}" ] && "$python" -m pip install -q --no-index --no-deps --no-compile --target "$site" "${wheels[@]}"
  export PYTHONPATH="$site${PYTHONPATH:+:$PYTHONPATH}"
fi
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" HF_HUB_OFFLINE=1
# NVML answers whether there is a GPU without starting CUDA in processes that only ask.
export PYTORCH_NVML_BASED_CUDA_CHECK=1
export ONEDNN_MAX_CPU_ISA=${ONEDNN_MAX_CPU_ISA:-AVX512_CORE_BF16}

"$python" -m internvl_megatron doctor | tee "$out/gpu_check_${stamp}_environment.txt"
# exit code 5: no test is marked `gpu`, or none could run
timeout 200 "$python" -m pytest tests/gpu -q -m gpu -p no:cacheprovider || [ $? -eq 5 ]
timeout 320 "$python" -m tools.gpu_check --output "$out/gpu_check_${stamp}.json" "$@"
