# The same verbs as run.py, which does the work: python run.py VERB
PYTHON ?= python3
.PHONY: setup demo test lab docs readme
setup demo test lab docs readme:
	@$(PYTHON) run.py $@ $(ARGS)
