"""Committed studies: the page beside the run files is what the run files give, and every run file is readable."""

from pathlib import Path

import pytest

from tawin_nemo.tools.study.analysis import load_results
from tawin_nemo.tools.study.arms import Study, read_study
from tawin_nemo.tools.study.plots import plot_names
from tawin_nemo.tools.study.tables import page

pytestmark = pytest.mark.results

REPOSITORY = Path(__file__).parents[3]
STUDIES = sorted((REPOSITORY / "recipes" / "studies").glob("*.yaml"))


def committed(path: Path) -> tuple[Study, Path]:
    study = read_study(path)
    folder = REPOSITORY / (study.file.results or f"recipes/results/{study.file.study}")
    if not (folder / "README.md").is_file():
        pytest.skip(f"{path.name} has no committed results in {folder.relative_to(REPOSITORY)}")
    return read_study(path, [f"results={folder}"]), folder


@pytest.mark.parametrize("path", STUDIES, ids=lambda path: path.stem)
def test_the_page_is_what_the_run_files_give(path):
    study, folder = committed(path)
    results = load_results(study)
    rebuilt = page(results, plot_names(results))
    assert rebuilt == (folder / "README.md").read_text(encoding="utf-8"), (
        f"rebuild it: python -m tawin_nemo study --recipe recipes/studies/{path.name} report=true"
    )
    assert {path.name for path in folder.glob("*.png")} == set(plot_names(results))


@pytest.mark.parametrize("path", STUDIES, ids=lambda path: path.stem)
def test_run_files_name_no_folder_of_a_machine(path):
    _, folder = committed(path)
    for file in folder.glob("*.json"):
        text = file.read_text(encoding="utf-8")
        assert "/home/" not in text
        assert str(REPOSITORY) not in text
