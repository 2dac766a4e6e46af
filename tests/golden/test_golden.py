"""Trajectories equal the committed ones, to 1e-6 of each value: far above what another CPU's order of additions does to
float64 in 50 updates, far below any change of a formula."""

import json

import pytest

from tests.golden.regenerate import FOLDER, STEPS, rows, trajectory

TOLERANCE = 1e-6


@pytest.mark.parametrize("row", rows(), ids=lambda row: row.slug)
def test_trajectory(row):
    path = FOLDER / f"{row.slug}.json"
    assert path.exists(), f"no golden trajectory: python -m tests.golden.regenerate {row.slug}"
    wanted, found = json.loads(path.read_text("utf8")), trajectory(row)
    assert (wanted["slug"], wanted["version"], len(wanted["loss"])) == (row.slug, row.version, STEPS)
    for figure in ("loss", "grad_norm"):
        for step, (a, b) in enumerate(zip(found[figure], wanted[figure], strict=True)):
            assert a == pytest.approx(b, rel=TOLERANCE, abs=1e-10), (
                f"{figure} of update {step}; see tests/golden/regenerate.py"
            )


def test_no_trajectory_of_a_method_that_is_gone():
    assert {path.stem for path in FOLDER.glob("*.json")} <= {row.slug for row in rows()}
