PYTHON ?= python3
VENV = .venv
RUN = $(VENV)/bin/python

# glibc then keeps the memory that a step frees, which makes training on a CPU faster.
export MALLOC_MMAP_MAX_ = 0
export MALLOC_TRIM_THRESHOLD_ = 1000000000000

.PHONY: run test test-all bench check compare compare-cifar10

run: $(VENV)/installed
	$(RUN) speedup_diffusion.py --strategy adaptive

PYTEST = $(RUN) -m pytest -o markers="$$(printf 'slow: minutes long\nbench: prints times')" test_speedup_diffusion.py

test: $(VENV)/installed  # with one thread: the models are tiny, more threads wait for each other
	OMP_NUM_THREADS=1 $(PYTEST) -m "not slow and not bench"

test-all: $(VENV)/installed  # adds ten kills and every default run: about 20 minutes on two cores
	$(PYTEST) -m "not bench"

bench: $(VENV)/installed  # what each method costs: some minutes on two cores, which should be idle
	$(PYTEST) -q -m bench

check: $(VENV)/check  # style
	$(RUN) -m ruff check --select E,F,I --line-length 120 .
	$(RUN) -m ruff format --check --line-length 120 .

# Every method on the digits with one budget, then a table: some four minutes a run on two cores.
# make compare SEEDS="0 1"                             more than one seed
# make compare RESULTS=runs/short FLAGS="--steps 400"  other settings for all, in another folder
# A run that is there is gone on with where it stopped.
SEEDS = 0
FLAGS =
RESULTS = runs/compare

compare: $(VENV)/installed
	set -e; for seed in $(SEEDS); do \
	    run() { \
	        name=$$1; shift; \
	        if [ -e $(RESULTS)/$$name-$$seed/checkpoint.pt ]; then \
	            $(RUN) speedup_diffusion.py --resume $(RESULTS)/$$name-$$seed $(FLAGS); \
	        else \
	            rm -rf $(RESULTS)/$$name-$$seed; \
	            $(RUN) speedup_diffusion.py --out $(RESULTS)/$$name-$$seed --seed $$seed $$@ \
	                --eval-every 200 --fid-every 200 $(FLAGS); \
	        fi; \
	    }; \
	    run uniform --strategy uniform; \
	    run speed --strategy speed; \
	    run speed-code --strategy speed --speed-variant code; \
	    run speed-lam --strategy speed --speed-lam 0.8; \
	    run speed-code-lam --strategy speed --speed-variant code --speed-lam 0.8; \
	    run speed-sampling --strategy speed --weighting none; \
	    run speed-weights --weighting change-aware; \
	    run speed-weights-lam --weighting change-aware --speed-lam 0.8; \
	    run curriculum --strategy curriculum; \
	    run momentum-decay --momentum-decay; \
	    run curriculum-momentum-decay --strategy curriculum --momentum-decay; \
	    run adaptive --strategy adaptive; \
	    run adaptive-loss --strategy adaptive --adaptive-reward loss --weighting change-aware --speed-lam 0.8; \
	    run min-snr --weighting min-snr; \
	    run logit-normal --strategy logit-normal; \
	done
	$(RUN) speedup_diffusion.py --report $(RESULTS)/uniform-* $(RESULTS)/*

CIFAR10 = --dataset cifar10 --image-size 16 --patch 2 --width 32 --mults 1 1 --num-blocks 1 --attention 4 --dropout 0 \
    --lr 2e-3 --ema-decay 0.999 --steps 5000 --eval-every 500 --fid-every 500 --fid-samples 5000 --sampling-steps 25

compare-cifar10:  # the same on CIFAR-10, downloaded, at 16x16: slow on a CPU
	$(MAKE) compare RESULTS=runs/cifar10 FLAGS="$(CIFAR10) $(FLAGS)"

$(VENV)/check: $(VENV)/installed
	$(RUN) -m pip install --quiet ruff
	touch $@

$(VENV)/installed: requirements.txt
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet --upgrade pip
	$(RUN) -m pip install --quiet -r requirements.txt
	touch $@
