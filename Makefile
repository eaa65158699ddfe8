# Each command does its own set-up: see .ci/install.
.PHONY: demo post test test-slow test-variants test-meshes test-gpu docs notebooks lint format clean

ARGS ?=
bin := .venv/bin

demo:
	@.ci/install ""
	$(bin)/python -m studies.tiny --resume $(ARGS)

post:
	@.ci/install ""
	$(bin)/python -m train post --preset tiny --out runs/post --resume $(ARGS)

# A file's tests share what they compile, so one worker has them all.
test: lint
	$(bin)/python -m pytest --numprocesses 2 --dist loadfile --durations 40 $(ARGS)

test-slow:
	@.ci/install test,docs
	@.ci/install_clients
	$(bin)/python -m pytest -m slow --numprocesses 2 --dist loadfile --durations 40 $(ARGS)

test-variants:
	@.ci/install test
	$(bin)/python -m pytest -m variants --numprocesses 2 --dist loadfile $(ARGS)

test-meshes:
	@.ci/install test
	$(bin)/python -m pytest -m meshes --numprocesses 2 $(ARGS)

test-gpu:
	@.ci/install test,cuda
	$(bin)/python -m benchmarks.gpu_tests $(ARGS)

docs:
	@.ci/install docs
	$(bin)/python -m zensical build --strict --clean
	@echo "The site begins at build/site/index.html"

# The notebooks are kept as scripts; Jupyter Lab also opens these as they are.
notebooks:
	@.ci/install notebooks
	$(bin)/python -m jupytext --quiet --from py:percent --to ipynb notebooks/*.py
	@echo "Converted: notebooks/*.ipynb"

lint:
	@.ci/install test
	$(bin)/ruff check
	$(bin)/ruff format --check
	$(bin)/pyright

format:
	@.ci/install test
	$(bin)/ruff check --fix
	$(bin)/ruff format

clean:
	rm -rf .venv .venv-clients .cache .pytest_cache .ruff_cache .hypothesis build dist *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
