"""`metalearn adapt`: a finished run predicts a query set of files."""

import re

import jax
import numpy as np
import pytest
from PIL import Image

from metalearn.datasets import digits
from metalearn.experiments import build
from metalearn.experiments.commands import run
from metalearn.experiments.commands.adapt import Examples, _results, read
from metalearn.experiments.runs import load_run
from tests.helpers.command_line import SINUSOID, call
from tests.helpers.small_configs import small

# ml-collections loads config files in a way that Python has deprecated.
pytestmark = pytest.mark.filterwarnings("ignore:the load_module.. method:DeprecationWarning")
NAMES = ("ant", "bee", "cat", "dog", "eel")


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    """A run of two outer steps on 5-way digits."""
    workdir = tmp_path_factory.mktemp("runs") / "digits"
    config = small("maml_digits", steps=2, eval_every=0, test_tasks=2, health=False)
    config.wandb.mode, config.engine, config.algorithm.eval_steps = "disabled", "reverse", 2
    run.train(config, workdir, progress=False)
    return workdir


@pytest.fixture(scope="module")
def images():
    """{name: images [4, 8, 8, 1] uint8} of five held-out classes."""
    index = digits("test")
    return {name: index.examples[i, :4] for i, name in enumerate(NAMES)}


@pytest.fixture(scope="module")
def folders(tmp_path_factory, images):
    """A support set of two images of each class, a query set of two, by class; and unsorted."""
    top = tmp_path_factory.mktemp("images")
    for name, pixels in images.items():
        for i, image in enumerate(pixels):
            part = "support" if i < 2 else "query"
            for place in (top / part / name, top / f"{part}-flat"):
                place.mkdir(parents=True, exist_ok=True)
                Image.fromarray(image[..., 0]).save(place / f"{name}{i}.png")
    return top


def expected(workdir, images, steps=None):
    """The outputs for the queries, in Python."""
    restored = load_run(workdir)
    support, query = (
        np.concatenate([pixels[part] for pixels in images.values()]).astype(np.float32) / 255
        for part in (slice(2), slice(2, 4))
    )
    learner = restored.trainer.algorithm.adapt(
        restored.trainer.learned(restored.state),
        (support, np.repeat(np.arange(5, dtype=np.int32), 2)),
        build.key_of(restored.config["seed"]),
        steps=steps,
    )
    return np.asarray(learner.predict(query))


@pytest.mark.slow
def test_folders_of_images_are_adapted_to_predicted_and_scored(
    workdir, folders, images, tmp_path, capsys
):
    out = tmp_path / "predictions.npz"
    words = ("adapt", f"--workdir={workdir}", f"--support={folders / 'support'}")
    assert call(*words, f"--query={folders / 'query'}", f"--out={out}") == 0
    result = np.load(out)
    outputs = expected(workdir, images)
    np.testing.assert_allclose(result["outputs"], outputs, rtol=1e-5)
    assert result["predictions"].tolist() == outputs.argmax(-1).tolist()
    assert result["names"].tolist() == [NAMES[i] for i in outputs.argmax(-1)]
    assert result["files"][0] == "ant/ant2.png"
    accuracy = (outputs.argmax(-1) == np.repeat(np.arange(5), 2)).mean()
    assert capsys.readouterr().out == (
        f"{out}: outputs [10, 5], files [10], predictions [10], names [10], of outer step 2 of "
        f"{workdir} after 2 inner steps.\nAccuracy {accuracy:.3f} on the 10 labelled queries.\n"
    )
    assert call(*words, f"--query={folders / 'query-flat'}", "--inner-steps=4") == 0
    result = np.load(workdir / "predictions.npz")
    np.testing.assert_allclose(result["outputs"], expected(workdir, images, steps=4), rtol=1e-5)
    assert "labelled" not in capsys.readouterr().out


def test_images_of_folders_are_resized_to_those_of_the_model(images, tmp_path):
    for name, pixels in images.items():
        (tmp_path / name).mkdir()
        for number, height in enumerate((8, 16, 24)):
            large = np.kron(pixels[number, ..., 0], np.ones((height // 8, 2), np.uint8))
            Image.fromarray(large).save(tmp_path / name / f"{number}.png")
    example = jax.ShapeDtypeStruct((1, 8, 8, 1), "float32")
    examples = read("support", tmp_path, example)
    assert examples.inputs.shape == (15, 8, 8, 1) and 0 < examples.inputs.max() <= 1


def test_arrays_of_a_file_are_adapted_to_and_predicted(workdir, images, tmp_path):
    support, query = (
        np.concatenate([pixels[part] for pixels in images.values()])
        for part in (slice(2), slice(2, 4))
    )
    np.savez(tmp_path / "support.npz", inputs=support, labels=np.repeat(np.arange(5), 2))
    np.savez(tmp_path / "query.npz", inputs=query)
    files = [f"--{name}={tmp_path / name}.npz" for name in ("support", "query")]
    assert call("adapt", f"--workdir={workdir}", *files, f"--out={tmp_path / 'out.npz'}") == 0
    result = np.load(tmp_path / "out.npz")
    assert sorted(result.files) == ["outputs", "predictions"]
    np.testing.assert_allclose(result["outputs"], expected(workdir, images), rtol=1e-5)


def test_outputs_that_are_not_finite_are_counted(workdir, images, tmp_path, capsys):
    pixels = np.concatenate(list(images.values())).astype(np.float32)
    np.savez(tmp_path / "support.npz", inputs=pixels, labels=np.repeat(np.arange(5), 4))
    pixels[:3] = np.nan
    np.savez(tmp_path / "query.npz", inputs=pixels)
    files = [f"--{name}={tmp_path / name}.npz" for name in ("support", "query")]
    assert call("adapt", f"--workdir={workdir}", *files, f"--out={tmp_path / 'out.npz'}") == 0
    assert "Warning: the outputs of " in capsys.readouterr().out


@pytest.mark.slow
def test_a_regression_is_scored_by_its_squared_error(tmp_path, capsys):
    workdir = tmp_path / "run"
    words = ("--noprogress", "--config.eval_every=0", "--config.steps=1")
    assert call(*SINUSOID, *words, f"--workdir={workdir}") == 0
    x = np.linspace(-1, 1, 10, dtype=np.float32)[:, None]
    np.savez(tmp_path / "wave.npz", inputs=x, labels=np.sin(x))
    capsys.readouterr()
    files = [f"--{name}={tmp_path / 'wave.npz'}" for name in ("support", "query")]
    assert call("adapt", f"--workdir={workdir}", *files) == 0
    outputs = np.load(workdir / "predictions.npz")["outputs"]
    error = ((outputs - np.sin(x)) ** 2).mean()
    assert f"Mean squared error {error:.4g} on the 10 labelled" in capsys.readouterr().out


# What is refused.


@pytest.mark.parametrize(
    ("support", "queries", "outputs", "message"),
    [
        (np.zeros(3), np.zeros(4), np.zeros((4, 1)), "labels [4], and what is predicted"),
        (np.arange(3), np.zeros((4, 1), int), np.zeros((4, 3)), "labels [4, 1], and what is"),
    ],
)
def test_labels_of_another_shape_than_the_predictions_are_refused(
    support, queries, outputs, message
):
    examples = (Examples(np.zeros((len(labels), 2)), labels) for labels in (support, queries))
    with pytest.raises(ValueError, match=re.escape(message)):
        _results(*examples, outputs)


@pytest.fixture
def adapting(workdir, refused, capsys):
    def refuse(*words):
        capsys.readouterr()  # of the run
        return refused("adapt", f"--workdir={workdir}", *words)

    return refuse


def test_a_support_and_a_query_set_are_asked_for(adapting, folders):
    message = "`metalearn adapt` needs --{}: an .npz file with the arrays `inputs` and `labels`, or"
    assert adapting().startswith(message.format("support"))
    assert adapting(f"--support={folders / 'support'}").startswith(message.format("query"))


def test_files_that_hold_no_support_set_are_refused(adapting, folders, tmp_path):
    words = f"--query={folders / 'query'}"
    nowhere = tmp_path / "nowhere"
    message = f"There is no file and no folder --support={nowhere}."
    assert adapting(f"--support={nowhere}", words) == message
    text = tmp_path / "text.npz"
    text.write_text("inputs")
    message = f"--support={text} is no .npz file of arrays ("
    assert adapting(f"--support={text}", words).startswith(message)
    np.savez(tmp_path / "few.npz", inputs=np.zeros((2, 8, 8, 1)), names=np.arange(2))
    message = f"--support={tmp_path / 'few.npz'} lacks labels; it has ['inputs', 'names']. Write"
    assert adapting(f"--support={tmp_path / 'few.npz'}", words).startswith(message)
    np.savez(tmp_path / "large.npz", inputs=np.zeros((2, 9, 9, 1)), labels=np.arange(2))
    assert adapting(f"--support={tmp_path / 'large.npz'}", words) == (
        f"--support={tmp_path / 'large.npz'} has inputs of the shape [2, 9, 9, 1], but the model "
        "of this run takes [n, 8, 8, 1]. Crop or resize the images, or reshape the arrays."
    )
    np.savez(tmp_path / "six.npz", inputs=np.zeros((6, 8, 8, 1)), labels=np.arange(6))
    message = "The labels go from 0 to 5, but the network has 5 outputs"
    assert adapting(f"--support={tmp_path / 'six.npz'}", words).startswith(message)


def test_a_support_folder_without_classes_and_a_query_of_another_class_are_refused(
    adapting, folders, tmp_path
):
    flat = folders / "query-flat"
    assert adapting(f"--support={flat}", f"--query={flat}") == (
        f"--support={flat} holds images, and no folder for each class, whose name would say what "
        f"they are. Move the images of a class into a folder: {flat}/CLASS."
    )
    (tmp_path / "fox").mkdir()
    Image.new("L", (8, 8)).save(tmp_path / "fox" / "0.png")
    message = adapting(f"--support={folders / 'support'}", f"--query={tmp_path}")
    assert message.startswith("--query has images of fox, and --support has none to adapt to; it")
