PYTHON ?= python3
VENV = .venv
RUN = $(VENV)/bin/python

.PHONY: run test test-all bench check compare
.DELETE_ON_ERROR:

run: $(VENV)/installed
	$(RUN) speedup_diffusion.py --strategy adaptive

test: $(VENV)/installed
	$(RUN) -m pytest $(MARKERS) -m "not slow and not bench" test_speedup_diffusion.py

test-all: $(VENV)/installed  # adds 20 kills, a long run and every default run: about 25 minutes on 2 cores
	$(RUN) -m pytest $(MARKERS) -m "not bench" test_speedup_diffusion.py

bench: $(VENV)/installed  # what each method costs: about 11 minutes on 2 cores, which should have nothing else to do
	$(RUN) -m pytest $(MARKERS) -q -m bench test_speedup_diffusion.py

check: $(VENV)/check  # style and types
	$(RUN) -m ruff check --line-length 110 .
	$(RUN) -m ruff format --check --line-length 110 .
	$(RUN) -m mypy --ignore-missing-imports speedup_diffusion.py

MARKERS = -o markers="$$(printf 'slow: minutes long; not in make test\nbench: prints times; only in make bench')"

# Every method on the digits with one budget, then the report: some five minutes a run on 2 cores.
# make compare SEEDS="0 1"                               more than one seed
# OMP_NUM_THREADS=1 make -j2 compare                     two runs side by side
# make compare RESULTS=runs/short FLAGS="--steps 400"    other settings for all, in another folder
SEEDS = 0
FLAGS =
RESULTS = runs/compare
BUDGET = --fid-samples 512 --fid-every 200 --fid-features $(RESULTS)/digits.ts

uniform =
logit-normal = --strategy logit-normal
speed = --strategy speed
speed-lam = --strategy speed --speed-lam 0.8
speed-sampling = --strategy speed --weighting none
speed-weighting = --weighting change-aware
curriculum = --strategy curriculum
momentum-decay = --momentum-decay
curriculum-momentum-decay = --strategy curriculum --momentum-decay
adaptive = --strategy adaptive
adaptive-min-snr = --strategy adaptive --weighting min-snr
min-snr = --weighting min-snr
ROWS = uniform logit-normal speed speed-lam speed-sampling speed-weighting curriculum momentum-decay \
       curriculum-momentum-decay adaptive adaptive-min-snr min-snr
RUNS = $(foreach row,$(ROWS),$(foreach seed,$(SEEDS),$(RESULTS)/$(row)-$(seed)))

compare: $(VENV)/matplotlib $(RUNS:=/done)
	$(RUN) speedup_diffusion.py --report $(RUNS)

# The stem is ROW-SEED. A run that was interrupted starts again.
$(RESULTS)/%/done: $(RESULTS)/digits.ts | $(VENV)/installed
	rm -rf $(@D)
	$(RUN) speedup_diffusion.py $($(patsubst %-$(lastword $(subst -, ,$*)),%,$*)) \
	    --seed $(lastword $(subst -, ,$*)) --out $(@D) $(BUDGET) $(FLAGS)
	touch $@

$(RESULTS)/digits.ts: | $(VENV)/installed
	mkdir -p $(RESULTS)
	$(RUN) -c "import test_speedup_diffusion as t; t.save_torchscript(t.DigitFeatures(), '$@')"

$(VENV)/matplotlib: $(VENV)/installed
	$(RUN) -m pip install --quiet matplotlib
	touch $@

$(VENV)/check: $(VENV)/installed
	$(RUN) -m pip install --quiet ruff mypy
	touch $@

$(VENV)/installed: requirements.txt
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet --upgrade pip
	$(RUN) -m pip install --quiet -r requirements.txt
	touch $@
