# The same verbs as run.py, which does the work. Arguments: make demo ARGS="--data PATH"
PYTHON ?= python3
VERBS = setup demo test lab docs bench app readme refresh
.PHONY: $(VERBS)
$(VERBS):
	@$(PYTHON) run.py $@ $(ARGS)
