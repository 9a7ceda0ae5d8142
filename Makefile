# Every command makes its own environment from nothing but Python 3.11 or newer.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PEERS := agent_saga langgraph dbos prefect

.PHONY: demo test test-a-to-l test-m-to-z test-many campaign mutants lint types layers schemas docs pictures bench bench-peers clean

demo: $(VENV)/.core  ## run the main job: 1,000 orders against three databases
	$(BIN)/python -m examples.order_fulfilment

test: $(VENV)/.dev  ## run the tests, two parts at a time, with branch coverage; what has to be covered stands in pyproject.toml
	@$(BIN)/coverage erase
	@$(MAKE) --no-print-directory --jobs 2 test-a-to-l test-m-to-z test-many
	@$(BIN)/coverage combine --quiet
	$(BIN)/coverage report

# Apart from the others: to trace thousands of sagas for coverage would take longer than they do.
MANY := tests/test_properties.py tests/test_families.py tests/test_nights.py tests/test_many_sagas.py
A_TO_L := $(filter-out $(MANY),$(wildcard tests/test_[a-l]*.py))
TRACED := $(BIN)/coverage run --parallel-mode -m pytest -p no:cacheprovider

test-a-to-l: $(VENV)/.dev
	$(TRACED) $(A_TO_L)

test-m-to-z: $(VENV)/.dev
	$(TRACED) $(filter-out $(MANY) $(A_TO_L),$(wildcard tests/test_*.py))

test-many: $(VENV)/.dev  ## the random sagas, and those of which there are thousands
	$(BIN)/python -m pytest -p no:cacheprovider $(MANY)

campaign: $(VENV)/.dev  ## the random sagas again, many more of them: make campaign CASES=100000
	SAGA_CASES=$(or $(CASES),50000) $(BIN)/python -m pytest --timeout 0 tests/test_properties.py tests/test_families.py tests/test_nights.py

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.dev
	$(BIN)/mypy

layers: $(VENV)/.dev
	$(BIN)/lint-imports

schemas: $(VENV)/.core  ## write the JSON schemas of policy, report and events
	$(BIN)/python -m saga.schemas schemas

docs: $(VENV)/.docs  ## build the docs into build/site; a link that leads nowhere fails
	$(BIN)/zensical build --strict --clean

pictures: $(VENV)/.dev  ## draw the docs' pictures anew
	$(BIN)/python -m tests.stories docs/pictures

bench: $(VENV)/.bench  ## against plain stageflow and sagaz, in one run
	$(BIN)/python -m bench

bench-peers: $(VENV)/.bench $(PEERS:%=peer-%)  ## against durable peers, each in an environment of its own
	$(BIN)/python -m bench.peers

# A peer that can't be installed is missing from the table, which says so.
peer-%: bench/peers/%.txt
	-@test .venv-peers/$*/installed -nt $< || { rm -rf .venv-peers/$* && $(PYTHON) -m venv .venv-peers/$* && \
		.venv-peers/$*/bin/python -m pip install --quiet --disable-pip-version-check -r $< && touch .venv-peers/$*/installed; }

# mutmut trusts modification times, so it starts from nothing.
mutants: $(VENV)/.mutants  ## change the core at random: nine of ten changes have to be noticed
	rm -rf mutants
	SAGA_CASES=150 $(BIN)/mutmut run --max-children $(or $(JOBS),1)
	@$(BIN)/mutmut results --all true | awk -F'[ :]+' \
		'{ sub(/\.[^.]*$$/, "", $$2); all[$$2]++; if ($$NF == "killed" || $$NF == "timeout") dead[$$2]++ } \
		END { for (m in all) { s = 100 * dead[m] / all[m]; printf "%-24s %d of %d: %.1f %%\n", m, dead[m], all[m], s; if (s < 90) low = 1 }; exit low || !NR }'

$(VENV)/.core: EXTRAS :=
$(VENV)/.dev: EXTRAS := [test,lint]
$(VENV)/.bench: EXTRAS := [bench]
$(VENV)/.docs: EXTRAS := [docs]
$(VENV)/.mutants: EXTRAS := [test,mutants]
$(VENV)/.%: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.$(EXTRAS)'
	touch $(VENV)/.core $@

clean:
	rm -rf $(VENV) .venv-peers build mutants .cache .coverage .hypothesis .mypy_cache .pytest_cache .ruff_cache
