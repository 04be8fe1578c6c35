PYTHON ?= python
SOURCES = protoclip kernels benchmarks tests setup.py
NATIVE = $(wildcard csrc/*.h csrc/*.cpp csrc/*.cu csrc/*.cuh tests/*.h tests/*.cpp)

.PHONY: check lint fix test faults bench study study-quick kernels gpu

check: lint test  ## everything CI checks

lint:
	ruff check $(SOURCES)
	ruff format --check $(SOURCES)
	mypy
	$(if $(NATIVE),clang-format --dry-run --Werror $(NATIVE))

fix:
	ruff check --fix $(SOURCES)
	ruff format $(SOURCES)
	$(if $(NATIVE),clang-format -i $(NATIVE))

test:
	$(PYTHON) -m pytest tests

faults:  ## kill a run twenty times and fill its disk, compare with one left alone; then every other fault
	$(PYTHON) tests/fault_runs.py --kills 20 --full-disk
	$(PYTHON) -m pytest tests/test_faults_*.py

bench:  ## parity, then speed; two cores, a few minutes
	$(PYTHON) -m pytest benchmarks --benchmark-only

study:  ## what each design is worth, over seeds; about an hour on two cores, resumable
	$(PYTHON) -m benchmarks.study

study-quick:  ## four rows, two seeds, short runs: ten minutes
	$(PYTHON) -m benchmarks.study --quick

kernels:  ## registers, spills, shared memory and instruction of each launch row; no GPU needed
	env -u TRITON_INTERPRET $(PYTHON) -m protoclip.kernels.compile_report

gpu:  ## on a card: every test, then the benchmarks; results under $OUT, else benchmarks/results
	mkdir -p $${OUT:-benchmarks/results}
	$(PYTHON) -m pytest tests | tee $${OUT:-benchmarks/results}/gpu-tests.log
	$(PYTHON) -m pytest benchmarks --benchmark-only --benchmark-json=$${OUT:-benchmarks/results}/gpu.json
