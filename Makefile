# Each command does its own set-up: see .ci/install.
.PHONY: demo test test-meshes test-gpu lint format clean

ARGS ?=
bin := .venv/bin

demo:
	@.ci/install ""
	$(bin)/python -m train --preset tiny --resume $(ARGS)

# A file's tests share what they compile, so one worker has them all.
test: lint
	$(bin)/python -m pytest --numprocesses 2 --dist loadfile $(ARGS)

test-meshes:
	@.ci/install test
	$(bin)/python -m pytest -m meshes --numprocesses 2 $(ARGS)

test-gpu:
	@.ci/install test,cuda
	$(bin)/python -m benchmarks.gpu_tests $(ARGS)

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
	rm -rf .venv .pytest_cache .ruff_cache .hypothesis build dist *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
