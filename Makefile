PYTHON ?= python3
VENV = .venv
RUN = $(VENV)/bin/python

.PHONY: run test test-all
.DELETE_ON_ERROR:

run: $(VENV)/installed
	$(RUN) speedup_diffusion.py --strategy adaptive

test: $(VENV)/installed
	$(RUN) -m pytest $(MARKERS) -m "not slow" test_speedup_diffusion.py

test-all: $(VENV)/installed  # adds the default run of every strategy: about 25 minutes on 2 cores
	$(RUN) -m pytest $(MARKERS) test_speedup_diffusion.py

MARKERS = -o markers="slow: takes minutes; left out of make test"

$(VENV)/installed: requirements.txt
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet --upgrade pip
	$(RUN) -m pip install --quiet -r requirements.txt
	touch $@
