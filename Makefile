# The environment is created in .venv, and updated when pyproject.toml changes.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: install demo test nightly check format bench torture study study-photos race docs gpu clean

install: $(VENV)/installed

$(VENV)/installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --editable '.[demo,test,bench,docs]'
	touch $@

demo: install
	$(BIN)/python -m fastrm.train --config examples/demo.toml --resume never --out runs/demo
	$(BIN)/python -m fastrm.evaluate runs/demo --knn --gap --neighbours runs/demo/neighbours.png
	@$(BIN)/python -m fastrm.report runs/demo
	@echo "The files above show nearest neighbours and curves. Try --residual-weight 0 or 1, or your own"
	@echo "images: .venv/bin/python -m fastrm.train --arch resnet18 --image-size 64 --data FOLDER"

# One process of tests per core, each with one thread. pytest-xdist gives each process a range of the files, so that the
# fixtures of a file are usually created once; idle processes take over tests of others. Waiting threads sleep, because
# spinning threads made some tests twenty times slower when other programs used the cores.
PYTEST := OMP_NUM_THREADS=1 OMP_WAIT_POLICY=passive $(BIN)/python -m pytest
SPREAD := --numprocesses logical --maxprocesses 8 --dist worksteal

test: install
	$(PYTEST) tests $(SPREAD)

# The slow tests, more and new random cases of every fuzz test, and the zoo. All parts run even if one fails; run one part
# with make nightly PARTS=fuzz. The zoo takes hours and can be split: SHARD=2/4.
PARTS ?= slow fuzz zoo
NIGHTLY_slow := tests -m slow
NIGHTLY_fuzz := tests/test_fuzz_arguments.py tests/test_fuzz_flags.py tests/test_fuzz_inputs.py \
	tests/test_fuzz_kernels.py --hypothesis-profile nightly

nightly: install
	@$(MAKE) --keep-going --no-print-directory $(PARTS:%=nightly-%)

# The smallest model of each timm class: docs/backbones.md. A stopped sweep of the same commit continues.
nightly-zoo: install
	OMP_NUM_THREADS=1 OMP_WAIT_POLICY=passive $(BIN)/python -m benchmarks.zoo \
		--out build/zoo/$(shell git describe --always --dirty) $(if $(SHARD),--shard $(SHARD))

nightly-%: install
	$(PYTEST) $(NIGHTLY_$*) $(SPREAD)

check: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	@said=$$($(BIN)/pip-audit --strict --skip-editable --progress-spinner off 2>&1) && echo "$$said" || case "$$said" in \
		*Found*vulnerabilit*) echo "$$said"; exit 1;; \
		*) echo "notice: pip-audit is skipped, because its source cannot be reached: $$said" | head -n 1;; esac

format: install
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: install
	$(BIN)/python -m pytest benchmarks --benchmark-only

# Kills runs at random moments, and compares their results: docs/reliability.md.
torture: install
	$(BIN)/python -m benchmarks.torture

# The effect of residual momentum on Fashion-MNIST, by weight, place and time: docs/study.md. Takes about 1.5 hours.
DEBIANS := /usr/share/datasets/fashion-mnist
study: install
	$(BIN)/python -m benchmarks.study $(if $(wildcard $(DEBIANS)),--data-root $(DEBIANS))

# The same on the photographs of CIFAR-10, optionally from the folder DATA: docs/study.md. Takes about six hours; runs with
# figures in docs/study/photos are skipped.
study-photos: install
	$(BIN)/python -m benchmarks.study_photos $(if $(DATA),--data $(DATA))

# Which trainer reaches a kNN accuracy first on these photographs: docs/benchmarks.md. Takes about 1.5 hours; finished runs
# are skipped.
race: install
	OMP_WAIT_POLICY=passive $(BIN)/python -m benchmarks.race --data $(DATA)

# Builds the documentation as a site in build/docs.
docs: install
	$(BIN)/python -m sphinx -W --keep-going -q -b html docs build/docs

# Uses $(PYTHON), not .venv: a stock PyTorch image has all packages except tyro and DALI. PHOTOS is a folder of photographs;
# without it, the parts that read photographs are skipped.
gpu:
	$(PYTHON) -m benchmarks.gpu $(if $(PHOTOS),--photos $(PHOTOS))

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
