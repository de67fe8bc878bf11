PYTHON ?= python3
VENV ?= .venv
RUN = $(VENV)/bin/python

.PHONY: setup test lint debug ladder

setup:  ## a virtual environment with everything for development
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install -r requirements-dev.txt

test:
	$(RUN) -m pytest

lint:
	$(RUN) -m ruff check .

debug:  ## train, sample and evaluate in seconds, on any machine
	$(RUN) train.py --out_dir=out-debug
	$(RUN) sample.py --out_dir=out-debug --max_new_tokens=100
	$(RUN) evaluate.py --out_dir=out-debug

ladder:  ## the lecture's models, from bigram to GPT, in about ten minutes
	$(RUN) -m tools.ladder
