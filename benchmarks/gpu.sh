#!/usr/bin/env bash
# make gpu, ten minutes on a GPU with 16 cores: the native build beside the kernels' compiler in a
# pool of processes, a canary of each kernel, one headline case of each op, the kernels' tests, time
# by kernel and a sweep of launch rows, the other benchmarks by value, a training run. Each step has
# a time limit, its log and record under $OUT as it goes, and each file of tests or benchmarks a
# process of its own: a kernel that crashes spoils its context, and must end that row only; CUDA's
# k-means comes last. `benchmarks/gpu.sh canary tests` runs the steps named. Needs torch, triton,
# numpy, pytest and pytest-benchmark (peers: pip install -e .[gpu-peers]); what a step misses is
# skipped with a reason. PROTOCLIP_REHEARSE=1 rehearses it without a card: Triton's interpreter,
# tiny sizes; PROTOCLIP_REHEARSE_TEST=FILE adds a file of tests, e.g. one that aborts.
set -u
cd "$(dirname "$0")/.."
steps=" ${*:-build canary headline tests kernels benchmarks train} "
out=${OUT:-benchmarks/results}
python=${PYTHON:-python}
sizes=full patience=1
if [ "${PROTOCLIP_REHEARSE:-}" = 1 ]; then
  sizes=tiny patience=4 # an interpreter on a busy CPU
  out=${OUT:-$(mktemp -d)} # no record
elif ! "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
  echo "make gpu: expected a CUDA device that torch can use, got none; PROTOCLIP_REHEARSE=1 make gpu" \
    "rehearses without a card" >&2
  exit 2
fi
mkdir -p "$out"

step() { # NAME SECONDS COMMAND...: run it, log it, go on whatever happens
  local name=$1 limit=$2 status
  shift 2
  echo "== $name ($SECONDS s into the run)"
  timeout -k 10 $((limit * patience)) "$@" 2>&1 | tee "$out/gpu-$name.log"
  status=${PIPESTATUS[0]}
  echo "$name: exit $status, $SECONDS s into the run" | tee -a "$out/gpu-summary.log"
}

wanted() { [[ $steps == *" $1 "* ]]; }

: >"$out/gpu-summary.log"
# protoclip.kernels and protoclip.csrc are mapped by the install; no network is needed for it.
"$python" -c 'import protoclip.kernels' 2>/dev/null ||
  step install 30 "$python" -m pip install --quiet --no-deps --no-build-isolation --no-index -e .
tests=(tests/house/test_package.py tests/ops/test_backends.py
  tests/kernels/test_kernels_hot_paths.py tests/kernels/test_kernels_info_nce.py tests/kernels/test_kernels_contrastive.py
  tests/kernels/test_kernels_prototype.py tests/ops/test_prototype_cross_entropy.py)
last_tests=(tests/ops/test_segment_mean.py tests/ops/test_kmeans_assign.py tests/kernels/test_cuda_gpu.py tests/ops/test_ops.py)
# The library's halves are built by two processes, before any test waits for them.
build='import sys, torch; from protoclip.ops import native as n; why = n.why_not(sys.argv[1])
print(sys.argv[1], why); sys.exit(why is not None and torch.cuda.is_available())'
pool=$(nproc)
[ "$pool" -le 16 ] || pool=16 # each holds a CUDA context
slower=$((16 / pool))         # than what the build's limit is made for
if [ "$sizes" = tiny ]; then
  pool=1 tests=(${PROTOCLIP_REHEARSE_TEST:-}) last_tests=(tests/ops/test_prototype_cross_entropy.py)
  echo "a rehearsal: Triton's interpreter at tiny sizes; its times say nothing of a GPU. Of the tests it" \
    "runs" "${tests[@]}" "${last_tests[@]}" "only, the others are in make test" | tee -a "$out/gpu-summary.log"
fi
compile='for i in $(seq 0 $(($1 - 1))); do
  "$0" -m pytest -q --bare --compile-share "$i/$1" "${@:2}" >"$OUT_LOG.$i" 2>&1 & done; wait
tail -qn 1 "$OUT_LOG".*'  # a test may fail on what was not computed; what counts is the cache
export OUT_LOG="$out/gpu-compile.log"
if wanted build; then
  step build $((120 * slower)) bash -c 'bash -c "$2" "$0" "${@:3}" & "$0" -c "$1" cpu & cpu=$!
    "$0" -c "$1" cuda; cuda=$?; wait $cpu && wait && exit $cuda' \
    "$python" "$build" "$compile" "$pool" "${tests[@]}" "${last_tests[@]}"
fi
wanted canary && step canary 60 "$python" -m benchmarks.gpu canary --seconds 25

time_file() { # STEP FILE SECONDS OPTIONS...
  step "$1-$2" $(($3 + 20)) "$python" -m pytest "benchmarks/test_$2.py" --benchmark-only \
    --sizes "$sizes" -rs --budget "$3" --record "$out/gpu.json" "${@:4}"
}
if wanted headline; then
  time_file headline contrastive 30 --headline
  time_file headline prototype_cross_entropy 10 --headline
  time_file headline kmeans 15 --headline
fi
if wanted tests; then
  for file in "${tests[@]}"; do
    while [ "$(jobs -rp | wc -l)" -ge 4 ]; do sleep 0.2; done
    step "tests-$(basename "$file" .py)" 100 "$python" -m pytest -v -rs --bare "$file" &
  done
  wait
  for file in "${last_tests[@]}"; do
    step "tests-$(basename "$file" .py)" 200 "$python" -m pytest -v -rs --bare "$file"
  done
fi
wanted kernels && step kernels 90 "$python" -m benchmarks.gpu --seconds 45
if wanted benchmarks; then
  time_file benchmarks contrastive 30
  time_file benchmarks prototype_cross_entropy 10
  time_file benchmarks grad_cache 10
  time_file benchmarks scale 10
  time_file benchmarks kmeans 20
fi
images=builtin:icons
"$python" -c 'import justmyresource_lucide, resvg_py' 2>/dev/null || images=builtin:shapes:512
if wanted train; then
  if missing=$("$python" -c 'import open_clip, PIL' 2>&1); then
    step train 40 "$python" -m protoclip.train --train-data "$images" --max-steps 20 \
      --report-to none --logs "$out/logs"
  else
    echo "train: skipped, ${missing##*$'\n'}" | tee -a "$out/gpu-summary.log"
  fi
fi
echo "== summary; all logs are in $out"
cat "$out/gpu-summary.log"
skipped=$(grep -hE '^SKIPPED|: skipped, |nothing is timed$' "$out"/gpu-*.log | sort -u)
[ -z "$skipped" ] || printf 'skipped:\n%s\n' "$skipped"
! grep -qE 'exit [1-9]' "$out/gpu-summary.log"
