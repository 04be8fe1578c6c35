PYTHON ?= python
SOURCES = protoclip kernels benchmarks tests setup.py
NATIVE = $(wildcard csrc/*.h csrc/*.cpp csrc/*.cu csrc/*.cuh tests/*/*.cpp tests/*/*.cu)

# `make` is `make check`; the words after ## are what `make help` says.
.PHONY: check help lint fix test check-peers check-sizes parity check-arm sanitize mutants versions dist-check faults bench bench-full peers docs pictures kernels ptx ptx-record ptx-mutants gpu gpu-sanitize

check: lint test parity  ## everything CI checks

help:  ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-20s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

lint:  ## style and types: ruff, mypy, clang-format; changes nothing
	ruff check $(SOURCES)
	ruff format --check $(SOURCES)
	mypy
	$(if $(NATIVE),clang-format --dry-run --Werror $(NATIVE))

fix:  ## format everything, and repair what ruff can
	ruff check --fix $(SOURCES)
	ruff format $(SOURCES)
	$(if $(NATIVE),clang-format -i $(NATIVE))

test:  ## the tests, on all cores
	$(PYTHON) -m pytest tests -n auto --dist loadfile

check-peers:  ## all cases of scikit-learn's own tests of k-means; `make test` runs one of each
	$(PYTHON) -m pytest tests/lloyd/test_kmeans_sklearn.py --all-peer-tests

check-sizes:  ## more than 2^31 logits in C++, which `make test` leaves out: half a minute
	$(PYTHON) -m pytest tests/ops/test_info_nce.py -k two_to_the_31 --all-sizes

parity:  ## every benchmark of `make bench` once: checked against fp64, not timed
	$(PYTHON) -m pytest benchmarks -n auto --benchmark-disable $(if $(SIZES),--sizes $(SIZES))

ARM_CXX ?= aarch64-linux-gnu-g++
check-arm:  ## csrc on ARM: all of it compiles, its plain kernels run (g++-aarch64-linux-gnu, qemu-user)
	mkdir -p build
	flags="-std=c++20 -O2 -fopenmp -w -DTORCH_EXTENSION_NAME=protoclip $$($(PYTHON) -c 'import sysconfig; \
		from torch.utils.cpp_extension import include_paths; \
		print(*(f"-isystem {p}" for p in [*include_paths(), sysconfig.get_path("include")]))')"; \
	for source in $(filter-out csrc/cuda_%,$(wildcard csrc/*.cpp)); do \
		echo $$source && $(ARM_CXX) $$flags -c $$source -o build/arm.o || exit 1; \
	done; \
	$(ARM_CXX) $$flags tests/ops/arm_check.cpp -o build/arm_check && \
	qemu-aarch64 -L /usr/aarch64-linux-gnu build/arm_check

SANITIZED = build/sanitized
OP_TESTS = ops stash segment_mean kmeans_assign kmeans kmeans_sklearn prototype_cpu prototype_cross_entropy \
	contrastive info_nce clip_loss faults_fuzz_ops
sanitize:  ## the ops' tests with csrc under the address and undefined-behaviour sanitizers (g++): half an hour
	mkdir -p $(SANITIZED)
	printf '#!/bin/sh\nexec g++ "$$@" -fsanitize=address,undefined -fno-sanitize=vptr -D_GLIBCXX_ASSERTIONS -g1\n' > $(SANITIZED)/g++
	chmod +x $(SANITIZED)/g++
	libraries=$$(for name in asan ubsan stdc++; do printf '%s ' $$(g++ -print-file-name=lib$$name.so); done); \
	env CXX=$(CURDIR)/$(SANITIZED)/g++ PROTOCLIP_CACHE=$(CURDIR)/$(SANITIZED) LD_PRELOAD="$$libraries" \
		ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=halt_on_error=1:print_stacktrace=1 \
		$(PYTHON) -m pytest -x $(foreach name,$(OP_TESTS),$(wildcard tests/*/test_$(name).py)) -k "not memory"  # a limit of addresses leaves asan no memory

mutants:  ## changes one thing at a time and lists what no test notices; an hour of one core, resumable; of one module: ONLY=training
	$(PYTHON) -m tests.mutants $(if $(ONLY),--only "$(ONLY)")

versions:  ## tests and kernels with other releases of PyTorch, 3 GB each: make versions VERSIONS="2.8 2.11 newest"
	.ci/versions $(or $(VERSIONS),2.8 2.11 newest)

dist-check:  ## wheel and sdist of the last commit, each installed in an empty environment and run; ten minutes, 6 GB
	.ci/dist-check

faults:  ## kill a run twenty times, stop two ranks 300 times (STOPS=20); then every other fault: about an hour
	PROTOCLIP_KILLS=20 PROTOCLIP_STOPS=$(or $(STOPS),300) $(PYTHON) -m pytest tests/*/test_faults_*.py tests/runs/test_checkpoint.py \
		tests/runs/test_run_folder.py tests/training/test_step.py tests/runs/test_resume*.py tests/training/test_stop.py tests/runs/test_full_disk.py

bench:  ## parity, then speed; at most five minutes on two cores
	$(PYTHON) -m pytest benchmarks --benchmark-only $(if $(RECORD),--record $(RECORD))

bench-full:  ## the wide sweeps and sizes too; recorded under benchmarks/results unless RECORD says where
	$(PYTHON) -m pytest benchmarks --benchmark-only --sizes full --record $(or $(RECORD),benchmarks/results)

peers:  ## other packages' own tests with our losses: make peers PEERS="open_clip=PATH lightly=PATH sentence_transformers=PATH"
	$(PYTHON) -m benchmarks.peer_suites $(PEERS)

docs:  ## the pages, the API and the commands as a site in build/docs (pip install -e '.[docs]')
	$(PYTHON) -m sphinx -W --keep-going -q -b html -c docs . build/docs

pictures:  ## the front page's pictures and alt texts, from the records
	$(PYTHON) -m benchmarks.pictures

kernels:  ## registers, spills, shared memory and instruction of each launch row; no GPU needed
	env -u TRITON_INTERPRET $(PYTHON) -m benchmarks.compile_report

ptx:  ## every kernel, executed in an emulator of PTX; ARCH="80 90": five to ten minutes of one core each
	for arch in $(or $(ARCH),80 90); do \
		env -u TRITON_INTERPRET $(PYTHON) -m tests.ptx.run $$arch $(PTX) || failed=1; \
	done; exit $${failed:-0}

ptx-record:  ## executes what tests/kernels/test_ptx.py skips while sources are what they were, and records what passed: ten minutes
	env -u TRITON_INTERPRET $(PYTHON) -c 'import sys; from tests.ptx import known; sys.exit(known.main())'

ptx-mutants:  ## breaks one PTX instruction at a time and prints what notices it; ARCH=80
	for arch in $(or $(ARCH),80); do env -u TRITON_INTERPRET $(PYTHON) -m tests.ptx.mutants $$arch || exit 1; done

gpu:  ## on a GPU: the kernels' tests, then the benchmarks; results under OUT, else benchmarks/results
	PYTHON=$(PYTHON) benchmarks/gpu.sh

SANITIZER = PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --target-processes all --error-exitcode 1

gpu-sanitize:  ## on a GPU: the kernels under compute-sanitizer, fresh memory filled with NaN
	for tool in racecheck synccheck; do \
		$(SANITIZER) --tool $$tool $(PYTHON) -m benchmarks.gpu canary --seconds 300 || exit 1; \
	done
	$(SANITIZER) --tool memcheck \
		$(PYTHON) -m pytest --bare --nan-empties -x tests/kernels/test_cuda_gpu.py \
		tests/kernels/test_kernels_info_nce.py tests/kernels/test_kernels_contrastive.py \
		tests/kernels/test_kernels_prototype.py tests/kernels/test_kernels_hot_paths.py
