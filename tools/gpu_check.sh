#!/usr/bin/env bash
# Everything worth knowing on a machine with one GPU, without network, in parts that each take less than 9 minutes:
#   environment tests curves checkpoint speed-vision {speed,hf}-{1b,2b,8b}-{4k,16k} kept-8b-4k profile-{bf16,fp8}
# Results go to $OUT, or to benchmarks/results/; tools/gpu_check.py says what the parts are. A folder .gpu/ beside the checkout
# may hold what the machine lacks: wheels, and *.tar.xz archives of site-packages folders (torch must be there already).
#   usage: tools/gpu_check.sh [PART ...] [--dry] [--limit SECONDS] [--merge FILE ...]     (--dry: tiny models on the CPU)
# $PYTHON runs them; else that of .venv, else python3.
set -euo pipefail
cd "$(dirname "$0")/.."
if [ -x .venv/bin/python ]; then installed=.venv/bin/python; else installed=python3; fi
python=${PYTHON:-$installed}
"$python" -c 'import sys, torch; sys.version_info >= (3, 12) or sys.exit(1)' 2>/dev/null || {
  echo "gpu_check: $python is not a Python >= 3.12 with torch; set PYTHON=path, or run \`make setup\`" >&2
  exit 2
}
began=$SECONDS

if [ -d .gpu ]; then
  site=$(mktemp -d)
  trap 'rm -rf "$site"' EXIT
  for archive in .gpu/*.tar.xz; do [ ! -e "$archive" ] || tar xJf "$archive" -C "$site"; done
  wheels=(.gpu/*.whl)
  [ ! -e "${wheels[0]}" ] || "$python" -m pip install -q --no-index --no-deps --no-compile --target "$site" "${wheels[@]}"
  export PYTHONPATH="$site${PYTHONPATH:+:$PYTHONPATH}"
  echo "unpacked .gpu/ in $((SECONDS - began)) s"
fi
# Transformer Engine takes a cuDNN of the system where there is one; torch has its own, and a process bears only one of them.
cudnn=$("$python" -c 'import nvidia.cudnn as cudnn; print(list(cudnn.__path__)[0])' 2>/dev/null || true)
[ -z "$cudnn" ] || export CUDNN_HOME="$cudnn"
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" HF_HUB_OFFLINE=1 PYTHONUNBUFFERED=1
# NVML answers whether there is a GPU without starting CUDA in processes that only ask.
export PYTORCH_NVML_BASED_CUDA_CHECK=1
export ONEDNN_MAX_CPU_ISA=${ONEDNN_MAX_CPU_ISA:-AVX512_CORE_BF16}

"$python" -m tools.gpu_check --output "${OUT:-benchmarks/results}" "$@"
