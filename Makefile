# make book   build the book into book/_build/html      make lab      open the chapters in JupyterLab
# make test   run the tests                             make refresh  run the chapters again and store their outputs
# Each makes .venv first, once; all it needs is Python 3.11.

PYTHON ?= python3.11
BIN := .venv/bin
HTML := book/_build/html
CHAPTERS := $(sort $(wildcard notebooks/[0-9]*.ipynb)) notebooks/report.ipynb
# The pages depend on this code and data, which the cache of executed chapters does not look at.
SOURCES := $(wildcard mmn/*.py mmn/*.html) $(shell find data -type f 2>/dev/null) constraints.txt

.PHONY: book lab test refresh clean
.DEFAULT_GOAL := book

.venv/ready: pyproject.toml constraints.txt
	@command -v $(PYTHON) >/dev/null || { echo "make needs Python 3.11: install it, or say make PYTHON=/path/to/python3.11"; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[book,test]'
	touch $@

book/_build/sources: $(SOURCES)
	rm -rf book/_build/.jupyter_cache
	mkdir -p book/_build
	touch $@

book/_static/atlas.html: .venv/ready book/_build/sources
	$(BIN)/mmn atlas --out $@

book: .venv/ready book/_build/sources book/_static/atlas.html
	TQDM_DISABLE=1 $(BIN)/jupyter-book build . --config book/_config.yml --toc book/_toc.yml --path-output book -nW --keep-going
	@echo "The book is in $(HTML)/index.html"

lab: .venv/ready
	$(BIN)/jupyter lab --notebook-dir=notebooks

# The chapters come first: they take longest, and both processes then end at about the same time.
test: .venv/ready
	TQDM_DISABLE=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadgroup --no-loadscope-reorder notebooks tests \
	    --nbval-lax --nbval-current-env --nbval-cell-timeout=300

# make refresh                the chapters and README's picture
# make refresh CHAPTERS=...   these chapters only
# make refresh TABLES=1       the slow tables of data/ first (an hour or more)
refresh: .venv/ready
	$(if $(TABLES),$(BIN)/mmn evaluate --out data/results/evaluate.json --card data/tiny-llava/README.md)
	$(if $(TABLES),$(BIN)/mmn tables)
	$(if $(TABLES),OMP_NUM_THREADS=1 $(BIN)/mmn bench --out data/results)
	$(if $(TABLES),OMP_NUM_THREADS=1 $(BIN)/mmn bench --study --out data/results)
	$(if $(TABLES),$(BIN)/mmn throughput --json > data/results/throughput.json)
	$(if $(TABLES),rm -rf runs/report && $(BIN)/mmn replicate run --out runs/report --count 60 --shards 2)
	$(if $(TABLES),rm -rf data/results/report && cp -r runs/report/tables data/results/report)
	$(BIN)/ruff format --quiet $(CHAPTERS)
	TQDM_DISABLE=1 $(BIN)/jupyter nbconvert --to notebook --execute --inplace --ExecutePreprocessor.timeout=600 \
	    --ExecutePreprocessor.record_timing=False --ExecutePreprocessor.store_widget_state=False $(CHAPTERS)
	$(BIN)/python book/make_picture.py
	$(BIN)/python book/make_claims.py
	$(BIN)/python book/make_costs.py

clean:
	rm -rf .venv book/_build book/_static/atlas.html
