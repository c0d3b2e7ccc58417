# The same verbs as run.py, which does the work: python run.py VERB
PYTHON ?= python3
.PHONY: setup demo test lab docs
setup demo test lab docs:
	@$(PYTHON) run.py $@ $(ARGS)
