# Two commands matter: `make demo` and `make test`. Both create .venv on their own; python3.11 and make are all they need.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
PIP = .venv/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt

.PHONY: demo test lint bench clean

demo: .venv/.installed
	@.venv/bin/palindrome encode --images samples/cifar10-test-256.parquet --model checkpoints/cifar10-32 --out demo/encoded
	@.venv/bin/palindrome reconstruct --latents demo/encoded --out demo/reconstructed

# Two processes for two cores: with three, starts of Ray wait for one another.
PYTEST_ARGS ?= -n 2 --dist loadfile --no-loadscope-reorder --durations=25
test: .venv/.installed-test lint
	.venv/bin/python -m pytest $(PYTEST_ARGS)

lint: .venv/.installed-test
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	@mkdir -p .links/palindrome
	@ln -sfn ../../infra ../../jobs ../../model ../../pipeline .links/palindrome/
	@for file in api/*.py; do ln -sf ../../$$file .links/palindrome/; done
	.venv/bin/mypy

BENCHMARKS = evaluation encode null_model scaling precision memory
bench: .venv/.installed-test
	@mkdir -p bench
	@for name in $(BENCHMARKS); do echo "benchmarks.$$name -> bench/$$name.json" && \
	    .venv/bin/python -m benchmarks.$$name > bench/$$name.json || exit 1; done

.venv/bin/python:
	$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or later is needed, and this is " + sys.version if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv .venv

.venv/.installed: .venv/bin/python pyproject.toml constraints.txt
	@echo "Installing Palindrome into .venv (about 2 GB, once) ..."
	$(PIP) -e .
	@touch $@

# open_clip_torch for the vocabulary of CLIP alone, torch-fidelity and pytorch-fid to be compared with: the torchvision
# that they ask for brings another torch of several GB.
.venv/.installed-test: .venv/.installed
	$(PIP) -e '.[test]'
	$(PIP) --no-deps open_clip_torch pytorch-fid torch-fidelity
	@touch $@

clean:
	rm -rf .venv .links demo bench
