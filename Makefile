# make train              from a fresh clone to a trained tiny model and its samples
# make train TEXT=my.txt  the same on your own text: a file, a folder, or .jsonl, .jsonl.gz, .jsonl.zst
# make train STEPS=3000  longer, the learning rate's schedule with it
# make train PRESET=tiny-glm  another model of that size: tiny, tiny-glm, tiny-deepseek
# make train PYTHON=python3.12  .venv is made with that Python
# make test               every test that needs one host, no GPU and no root
# make test-cluster       the launchers on two hosts in namespaces: needs root on Debian, installs sshd, pdsh and Slurm
# make gpu                checks and speed on the GPUs of this host: ten minutes on one H100 (predicted)
# make check              formatting, lint, types and the number of lines
# make bench              the training step compared with DeepSpeed's MoE layer and Mixtral: 20 minutes, 17 GiB
# make bench-short        a tiny model compared with DeepSpeed's MoE layer: a minute

TEXT ?=
PRESET ?= tiny-plus
STEPS ?=
ifndef RUN
RUN := runs/$(PRESET)-$(shell date +%Y%m%d-%H%M%S)
endif
override RUN := $(patsubst %/,%,$(RUN))

ifneq ($(words $(RUN)),1)
$(error RUN is '$(RUN)'; give the path of a run folder, without spaces)
endif

# The vocabulary is the preset's; its recipe is the JSON of its name, or else tiny.json.
VOCAB := $(shell sed -n 's/.*"vocab_size": *\([0-9]*\).*/\1/p' megamoe/config/presets/$(PRESET).json 2>/dev/null)
RECIPE := $(firstword $(wildcard ds_configs/$(subst -,_,$(PRESET)).json) ds_configs/tiny.json)
ifeq ($(and $(filter tiny%,$(PRESET)),$(VOCAB)),)
$(error PRESET is $(PRESET), not a preset of this size; give tiny-plus, tiny, tiny-glm or tiny-deepseek)
endif
ifneq ($(STEPS),)
ifneq ($(shell test '$(STEPS)' -gt 40 2>/dev/null && echo yes),yes)
$(error STEPS is $(STEPS); give a whole number above 40, the steps of the warm-up)
endif
endif

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

ifeq ($(TEXT),)
SOURCE := data/plays
TOKENS := data/shakespeare-$(VOCAB)
else
ifneq ($(words $(TEXT)),1)
$(error TEXT is '$(TEXT)'; give one path, without spaces; a link will do: ln -s 'my text.txt' my.txt)
endif
ifeq ($(wildcard $(TEXT)),)
$(error TEXT is $(TEXT), which does not exist; give a text file, a folder, or JSON lines)
endif
SOURCE := $(TEXT)
TOKENS := data/tokens-$(shell printf %s "$(abspath $(TEXT))" | cksum | cut -d' ' -f1)-$(VOCAB)
CHANGED := $(if $(shell find -L $(TEXT) -newer $(TOKENS)/corpus.json -print -quit 2>/dev/null),changed)
endif

OPTIONS = --ds_config $(RECIPE) $(if $(STEPS),--schedule_steps $(STEPS)) --preset $(PRESET) --data $(TOKENS) \
	--run_dir $(RUN) --auto_resume --eval_interval 100
CONTINUED = $(filter-out RUN=%,$(MAKEOVERRIDES)) RUN=$(RUN)

.PHONY: changed train ready test test-cluster gpu check bench bench-short
train:
	@flock --nonblock Makefile true || echo "waiting for another 'make train' here to prepare its data" >&2
	@flock --no-fork Makefile $(MAKE) --no-print-directory ready
	@trap : INT; ranks=$$(python -c 'import torch; print(1 if torch.cuda.device_count() == 1 else 2)') || exit; \
	command="launch_scripts/single_node.sh $$ranks --ep_size $$ranks $(OPTIONS)"; echo $$command; \
	$$command || { code=$$?; [ $$code != 75 ] || echo "to go on: make train $(CONTINUED)" >&2; exit $$code; }
	python tools/generate.py $(RUN) --prompt "In a quiet library," --num_samples 5
	python tools/report.py $(RUN)

ready: .venv/.train $(TOKENS)/corpus.json
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
	python tools/dev/check_lines.py

$(TOKENS)/corpus.json: $(SOURCE) $(CHANGED) | .venv/.train
	rm -rf $(TOKENS) data/.$(notdir $(TOKENS)).partial
	python tools/prepare_data.py $(SOURCE) --out $(TOKENS) --vocab_size $(VOCAB)

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
