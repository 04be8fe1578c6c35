#!/usr/bin/env bash
# make gpu, ten minutes on a card: the native build beside the kernels' compiler in a pool of
# processes, one headline case of each op, the kernels' tests, time by kernel and a sweep of launch
# rows, the other benchmarks by value, a training run. Each step has a time limit, its log and
# record under $OUT as it goes. Needs torch, triton, numpy, pytest and pytest-benchmark (peers:
# pip install -e .[gpu-peers]); what a step misses is skipped with a reason. PROTOCLIP_REHEARSE=1
# rehearses it without a card: Triton's interpreter, tiny sizes.
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
tests=(tests/test_package.py tests/test_backends.py tests/test_cuda_gpu.py
  tests/test_kernels_hot_paths.py tests/test_kernels_info_nce.py tests/test_kernels_contrastive.py
  tests/test_kernels_prototype.py
  tests/test_prototype_cross_entropy.py tests/test_segment_mean.py
  tests/test_kmeans_assign.py)
# The library's halves are built by two processes, before any test waits for them.
build='import sys, torch; from protoclip.ops import native as n; why = n.why_not(sys.argv[1])
print(sys.argv[1], why); sys.exit(why is not None and torch.cuda.is_available())'
pool=$(nproc)
[ "$pool" -le 16 ] || pool=16 # each holds a CUDA context
[ "$sizes" = tiny ] && pool=1 tests=(tests/test_segment_mean.py)
compile='for i in $(seq 0 $(($1 - 1))); do
  "$0" -m pytest -q --bare --compile-share "$i/$1" "${@:2}" >"$OUT_LOG.$i" 2>&1 & done; wait
tail -qn 1 "$OUT_LOG".*'  # a test may fail on what was not computed; what counts is the cache
export OUT_LOG="$out/gpu-compile.log"
step build 120 bash -c 'bash -c "$2" "$0" "${@:3}" & "$0" -c "$1" cpu & cpu=$!
  "$0" -c "$1" cuda; cuda=$?; wait $cpu && wait && exit $cuda' \
  "$python" "$build" "$compile" "$pool" "${tests[@]}"
step headline 80 "$python" -m pytest benchmarks --benchmark-only --sizes "$sizes" -rs --headline \
  --budget 60 --record "$out/gpu.json"
step tests 130 "$python" -m pytest -v --bare "${tests[@]}"
step kernels 95 "$python" -m benchmarks.gpu --seconds 55
step benchmarks 110 "$python" -m pytest benchmarks --benchmark-only --sizes "$sizes" -rs \
  --budget 90 --record "$out/gpu.json"
images=builtin:icons
"$python" -c 'import justmyresource_lucide, resvg_py' 2>/dev/null || images=builtin:shapes:512
if missing=$("$python" -c 'import open_clip, PIL' 2>&1); then
  step train 40 "$python" -m protoclip.train --train-data "$images" --max-steps 20 \
    --report-to none --logs "$out/logs"
else
  echo "train: skipped, ${missing##*$'\n'}" | tee -a "$out/gpu-summary.log"
fi
cat "$out/gpu-summary.log"
exit "$failed"
