# CI's steps by name; `just` lists them. Each runs in the environment that is active.

default:
    @just --list

# what CI runs, in a new environment
ci:
    bash .ci/run

# the tests, as in README
test *files:
    pytest -n auto {{files}}

# everything, slow tests too: before a release
test-all:
    pytest -n auto -m "slow or not slow"

lint:
    ruff check .
    ruff format --check .
    mypy

# README.md from its template and benchmarks/results
readme:
    python docs/_ext/render.py

# the site, into docs/_build/html; warnings are errors
docs:
    python -m sphinx -b html -W --keep-going docs docs/_build/html

# the tutorial again, with its outputs
tutorial:
    python docs/_ext/tutorial.py

# wheel and sdist, built and checked
dist:
    python .ci/installs.py
