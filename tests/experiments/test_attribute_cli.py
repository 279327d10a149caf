"""`metalearn attribute`: scores in a file, a page that shows examples as what they are."""

import numpy as np
import pytest

from metalearn._utils import strict_json
from metalearn.experiments import build
from metalearn.experiments.commands import rate
from metalearn.experiments.commands import run as train
from metalearn.experiments.commands.attribute import Options, run
from metalearn.experiments.report.examples import cards, content, label, png
from tests.helpers.small_configs import skip_without, small

RUN = {"steps": 1, "test_tasks": 2, "health": False, "wandb.mode": "disabled", "pictures": ()}
SIZES = {"algorithm.batch": 20, "algorithm.inner_steps": 4}


@pytest.mark.slow
def test_scores_are_written_shown_and_validated(tmp_path, capsys):
    config = small("data_weights_digits", **SIZES)
    options = Options(queries=2, validate=True, leave_out=3, trainings=4, fraction=0.25)
    validated = run(config, tmp_path, options)
    with np.load(tmp_path / "attribution.npz") as file:
        assert file["scores"].shape == (3, 1170) and file["queries"].tolist() == [0, 1, -1]
        assert file["reads"].sum() == 4 * 20 and (file["rows"] == np.arange(1170)).all()
        assert file["query_inputs"].shape == (270, 8, 8, 1)
        read = np.flatnonzero(file["reads"])
        assert len(file["kept"]) == round(0.25 * len(read)) and np.isin(file["kept"], read).all()
        assert file["scores"][-1][file["kept"]].min() == file["threshold"]
    page = (tmp_path / "attribution.html").read_text()
    assert "Query 1, loss" in page and "All 270 queries" in page and "Helps most" in page
    assert page.count("data:image/png") >= 3 and "linear datamodelling score" in page
    assert strict_json.read(tmp_path / "attribution.json", "it") == validated
    assert set(validated["lds"]) == {"scores", "gradient cosine", "final loss"}
    assert validated["of"] <= 80 and validated["left_out"] == 3
    shown = capsys.readouterr().out
    assert "scores [3, 1170] of 3 query sets" in shown and "queries alone" in shown
    assert f" Kept: {round(0.25 * len(read))} of {len(read)} examples, of a score of" in shown


@pytest.mark.slow
def test_a_trained_rater_scores_the_training_data_of_its_run_into_the_same_files(tmp_path, capsys):
    skip_without("text")
    config = small("data_rater_shakespeare", **RUN)
    train.train(config, tmp_path / "run", progress=False)
    rate.run(tmp_path / "run", fraction=0.5)
    windows = build.splits(build.to_json(config)["dataset"]).train.windows()
    with np.load(tmp_path / "run" / "attribution.npz") as file:
        names = {"scores", "losses", "reads", "rows", "queries", "query_inputs", "query_targets"}
        assert set(file.files) == names | {"kept", "threshold"}
        assert file["scores"].shape == (1, len(windows.inputs)) and file["queries"].tolist() == [-1]
        assert len(file["kept"]) == round(len(windows.inputs) / 2)
        assert file["scores"][0][file["kept"]].min() == file["threshold"]
    page = (tmp_path / "run" / "attribution.html").read_text()
    assert "Highest scores" in page and "of the windows are corrupted: the AUC of" in page
    assert page.count("<figure") == 16 and "Kept: " in page
    assert " Kept: " in capsys.readouterr().out
    with pytest.raises(ValueError, match=r"`top_fraction\(fraction=1.0\)` is a share of"):
        rate.run(tmp_path / "run", fraction=1.0)


def test_a_config_of_a_rater_is_trained_before_it_scores(tmp_path):
    skip_without("text")
    with pytest.raises(ValueError, match="a 'data_rater' is trained first: `metalearn train"):
        run(small("data_rater_shakespeare"), tmp_path, Options())


@pytest.mark.slow
def test_a_run_of_another_algorithm_scores_no_examples(tmp_path):
    config = small("maml_sinusoid", **RUN)
    train.train(config, tmp_path / "run", progress=False)
    with pytest.raises(ValueError, match="is of 'maml'. Pass a config with 'data_weights' for"):
        rate.run(tmp_path / "run")


def test_a_config_without_a_weight_for_each_example_is_refused(tmp_path):
    with pytest.raises(ValueError, match="needs a config with the algorithm 'data_weights'"):
        run(small("fds_digits"), tmp_path, Options())


def test_a_split_that_the_dataset_has_not_is_refused(tmp_path):
    config = small("data_weights_digits", **{"dataset.held_out": 0.0})
    with pytest.raises(ValueError, match=r"has no validation split .* Take --split=train"):
        run(config, tmp_path, Options(split="validation"))
    with pytest.raises(ValueError, match="No split is called 'tests'"):
        run(config, tmp_path, Options(split="tests"))


def test_examples_are_shown_as_images_texts_or_numbers():
    image = np.zeros((4, 4, 1), np.uint8)
    assert png(image).startswith(b"\x89PNG") and "<img" in content(image)
    assert png(np.linspace(0, 1, 48).reshape(4, 4, 3)).startswith(b"\x89PNG")
    text = np.frombuffer(b"to <be>", np.uint8).astype(np.int32)
    assert content(text) == "<pre>to &lt;be&gt;</pre>"
    assert content(np.array([0.5, -1.0])) == "<pre>[ 0.5 -1. ]</pre>"
    assert content(np.array([1000, 7])) == "<pre>[1000    7]</pre>"  # tokens of no known text
    assert cards([]) == '<p class="note">None.</p>' and "row 3" in cards([(image, "row 3")])
    assert label(np.int32(7)) == "7" and label(np.zeros((2, 3))) == "[2, 3]"
