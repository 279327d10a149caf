"""The page that goes from folders of images to predictions, run as it stands on drawn images."""

import pathlib
import re

import numpy as np
import pytest
from PIL import Image

PAGE = pathlib.Path(__file__).parents[1] / "docs" / "few_shot_by_friday.md"


def draw(folder, patterns, each, rng):
    """Draw images of classes: the class is a pattern of 4 x 4 fields, the rest is noise."""
    for name, pattern in patterns.items():
        (folder / name).mkdir(parents=True)
        for i in range(each):
            image = np.kron(pattern, np.ones((5, 5))) * 160 + rng.uniform(0, 80, (20, 20))
            Image.fromarray(image.astype(np.uint8)).save(folder / name / f"{name}{i}.png")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*strict=:DeprecationWarning")
def test_the_page_goes_from_folders_of_images_to_predictions_of_new_classes(
    tmp_path, monkeypatch, capsys
):
    rng = np.random.default_rng(0)
    names = {"train": "abcdefghij", "validation": "klmn", "new": "xyz"}
    for folder, classes in names.items():
        patterns = {name: rng.integers(0, 2, (4, 4)) for name in classes}
        draw(tmp_path / "data" / folder, patterns, 2 if folder == "new" else 6, rng)
    draw(tmp_path / "drawn", patterns, 3, rng)
    (tmp_path / "data" / "unknown").mkdir()
    for image in (tmp_path / "drawn").rglob("*.png"):
        image.rename(tmp_path / "data" / "unknown" / image.name)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("METALEARN_CACHE", str(tmp_path / "cache"))
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    shown = {"__name__": "page"}
    exec(compile("\n".join(blocks), str(PAGE), "exec"), shown)  # noqa: S102
    score, *predictions = capsys.readouterr().out.splitlines()
    assert float(score.split()[0]) > 0.8  # of three classes that it was not trained on
    assert len(predictions) == 9
    assert sum(line[0] == line[-1] for line in predictions) >= 8  # x0.png x
    assert shown["learner"].steps == 3 and "head" in shown["learner"].params
