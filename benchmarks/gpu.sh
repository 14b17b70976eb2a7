#!/usr/bin/env bash
# Checks and measures Slotstream on one GPU in under 8 minutes, on a bare machine without network.
# usage: benchmarks/gpu.sh OUT [WHEELS] [--dry-run]
#   OUT      folder for gpu.json, gpu.md, trace.json.gz and log.txt; made if it is not there
#   WHEELS   folder of wheels of what this Python lacks (deepspeed, hydra-core, omegaconf ...); torch >= 2.11 and triton must be there
#   --dry-run  tiny shapes on the CPU: shows that the script runs, its figures mean nothing
# PYTHON=... chooses the interpreter (python3).
set -euo pipefail

python=${PYTHON:-python3}
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
words=() dry=()
for word in "$@"; do
  case $word in
    --dry-run) dry=(--dry-run) ;;
    -*) echo "error: $word is not known; usage: benchmarks/gpu.sh OUT [WHEELS] [--dry-run]" >&2; exit 2 ;;
    *) words+=("$word") ;;
  esac
done
if [ ${#words[@]} -lt 1 ] || [ ${#words[@]} -gt 2 ]; then
  echo "error: usage: benchmarks/gpu.sh OUT [WHEELS] [--dry-run]" >&2; exit 2
fi
mkdir -p "${words[0]}"
out=$(cd "${words[0]}" && pwd)

if [ ${#words[@]} -eq 2 ]; then
  wheels=$(cd "${words[1]}" && pwd)
  environment=$(mktemp -d)
  trap 'rm -rf "$environment"' EXIT
  "$python" -m venv --system-site-packages "$environment"
  python=$environment/bin/python
  # one wheel at a time and without its requirements: none may take the place of the machine's own torch
  for wheel in "$wheels"/*.whl; do
    "$python" -m pip install --quiet --no-index --find-links "$wheels" --no-deps "$wheel"
  done
fi

cd "$root"
export DS_BUILD_OPS=0 PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}"
"$python" -m benchmarks.gpu --out "$out" "${dry[@]+"${dry[@]}"}" 2>&1 | tee "$out/log.txt"
