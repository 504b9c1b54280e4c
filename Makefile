# Two commands: `make demo` and `make test`. Each makes .venv and installs what it needs first.
PYTHON ?= python3
VENV ?= .venv
PY := $(VENV)/bin/python
MODEL := output/demo/best_model

.PHONY: demo test lint clean

$(VENV)/.ready: requirements.txt requirements-dev.txt
	$(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --quiet --disable-pip-version-check -r requirements.txt -r requirements-dev.txt
	@touch $@

demo: $(VENV)/.ready
	$(PY) demo_data.py
	$(PY) load.py --preset demo
	rm -rf output/demo
	$(PY) train_match.py --preset demo --output_dir output/demo
	$(PY) inference_script.py --checkpoint $(MODEL) --image_path data/demo/images/scene_00639.tif --text "an airport with aircraft" "a port with ships" "一座机场，有四架飞机" "一片森林"
	$(PY) inference_script.py --checkpoint $(MODEL) --json_input data/demo/pairs_test.json --json_output output/demo/pairs_scores.json
	$(PY) data2csv.py --preset demo
	$(PY) csv2json.py --preset demo
	rm -rf output/demo_vqa
	$(PY) train_vqa.py --preset demo --output_dir output/demo_vqa
	$(PY) compare_before_after.py --preset demo --num_samples 10
	rm -rf output/demo_chat
	$(PY) train_vqa.py --preset demo --task chat --output_dir output/demo_chat
	printf '图中有飞机吗？\n那船呢？\nstop\n' | $(PY) cli_demo.py --from_pretrained output/demo_chat/best_model --image_path data/demo/images/scene_00639.tif --language zh
	rm -rf output/demo_caption
	$(PY) train_caption.py --preset demo --output_dir output/demo_caption
	$(PY) caption.py eval --preset demo
	$(PY) caption.py generate --preset demo --image_path data/demo/images/scene_00639.tif --prompt "Describe the image."
	rm -rf output/demo_search
	$(PY) search.py index --preset demo
	$(PY) search.py query --preset demo "an airport with aircraft" "a lake with ships" "从空中俯瞰一片森林，可以看到北部的两栋建筑物。" --each -k 5 --sheet output/demo_search/sheet.png
	$(PY) search.py index data/demo/images_later --preset demo --store output/demo_search/after.index

test: $(VENV)/.ready lint
	OMP_NUM_THREADS=1 $(PY) -m pytest -n 2 --dist worksteal

lint: $(VENV)/.ready
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

clean:
	rm -rf $(VENV) .pytest_cache .ruff_cache
