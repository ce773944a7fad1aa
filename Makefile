.PHONY: demo test check docs

demo:  ## the embedded model on its embedded data, from files to a decision
	fine-tune-llm demo

test:  ## notebooks and tests/
	pytest

check:  ## what .ci/run does, in this environment
	bash .ci/run --no-install

docs:  ## README.md, the list of pages, and _docs/ (by Quarto where it is installed)
	python tools/readme.py
	python tools/docs.py --sidebar
	python tools/docs.py
