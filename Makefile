# The environment is made once, in .venv, and made again when what it installs changes.
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
	$(BIN)/python -m fastrm.train --data photo-patches --arch test_resnet --stem imagenet --image-size 32 \
		--batch-size 128 --epochs 6 --optimizer adamw --lr 0.004 --weight-decay 0.0001 --temperature 0.2 \
		--hidden-dim 512 --predictor-hidden-dim 512 --teacher-momentum 0.9 --eval-every 3 --log-every 10 \
		--resume never --out runs/demo
	$(BIN)/python -m fastrm.evaluate runs/demo --knn --gap --neighbours runs/demo/neighbours.png
	@$(BIN)/python -m fastrm.report runs/demo
	@echo "The pictures above are the nearest neighbours and the curves. Try --residual-weight 0 or 1, or your own"
	@echo "pictures: .venv/bin/python -m fastrm.train --arch resnet18 --image-size 64 --data FOLDER"

# One process of tests per core, each with one thread. pytest-xdist gives each a stretch of the files, so that a fixture of
# a file is made once, and what is left of one stretch to whoever is done. Threads wait asleep, since those that spin made
# some tests twenty times slower where other work has the cores.
PYTEST := OMP_NUM_THREADS=1 OMP_WAIT_POLICY=passive $(BIN)/python -m pytest
SPREAD := --numprocesses logical --maxprocesses 8 --dist worksteal

test: install
	$(PYTEST) tests $(SPREAD)

# The slow tests, and more cases of every fuzz test, new ones each time. A part that fails does not hide the others, and
# each can be run alone: make nightly PARTS=fuzz. The zoo takes hours, and can be split: SHARD=2/4.
PARTS ?= slow fuzz zoo
NIGHTLY_slow := tests -m slow
NIGHTLY_fuzz := tests/test_fuzz_arguments.py tests/test_fuzz_flags.py tests/test_fuzz_inputs.py \
	tests/test_fuzz_kernels.py --hypothesis-profile nightly

nightly: install
	@$(MAKE) --keep-going --no-print-directory $(PARTS:%=nightly-%)

# The smallest model of each of timm's classes: docs/backbones.md. A stopped sweep of the same commit goes on.
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
		*) echo "notice: pip-audit is skipped, since its source cannot be reached: $$said" | head -n 1;; esac

format: install
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: install
	$(BIN)/python -m pytest benchmarks --benchmark-only

# Kills runs at random moments, and compares how they end: docs/reliability.md.
torture: install
	$(BIN)/python -m benchmarks.torture

# What residual momentum does on Fashion-MNIST, where the term is taken, and when: docs/study.md. About 1.5 hours.
DEBIANS := /usr/share/datasets/fashion-mnist
study: install
	$(BIN)/python -m benchmarks.study $(if $(wildcard $(DEBIANS)),--data-root $(DEBIANS))

# The same question on the photographs of CIFAR-10, for which DATA may name a folder: docs/study.md. About six hours; a
# run whose figures are in docs/study/photos is not made again.
study-photos: install
	$(BIN)/python -m benchmarks.study_photos $(if $(DATA),--data $(DATA))

# Who reaches a kNN accuracy first on those photographs: docs/benchmarks.md. About 1.5 hours; goes on as the study does.
race: install
	$(BIN)/python -m benchmarks.race --data $(DATA)

# The documentation as a site, in build/docs.
docs: install
	$(BIN)/python -m sphinx -W --keep-going -q -b html docs build/docs

# With the Python at hand, not .venv: the packages of a stock PyTorch image are enough, but for tyro and DALI. PHOTOS names
# a folder with photographs; what reads them is left out without it.
gpu:
	$(PYTHON) -m benchmarks.gpu $(if $(PHOTOS),--photos $(PHOTOS))

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
