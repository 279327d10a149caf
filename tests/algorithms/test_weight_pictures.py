"""Pictures of learned loss weights: few groups, whatever the number of sources."""

import numpy as np

from metalearn.algorithms.pictures import by_source

VALUES = np.arange(24.0).reshape(3, 4, 2)  # [T, batch, S]


def test_weights_without_sources_are_one_group():
    (name,) = by_source(VALUES, None)
    assert name == "all examples"


def test_a_few_sources_are_a_group_each():
    groups = by_source(VALUES, np.array([[0, 1, 0, 5]] * 3))
    assert list(groups) == ["source 0", "source 1", "source 5"]
    assert sum(group.size for group in groups.values()) == VALUES.size
    np.testing.assert_array_equal(groups["source 5"], VALUES[:, 3])


def test_of_many_sources_the_means_are_drawn():
    groups = by_source(VALUES, np.arange(12).reshape(3, 4))
    assert list(groups) == ["means of 12 sources"]
    np.testing.assert_allclose(groups["means of 12 sources"], VALUES.mean(2).ravel())
