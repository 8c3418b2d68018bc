# make train              from a fresh clone to a trained tiny model and its samples
# make train TEXT=my.txt  the same on your own text: a file, a folder, or .jsonl, .jsonl.gz, .jsonl.zst
# make train STEPS=3000  longer, the learning rate's schedule with it
# make train PRESET=tiny-glm  another model of that size: tiny, tiny-glm, tiny-deepseek
# make train RUN=runs/mine  into that folder, or on from where it was stopped
# make train PYTHON=python3.12  .venv is made with that Python
# make test               every test that needs one host, no GPU and no root
# make test-cluster       the launchers on two hosts in namespaces: needs root on Debian, installs sshd, pdsh and Slurm
# make gpu                checks and speed on the GPUs of this host: ten minutes on one H100 (predicted)
# make check              formatting, lint, types, the number of lines and the docs
# make docs               the site of README and docs/ in build/site; a broken link is an error
# make bench              the training step compared with DeepSpeed's MoE layer and Mixtral: 20 minutes, 17 GiB
# make bench-short        a tiny model compared with DeepSpeed's MoE layer: a minute

SOURCE := $(or $(TEXT),data/plays)

BIN := $(CURDIR)/.venv/bin
export PATH := $(BIN):$(PATH)

# .venv/.train holds the folder in which .venv was made.
MADE_IN := $(shell cat .venv/.train 2>/dev/null)
ifneq ($(or $(MADE_IN),$(CURDIR)),$(CURDIR))
$(error .venv was made in $(MADE_IN) and cannot be moved to $(CURDIR); remove it, rm -r .venv, and try again)
endif
ifneq ($(or $(PYTHON),$(if $(realpath .venv/bin/python),,gone)),)
.PHONY: .venv/.train # tools/install.sh looks whether its Python is the one that is asked for, or is gone
endif

.PHONY: train ready test test-cluster gpu check docs bench bench-short
train:
	@flock --nonblock Makefile true || echo "waiting for another 'make train' here to prepare its data" >&2
	@flock --no-fork Makefile $(MAKE) --no-print-directory ready
	megamoe train --text '$(SOURCE)' $(PRESET:%=--preset %) $(STEPS:%=--schedule_steps %) $(if $(RUN),--run_dir '$(RUN)')

ready: .venv/.train $(if $(TEXT),,data/plays)
	@:

test: .venv/.test
	@command -v $${CXX:-c++} >/dev/null || { echo "error: there is no C++ compiler $${CXX:-c++}, with which tests compile" \
		"operators; install one (Debian, Ubuntu: apt install g++), or set CXX." >&2; exit 2; }
	python -m pytest --numprocesses 3 --dist loadfile

CLUSTER_PACKAGES = slurm-wlm pdsh openssh-server openssh-client iproute2 procps

test-cluster: .venv/.test
	-dpkg -s $(CLUSTER_PACKAGES) >/dev/null 2>&1 || { apt-get -q update && \
	  DEBIAN_FRONTEND=noninteractive apt-get -q install -y --no-install-recommends $(CLUSTER_PACKAGES); } >/dev/null
	python -m pytest tests/launchers -m cluster

gpu: .venv/.test
	python tools/dev/check_gpu.py

bench: .venv/.bench
	python tools/dev/benchmark.py --json benchmark.json

bench-short: .venv/.train
	python tools/dev/benchmark.py --preset tiny --contenders megamoe:1 stock:1 --samples 4 --steps 20

check: .venv/.test
	python -m ruff format --check .
	python -m ruff check .
	python -m mypy
	hadolint Dockerfile
	python tools/dev/check_lines.py
	python tools/dev/build_docs.py

docs: .venv/.test
	python tools/dev/build_docs.py

data/plays: | .venv/.train
	rm -rf data/.plays-*
	python tools/dev/fetch_corpus.py --out data/plays

.venv/.train: pyproject.toml
	tools/install.sh .
	pwd -P > $@

.venv/.bench: .venv/.train
	tools/install.sh ".[bench]"
	touch $@

.venv/.test: .venv/.train
	tools/install.sh ".[dev]"
	touch $@
