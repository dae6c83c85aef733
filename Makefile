# The tasks of a contributor and of CI (.ci/run). `make` alone lists them.

AGAINST ?=

.PHONY: help test slow lint types course lines check ci release

help:
	@sed -n 's/^\([a-z]*\):.*## /\1	/p' $(MAKEFILE_LIST)

test: ## the default tests
	pytest

slow: ## the tests that take minutes
	pytest -m slow

lint: ## ruff, its format, and the direction of imports
	ruff check .
	ruff format --check .
	lint-imports

types: ## mypy: strict on core, cache and engine
	mypy

course: ## lessons, exercises, mutants and cards hold together
	python scripts/lessons.py dev-check

lines: ## lines of each room; AGAINST=REV shows the difference
	python scripts/lines.py $(if $(AGAINST),--against $(AGAINST))

check: lint types course lines ## all of CI but the tests

ci: test check ## what CI runs

release: ## sdist and wheel in dist/, checked, installed elsewhere and used; needs the extra dev
	python scripts/release.py
